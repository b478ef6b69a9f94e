"""A sweep before it starts: its checks, its name, its room, its trials' configs."""

import json
import runpy
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from muser_dist.cli import parse_runs, parse_sweep
from muser_dist.config import OPERATIONAL, PairConfig, leaves, to_dict
from muser_dist.data.config import SourceConfig
from muser_dist.errors import ConfigError, MuserError
from muser_dist.recipes import load_recipe
from muser_dist.sweep.plan import config_of, dry_run_of, grace_samples, plan, room
from muser_dist.sweep.record import Trial
from muser_dist.sweep.results import command_of
from tests.small import small_config
from tests.sweep.cases import base_of, options_of

ROOT = Path(__file__).parents[2]
RECIPE = "tests.small:small_config"


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        ("val_MMR", r"there is no 'val_MMR'; did you mean val_MRR\?"),
        ("val_R@10/text->lyrics", r"did you mean val_R@10/text->audio\?"),
        ("val_accuracy/genre by audio", "val_accuracy/instrument by audio"),
        ("loss", "there is no 'loss'"),
        ("val_accuracy/absent by audio", r"the validation data give no .* \(absent: 0 different values in the data\)"),
        ("val_roc_auc/instrument by audio", r"give no .* \(instrument: rows have one value of it"),
    ],
)
def test_a_metric_that_does_not_exist(tmp_path, metric, message):
    with pytest.raises(ConfigError, match=message) as raised:
        plan("small", base_of(tmp_path), options_of(tmp_path, metric=metric))
    assert "\n" not in str(raised.value)


def test_what_cannot_work_is_said_before_anything_starts(tmp_path):
    base, options = base_of(tmp_path), options_of(tmp_path)
    with pytest.raises(ConfigError, match="give --data"):
        plan("small", replace(base, data=replace(base.data, val=())), options)
    ranged = replace(base, train=replace(base.train, workers="1:2", resource="trainer"))
    with pytest.raises(ConfigError, match="trials share the cluster: give one number"):
        plan("small", ranged, options)
    with pytest.raises(ConfigError, match="is a URL"):
        plan("small", replace(base, storage="s3://bucket/runs"), options)
    late = replace(base, evaluate=replace(base.evaluate, every_samples=100))
    with pytest.raises(ConfigError, match=r"every_samples \(100\).*first comparison waits for \(16 samples\)"):
        plan("small", late, options)
    with pytest.raises(ConfigError, match=r"--grace-samples 100000: a trial ends after \d+ samples"):
        plan("small", base, replace(options, grace_samples=100_000))
    with pytest.raises(MuserError, match="no shard matches"):
        plan("small", replace(base, data=replace(base.data, train=("/nowhere-*.tar",))), options)
    unknown = options_of(tmp_path, {"objective.name": {"choice": ["contrastive", "contrastve"]}}, search="grid")
    with pytest.raises(ConfigError, match=r'no config with objective\.name "contrastve".*did you mean .contrastive'):
        plan("small", base, unknown)
    for field, values in {"train.samples": [144, 288], "train.global_batch": [8, 16]}.items():
        longer = options_of(tmp_path, {field: {"choice": values}})
        with pytest.raises(ConfigError, match=rf"{field} gives trials different lengths.*--early-stopping none"):
            plan("small", base, longer)
        plan("small", base, replace(longer, early_stopping="none"))
    assert not (tmp_path / "runs").exists()


def test_towers_are_tried_once_for_all_points_that_share_them(tmp_path, monkeypatch, capsys):
    tried = []

    def look(config):
        tried.append(config.model.projection_dim)
        if config.model.projection_dim == 4:
            raise ConfigError("too small")
        return 1, 1

    monkeypatch.setattr("muser_dist.sweep.plan.check_model", look)
    space = {
        "objective.temperature.init": {"log_uniform": [0.02, 1.0]},
        "train.lr": {"choice": [0.1, 0.2]},
        "model.projection_dim": {"choice": [16, 32, 4]},
    }
    with pytest.raises(ConfigError, match=r"no config with model\.projection_dim 4 is valid: too small"):
        plan("small", base_of(tmp_path), options_of(tmp_path, space, search="grid"))
    assert tried == [small_config().model.projection_dim, 16, 32, 4]
    told = capsys.readouterr().err.splitlines()
    assert told[0] == "0 of 30 valid points" and told[-1].startswith("20 of 20 valid points")
    assert told[-1].endswith("10 left out")


def test_the_same_command_is_the_same_sweep_and_another_space_another(tmp_path):
    base, options = base_of(tmp_path), options_of(tmp_path)
    name = plan("small", base, options).base.name
    assert name.startswith("small-sweep-")
    more = plan("small", replace(base, train=replace(base.train, workers=2)), replace(options, trials=20, concurrent=3))
    assert more.base.name == name
    others = [
        plan("small", replace(base, seed=1), options),
        plan("small", base, replace(options, early_stopping="none")),
        plan("small", base, options_of(tmp_path, {"train.lr": {"choice": [0.1, 0.2]}})),
    ]
    assert len({name, *(other.base.name for other in others)}) == 4


def test_a_trials_config_is_the_base_with_its_values(tmp_path):
    base = base_of(tmp_path, checkpoint_storage="s3://bucket/runs")
    planned = plan("small", base, options_of(tmp_path))
    trial = Trial(7, planned.source.points.found[0])
    config = config_of(planned.base, trial, slots=3)
    assert config.folder == planned.base.folder / "trials" / "007"
    assert config.train.checkpoint_storage == f"s3://bucket/runs/{planned.base.name}"
    assert config.data.max_decode_slots == 3 and config.evaluate.every_samples == 16
    before, after = dict(leaves(to_dict(base))), dict(leaves(to_dict(config)))
    changed = {name for name in after if after[name] != before[name] and name not in OPERATIONAL}
    assert changed <= {*trial.overrides, "name"}
    assert {name: after[name] for name in trial.overrides} == trial.overrides


def test_paths_mean_the_same_in_a_trials_actor(tmp_path, monkeypatch):
    base = base_of(tmp_path)
    monkeypatch.chdir(tmp_path)
    of_songs = replace(base.objective, pairs=(*base.objective.pairs, PairConfig("audio", "partner")))
    data = replace(base.data, train=("data/train-*.tar",), pairs="pairs.parquet")
    planned = plan("small", replace(base, data=data, objective=of_songs, storage="runs"), options_of(tmp_path))
    assert planned.base.data.train == base.data.train and planned.base.storage == base.storage
    assert planned.base.data.pairs == str(tmp_path / "pairs.parquet")


@pytest.mark.parametrize(
    ("train", "slots", "resources", "most", "expected"),
    [
        ({}, 1, {"CPU": 2.0}, 0, (1, 1)),
        ({}, 1, {"CPU": 2.0}, 2, (1, 1)),  # two would wait for each other
        ({}, 1, {"CPU": 5.0}, 0, (2, 1)),
        ({}, 1, {"CPU": 8.0}, 2, (2, 3)),  # what is left decodes
        ({"cpus_per_worker": 0.5}, 1, {"CPU": 3.0}, 0, (2, 1)),
        ({"workers": 2}, 2, {"CPU": 16.0}, 0, (4, 2)),
        ({"gpu": True, "gpu_share": 0.25}, 1, {"CPU": 64.0, "GPU": 2.0}, 0, (8, 7)),
        ({"gpu": True, "gpu_share": 0.1}, 1, {"CPU": 64.0, "GPU": 1.0}, 0, (10, 5)),
        ({"gpu": True, "workers": 2}, 1, {"CPU": 64.0, "GPU": 5.0}, 0, (2, 30)),
        ({"resource": "trainer"}, 1, {"CPU": 64.0, "trainer": 3.0}, 0, (3, 20)),
    ],
)
def test_as_many_trials_as_have_their_cpus(train, slots, resources, most, expected):
    config = small_config(train=train, data={"decode_slots": slots})
    at_once, decoding = room(config, resources, most)
    assert (at_once, decoding) == expected
    workers = config.train.worker_range[0] * config.train.cpus_per_worker
    assert at_once * (workers + decoding) <= resources["CPU"]


def test_a_dry_run_names_the_trials_and_what_they_take(tmp_path):
    options = options_of(tmp_path, trials=4)
    planned = plan("small", base_of(tmp_path), options)
    text = dry_run_of(planned, options)
    assert all(json.dumps(point["objective.temperature.init"]) in text for point in planned.source.points.found)
    assert "Each trial takes 2 CPUs" in text and "at most 576 samples" in text and "from 16 samples on" in text
    assert not (tmp_path / "runs").exists() and not (tmp_path / "cache").exists()


def test_asha_compares_twice_before_the_end_by_default(tmp_path):
    base = base_of(tmp_path)
    assert grace_samples(base, options_of(tmp_path)) == 144 // 9
    assert grace_samples(base, options_of(tmp_path, grace_samples=40)) == 40


def test_the_command_for_the_best_trial_gives_its_config(tmp_path):
    space = {
        "objective.temperature.init": {"choice": [0.123]},
        "objective.temperature.learnable": {"choice": [False]},
        "objective.dims": {"choice": [[2, 4]]},
        "model.audio.options.width": {"choice": [32]},
        "data.templates": {"choice": [["A piece for {instrument}", "{caption}, 'so'"]]},
        "objective.name": {"choice": ["debiased"]},
        "objective.targets": {"choice": ["instance"]},
        "objective.options": {"choice": [{"tau_plus": 0.1, "beta": 0.5}]},
    }
    planned = plan("small", base_of(tmp_path, samples=24), options_of(tmp_path, space, early_stopping="none"))
    config = config_of(planned.base, Trial(0, planned.source.points.found[0]))
    words = subprocess.run(  # as a shell would take it apart
        ["sh", "-c", f"for word in {command_of(RECIPE, config)}; do printf '%s\\0' \"$word\"; done"],
        stdout=subprocess.PIPE,
        check=True,
        text=True,
    ).stdout.split("\0")[2:-1]
    (again,) = parse_runs(words, "jobs/pretrain.py")
    kept = set(dict(leaves(to_dict(config)))) - OPERATIONAL - {"name"}
    ours, theirs = dict(leaves(to_dict(config))), dict(leaves(to_dict(again)))
    assert {name: theirs[name] for name in kept} == {name: ours[name] for name in kept}


def test_what_no_option_says_stands_behind_the_command(tmp_path):
    own = load_recipe(RECIPE)
    sources = (SourceConfig("one", (f"{tmp_path}/one-*.tar",)),)
    config = replace(
        own,
        data=replace(own.data, sources=sources, crop_seconds=0.25),
        model=replace(own.model, spectrogram=None),
        objective=replace(own.objective, pairs=(PairConfig("audio", "text", 2.0),)),
    )
    command, _, beyond = command_of(RECIPE, config).partition("  # and, in a recipe of your own: ")
    (again,) = parse_runs(shlex.split(command)[2:], "jobs/pretrain.py")
    assert again.data.crop_seconds == 0.25
    for told in ('data.sources [{"name": "one"', "model.spectrogram null", 'objective.pairs [{"first": "audio"'):
        assert told in beyond


def test_options_of_the_sweep_and_of_its_runs_stand_side_by_side():
    words = [RECIPE, "--space", "temperature", "--trials", "5", "--train.lr", "0.5", "--search", "optuna"]
    recipe, base, options = parse_sweep(words, "jobs/sweep.py")
    assert (recipe, base.train.lr, options.trials, options.search) == (RECIPE, 0.5, 5, "optuna")
    assert base.data.keep_clips and not small_config().data.keep_clips
    assert not parse_sweep([*words, "--data.no-keep-clips"], "jobs/sweep.py")[1].data.keep_clips


def test_what_can_be_swept_is_told(capsys):
    with pytest.raises(SystemExit):
        parse_sweep(["--help"], "jobs/sweep.py")
    usage, recipes, help_ = capsys.readouterr().out.splitlines()
    assert usage == "usage: python jobs/sweep.py RECIPE --space SPACE [--field value ...]"
    assert "muser_tiny" in recipes and "clamp2" not in recipes  # which has stages
    assert help_ == "python jobs/sweep.py tiny --help explains every field"


def test_the_job_ends_with_one_line_and_status_2(tmp_path, monkeypatch, capsys):
    base_of(tmp_path)
    data = ["--data.train", f"{tmp_path}/data/train-*.tar", "--data.val", f"{tmp_path}/data/val-*.tar"]
    monkeypatch.setattr(sys, "argv", ["jobs/sweep.py", RECIPE, "--space", "temprature", *data])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / "jobs" / "sweep.py"), run_name="__main__")
    out, err = capsys.readouterr()
    assert end.value.code == 2 and not out
    assert err.startswith("error: space: cannot read temprature") and len(err.splitlines()) == 1
