"""What becomes of a sweep's trials: the driver writes it down, and prints a line each time."""

import json
import time
from collections import Counter
from typing import Any

from ray import tune

from muser_dist.sweep.plan import Planned, config_of
from muser_dist.sweep.record import Trial
from muser_dist.sweep.space import named
from muser_dist.sweep.trial import ERROR
from muser_dist.train.runlog import DIVERGED, EVENTS, read_lines


class Following(tune.Callback):
    """Writes down on the driver what becomes of trials, and prints a line each time."""

    def __init__(self, planned: Planned, metric: str, at_once: int) -> None:
        self._planned, self._record = planned, planned.record
        self._metric, self._at_once = metric, at_once
        self._started: dict[int, float] = {}
        self._ended: list[float] = []  # seconds of trials that ended under this driver

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        ours = self._of(trial)
        ours.state, ours.curve, ours.error = "running", [], None
        (config_of(self._planned.base, ours).folder / ERROR).unlink(missing_ok=True)  # of an earlier attempt
        self._started[ours.number] = time.monotonic()
        self._tell(ours, named(ours.overrides))

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **_: Any) -> None:
        ours = self._of(trial)
        ours.curve.append((result["samples"], result["score"]))
        ours.scores = json.loads(result["scores"])
        if result["finished"]:
            ours.state = "finished"
            self._record.save()
        else:
            self._tell(ours, self._score(ours))

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        ours = self._of(trial)
        if ours.state == "running":
            ours.state = "stopped"
        self._over(ours, self._score(ours))

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        ours = self._of(trial)
        folder = config_of(self._planned.base, ours).folder
        events = read_lines(folder / EVENTS)
        ours.state = "diverged" if events and events[-1]["event"] == DIVERGED else "failed"
        told = folder / ERROR
        ours.error = told.read_text().partition("\n")[0] if told.exists() else "its actor died"
        self._over(ours, ours.error)

    def _of(self, trial: Any) -> Trial:
        return self._record.trials[trial.config["number"]]

    def _score(self, ours: Trial) -> str:
        samples, score = ours.curve[-1]
        return f"{self._metric} {score:.4g} at {samples:,} samples"

    def _over(self, ours: Trial, what: str) -> None:
        seconds = time.monotonic() - self._started.pop(ours.number, time.monotonic())
        ours.seconds = round(ours.seconds + seconds, 1)
        self._ended.append(seconds)
        self._planned.source.learn(ours)
        self._tell(ours, what)

    def _tell(self, ours: Trial, what: str) -> None:
        self._record.save()
        counts = Counter(trial.state for trial in self._record.trials if trial.state != "waiting")
        parts, eta = ", ".join(f"{count} {state}" for state, count in counts.items()), ""
        if self._ended:
            to_do = self._planned.total - counts.total() + counts["running"] / 2
            seconds = int(sum(self._ended) / len(self._ended) * to_do / self._at_once)
            eta = f"  ETA {seconds // 3600}:{seconds % 3600 // 60:02d}:{seconds % 60:02d}"
        line = f"trial {ours.name} {ours.state}" + (f": {what}" if what else "")
        print(f"{line}  [{parts} of {self._planned.total}{eta}]", flush=True)
