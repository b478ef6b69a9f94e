"""Faults that tests inject: the objective `tests.cluster.plugins:faulty`, which workers import."""

import json
import os
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from muser_dist.models.features import FeatureTower
from muser_dist.objectives.contrastive import contrastive
from muser_dist.train.store import CheckpointStore

ARMED = "MUSER_TEST_ARMED"
"""Environment variable with the folder whose files arm faults, one for each rank."""

_calls = 0


def arm(folder: Path, kind: str, call: int, ranks: tuple[int, ...] = (1,), **details: Any) -> None:
    """Lets a fault happen in these ranks at the `call`-th step of their process, once."""
    for rank in ranks:
        (folder / f"{kind}-{rank}").write_text(json.dumps({"kind": kind, "call": call} | details))


def faulty(features, logits, batch, config):
    """The contrastive objective, with the faults that are armed for this rank."""
    global _calls
    _calls += 1
    loss = contrastive(features, logits, batch, config)
    for path in sorted(Path(os.environ[ARMED]).glob(f"*-{dist.get_rank()}")):
        fault = json.loads(path.read_text())
        if fault["kind"] == "slow":  # as long as it is armed
            time.sleep(fault["seconds"])
        elif _calls == fault["call"]:
            path.unlink()
            if fault["kind"] == "nan":
                return replace(loss, share=loss.share * float("nan"))
            _FAULTS[fault["kind"]]()
    return loss


class DyingFeatures(FeatureTower):
    """CLaMP 3's tower, in whose `call`-th forward pass of a process the fault strikes that is armed for its rank."""

    def forward(self, batch):
        global _calls
        if dist.is_initialized():  # not where a config is tried
            _calls += 1
            for path in sorted(Path(os.environ[ARMED]).glob(f"*-{dist.get_rank()}")):
                fault = json.loads(path.read_text())
                if _calls == fault["call"]:
                    path.unlink()
                    _FAULTS[fault["kind"]]()
        return super().forward(batch)


def _kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _hang() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def _die_while_writing() -> None:
    """The next part of a checkpoint is written by half, and then the process is killed."""

    def write(self: CheckpointStore, step: int, name: str, content: bytes) -> None:
        path = Path(f"{self._folder(step)}/{name}.part")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content[: len(content) // 2])
        _kill()

    CheckpointStore.write = write


def _run_out_of_memory() -> None:
    raise torch.OutOfMemoryError("no memory is left on this device")


_FAULTS = {"memory": _run_out_of_memory, "kill": _kill, "hang": _hang, "write": _die_while_writing}


def steady(features, logits, batch, config):
    """The contrastive objective, slow enough to be scored while it trains."""
    time.sleep(2)  # a score takes some ten seconds
    return contrastive(features, logits, batch, config)


def against(features, logits, batch, config):
    """Trains to keep apart what belongs together: its scores are the worst."""
    loss = steady(features, logits, batch, config)
    return replace(loss, share=-loss.share)


def failing(features, logits, batch, config):
    """Raises an error that nobody thought of."""
    raise ArithmeticError("this objective always fails")


def diverging(features, logits, batch, config):
    """Is not finite from the first step on."""
    loss = contrastive(features, logits, batch, config)
    return replace(loss, share=loss.share * float("nan"))
