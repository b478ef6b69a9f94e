"""The loss curve of a run: the same for any number of workers and of chunks, at ZeRO 2."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from muser_dist.config import RunConfig
from muser_dist.models.model import MultimodalModel
from muser_dist.objectives.batch import global_metrics
from muser_dist.objectives.registry import load_objective
from muser_dist.train.engine import DeepSpeedEngine, Engine, PlainEngine
from muser_dist.train.optimizer import lr_factor
from muser_dist.train.step import train_step
from tests.distributed.engine_cells import OBJECTIVES, on_device
from tests.distributed.workers import run_workers
from tests.small import small_config

N, STEPS, CPU = 24, 50, torch.device("cpu")


def config_for(workers: int, chunks: int) -> RunConfig:
    train = {"workers": workers, "zero_stage": 2, "global_batch": N, "samples": STEPS * N, "chunk": N // chunks}
    return small_config(train=train | {"warmup_samples": 5 * N, "lr": 3e-3}, objective=OBJECTIVES["InfoNCE, same text"])


def chunks_of(step: int, config: RunConfig) -> list[dict]:
    """A step's chunks: the same rows however they are cut; text tells two kinds of sound apart."""
    rng = np.random.default_rng(step)
    kind = rng.integers(4, size=N)
    time = np.arange(config.data.crop_samples) / config.data.sample_rate
    audio = 8000 * np.sin(2 * np.pi * (200 * (1 + kind))[:, None] * time) + rng.normal(0, 500, (N, len(time)))
    heard = rng.random(N) < 0.9
    columns = {
        "row": step * N + np.arange(N),
        "text_id": kind,
        "label_id": np.full(N, -1),
        "valid_audio": heard,
        "valid_spectrogram": heard,
        "valid_text": np.ones(N, bool),
        "audio": audio.astype(np.int16),
        "audio_length": np.full(N, len(time), np.int32) * heard,
        "text_ids": np.repeat(2 + kind[:, None], config.data.max_tokens, 1).astype(np.int32),
        "text_length": np.full(N, 4, np.int32),
    }
    c = config.train.chunk
    chunks = [
        {"step": np.int64(step), "chunk": np.int64(k)} | {n: x[k * c : (k + 1) * c] for n, x in columns.items()}
        for k in range(config.train.chunks_per_step)
    ]
    padding = {name: np.zeros_like(x[:c]) for name, x in columns.items()} | {"row": np.full(c, -1)}
    missing = config.train.chunks_per_worker(config.train.workers) * config.train.workers - len(chunks)
    return chunks + [{"step": np.int64(step), "chunk": np.int64(len(chunks) + k)} | padding for k in range(missing)]


def curve(engine: Engine, config: RunConfig, rank: int) -> list[float]:
    objective, losses = load_objective(config.objective), []
    for step in range(STEPS):
        mine = on_device(chunks_of(step, config)[rank :: config.train.workers], config)
        loss, *_ = train_step(engine, objective, config, mine, lr_factor((step + 1) * N, config.train))
        losses.append(global_metrics(loss)["loss"])
    return losses


def worker(rank: int, config: RunConfig, out: str) -> None:
    losses = curve(DeepSpeedEngine(MultimodalModel(config), config, CPU), config, rank)
    if rank == 0:
        Path(out).write_text(json.dumps(losses))


@pytest.fixture(scope="module")
def alone() -> list[float]:
    config = config_for(1, 1)
    torch.set_num_threads(1)
    return curve(PlainEngine(MultimodalModel(config), config, CPU), config, 0)


@pytest.mark.parametrize(
    ("workers", "chunks"),
    [
        (2, 8),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in ((1, 1), (1, 8), (2, 2), (4, 4), (4, 2), (4, 8))),
    ],
)
def test_the_loss_curve_does_not_depend_on_workers_and_chunks(workers, chunks, alone, tmp_path):
    run_workers(worker, workers, config_for(workers, chunks), str(tmp_path / "losses"))
    losses = json.loads((tmp_path / "losses").read_text())
    assert alone[-1] < 0.8 * alone[0]  # it has learned something: the curve is one
    np.testing.assert_allclose(losses, alone, rtol=1e-3)
