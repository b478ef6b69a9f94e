"""The page and the tables of a sweep, from a record with trials in every state."""

import math
import shlex
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
from scipy import stats
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from muser_dist.cli import parse_runs
from muser_dist.sweep.charts import by_leading_dims, by_value, place
from muser_dist.sweep.plan import plan
from muser_dist.sweep.record import Trial
from muser_dist.sweep.results import HPARAMS, TABLE, command_of, describe, table, write_results
from muser_dist.sweep.space import Choice, Range, apply
from tests.sweep.cases import base_of, fill, options_of

RECIPE = "tests.small:small_config"


@pytest.fixture
def planned(tmp_path):
    found = plan("small", base_of(tmp_path), options_of(tmp_path, trials=7))
    fill(found.record, found.source.points.found)
    return found


def test_the_page_shows_every_trial_and_the_best_command(planned, tmp_path):
    page = write_results(RECIPE, planned, options_of(tmp_path), ["python", "jobs/sweep.py", "<script>"]).read_text()
    best = planned.record.ranked()[0]
    command = command_of(RECIPE, apply(planned.base, best.overrides))
    assert command.replace("'", "&#39;") in page
    assert "Trials: 3 finished, 1 stopped, 1 diverged, 1 failed, 1 running." in page
    assert "the loss is &lt;not&gt; finite" in page and "<script>" not in page
    assert page.count("<svg") == 1 + 3 + 1  # parallel coordinates, each field, learning curves
    assert "http" not in page
    rows = page[page.index("<tbody>") :]
    numbers = [trial.name for trial in planned.record.ranked()]
    assert [rows.index(f"<th>{name}</th>") for name in numbers] == sorted(rows.index(f"<th>{n}</th>") for n in numbers)


def test_the_best_run_again_is_where_and_with_what_the_sweep_was(tmp_path):
    base, access = base_of(tmp_path, workers=2, cpus_per_worker=0.5, resource="trainer"), tmp_path / "access.json"
    access.write_text("{}")
    base = replace(base, data=replace(base.data, storage_options=str(access)), storage=str(tmp_path / "shared"))
    options = options_of(tmp_path, trials=7)
    planned = plan("small", base, options)
    fill(planned.record, planned.source.points.found)
    text = describe(RECIPE, planned, options)
    (again,) = parse_runs(shlex.split(text.partition("\nAgain ")[2])[2:], "jobs/pretrain.py")
    assert again.folder.parent == tmp_path / "shared" and again.data.storage_options == str(access)
    assert (again.train.workers, again.train.cpus_per_worker, again.train.resource) == (2, 0.5, "trainer")
    assert again.data.cache_folder == base.data.cache_folder and again.evaluate.every_samples == 0
    assert again.model.projection_dim == planned.record.ranked()[0].overrides["model.projection_dim"]


def test_a_sweep_without_a_finished_trial_has_a_page_too(planned, tmp_path):
    planned.record.trials[:] = planned.record.trials[2:4]
    page = write_results(RECIPE, planned, options_of(tmp_path), []).read_text()
    assert "there is no best one" in page and "<svg" not in page
    assert "no best one" in describe(RECIPE, planned, options_of(tmp_path))


def test_the_tables_hold_values_and_scores(planned, tmp_path):
    write_results(RECIPE, planned, options_of(tmp_path), [])
    rows = pq.read_table(planned.record.folder / TABLE).to_pylist()
    for row, trial in zip(rows, planned.record.trials, strict=True):
        assert (row["trial"], row["state"]) == (trial.number, trial.state)
        assert {name: row[name] for name in trial.overrides} == trial.overrides
        assert row["val_MRR"] == (trial.scores.get("val_MRR"))
    with_scores = {trial.name for trial in planned.record.trials if trial.curve}
    assert {path.parent.name for path in (planned.record.folder / HPARAMS).glob("*/events.*")} == with_scores


def test_hparams_are_those_of_the_last_driver(planned, tmp_path):
    def score(trial: Trial) -> float:
        (events,) = (planned.record.folder / HPARAMS / trial.name).glob("events.*")
        read = EventAccumulator(str(events))
        read.Reload()
        return read.Scalars("val_MRR")[-1].value

    again = planned.record.trials[6]  # ran when the first driver died
    for value in (0.25, 0.75):
        again.curve = [*again.curve, (144, value)]
        write_results(RECIPE, planned, options_of(tmp_path), [])
        assert score(again) == value


def test_values_of_several_types_share_a_column():
    values = [[1, 2], "one", None, 3]
    found = table([Trial(i, {"x": value, "y": i if i else 0.5}) for i, value in enumerate(values)])
    assert found["x"].to_pylist() == ['"[1, 2]"', '"one"', None, "3"]
    assert found["y"].to_pylist() == [0.5, 1.0, 2.0, 3.0]


def test_means_and_their_intervals():
    scores = {4: [0.1, 0.3, 0.2], 8: [0.5], 16: [0.2, 0.4]}
    trials = [
        Trial(0, {"d": dim}, "finished", [(1, 9.0), (9, score)]) for dim, found in scores.items() for score in found
    ]
    dimension = Choice((4, 8, 16))
    for (x, mean, half, n), (dim, found) in zip(by_value("d", dimension, trials), scores.items(), strict=True):
        assert (x, n) == (place(dimension, dim), len(found)) and mean == pytest.approx(np.mean(found))
        if n == 1:
            assert math.isnan(half)
        else:
            low, high = stats.t.interval(0.95, n - 1, loc=np.mean(found), scale=stats.sem(found))
            assert (mean - half, mean + half) == pytest.approx((low, high))


def test_a_range_is_averaged_in_thirds_of_its_logarithm():
    dimension = Range(0.001, 1.0, log=True)
    trials = [Trial(0, {"t": t}, "finished", [(9, s)]) for t, s in ((0.001, 1.0), (0.009, 3.0), (0.5, 5.0), (1.0, 7.0))]
    assert [(round(x, 3), mean, n) for x, mean, _, n in by_value("t", dimension, trials)] == [
        (round(0.5 / 3, 3), 2.0, 2),
        (round(2.5 / 3, 3), 6.0, 2),
    ]


def test_sizes_are_read_off_matryoshka_runs_too():
    scores = {"val_MRR": 0.5, "val_MRR@4": 0.3, "val_MRR@6": 0.35, "val_MRR/text->audio": 0.6, "val_R@10@8": 0.9}
    trials = [Trial(0, {}, "finished", [(9, 0.5)], scores), Trial(1, {}, "finished", [(9, 0.1)], {"val_MRR": 0.1})]
    assert by_leading_dims(Choice((4, 8, 16)), trials, "val_MRR") == [(0.0, 0.3)]
    assert [score for _, score in by_leading_dims(Range(4, 16, integer=True), trials, "val_MRR")] == [0.3, 0.35]
    assert by_leading_dims(Choice((4, 8, 16)), trials, "val_R@10") == [(0.5, 0.9)]
