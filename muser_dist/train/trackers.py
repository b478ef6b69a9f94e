"""Where a run's numbers go besides metrics.jsonl: TensorBoard, Weights & Biases, Ray's own metrics.

Rank 0 opens them whenever training starts or goes on. metrics.jsonl stays the record of a run: a
tracker that cannot be opened or fails later is switched off with one warning, and training goes on.
"""

import json
import logging
import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol
from uuid import uuid4

from muser_dist.config import RunConfig, to_dict
from muser_dist.errors import require
from muser_dist.files import write_whole

PROJECT = "muser_dist"
"""Project of Weights & Biases, unless the environment variable WANDB_PROJECT names another."""

SCORED = "scored_step"
"""Axis of scores in Weights & Biases, which takes nothing more at a step that is over."""

_NEEDS = {"tensorboard": ("tensorboard", "tensorboard"), "wandb": ("wandb", "wandb"), "ray": ("ray", "train")}
"""By tracker: the package that it needs, and the extra of muser_dist that brings it."""

logger = logging.getLogger(__name__)


class Tracker(Protocol):
    """Takes the lines of metrics.jsonl as they are written."""

    def metrics(self, line: dict[str, Any], step: int) -> None:
        """Takes the numbers of a line; what is no number is left out.

        Args:
            line: values by name; "loss/audio-text" is the part "audio-text" of "loss".
            step: optimizer steps done.
        """
        ...

    def scores(self, scores: dict[str, Any], step: int) -> None:
        """Takes the scores of the model as it was after `step` steps, of which later ones may have been taken."""
        ...

    def close(self) -> None:
        """Hands over what is still held back."""
        ...


class TensorBoard:
    """Event files in `folder`; a start after `step` steps makes TensorBoard forget what was logged beyond them."""

    def __init__(self, folder: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=step + 1)

    def metrics(self, line: dict[str, Any], step: int) -> None:
        for name, value in _numbers(line):
            self._writer.add_scalar(name, value, step)
        self._writer.flush()  # a line that a checkpoint covers must not die with the process

    def scores(self, scores: dict[str, Any], step: int) -> None:
        self.metrics(scores, step)

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """A run of Weights & Biases that goes on as the same one when training does.

    The key is read by wandb itself, from WANDB_API_KEY. With WANDB_MODE=offline every start leaves a
    folder of its own, and `wandb sync` makes one run of them: steps are in one of them alone.

    Args:
        project: the project's name.
        name: the run's name.
        folder: the run's folder. It keeps the id of the run: a folder of the same name elsewhere is
            another run, and so is one that begins anew at step 0.
        config: the run's config, shown beside the curves.
        step: optimizer steps done.
    """

    def __init__(self, project: str, name: str, folder: Path, config: dict[str, Any], step: int) -> None:
        import wandb

        self._state = folder / "wandb-run.json"
        state: dict[str, Any] = {"id": uuid4().hex[:8], "next": 0}
        if step > 0 and self._state.exists():
            state = json.loads(self._state.read_text())
        self._id = state["id"]
        self._keep(state["next"])
        self._run = wandb.init(
            project=project,
            name=name,
            id=self._id,
            resume="allow",
            dir=str(folder),
            config=config,
            # Neither the worker's output, nor its command line, code or git remote leave the machine.
            settings=wandb.Settings(
                console="off", silent=True, disable_code=True, disable_git=True, x_disable_meta=True
            ),
        )
        # What it has from before the restart is not sent twice; only the server knows what it has.
        self._next = state["next"] if self._run.offline else self._run.step
        self._run.define_metric("val_*", step_metric=SCORED)
        self._scores: dict[str, float] = {}  # to go with the next line

    def metrics(self, line: dict[str, Any], step: int) -> None:
        if step >= self._next:
            self._run.log(dict(_numbers(line)) | self._scores, step=step, commit=True)
            self._scores = {}
            self._keep(step + 1)

    def scores(self, scores: dict[str, Any], step: int) -> None:
        if numbers := dict(_numbers(scores)):
            self._scores = numbers | {SCORED: step}

    def close(self) -> None:
        if self._scores:
            self._run.log(self._scores)
        self._run.finish()

    def _keep(self, following: int) -> None:
        write_whole(self._state, json.dumps({"id": self._id, "next": following}))


class RayMetrics:
    """Gauges that Ray exports with its own, for its dashboard and Prometheus.

    "loss/audio-text" of run R is ray_muser_loss{run="R", part="audio-text"}.
    """

    def __init__(self, run: str) -> None:
        self._run = run
        self._gauges: dict[str, Any] = {}

    def metrics(self, line: dict[str, Any], step: int) -> None:
        from ray.util.metrics import Gauge

        for name, value in _numbers(line):
            kind, _, part = name.partition("/")
            if kind not in self._gauges:
                exported = "muser_" + re.sub(r"[^a-zA-Z0-9_]", "_", kind)
                self._gauges[kind] = Gauge(exported, f"{kind} in metrics.jsonl", tag_keys=("run", "part"))
            self._gauges[kind].set(value, {"run": self._run, "part": part})

    def scores(self, scores: dict[str, Any], step: int) -> None:
        self.metrics(scores, step)

    def close(self) -> None:
        """Ray drops the gauges of a worker that has ended."""


class Trackers:
    """All trackers of a run, as one; a tracker that fails is switched off, with one warning.

    Args:
        makers: by name, what opens the tracker.
    """

    def __init__(self, makers: Mapping[str, Callable[[], Tracker]]) -> None:
        self._trackers: dict[str, Tracker] = {}
        for name, make in makers.items():
            with self._guarded(name):
                self._trackers[name] = make()

    def metrics(self, line: dict[str, Any], step: int) -> None:
        for name, tracker in list(self._trackers.items()):
            with self._guarded(name):
                tracker.metrics(line, step)

    def scores(self, scores: dict[str, Any], step: int) -> None:
        for name, tracker in list(self._trackers.items()):
            with self._guarded(name):
                tracker.scores(scores, step)

    def close(self) -> None:
        for name, tracker in list(self._trackers.items()):
            with self._guarded(name):
                tracker.close()
        self._trackers.clear()

    @contextmanager
    def _guarded(self, name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # whatever a service or its library can think of
            self._trackers.pop(name, None)
            logger.warning(
                "The tracker %s is switched off until training starts again: %s: %s. metrics.jsonl holds all numbers.",
                name,
                type(error).__name__,
                error,
            )


def check_trackers(names: Collection[str]) -> None:
    """Checks on the driver, before anything starts, that these trackers can be opened.

    Raises:
        ConfigError: there is none of a name, its package is missing, or Weights & Biases has no key.
    """
    for name in names:
        require(name in _NEEDS, f"train.trackers: there is no {name!r}, only {', '.join(_NEEDS)}")
        package, extra = _NEEDS[name]
        require(
            find_spec(package) is not None,
            f"train.trackers: {name} needs the package {package}, which is not installed: "
            f"pip install 'muser_dist[{extra}]' on every node",
        )
    offline = os.environ.get("WANDB_MODE", "online") in ("offline", "disabled")
    require(
        "wandb" not in names or offline or bool(os.environ.get("WANDB_API_KEY")),
        "train.trackers: wandb needs a key; set WANDB_API_KEY where Ray's nodes are started, or WANDB_MODE=offline",
    )


def trackers_of(names: Collection[str], config: RunConfig, step: int) -> Trackers:
    """Opens these trackers for a run that goes on after `step` optimizer steps; for rank 0."""
    project = os.environ.get("WANDB_PROJECT", PROJECT)
    makers: dict[str, Callable[[], Tracker]] = {
        "tensorboard": lambda: TensorBoard(config.folder / "tensorboard", step),
        "wandb": lambda: WeightsAndBiases(project, config.name, config.folder, to_dict(config), step),
        "ray": lambda: RayMetrics(config.name),
    }
    return Trackers({name: makers[name] for name in names})


def _numbers(line: dict[str, Any]) -> Iterator[tuple[str, float]]:
    for name, value in line.items():
        if isinstance(value, (int, float)) and not isinstance(value, bool) and name != "step":
            yield name, value
