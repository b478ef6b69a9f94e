"""Where trials come from, and how a sweep goes on after its driver has died."""

import json
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
from ray.tune.search import Searcher

from muser_dist.errors import CheckpointError, ConfigError, DataError, MuserError
from muser_dist.files import alone_in
from muser_dist.sweep import launch
from muser_dist.sweep.launch import asha, sweep
from muser_dist.sweep.plan import plan
from muser_dist.sweep.record import RECORD, Record
from muser_dist.sweep.search import Optuna, Plan, Trials
from muser_dist.sweep.space import Choice, Range
from tests.small import small_config
from tests.sweep.cases import base_of, fill, options_of

BASE = small_config()
SPACE = {"objective.temperature.init": Range(0.02, 1.0, log=True), "model.projection_dim": Choice((4, 8, 16))}


def nothing(config: Any) -> None:
    """Every config can work."""


def plan_of(tmp_path, search: str = "random", trials: int = 7) -> Plan:
    return Plan(SPACE, BASE, options_of(tmp_path, search=search, trials=trials), nothing)


def optuna_of(tmp_path, trials: int = 30, check=nothing, lower: bool = False) -> Optuna:
    return Optuna(SPACE, BASE, options_of(tmp_path, search="optuna", trials=trials), check, lower)


def test_two_drivers_do_not_run_one_sweep(tmp_path):
    base, options = base_of(tmp_path), options_of(tmp_path)
    record = plan("small", base, options).record
    with alone_in(record.folder), pytest.raises(DataError, match="another job works in"):
        sweep("small", base, options, ["test"])
    assert not (record.folder / RECORD).exists()
    other = Record(record.folder, record.definition, lower=False)
    fill(other, plan_of(tmp_path).points.found)
    record.load()  # another driver came and went between this one's checks and its lock
    assert [trial.number for trial in record.trials] == [trial.number for trial in other.trials]


@pytest.mark.parametrize("state", ["failed", "diverged", "finished"])
def test_a_sweep_that_finished_nothing_is_an_error_behind_its_page(tmp_path, monkeypatch, state):
    def over(planned, options, command):
        for number in range(planned.total):
            trial = planned.record.add(planned.source.propose(number))
            trial.state, trial.error = state, "no memory"
            trial.curve = [(144, 0.5)]

    monkeypatch.setattr(launch, "_run", over)
    base, options = base_of(tmp_path), options_of(tmp_path, trials=2)
    with (
        nullcontext() if state == "finished" else pytest.raises(MuserError, match="no trial of the sweep was finished")
    ):
        sweep("tests.small:small_config", base, options, ["test"])
    assert len(list((tmp_path / "runs").glob("*/sweep.html"))) == 1


def test_trials_that_are_over_are_not_repeated_and_the_others_come_first(tmp_path):
    plan, definition = plan_of(tmp_path, trials=9), {"space": "this"}
    record = Record(tmp_path / "sweep", definition, lower=False)
    fill(record, plan.points.found[:7])
    again = Record(tmp_path / "sweep", definition, lower=False)
    assert again.trials == [replace_tuples(trial) for trial in record.trials]
    trials = Trials(again, plan, lambda trial: json.dumps(trial.overrides))
    numbers = []
    while (suggested := trials.suggest("id")) != Searcher.FINISHED:
        assert isinstance(suggested, dict)
        numbers.append(suggested["number"])
        assert json.loads(suggested["config"]) == plan.points.found[suggested["number"]]
    assert numbers == [3, 6, 7, 8]  # the one that failed, the one that ran, and two that nobody came to
    assert len(json.loads((tmp_path / "sweep" / RECORD).read_text())["trials"]) == 9


def replace_tuples(trial):
    trial.curve = [list(point) for point in trial.curve]  # as JSON gives them back
    return trial


def test_a_folder_with_another_sweep_or_a_broken_record_is_refused(tmp_path):
    Record(tmp_path, {"space": 1, "rules": 2}, lower=False).save()
    with pytest.raises(CheckpointError, match=r"another sweep \(another space\); give another --name"):
        Record(tmp_path, {"space": 3, "rules": 2}, lower=False)
    (tmp_path / RECORD).write_text('{"space": 1')
    with pytest.raises(CheckpointError, match="is broken"):
        Record(tmp_path, {"space": 1, "rules": 2}, lower=False)


def test_the_best_is_a_finished_one_with_a_finite_score(tmp_path):
    record = Record(tmp_path, {}, lower=False)
    fill(record, plan_of(tmp_path).points.found)
    record.trials[1].curve = [(48, 99.0)]  # stopped
    record.trials[5].curve = [(144, float("nan"))]
    scores = [trial.curve[-1][1] for trial in record.ranked()]
    assert scores == sorted(scores, reverse=True) and len(scores) == 2 and max(scores) < 1
    record.lower = True
    assert [trial.curve[-1][1] for trial in record.ranked()] == scores[::-1]


@pytest.mark.parametrize("lower", [False, True])
def test_optuna_learns_also_from_what_an_earlier_driver_left(tmp_path, lower):
    """What is known is best at a temperature of 0.1 and 16 dimensions; new proposals lie there more than by chance."""
    record = Record(tmp_path, {}, lower)
    for number, point in enumerate(plan_of(tmp_path, trials=25).points.found):
        trial = record.add(point)
        off = abs(point["objective.temperature.init"] - 0.1) + (point["model.projection_dim"] != 16)
        trial.state, trial.curve = ("finished" if number % 3 else "stopped"), [(9, off if lower else -off)]
    trials = Trials(record, optuna_of(tmp_path, trials=45, lower=lower), lambda trial: "")
    while trials.suggest("id") != Searcher.FINISHED:
        pass
    new = record.trials[25:]
    assert len(new) == 20
    # By chance a third of them has 16 dimensions, and 9 of 20 such a temperature: 16 in all.
    good = sum(trial.overrides["model.projection_dim"] == 16 for trial in new)
    good += sum(0.04 < trial.overrides["objective.temperature.init"] < 0.25 for trial in new)
    assert good > 22


def test_optuna_goes_on_where_an_earlier_driver_ended(tmp_path):
    def go_on(record: Record, trials: int) -> Record:
        source = optuna_of(tmp_path, trials=trials)
        handed_out = Trials(record, source, lambda trial: "")
        while handed_out.suggest("id") != Searcher.FINISHED:
            trial = record.trials[-1]
            trial.state, trial.curve = "finished", [(9, -abs(trial.overrides["objective.temperature.init"] - 0.1))]
            source.learn(trial)
        return record

    whole = go_on(Record(tmp_path / "whole", {}, lower=False), 14)
    parts = go_on(go_on(Record(tmp_path / "parts", {}, lower=False), 5), 14)
    points = [trial.overrides for trial in whole.trials]
    assert [trial.overrides for trial in parts.trials] == points
    assert len({json.dumps(point) for point in points}) == 14


def test_optuna_proposes_no_config_that_cannot_work_and_goes_on_after_failures(tmp_path):
    def no_large_ones(config):
        if config.model.projection_dim > 4:
            raise ConfigError("too large")

    source = optuna_of(tmp_path, trials=8, check=no_large_ones)
    record = Record(tmp_path, {}, lower=False)
    for number in range(8):
        overrides = source.propose(number)
        assert overrides is not None and overrides["model.projection_dim"] == 4
        trial = record.add(overrides)
        trial.state = ("diverged", "finished", "failed", "stopped")[number % 4]
        trial.curve = [(9, float("nan") if number == 1 else 0.5)] if trial.state in ("finished", "stopped") else []
        source.learn(trial)
    assert source.propose(8) is None
    for trial in record.trials:
        optuna_of(tmp_path).learn(trial)  # of an earlier driver


def test_asha_remembers_comparisons_of_earlier_drivers(tmp_path):
    base, options = base_of(tmp_path), options_of(tmp_path, reduction=2, grace_samples=36)
    record = Record(tmp_path / "sweep", {}, lower=False)
    for score in (0.4, 0.6):
        trial = record.add({})
        trial.state, trial.curve = "finished", [(36, score), (144, score)]
    nobody: Any = None
    for score, decision in ((0.3, "STOP"), (0.7, "CONTINUE")):
        scheduler, trial = asha(base, options, record), SimpleNamespace(trial_id="new")
        scheduler.on_trial_add(nobody, trial)
        assert scheduler.on_trial_result(nobody, trial, {"samples": 36, "score": score}) == decision
    record.lower = True
    scheduler, trial = asha(base, options, record), SimpleNamespace(trial_id="new")
    scheduler.on_trial_add(nobody, trial)
    assert scheduler.on_trial_result(nobody, trial, {"samples": 36, "score": 0.7}) == "STOP"
