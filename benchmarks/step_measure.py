"""What each rank of step.py does: the training step on synthetic chunks, timed as a whole or by phases."""

import time
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import flops
import numpy as np
import torch
import torch.distributed as dist
from synthetic import synthetic_chunk
from torch import Tensor

from muser_dist.config import ObjectiveConfig, RunConfig, from_dict
from muser_dist.models.model import MultimodalModel
from muser_dist.objectives.batch import Batch, Logits, Loss, Objective
from muser_dist.objectives.collectives import world
from muser_dist.objectives.registry import load_objective
from muser_dist.train.engine import DeepSpeedEngine, Engine, PlainEngine
from muser_dist.train.optimizer import lr_factor
from muser_dist.train.step import DeviceChunk, to_device, train_step

PHASES = {
    "copy": "arrays of the chunks to the worker's device",
    "forward": "the towers' forward pass",
    "objective": "gathering of features, the loss, and its gradient with respect to the features",
    "replay": "the towers' second forward pass (GradCache)",
    "backward": "the towers' backward pass, and ZeRO's reduction of gradients",
    "optimizer": "clipping, the update, and ZeRO's gathering of parameters",
}


class Trainer:
    """The training loop's step on the same synthetic chunks again and again.

    Args:
        config: the run; its global batch must be whole chunks for each rank.
        device: of this rank.
        clock: is told the phases of each step; see `Timed`.
    """

    def __init__(self, config: RunConfig, device: torch.device, clock: "PhaseClock | None" = None) -> None:
        rank, ranks = world()
        model = MultimodalModel(config)
        engine = DeepSpeedEngine if dist.is_initialized() else PlainEngine
        self.config = config
        self.engine: Engine = engine(model, config, device)
        self.objective: Objective = load_objective(config.objective)
        self.timed = Timed(self.engine, self.objective, clock) if clock else None
        if self.timed:
            self.engine, self.objective = self.timed, self.timed.score
        self.chunks = [synthetic_chunk(config, number) for number in range(rank, config.train.chunks_per_step, ranks)]
        self.steps = 0

    def step(self) -> None:
        """One step of muser_dist/train/loop.py, from decoded chunks to updated parameters."""
        modalities, of_step = tuple(self.config.model.towers()), {"step": self.steps}
        if self.timed:
            self.timed.clock.enter("copy")
        chunks = [to_device(chunk | of_step, modalities, self.engine.device) for chunk in self.chunks]
        if self.timed:
            chunks = [self.timed.chunk(chunk) for chunk in chunks]
        factor = lr_factor((self.steps + 1) * self.config.train.global_batch, self.config.train)
        train_step(self.engine, self.objective, self.config, chunks, factor)
        self.steps += 1


# --- Tasks: what launchers.run calls ---


def speed(setting: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Seconds of each step in steady state, CPU seconds and peak memory of each rank.

    Args:
        setting: "config", "warmup" and "steps".
    """
    config = from_dict(setting["config"], "the benchmark's config")
    dtype = torch.bfloat16 if config.train.precision == "bf16" else torch.float32
    rate = flops.matrix_rate(device, dtype)
    before = _begin_memory(device)
    trainer = Trainer(config, device)
    for _ in range(setting["warmup"]):
        trainer.step()
    meet(device)
    cpu, moments = time.process_time(), [time.perf_counter()]
    for _ in range(setting["steps"]):
        trainer.step()
        moments.append(time.perf_counter())
    meet(device)
    moments[-1] = time.perf_counter()  # of the slowest rank, and of all that the device had still to do
    ranks = _of_ranks({"cpu_seconds": time.process_time() - cpu, "peak_bytes": _peak(device)})
    return {
        "step_seconds": np.diff(moments).tolist(),
        "ranks": ranks,
        "bytes_before": before,
        "matrix_rate": rate,
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
    }


def phases(setting: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Seconds of a step of rank 0 by phase.

    Args:
        setting: "config", "warmup" and "steps".
    """
    clock = PhaseClock(device)
    trainer = Trainer(from_dict(setting["config"], "the benchmark's config"), device, clock)
    for _ in range(setting["warmup"]):
        trainer.step()
    meet(device)
    clock.seconds()
    for _ in range(setting["steps"]):
        trainer.step()
    seconds = clock.seconds()
    meet(device)
    return {name: seconds[name] / setting["steps"] for name in PHASES}


# --- Phases ---


class PhaseClock:
    """Divides time among phases: each moment belongs to the phase that was entered last.

    On a GPU moments are events in the stream, so a phase has what the device spends on it and waits in it, and
    nothing has to be synchronised meanwhile.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._entered: list[tuple[str, Any]] = []

    def enter(self, phase: str) -> None:
        """From now on it is this phase."""
        moment: Any = time.perf_counter()
        if self._cuda:
            moment = torch.cuda.Event(enable_timing=True)
            moment.record()
        self._entered.append((phase, moment))

    def seconds(self) -> Counter[str]:
        """Of each phase since the last call."""
        self.enter("")
        if self._cuda:
            torch.cuda.synchronize()
        spent: Counter[str] = Counter()
        for (phase, start), (_, end) in pairwise(self._entered):
            spent[phase] += start.elapsed_time(end) / 1000 if self._cuda else end - start
        self._entered.clear()
        return spent


class Timed:
    """Stands between `train_step` and its engine, objective and chunks, and tells a clock which phase begins.

    Where chunks are encoded once, one backward pass leads through the objective and the towers; it has left the
    objective when the first gradient of features is there.
    """

    def __init__(self, engine: Engine, objective: Objective, clock: PhaseClock) -> None:
        self.device, self.model, self.clock = engine.device, engine.model, clock
        self._engine, self._objective = engine, objective
        self._scored = False
        self._whole_graph = False

    def chunk(self, chunk: DeviceChunk) -> DeviceChunk:
        """The chunk, its tensors timed."""

        def tensors() -> dict[str, Tensor]:
            self.clock.enter("copy")
            return chunk.tensors()

        return replace(chunk, tensors=tensors)

    def encode(self, batch: dict[str, Tensor], moment: tuple[int, int]) -> dict[str, Tensor]:
        self.clock.enter("replay" if self._scored else "forward")
        return self._engine.encode(batch, moment)

    def score(self, features: dict[str, Tensor], logits: Logits, batch: Batch, config: ObjectiveConfig) -> Loss:
        """The objective."""
        self.clock.enter("objective")
        self._scored = True
        self._whole_graph = any(x.grad_fn is not None for x in features.values())
        if self._whole_graph:
            for x in features.values():
                x.register_hook(lambda _: self.clock.enter("backward"))
        return self._objective(features, logits, batch, config)

    def backward(self, share: Tensor, last: bool = True) -> None:
        if not self._whole_graph:
            self.clock.enter("backward")
        self._engine.backward(share, last)

    def step(self, lr_factor: float) -> None:
        self.clock.enter("optimizer")
        self._engine.step(lr_factor)
        self._scored = False

    def grad_norm(self) -> float:
        return self._engine.grad_norm()

    def state_dict(self) -> dict[str, Tensor]:
        return self._engine.state_dict()


# --- Around a measurement ---


def meet(device: torch.device) -> None:
    """Waits until every rank, and its device, has done what came before."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    if dist.is_initialized():
        dist.barrier()


def _of_ranks(value: Any) -> list[Any]:
    values: list[Any] = [value]
    if world()[1] > 1:
        values = [None] * world()[1]
        dist.all_gather_object(values, value)
    return values


def _begin_memory(device: torch.device) -> int:
    """Bytes in use; the peak is that of what follows."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    return _status("VmRSS")


def _peak(device: torch.device) -> int:
    """Most bytes in use: on a GPU allocated by torch, on a CPU resident, libraries included."""
    return torch.cuda.max_memory_allocated() if device.type == "cuda" else _status("VmHWM")


def _status(what: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(what))
    return 1024 * int(line.split()[1])
