"""Where a sweep's trials come from: what an earlier driver left, then the plan, or Optuna's proposals."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from ray.tune.search import Searcher

from muser_dist.config import RunConfig
from muser_dist.errors import ConfigError, MuserError
from muser_dist.sweep.config import SweepConfig
from muser_dist.sweep.record import OVER, Record, Trial
from muser_dist.sweep.space import Check, Choice, Overrides, PointsShown, Space, apply, draws, grid, silent

_REFUSED = 100
"""Proposals in a row whose config is not valid, after which Optuna is asked no more."""


class Plan:
    """Trials that are known from the start: random draws, or a grid. What was learned changes nothing."""

    def __init__(
        self, space: Space, base: RunConfig, sweep: SweepConfig, check: Check, progress: PointsShown = silent
    ) -> None:
        of_grid = sweep.search == "grid"
        self.points = (
            grid(space, base, check, progress) if of_grid else draws(space, base, sweep.trials, check, progress)
        )
        self.count = len(self.points.found)

    def propose(self, number: int) -> Overrides | None:
        """The values of trial `number`; None when there are no more."""
        return self.points.found[number] if number < self.count else None

    def learn(self, trial: Trial) -> None:
        """Takes note of a trial that is over."""


class Optuna:
    """Proposals of the Tree-structured Parzen Estimator.

    Values of a choice go by their place, for they may be anything; trials that diverged or failed, or have a score that
    is not finite, tell it nothing.
    """

    def __init__(self, space: Space, base: RunConfig, sweep: SweepConfig, check: Check, lower: bool) -> None:
        try:
            import optuna
        except ModuleNotFoundError:
            raise ConfigError(
                "search: optuna is not installed: pip install 'muser_dist[sweep]', or give --search random"
            ) from None
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self._optuna, self._space, self._base, self._check = optuna, space, base, check
        self.count = sweep.trials
        kinds = optuna.distributions
        self._distributions: dict[str, Any] = {}
        for field, dimension in space.items():
            if isinstance(dimension, Choice):
                self._distributions[field] = kinds.CategoricalDistribution(range(len(dimension.values)))
            elif dimension.integer:
                self._distributions[field] = kinds.IntDistribution(int(dimension.low), int(dimension.high))
            else:
                self._distributions[field] = kinds.FloatDistribution(dimension.low, dimension.high, log=dimension.log)
        self._study = optuna.create_study(direction="minimize" if lower else "maximize")
        self._asked: dict[int, Any] = {}

    def propose(self, number: int) -> Overrides | None:
        """The values of trial `number`, which nobody has asked for before; None when there are no more."""
        # By the number, or a sweep that goes on would draw what its first trials had. A liar: trials that run count as
        # bad, so that those at the same time differ.
        seed = int(np.random.SeedSequence([self._base.seed, number]).generate_state(1)[0])
        self._study.sampler = self._optuna.samplers.TPESampler(seed=seed, constant_liar=True)
        for _ in range(_REFUSED if number < self.count else 0):
            asked = self._study.ask(fixed_distributions=self._distributions)
            overrides = {field: self._value(field, asked.params[field]) for field in self._space}
            try:
                self._check(apply(self._base, overrides))
            except MuserError:
                self._study.tell(asked, state=self._optuna.trial.TrialState.FAIL)
                continue
            self._asked[number] = asked
            return overrides
        return None

    def learn(self, trial: Trial) -> None:
        """Takes note of a trial that is over, also of one that an earlier driver asked for."""
        states = self._optuna.trial.TrialState
        good = trial.state in ("finished", "stopped") and bool(trial.curve) and math.isfinite(trial.curve[-1][1])
        state, value = (states.COMPLETE, trial.curve[-1][1]) if good else (states.FAIL, None)
        if trial.number in self._asked:
            self._study.tell(self._asked.pop(trial.number), value, state=state)
        elif good:
            params = {field: self._param(field, value) for field, value in trial.overrides.items()}
            self._study.add_trial(
                self._optuna.trial.create_trial(
                    state=state, value=value, params=params, distributions=self._distributions
                )
            )

    def _value(self, field: str, param: Any) -> Any:
        dimension = self._space[field]
        return dimension.values[param] if isinstance(dimension, Choice) else param

    def _param(self, field: str, value: Any) -> Any:
        dimension = self._space[field]
        return dimension.values.index(value) if isinstance(dimension, Choice) else value


def left(record: Record) -> Iterator[Trial]:
    """Trials that an earlier driver began, or never came to, in order."""
    return (trial for trial in record.trials if trial.state not in OVER)


class Trials(Searcher):
    """Hands trials to Ray Tune: those that are left of an earlier driver, and then new ones.

    Args:
        record: of the sweep.
        source: of new ones.
        config_of: makes a trial's whole config.
    """

    def __init__(self, record: Record, source: Plan | Optuna, config_of: Callable[[Trial], str]) -> None:
        super().__init__()
        self._record, self._source, self._config_of = record, source, config_of
        self._left = list(left(record))
        for trial in record.trials:
            if trial.state in OVER:
                source.learn(trial)

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:  # type: ignore[override]  # FINISHED is a str
        """Ray Tune's hook: number and config of the next trial."""
        if self._left:
            trial = self._left.pop(0)
        else:
            overrides = self._source.propose(len(self._record.trials))
            if overrides is None:
                return Searcher.FINISHED
            trial = self._record.add(overrides)
            self._record.save()  # before it starts: what has a folder has a line
        # As text: Ray Tune would take dotted names apart.
        return {"number": trial.number, "config": self._config_of(trial)}

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Ray Tune's hook; what a trial came to is told by the driver's callback, which knows its number."""

    def save(self, checkpoint_path: str) -> None:
        """Ray Tune's hook: the record is what a sweep goes on from."""

    def restore(self, checkpoint_path: str) -> None:
        """Ray Tune's hook, never called."""
