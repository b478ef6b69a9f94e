"""One run of muser_table.py: trains, embeds both sets of shards, scores."""

import json
import sys
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from plain import train
from runs import origin, write_scores

from muser_dist.config import RunConfig
from muser_dist.data.pipeline import evaluation_chunks
from muser_dist.data.shards import ShardIndex, index_shards
from muser_dist.data.spectrogram import LogMel
from muser_dist.data.storage import Storage
from muser_dist.evaluate.comparison import PerRow, compare_rows, load_rows, save_rows
from muser_dist.evaluate.embedding import Embedded, embed
from muser_dist.evaluate.evaluator import Probing, score
from muser_dist.evaluate.fields import read_labels
from muser_dist.evaluate.probes import probe
from muser_dist.models.model import MultimodalModel
from muser_dist.muser import Muser, save_model

EMBEDDINGS = "embeddings.npz"
"""Of all rows of both sets of shards, in a run's folder: an `Embedded`."""


def run(config: RunConfig, recipe: str, folder: Path) -> None:
    """Leaves the model, its curve, scores.json and rows.npz in the folder; "untrained" has the floor as well."""
    torch.set_num_threads(1)
    start, curve = time.monotonic(), []

    def watch(step: int, chunks: list[dict[str, Any]], figures: dict[str, float]) -> None:
        if step % 16 == 0 or step == config.train.steps:
            curve.append({"samples": step * config.train.global_batch, "loss": figures["loss"]})
            left = (time.monotonic() - start) / step * (config.train.steps - step)
            print(f"step {step}/{config.train.steps}  {figures}  ETA {left:.0f} s", file=sys.stderr, flush=True)

    known, made = folder / "training.json", origin(config)
    if not known.exists():
        model = MultimodalModel(config)
        if recipe != "untrained":
            model, config = train(config, watch)
        save_model(folder / "model", model.state_dict(), config)
        about = {"recipe": recipe, "seed": config.seed, "seconds": round(time.monotonic() - start, 1), "curve": curve}
        known.write_text(json.dumps(about | made))
    muser = Muser.from_pretrained(folder)

    storage = Storage.of(config.data)
    train_index, val_index = (
        index_shards(storage, storage.expand(list(shards), "data"), "data")
        for shards in (config.data.train, config.data.val)
    )
    test, fitted = (
        embed(muser, replace(config, evaluate=replace(config.evaluate, rows=index.total)), index, storage)
        for index in (val_index, train_index)
    )
    per_row: PerRow = {}
    scores = score(muser, config, test, fitted, Probing(on="tower", kinds=("linear",), seeds=5), per_row)
    save_rows(folder / "rows.npz", per_row)
    Embedded.join([fitted, test]).save(folder / EMBEDDINGS)
    if recipe == "untrained":
        (folder / "floor.json").write_text(json.dumps(floor(config, val_index, train_index, storage)))
    write_scores(folder, scores)


def without_classes(scores: Any) -> Any:
    """Scores without what they say of single classes and of single draws, which nobody reads in a table of runs."""
    if not isinstance(scores, dict):
        return scores
    kept = {name: without_classes(value) for name, value in scores.items() if name not in _OF_CLASSES}
    return kept | {"points": [without_classes(point) for point in scores["points"]]} if "points" in scores else kept


_OF_CLASSES = ("classes", "counts", "confusion", "values")


def compared(folders: Iterable[list[Path]]) -> list[dict[str, Any]]:
    """The first of each two runs' folders against the second, row by row; by seed, where both are there."""
    paths = [[folder / "rows.npz" for folder in two] for two in folders]
    return [
        {"seed": seed} | compare_rows(load_rows(first), load_rows(second))
        for seed, (first, second) in enumerate(paths)
        if first.exists() and second.exists()
    ]


def floor(config: RunConfig, test: ShardIndex, train: ShardIndex, storage: Storage) -> dict[str, Any]:
    """What a linear probe finds in the mean and standard deviation of 128 log-mel bands, by field."""
    whole = replace(config, data=replace(config.data, crop_seconds=10.0))
    mel = LogMel(config.data.sample_rate, mels=128)
    sets = [_statistics(whole, index, storage, mel) for index in (test, train)]
    found = {}
    for field in config.evaluate.fields:
        labels = read_labels(field, sets[0][1], sets[1][1])
        (scored, seen), (of_test, of_train) = labels.known, labels.sets
        arrays = sets[1][0][seen], of_train[seen], sets[0][0][scored], of_test[scored]
        found[field] = probe("linear", *arrays, labels.classes)[0]
    return found


def _statistics(
    config: RunConfig, index: ShardIndex, storage: Storage, mel: LogMel
) -> tuple[np.ndarray, list[dict[str, Any]]]:
    features, fields = [], []
    everything = replace(config, evaluate=replace(config.evaluate, rows=index.total))
    for chunk in evaluation_chunks(everything, index, storage):
        image = mel(torch.from_numpy(np.array(chunk["audio"])))[:, 0]
        rows = torch.cat([image.mean(dim=2), image.std(dim=2)], dim=1).numpy()
        real = chunk["row"] >= 0
        features.append(rows[real])
        fields += [json.loads(values) for values, use in zip(chunk["fields"], real, strict=True) if use]
    return np.concatenate(features), fields
