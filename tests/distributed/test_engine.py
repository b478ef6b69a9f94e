"""DeepSpeedEngine beyond gradients: whole weights, the schedule, steps that are not applied."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from muser_dist.models.model import MultimodalModel
from muser_dist.objectives.contrastive import contrastive
from muser_dist.train.diagnosis import why_not_applied
from muser_dist.train.engine import DeepSpeedEngine, PlainEngine
from muser_dist.train.step import train_step
from tests.distributed.engine_cells import ROWS, config_for, global_chunks, on_device
from tests.distributed.workers import run_workers

CPU = torch.device("cpu")
EMA_SAMPLES = (0, 0, 20, 20)
"""By stage."""


def steps(engine, config, rank, world, factors):
    mine = on_device(global_chunks(config, messy=False)[rank::world], config)
    for factor in factors:
        train_step(engine, contrastive, config, mine, factor)


def spoilt(features, logits, batch, config):
    """The contrastive objective, whose share is not finite on rank 1."""
    loss = contrastive(features, logits, batch, config)
    return replace(loss, share=loss.share * (float("nan") if dist.get_rank() == 1 else 1.0))


def worker(rank: int, folder: str) -> None:
    """Three steps, and one that cannot be applied; with a moving average at two stages, and offloading at two."""
    world = dist.get_world_size()
    for stage in range(4):
        settings = {"ema_samples": EMA_SAMPLES[stage], "offload": stage in (1, 3)}
        config = config_for("InfoNCE, same text", world, 4, stage, **settings)
        engine = DeepSpeedEngine(MultimodalModel(config), config, CPU)
        initial = engine.state_dict()
        steps(engine, config, rank, world, [1.0, 0.5, 0.25])
        weights, norm = engine.state_dict(), engine.grad_norm()
        assert (not weights) == (rank > 0)
        mine = on_device(global_chunks(config, messy=False)[rank::world], config)
        made = train_step(engine, spoilt, config, mine, 1.0)
        after = engine.state_dict()
        assert not made.applied and not math.isfinite(engine.grad_norm())
        named = [{"shard": ["s.tar"] * ROWS, "key": [f"{chunk.moment[1]}-{i}" for i in range(ROWS)]} for chunk in mine]
        made.features["audio"][rank] = float("inf")  # row 0 on rank 0, row 1 on rank 1
        why = why_not_applied(made, 4, named, engine.grad_norm(), config.train)
        assert "not finite at step 4 (loss nan" in why and "none; rank 1." in why
        assert "not finite: s.tar: 0-0 (rank 0), s.tar: 1-1 (rank 1)." in why
        assert all(torch.equal(after[name], value) for name, value in weights.items())
        if rank == 0:
            torch.save((initial, weights, norm), Path(folder) / f"{stage}.pt")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("engine")
    run_workers(worker, 2, str(folder))
    return [torch.load(folder / f"{stage}.pt") for stage in range(4)]


@pytest.fixture(scope="module")
def plain():
    """The same three steps on one process and plain torch, by the half-life of the average."""
    engines = {}
    for ema_samples in set(EMA_SAMPLES):
        config = config_for("InfoNCE, same text", 1, 4, ema_samples=ema_samples)
        engines[ema_samples] = PlainEngine(MultimodalModel(config), config, CPU)
        steps(engines[ema_samples], config, 0, 1, [1.0, 0.5, 0.25])
    return engines


@pytest.mark.parametrize("stage", range(4))
def test_whole_weights_come_out_of_every_stage(results, stage):
    initial = results[stage][0]
    want = MultimodalModel(config_for("InfoNCE, same text", 1, 4)).state_dict()
    assert initial.keys() == want.keys()
    for name, value in want.items():
        torch.testing.assert_close(initial[name], value, rtol=0, atol=0)


@pytest.mark.parametrize("stage", range(4))
def test_two_workers_train_as_one_process_does(results, plain, stage):
    _, straight, norm = results[stage]
    plain = plain[EMA_SAMPLES[stage]]
    start = MultimodalModel(config_for("InfoNCE, same text", 1, 4)).state_dict()
    for name, value in plain.state_dict().items():
        moved = (value - start[name]).norm()
        # Adam divides by the gradient's own size, so what is rounding in a gradient that should
        # be zero becomes a step of full size: parameters with such gradients are left out below.
        if name.endswith("k_proj.bias") or name.endswith("key.bias"):
            continue
        assert (straight[name] - value).norm() <= 1e-3 * moved + 1e-6, name
    assert norm == pytest.approx(plain.grad_norm(), rel=1e-4)
