"""How exact parameters' gradients are through the engine: each ZeRO stage, number of chunks and W."""

import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from muser_dist.config import ObjectiveConfig, RunConfig, TemperatureConfig
from muser_dist.models.model import MultimodalModel
from muser_dist.objectives.batch import Batch, Logits, global_metrics
from muser_dist.objectives.reference import reference_loss
from muser_dist.objectives.registry import load_objective
from muser_dist.train.engine import DeepSpeedEngine, PlainEngine
from muser_dist.train.step import DeviceChunk, to_device, train_step
from tests.distributed.workers import run_workers
from tests.small import small_config

ROWS = 3  # of a chunk

OBJECTIVES = {
    "InfoNCE, same text": ObjectiveConfig(targets="same_text", temperature=TemperatureConfig(init=0.1)),
    "sigmoid": ObjectiveConfig(name="sigmoid", targets="instance", temperature=TemperatureConfig(init=0.1), bias=-3.0),
}


def chunk_counts(world: int) -> dict[str, int]:
    """K, the chunks of a global batch, by the words for it."""
    counts = {f"{each} a rank": each * world for each in (1, 2, 5)} | {"2 a rank, one graph": 2 * world}
    return counts | ({"K = 4" if world == 3 else f"K = {2 * world - 1}": 4 if world == 3 else 2 * world - 1})


def config_for(
    objective: str, workers: int, chunks: int, stage: int = 0, precision: str = "fp32", **train: object
) -> RunConfig:
    settings = {
        "workers": workers,
        "zero_stage": stage,
        "precision": precision,
        "global_batch": chunks * ROWS,
        "samples": 16 * chunks * ROWS,
        "chunk": ROWS,
        "clip_norm": 0.0,  # clipping would hide every error of scale
    }
    return replace(small_config(train=settings | train), objective=OBJECTIVES[objective])


def global_chunks(config: RunConfig, messy: bool = True) -> list[dict]:
    """All chunks of a step, padded to a multiple of the workers, in the pipeline's form."""
    chunks = []
    for number in range(config.train.chunks_per_worker(config.train.workers) * config.train.workers):
        rng = np.random.default_rng(number)
        samples, tokens = config.data.crop_samples, config.data.max_tokens
        real = number < config.train.chunks_per_step
        heard, stated = np.full(ROWS, real), np.full(ROWS, real)
        row = np.arange(number * ROWS, (number + 1) * ROWS) if real else np.full(ROWS, -1)
        text_id = 1000 + row
        if messy and real:
            heard[number % ROWS] = False  # masked rows
            if number == 1 and config.train.chunks_per_step > 2:
                stated[:] = False  # a chunk without any text
            text_id = np.array([7, number % 2, 50 + number])  # duplicate texts
            row[2] = 2 if number == 3 else row[2]  # the same clip twice, its text read differently
        text_id = np.where(stated, text_id, -1)
        chunks.append(
            {
                "step": np.int64(0),
                "chunk": np.int64(number),
                "row": row.astype(np.int64),
                "text_id": text_id.astype(np.int64),
                "label_id": np.full(ROWS, -1),
                "valid_audio": heard,
                "valid_spectrogram": heard,
                "valid_text": stated,
                "audio": rng.integers(-9000, 9000, (ROWS, samples)).astype(np.int16) * heard[:, None].astype(np.int16),
                "audio_length": np.full(ROWS, samples, np.int32) * heard,
                "text_ids": rng.integers(2, config.data.vocabulary, (ROWS, tokens)).astype(np.int32),
                "text_length": np.full(ROWS, tokens, np.int32) * stated,
            }
        )
    return chunks


def on_device(chunks: list[dict], config: RunConfig) -> list[DeviceChunk]:
    return [to_device(chunk, config.features, torch.device("cpu")) for chunk in chunks]


def expected(config: RunConfig) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients by the reference, in float64, in one process with one graph."""
    config = replace(config, train=replace(config.train, workers=1, precision="fp32"))
    model = MultimodalModel(config).double().train()
    chunks = on_device(global_chunks(config), config)
    encoded = [model(chunk.tensors(), chunk.moment) for chunk in chunks]
    features = {name: torch.cat([part[name] for part in encoded]) for name in config.model.towers()}
    logits = Logits(encoded[0]["scale"], encoded[0].get("bias"))
    loss = reference_loss(features, logits, Batch.join([c.batch for c in chunks]), config.objective)
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


class Recording:
    """An engine that keeps the gradients of the step it is asked for, and changes no weight."""

    def __init__(self, engine, factor: float = 1.0) -> None:
        self.engine, self.device, self.factor = engine, engine.device, factor
        self.encode, self.model, self.grad_norm = engine.encode, engine.model, engine.grad_norm
        self.gradients: dict[str, torch.Tensor] = {}

    def backward(self, share: torch.Tensor, last: bool = True) -> None:
        self.engine.backward(self.factor * share, last)

    def step(self, lr_factor: float) -> None:
        if isinstance(self.engine, PlainEngine):
            self.gradients = {n: p.grad.clone() for n, p in self.engine.model.named_parameters() if p.requires_grad}
        else:
            from deepspeed.utils import safe_get_full_grad

            for name, parameter in self.engine.deepspeed.module.named_parameters():
                if parameter.requires_grad:
                    self.gradients[name] = safe_get_full_grad(parameter).detach().clone()
        self.engine.step(0.0)


def engine_worker(
    rank: int, world: int, folder: str, objectives: list[str], counts: dict[str, int], precision: str, factor: float
) -> None:
    for objective in objectives:
        for stage in range(4):
            config = config_for(objective, world, world, stage, precision)
            recording = Recording(DeepSpeedEngine(MultimodalModel(config), config, torch.device("cpu")), factor)
            for words, chunks in counts.items():
                cached = not words.endswith("one graph")
                config = config_for(objective, world, chunks, stage, precision, cache_gradients=cached)
                mine = on_device(global_chunks(config)[rank::world], config)
                loss, *_ = train_step(recording, load_objective(config.objective), config, mine, 1.0)
                value = global_metrics(loss)["loss"]
                if rank == 0:
                    torch.save((value, recording.gradients), f"{folder}/{objective}-{stage}-{words}.pt")


def engine_results(
    world: int,
    objectives: Iterable[str] = tuple(OBJECTIVES),
    counts: dict[str, int] | None = None,
    precision: str = "fp32",
    factor: float = 1.0,
) -> Iterator[tuple[str, int, str, tuple[float, float], tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]]]:
    """Of each cell: objective, stage, chunks; (loss, exact loss); (gradients, exact gradients)."""
    counts = counts or chunk_counts(world)
    with tempfile.TemporaryDirectory() as folder:
        run_workers(engine_worker, world, world, folder, list(objectives), counts, precision, factor)
        for objective in objectives:
            for words, chunks in counts.items():
                value, want = expected(config_for(objective, world, chunks))
                for stage in range(4):
                    got_value, got = torch.load(Path(folder) / f"{objective}-{stage}-{words}.pt")
                    yield objective, stage, words, (got_value, value), (got, want)
