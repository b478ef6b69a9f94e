"""A run in one process without Ray: what benchmarks of quality train with, several at a time on a small machine."""

import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from muser_dist.config import RunConfig
from muser_dist.data.labels import find_label_values
from muser_dist.data.partners import Partners, find_partners
from muser_dist.data.pipeline import training_reader
from muser_dist.data.shards import index_shards
from muser_dist.data.storage import Storage
from muser_dist.models.model import MultimodalModel
from muser_dist.models.weights import load_weights
from muser_dist.objectives.registry import load_objective
from muser_dist.train.engine import PlainEngine
from muser_dist.train.optimizer import lr_factor
from muser_dist.train.step import to_device, train_step


def train(
    config: RunConfig, watch: Callable[[int, list[dict[str, Any]], dict[str, float]], None]
) -> tuple[MultimodalModel, RunConfig]:
    """Trains on all of config.data.train.

    Args:
        config: the run.
        watch: called after each step with its number, its chunks, and the loss's figures.

    Returns:
        the model, and the config with the values of the fields that it learned.
    """
    storage, device = Storage.of(config.data), torch.device("cpu")
    index = index_shards(storage, storage.expand(list(config.data.train), "data.train"), "data.train")
    if config.data.label_kinds():
        config = replace(
            config, data=replace(config.data, label_values=find_label_values(config.data, [index], storage))
        )
    model = MultimodalModel(config)
    load_weights(model, config)
    engine, objective = PlainEngine(model, config, device), load_objective(config.objective)
    partners = None
    if config.data.pairs:
        scratch = tempfile.TemporaryDirectory()  # gone with the last of this function
        folder = Path(scratch.name)
        found = find_partners(config.data.pairs, index, storage, folder, lambda done, of: None)
        print(found, file=sys.stderr, flush=True)
        partners = Partners(folder)
    for step, chunks in enumerate(_steps(config, training_reader(config, [index], storage, partners=partners).read)):
        mine = [to_device(chunk, config.features, device) for chunk in chunks]
        made = train_step(
            engine, objective, config, mine, lr_factor((step + 1) * config.train.global_batch, config.train)
        )
        if not made.applied:
            raise RuntimeError(f"{config.name}: step {step + 1} cannot be applied")
        watch(step + 1, chunks, {name: value.item() for name, value in made.loss.metrics.items()})
    return model, config


def _steps(config: RunConfig, read: Callable[[range], Iterator[dict[str, Any]]]) -> Iterator[list[dict[str, Any]]]:
    k = config.train.chunks_per_step
    chunks = read(range(config.train.steps * k))
    for _ in range(config.train.steps):
        yield [next(chunks) for _ in range(k)]
