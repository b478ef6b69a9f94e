"""How exact losses are on features: each loss, gathered and in a ring, on W ranks with uneven rows."""

import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import pairwise

import numpy as np
import torch
import torch.distributed as dist

from muser_dist.objectives import similarity
from muser_dist.objectives.batch import global_metrics
from muser_dist.objectives.reference import reference_loss
from muser_dist.objectives.registry import load_objective
from muser_dist.objectives.targets import Matches
from muser_dist.objectives.tiles import TorchTiles
from tests.distributed.workers import run_workers
from tests.objectives.cases import LOSSES, Case, gradients

TOLERANCE = 1e-5
"""Norm-wise relative error of a tensor's gradient in float32 against float64."""

ZERO = 1e-7
"""A gradient that is zero in exact arithmetic (such as an attention key's bias, which the softmax
cancels) has no relative error: below this share of the largest gradient's norm it is compared with that instead."""

PATHS = {"gathered": 4096, "ring": 0}
"""By name, MiB of gathered features that are allowed."""


def errors(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> dict[str, float]:
    """Relative error by tensor, norm-wise; of those that should be zero, relative to the largest norm."""
    assert got.keys() == want.keys()
    largest = max(float(g.norm()) for g in want.values())
    result = {}
    for name, exact in want.items():
        error, size = float((got[name].double() - exact).norm()), float(exact.norm())
        result[name] = error / largest if size <= ZERO * largest else error / size
    return result


def rows_of(rank: int, world: int) -> int:
    """Rows of a rank, different on each, whole pairs of songs; with three ranks one has none at all."""
    return 0 if (world, rank) == (3, 1) else 8 + 2 * rank


def parts(world: int) -> list[slice]:
    """The rows of each rank."""
    bounds = np.cumsum([0, *(rows_of(rank, world) for rank in range(world))]).tolist()
    return [slice(a, b) for a, b in pairwise(bounds)]


def case_for(name: str, world: int) -> Case:
    return Case(name, parts(world)[-1].stop, seed=world)


def loss_worker(rank: int, world: int, folder: str, names: list[str], mutation: str) -> None:
    TorchTiles.rows, TorchTiles.columns = 3, 4  # several tiles in each block
    mutate(mutation)
    for name in names:
        case = case_for(name, world)
        for path, mib in PATHS.items():
            features, logits, batch = case.part(parts(world)[rank], torch.float32)
            config = replace(case.config, gather_mib=mib)
            loss = load_objective(config)(features, logits, batch, config)
            loss.share.backward()
            torch.save((global_metrics(loss)["loss"], gradients(features, logits)), f"{folder}/{name}-{path}-{rank}.pt")


def mutate(mutation: str) -> None:
    """Breaks the objective in one of the ways that tests must notice."""
    if mutation == "a column log-sum-exp dropped":
        similarity.exchange = lambda x: torch.stack([x[dist.get_rank()]] * len(x))
    elif mutation == "a mask ignored":
        of = Matches.of
        Matches.of = lambda *pairs: [replace(m, valid=torch.ones_like(m.valid), all_valid=True) for m in of(*pairs)]
    elif mutation == "a block not passed on":
        similarity.pass_on = lambda tensors: tensors
    else:
        assert not mutation


def loss_errors(
    world: int, names: Iterable[str] = tuple(LOSSES), mutation: str = ""
) -> Iterator[tuple[str, str, float, dict[str, float]]]:
    """Of each loss and path: name, path, relative error of the loss, and errors of the gradients by tensor."""
    with tempfile.TemporaryDirectory() as folder:
        run_workers(loss_worker, world, world, folder, list(names), mutation)
        for name in names:
            case = case_for(name, world)
            features, logits, batch = case.part(slice(None), torch.float64)
            exact = reference_loss(features, logits, batch, case.config, **case.config.options)
            exact.backward()
            want = gradients(features, logits)
            for path in PATHS:
                values, shares = zip(*(torch.load(f"{folder}/{name}-{path}-{r}.pt") for r in range(world)), strict=True)
                got = {
                    part: sum(share[part] for share in shares)
                    if part in ("scale", "bias")
                    else torch.cat([share[part] for share in shares])
                    for part in want
                }
                yield name, path, abs(values[0] - exact.item()) / abs(exact.item()), errors(got, want)
