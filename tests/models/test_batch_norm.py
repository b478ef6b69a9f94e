"""Towers with batch normalisation: against torch's own, with masked rows, over chunks and ranks."""

from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from muser_dist.config import RunConfig, TowerConfig
from muser_dist.models.batch_norm import (
    ChunkBatchNorm,
    replace_batch_norm,
    set_valid_rows,
    update_running_statistics,
)
from muser_dist.models.model import MultimodalModel
from muser_dist.objectives.registry import load_objective
from muser_dist.train.engine import DeepSpeedEngine, Engine, PlainEngine
from muser_dist.train.step import train_step
from tests.distributed.engine_cells import config_for, global_chunks, on_device
from tests.distributed.workers import run_workers

CPU = torch.device("cpu")


def norms() -> tuple[nn.BatchNorm2d, nn.Sequential]:
    torch.manual_seed(0)
    theirs = nn.BatchNorm2d(3)
    nn.init.normal_(theirs.weight)
    ours = nn.Sequential(nn.BatchNorm2d(3))
    ours[0].load_state_dict(theirs.state_dict())
    replace_batch_norm(ours, "chunk")
    return theirs, ours


def test_one_chunk_without_masked_rows_is_torchs():
    theirs, ours = norms()
    x = torch.randn(5, 3, 4, 2)
    set_valid_rows(ours, torch.ones(5, dtype=torch.bool))
    torch.testing.assert_close(ours(x), theirs(x))
    update_running_statistics(ours)
    torch.testing.assert_close(ours[0].running_mean, theirs.running_mean)
    torch.testing.assert_close(ours[0].running_var, theirs.running_var)
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))


def test_masked_rows_do_not_matter():
    _, ours = norms()
    x, valid = torch.randn(5, 3, 4, 2), torch.tensor([True, False, True, True, False])
    set_valid_rows(ours, valid)
    out = ours(x)
    x[~valid] = 1e4
    torch.testing.assert_close(ours(x)[valid], out[valid])
    set_valid_rows(ours, torch.zeros(5, dtype=torch.bool))
    before = ours[0].pending.clone()
    assert torch.isfinite(ours(x)).all()
    assert torch.equal(ours[0].pending, before)


def test_running_statistics_move_once_a_step_and_frozen_ones_never():
    _, ours = norms()
    set_valid_rows(ours, torch.ones(4, dtype=torch.bool))
    chunks = [torch.randn(4, 3, 2, 2) + shift for shift in (0.0, 10.0)]
    for chunk in chunks:
        with torch.no_grad():
            ours(chunk)  # the first of two passes
        ours(chunk)
    update_running_statistics(ours)
    mean = torch.stack([chunk.mean(dim=(0, 2, 3)) for chunk in chunks]).mean(dim=0)
    torch.testing.assert_close(ours[0].running_mean, 0.1 * mean)
    update_running_statistics(ours)
    torch.testing.assert_close(ours[0].running_mean, 0.1 * mean)
    frozen = nn.Sequential(nn.BatchNorm2d(3))
    replace_batch_norm(frozen, "frozen")
    torch.testing.assert_close(frozen(chunks[1]), chunks[1] / (1 + 1e-5) ** 0.5)
    update_running_statistics(frozen)
    assert (frozen[0].running_mean == 0).all()


def config(workers: int, stage: int = 2, cached: bool = True) -> RunConfig:
    given = config_for("InfoNCE, same text", workers, 4, stage, cache_gradients=cached)
    options = {"model": "resnet10t", "mels": 32, "window": 256, "hop": 80}
    return replace(given, model=replace(given.model, spectrogram=TowerConfig("spectrogram", options)))


def one_step(engine: Engine, config: RunConfig, rank: int, world: int) -> None:
    mine = on_device(global_chunks(config)[rank::world], config)
    train_step(engine, load_objective(config.objective), config, mine, 1.0)


def worker(rank: int, folder: str) -> None:
    world = dist.get_world_size()
    engine = DeepSpeedEngine(MultimodalModel(config(world)), config(world), CPU)
    one_step(engine, config(world), rank, world)
    weights = engine.state_dict()
    if rank == 0:
        torch.save(weights, Path(folder) / "weights.pt")


def alone(cached: bool) -> PlainEngine:
    """One process after one step."""
    engine = PlainEngine(MultimodalModel(config(1, cached=cached)), config(1, cached=cached), CPU)
    one_step(engine, config(1, cached=cached), 0, 1)
    return engine


def same_statistics(weights: dict[str, torch.Tensor], expected: PlainEngine) -> None:
    moved = 0
    for name, value in expected.state_dict().items():
        if "running_" in name:
            torch.testing.assert_close(weights[name], value, rtol=1e-4, atol=1e-6, msg=name)
            moved += bool((value != (1.0 if name.endswith("var") else 0.0)).any())
    assert moved > 10
    assert any(isinstance(module, ChunkBatchNorm) for module in expected.model.modules())


def test_statistics_move_the_same_with_one_encoding_of_each_chunk_and_with_two():
    same_statistics(alone(cached=False).state_dict(), alone(cached=True))


def test_statistics_move_the_same_on_two_ranks(tmp_path):
    run_workers(worker, 2, str(tmp_path))
    same_statistics(torch.load(tmp_path / "weights.pt"), alone(cached=True))
