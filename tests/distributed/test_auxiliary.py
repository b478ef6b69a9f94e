"""Losses of towers that depend on their parameters alone: counted once, whatever ranks, chunks and passes; and SGD."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from muser_dist.config import RunConfig
from muser_dist.models.model import MultimodalModel
from muser_dist.objectives.batch import global_metrics
from muser_dist.objectives.registry import load_objective
from muser_dist.train.engine import DeepSpeedEngine, PlainEngine
from muser_dist.train.step import train_step
from tests.distributed.engine_cells import Recording, config_for, expected, global_chunks, on_device
from tests.distributed.loss_cells import TOLERANCE, errors
from tests.distributed.workers import run_workers
from tests.models.test_frozen import with_towers
from tests.models.test_huggingface import TOWERS

CPU = torch.device("cpu")
CASES = [(2, 5, True), (3, 5, True)]
"""ZeRO stage, chunks of a global batch, and whether gradients are cached."""


class Factors(nn.Module):
    """So many that ZeRO-3 shares them out: DeepSpeed leaves parameters below 100,000 whole."""

    def __init__(self) -> None:
        super().__init__()
        self.values = nn.Parameter(torch.tensor([3.0, 2.0])[:, None].repeat(1, 60_000))

    def forward(self) -> Tensor:
        return self.values


class Penalised(nn.Module):
    """How loud the clip is, times the means of factors that should be 1."""

    width = 2

    def __init__(self, data) -> None:
        super().__init__()
        self.factors = Factors()

    def auxiliary_losses(self) -> dict[str, Tensor]:
        return {"unit": (self.factors() - 1.0).square().mean(dim=1).sum()}

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        factors = self.factors().mean(dim=1)
        return (0.1 + batch["audio"].to(factors).abs().mean(dim=1, keepdim=True) / 32768) * factors


def config_of(workers: int, chunks: int, stage: int = 0, cached: bool = True, **train) -> RunConfig:
    config = config_for("InfoNCE, same text", workers, chunks, stage, cache_gradients=cached, **train)
    return with_towers(config, audio={"build": f"{__name__}:Penalised", "options": {}})


def step(engine, config: RunConfig, rank: int, world: int) -> dict[str, float]:
    mine = on_device(global_chunks(config)[rank::world], config)
    return global_metrics(train_step(engine, load_objective(config.objective), config, mine, 1.0).loss)


def worker(rank: int, world: int, folder: str) -> None:
    for case in CASES:
        stage, chunks, cached = case
        config = config_of(world, chunks, stage, cached)
        recording = Recording(DeepSpeedEngine(MultimodalModel(config), config, CPU))
        metrics = step(recording, config, rank, world)
        if rank == 0:
            torch.save((metrics, recording.gradients), f"{folder}/{CASES.index(case)}.pt")
    config = config_of(world, 2, 2, optimizer="sgd", ema_samples=12)
    engine = DeepSpeedEngine(MultimodalModel(config), config, CPU)
    for _ in range(3):
        step(engine, config, rank, world)
    states = {name.split("/")[0] for name in engine.snapshot()}
    assert states - {"buffer"} == {"weight", "momentum_buffer", "average"}
    weights = engine.state_dict()
    if rank == 0:
        torch.save(weights, f"{folder}/sgd.pt")
    dist.barrier()


def check_alone(metrics: dict[str, float], got: dict[str, Tensor], chunks: int, words: object) -> None:
    exact, want = expected(config_of(1, chunks))
    want = dict(want)
    name = "towers.audio.factors.values"
    want[name] = want[name] + torch.tensor([[4.0], [2.0]], dtype=torch.float64) / 60_000  # of (3 - 1)² + (2 - 1)² = 5
    assert metrics["loss/audio/unit"] == pytest.approx(5.0), words
    assert metrics["loss"] == pytest.approx(exact + 5.0, rel=1e-6), words
    worst = max(errors(got, want).items(), key=lambda item: item[1])
    assert worst[1] <= TOLERANCE, (words, worst)


@pytest.mark.parametrize("cached", [True, False])
def test_in_one_process_by_hand(cached):
    config = config_of(1, 3, cached=cached)
    recording = Recording(PlainEngine(MultimodalModel(config), config, CPU))
    check_alone(step(recording, config, 0, 1), recording.gradients, 3, cached)
    frozen = with_towers(config, audio={"freeze": True})
    engine = PlainEngine(MultimodalModel(frozen), frozen, CPU)
    assert "loss/audio/unit" not in step(engine, frozen, 0, 1)  # it can change nothing


def test_two_ranks_equal_one_process(tmp_path):
    run_workers(worker, 2, 2, str(tmp_path))
    for number, (stage, chunks, cached) in enumerate(CASES):
        check_alone(*torch.load(Path(tmp_path) / f"{number}.pt"), chunks, (stage, chunks, cached))
    config = config_of(1, 2, optimizer="sgd", ema_samples=12)
    engine = PlainEngine(MultimodalModel(config), config, CPU)
    for _ in range(3):
        step(engine, config, 0, 1)
    for name, value in torch.load(tmp_path / "sgd.pt").items():
        torch.testing.assert_close(value, engine.state_dict()[name], rtol=1e-5, atol=1e-6, msg=name)


def test_sgd_is_torchs_with_nesterov_momentum():
    config = config_of(1, 2, optimizer="sgd", betas=(0.7, 0.9), weight_decay=0.0, lr=0.1)
    engine = PlainEngine(MultimodalModel(config), config, CPU)
    theirs = MultimodalModel(config)
    optimizer = torch.optim.SGD(theirs.parameters(), lr=0.1, momentum=0.7, nesterov=True)
    for _ in range(3):
        step(engine, config, 0, 1)
        recording = Recording(PlainEngine(theirs, config, CPU))
        step(recording, config, 0, 1)
        for name, parameter in theirs.named_parameters():
            parameter.grad = recording.gradients[name]
        optimizer.step()
        optimizer.zero_grad()
    for name, parameter in theirs.named_parameters():
        torch.testing.assert_close(parameter, dict(engine.model.named_parameters())[name])


PUBLISHED = ("ESResNeXt", "HTS-AT", "CLIP text")


def of_published_kinds(workers: int, stage: int = 0) -> RunConfig:
    config = config_for("InfoNCE, same text", workers, 4, stage)
    towers = {
        modality: {"build": build, "options": options} for modality, build, options in (TOWERS[n] for n in PUBLISHED)
    }
    return with_towers(config, **towers)


def published_worker(rank: int, world: int, folder: str) -> None:
    for stage in (1, 3):
        config = of_published_kinds(world, stage)
        recording = Recording(DeepSpeedEngine(MultimodalModel(config), config, CPU))
        step(recording, config, rank, world)
        if rank == 0:
            torch.save(recording.gradients, f"{folder}/published-{stage}.pt")


@pytest.mark.slow
def test_towers_of_published_kinds_over_two_ranks_equal_one_process(tmp_path):
    run_workers(published_worker, 2, 2, str(tmp_path))
    config = of_published_kinds(1)
    recording = Recording(PlainEngine(MultimodalModel(config), config, CPU))
    step(recording, config, 0, 1)
    want = {name: gradient.double() for name, gradient in recording.gradients.items()}
    for stage in (1, 3):
        worst = max(errors(torch.load(tmp_path / f"published-{stage}.pt"), want).items(), key=lambda item: item[1])
        # Both are float32, and statistics of the few rows of a chunk enlarge rounding.
        assert worst[1] <= 1e-3, (stage, worst)
