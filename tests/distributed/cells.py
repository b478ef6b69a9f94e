"""How exact everything is, cell by cell: each loss on W ranks, and each ZeRO stage, chunk count and W.

The tests of this folder assert on these cells; `python -m tests.distributed.cells --json OUT` measures all of
them and writes a table beside the JSON.
"""

import argparse
import json
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from muser_dist.config import ObjectiveConfig, RunConfig, TemperatureConfig
from muser_dist.models.model import MultimodalModel
from muser_dist.objectives import similarity
from muser_dist.objectives.batch import Batch, Logits, global_metrics
from muser_dist.objectives.reference import reference_loss
from muser_dist.objectives.registry import load_objective
from muser_dist.objectives.targets import Matches
from muser_dist.objectives.tiles import TorchTiles
from muser_dist.train.engine import DeepSpeedEngine, PlainEngine
from muser_dist.train.step import DeviceChunk, to_device, train_step
from tests.distributed.workers import run_workers
from tests.objectives.cases import LOSSES, Case, gradients
from tests.small import small_config

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


# --- Losses on features: every loss, path and W ---


def rows_of(rank: int, world: int) -> int:
    """Rows of a rank, different on each; with three ranks one has none at all."""
    return 0 if (world, rank) == (3, 1) else 7 + 2 * rank


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


# --- Parameters through the engine: every ZeRO stage, chunk count and W ---

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
    for number in range(config.train.chunks_per_worker * config.train.workers):
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
    return [to_device(chunk, tuple(config.model.towers()), torch.device("cpu")) for chunk in chunks]


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
    return loss.item(), {name: p.grad for name, p in model.named_parameters()}


class Recording:
    """An engine that keeps the gradients of the step it is asked for, and changes no weight."""

    def __init__(self, engine, factor: float = 1.0) -> None:
        self.engine, self.device, self.factor = engine, engine.device, factor
        self.encode, self.model = engine.encode, engine.model
        self.gradients: dict[str, torch.Tensor] = {}

    def backward(self, share: torch.Tensor, last: bool = True) -> None:
        self.engine.backward(self.factor * share, last)

    def step(self, lr_factor: float) -> None:
        if isinstance(self.engine, PlainEngine):
            self.gradients = {n: p.grad.clone() for n, p in self.engine.model.named_parameters()}
        else:
            from deepspeed.utils import safe_get_full_grad

            for name, parameter in self.engine.deepspeed.module.named_parameters():
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
                loss, _ = train_step(recording, load_objective(config.objective), config, mine, 1.0)
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


# --- The table ---


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True, help="results; a table of the same name goes beside it")
    out = parser.parse_args().json
    losses: dict[str, dict[str, float]] = {}
    engines: dict[str, dict[str, float]] = {}
    for world in (1, 2, 3, 4):
        for name, path, of_loss, of_gradients in loss_errors(world):
            losses.setdefault(name, {})[f"{path}, W = {world}"] = max(of_loss, *of_gradients.values())
        for objective, stage, words, (value, exact), (got, want) in engine_results(world):
            worst = max(abs(value - exact) / abs(exact), *errors(got, want).values())
            words = "padded K" if words.startswith("K") else words
            engines.setdefault(f"{objective}, ZeRO {stage}, {words}", {})[f"W = {world}"] = worst
        print(f"W = {world} done", flush=True)
    command = f"python -m tests.distributed.cells --json {out}"
    results = {"command": command, "tolerance": TOLERANCE, "losses": losses, "engine": engines}
    out.write_text(json.dumps(results, indent=1) + "\n")
    out.with_suffix(".md").write_text(
        "# Exactness: the worst norm-wise relative error of each cell\n\n"
        f"`{command}`: float32 against float64 in one process, gloo on a CPU. Bound: {TOLERANCE:g}.\n"
        "Batches have masked rows, missing modalities, repeated texts and clips.\n\n"
        "## Losses on features, uneven rows on the ranks\n\n" + _table(losses, "loss") + "\n\n"
        "## Every parameter, through DeepSpeed\n\nChunks of a rank; the last rows have a number of chunks that W does "
        "not divide.\n\n" + _table(engines, "objective, stage, chunks") + "\n"
    )


def _table(cells: dict[str, dict[str, float]], what: str) -> str:
    columns = list(dict.fromkeys(column for row in cells.values() for column in row))
    lines = [f"| {what} | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for name, row in cells.items():
        lines.append(f"| {name} | " + " | ".join(f"{row[c]:.1e}" if c in row else "" for c in columns) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
