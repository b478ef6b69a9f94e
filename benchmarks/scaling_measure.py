"""What each rank of scaling.py does: steps of several sizes, the loss alone, and bare collectives."""

import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from step_measure import Trainer, meet
from synthetic import synthetic_chunk
from torch import Tensor

from muser_dist.config import RunConfig, from_dict
from muser_dist.objectives.batch import Batch, Logits
from muser_dist.objectives.collectives import world
from muser_dist.objectives.registry import load_objective


def cells(setting: dict[str, Any], device: torch.device) -> list[dict[str, Any]]:
    """Seconds of each cell, and the bytes that a rank received in it.

    Args:
        setting: "config"; "chunks", numbers of chunks for each rank; "rows", N of the loss alone; "megabytes", sizes
            of collectives; "rounds".

    Returns:
        a row for each: "kind" ("step", "loss", "all_gather", "all_reduce"), "world", its size, "seconds" (median of
        the rounds), "each_seconds" and "received_bytes".
    """
    config = from_dict(setting["config"], "the benchmark's config")
    rank, ranks = world()
    cases: list[tuple[dict[str, Any], Callable[[], Any]]] = []
    trainer = Trainer(config, device)
    for chunks in setting["chunks"]:
        of_rank = [synthetic_chunk(config, rank + i * ranks) for i in range(chunks)]
        size = {"chunks": chunks, "rows": chunks * config.train.chunk * ranks}
        cases.append(({"kind": "step"} | size, partial(_step, trainer, of_rank)))
    for rows in setting["rows"]:
        cases.append(({"kind": "loss", "rows": rows}, _loss(config, rows // ranks, rank, device)))
    for megabytes in setting["megabytes"] if ranks > 1 else ():
        mine = torch.zeros(round(megabytes * 1e6 / 4 / ranks) * ranks)
        part = mine[: len(mine) // ranks].clone()
        size = {"bytes": mine.nbytes}
        cases.append(({"kind": "all_reduce"} | size, partial(dist.all_reduce, mine)))
        cases.append(({"kind": "all_gather"} | size, partial(dist.all_gather_into_tensor, mine, part)))
    return _take_turns(cases, setting["rounds"], device)


def _take_turns(
    cases: list[tuple[dict[str, Any], Callable[[], Any]]], rounds: int, device: torch.device
) -> list[dict[str, Any]]:
    seconds: list[list[float]] = [[] for _ in cases]
    received: list[list[int]] = [[] for _ in cases]
    for round_ in range(rounds + 1):  # the first warms up
        for number, (_, call) in enumerate(cases):
            meet(device)
            before, start = _loopback_bytes(), time.perf_counter()
            call()
            meet(device)
            if round_:
                seconds[number].append(time.perf_counter() - start)
                received[number].append((_loopback_bytes() - before) // world()[1])
    return [
        known
        | {"world": world()[1], "seconds": statistics.median(each), "each_seconds": each}
        | {"received_bytes": statistics.median(of_case)}
        for (known, _), each, of_case in zip(cases, seconds, received, strict=True)
    ]


def _step(trainer: Trainer, chunks: list[dict[str, Any]]) -> None:
    trainer.chunks = chunks
    trainer.step()


def _loss(config: RunConfig, b: int, rank: int, device: torch.device) -> Callable[[], None]:
    """The loss of so many rows for each rank, and its gradient with respect to their features."""
    objective = load_objective(config.objective)
    g = torch.Generator().manual_seed(rank)
    features: dict[str, Tensor] = {
        name: torch.randn(b, config.model.projection_dim, generator=g).to(device).requires_grad_()
        for name in config.model.towers()
    }
    row = torch.arange(b, device=device) + b * rank
    batch = Batch(
        {name: torch.ones_like(row, dtype=torch.bool) for name in features}, row, row, torch.full_like(row, -1)
    )
    pairs = len(config.objective.pairs)
    temperature = config.objective.temperature.init
    scale = torch.full((pairs,), 1 / temperature, device=device, requires_grad=True)
    bias = None if config.objective.bias is None else torch.full((pairs,), config.objective.bias, device=device)

    def call() -> None:
        for x in (*features.values(), scale):
            x.grad = None
        objective(features, Logits(scale, bias), batch, config.objective).share.backward()

    return call


def _loopback_bytes() -> int:
    return int(Path("/sys/class/net/lo/statistics/rx_bytes").read_text())
