"""What a sweep may vary, checked before anything starts."""

import json
import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from muser_dist.config import TemperatureConfig, leaves, to_dict
from muser_dist.errors import ConfigError
from muser_dist.sweep.space import PRESETS, Choice, Range, apply, check_space, draws, grid, load_space
from tests.small import small_config

BASE = small_config()


def space_of(tmp_path, values):
    path = tmp_path / "space.json"
    path.write_text(values if isinstance(values, str) else json.dumps(values))
    return load_space(str(path))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ("{", "is no JSON"),
        ("[]", "must hold"),
        ({}, "must hold"),
        ({"train.lr": [1, 2]}, 'train.lr: give one of {"choice"'),
        ({"train.lr": {"log_unifrom": [1, 2]}}, "train.lr: no 'log_unifrom'; did you mean 'log_uniform'"),
        (
            {"train.lr": {"uniform": [2, 1]}},
            r"train.lr: uniform takes two numbers, the smaller one first, not \[2, 1\]",
        ),
        ({"train.lr": {"uniform": ["a", "b"]}}, "takes two numbers"),
        ({"train.lr": {"log_uniform": [0, 1]}}, "positive"),
        ({"train.lr": {"uniform": [0, math.inf]}}, r"takes two numbers.*not \[0, Infinity\]"),
        ({"train.lr": {"log_uniform": [1, 10**400]}}, "takes two numbers"),
        ({"seed": {"integers": [0, 10**24]}}, "takes two numbers"),
        ({"train.chunk": {"integers": [1.5, 2]}}, "two numbers"),
        ({"train.chunk": {"choice": []}}, "give one of"),
        (
            {"objective.temprature.init": {"choice": [1]}},
            r"no field objective\.temprature; did you mean objective\.temp",
        ),
        ({"objective.temperature.inti": {"choice": [1]}}, r"did you mean objective\.temperature\.init\?"),
        ({"nothing.like.it": {"choice": [1]}}, "there is no field nothing$"),
        (
            {"objective.temperature.init": {"choice": [0.1, "hot"]}},
            r'init cannot be "hot": Input should be a valid num',
        ),
        ({"objective.temperature.learnable": {"uniform": [0, 1]}}, r"learnable cannot be 0\.0: .*valid boolean"),
        ({"model.projection_dim": {"uniform": [8, 16]}}, r"projection_dim cannot be 8\.0: .*valid integer"),
        ({"train.zero_stage": {"choice": [4]}}, "zero_stage does not change what a run computes"),
        ({"train.workers": {"choice": [1, 2]}}, "does not change what a run computes"),
        ({"evaluate.rows": {"choice": [1, 2]}}, "must be the same for all trials"),
        ({"train.precision": {"choice": ["fp8"]}}, r'precision cannot be "fp8"'),
        (
            {"objective.temperature.init": {"choice": [200.0]}},
            r"no config satisfies it.*0 < minimum <= init <= maximum",
        ),
        (
            {"objective.dims": {"choice": [[9], [10]]}},
            r"no config satisfies it.*goes beyond model\.projection_dim \(8\)",
        ),
    ],
)
def test_what_is_wrong_is_said_in_one_line(tmp_path, values, message):
    with pytest.raises(ConfigError, match=message) as raised:
        check_space(space_of(tmp_path, values), BASE)
    assert str(raised.value).startswith("space: ") and "\n" not in str(raised.value)


def test_a_preset_that_is_misspelt_is_named():
    with pytest.raises(ConfigError, match="did you mean temperature_x_projection"):
        load_space("temperature_projection")


def test_a_field_below_a_tower_that_the_recipe_lacks():
    objective = replace(BASE.objective, pairs=BASE.objective.pairs[:1])
    base = replace(BASE, model=replace(BASE.model, spectrogram=None), objective=objective)
    with pytest.raises(ConfigError, match=r"model\.spectrogram is not set in this recipe"):
        apply(base, {"model.spectrogram.lr": 0.1})


@pytest.mark.parametrize("name", PRESETS)
def test_presets_fit_every_recipe(name):
    space = load_space(name)
    check_space(space, BASE)
    assert len(draws(space, BASE, 6).found) == 6


def test_any_field_can_be_swept(tmp_path):
    """Lists for tuples, dataclasses whole, options of towers, and what is None."""
    space = space_of(
        tmp_path,
        {
            "objective.dims": {"choice": [[], [4, 8]]},
            "objective.temperature": {"choice": [{"init": 0.5, "learnable": False}]},
            "model.audio.options.width": {"choice": [16, 32]},
            "model.text.lr": {"choice": [None, 0.01]},
            "seed": {"integers": [0, 3]},
        },
    )
    check_space(space, BASE)
    for overrides in draws(space, BASE, 20).found:
        config = apply(BASE, overrides)
        assert config.objective.temperature == TemperatureConfig(init=0.5, learnable=False)
        assert list(config.objective.dims) == overrides["objective.dims"]
        assert config.model.audio.options["width"] == overrides["model.audio.options.width"]
        assert config.model.text.lr == overrides["model.text.lr"] and config.seed == overrides["seed"]
        before, after = dict(leaves(to_dict(BASE))), dict(leaves(to_dict(config)))
        changed = {name for name in after if before.get(name) != after[name]}
        assert all(any(name.startswith(field) for field in space) for name in changed)


@settings(max_examples=50)
@given(low=st.floats(1e-6, 1), factor=st.floats(1.01, 1e6), log=st.booleans(), seed=st.integers(0, 9))
def test_draws_and_points_lie_in_their_range(low, factor, log, seed):
    dimension = Range(low, low * factor, log)
    space, base = {"train.lr": dimension}, replace(BASE, seed=seed)
    values = [point["train.lr"] for point in draws(space, base, 5).found]
    assert all(low <= value <= low * factor for value in (*values, *dimension.points()))
    assert dimension.points()[0] == low and dimension.points()[-1] == low * factor
    assert draws(space, base, 5) == draws(space, base, 5)
    assert draws(space, base, 3).found == draws(space, base, 5).found[:3]


def test_a_logarithmic_range_is_drawn_evenly_by_its_logarithm():
    found = [p["train.lr"] for p in draws({"train.lr": Range(1e-4, 1e-2, log=True)}, BASE, 400).found]
    assert 0.4 < sum(value < 1e-3 for value in found) / 400 < 0.6
    assert math.isclose(sorted(found)[200], 1e-3, rel_tol=0.4)


def test_points_are_drawn_once_and_contradictions_left_out():
    space = {"train.chunk": Choice((2, 3, 4)), "train.global_batch": Choice((6, 8))}
    valid = [{"train.chunk": c, "train.global_batch": n} for c in (2, 3, 4) for n in (6, 8) if n % c == 0]
    assert grid(space, BASE).found == valid and grid(space, BASE).refused == 2
    drawn = draws(space, BASE, 100)
    assert sorted(map(str, drawn.found)) == sorted(map(str, valid))
    assert "must be a multiple of train.chunk" in drawn.first


def test_a_value_that_fits_nothing_is_no_combination_that_is_left_out():
    space = {"train.chunk": Choice((2, 7)), "train.global_batch": Choice((6, 8))}
    with pytest.raises(ConfigError, match=r"no config with train\.chunk 7 is valid: train\.global_batch \(6\)"):
        grid(space, BASE)


def test_a_grid_takes_five_points_of_a_range():
    space = {"train.lr": Range(1e-4, 1.0, log=True), "seed": Range(0, 2, integer=True)}
    points = grid(space, BASE).found
    assert len(points) == 5 * 3
    assert [p["train.lr"] for p in points[::3]] == pytest.approx([1e-4, 1e-3, 1e-2, 1e-1, 1.0])


def test_a_grid_that_nobody_could_try_is_refused():
    space = {f"model.audio.options.{name}": Range(0.0, 1.0) for name in "abcdef"}
    with pytest.raises(ConfigError, match=r"space: the grid has 15,625 points.*--search random"):
        grid(space, BASE)
