"""One run of clamp_table.py, and what reading the headers alone achieves."""

import json
import re
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from muser_table_run import EMBEDDINGS
from plain import train
from runs import origin, write_scores

from muser_dist.config import RunConfig
from muser_dist.data.pipeline import evaluation_chunks
from muser_dist.data.shards import ShardIndex, index_shards
from muser_dist.data.storage import Storage
from muser_dist.data.symbolic.patches import to_text
from muser_dist.evaluate.comparison import PerRow, save_rows
from muser_dist.evaluate.embedding import Embedded, embed
from muser_dist.evaluate.evaluator import Probing, score
from muser_dist.evaluate.fields import read_labels
from muser_dist.evaluate.probes import probe
from muser_dist.evaluate.retrieval import chance
from muser_dist.models.model import MultimodalModel
from muser_dist.muser import Muser, save_model


def pretrain(config: RunConfig, folder: Path) -> None:
    """Leaves the model and scores.json, with the curve of the loss, in the folder."""
    start, made = time.monotonic(), origin(config)
    model, config, curve = _train(config)
    save_model(folder / "model", model.state_dict(), config)
    seconds = round(time.monotonic() - start, 1)
    scores = {"seed": config.seed, "seconds": seconds, "curve": curve}
    (folder / "scores.json").write_text(json.dumps(scores | made))


def run(config: RunConfig, variant: str, folder: Path, trained: bool) -> None:
    """Leaves the model, its curve, embeddings, scores.json and rows.npz in the folder."""
    torch.set_num_threads(1)
    known, made = folder / "training.json", origin(config)
    if not known.exists():
        start, curve, model = time.monotonic(), [], MultimodalModel(config)
        if trained:
            model, config, curve = _train(config)
        save_model(folder / "model", model.state_dict(), config)
        about = {"recipe": variant, "seed": config.seed, "seconds": round(time.monotonic() - start, 1), "curve": curve}
        known.write_text(json.dumps(about | made))
    muser = Muser.from_pretrained(folder)
    train_set, test_set = _indices(config)
    storage = Storage.of(config.data)
    fitted, test = (embed(muser, config, index, storage) for index in (train_set, test_set))
    per_row: PerRow = {}
    scores = score(muser, config, test, fitted, Probing(on="tower", kinds=("linear",), seeds=0), per_row)
    save_rows(folder / "rows.npz", per_row)
    Embedded.join([fitted, test]).save(folder / EMBEDDINGS)
    write_scores(folder, scores)


def _train(config: RunConfig) -> tuple[MultimodalModel, RunConfig, list[dict[str, float]]]:
    torch.set_num_threads(1)
    start, curve = time.monotonic(), []

    def watch(step: int, chunks: list[dict[str, Any]], figures: dict[str, float]) -> None:
        if step % 16 == 0 or step == config.train.steps:
            curve.append({"samples": step * config.train.global_batch, "loss": figures["loss"]})
            left = (time.monotonic() - start) / step * (config.train.steps - step)
            print(f"step {step}/{config.train.steps}  {figures}  ETA {left:.0f} s", file=sys.stderr, flush=True)

    return *train(config, watch), curve


def _indices(config: RunConfig) -> list[ShardIndex]:
    """Of the training and of the validation shards."""
    storage = Storage.of(config.data)
    return [
        index_shards(storage, storage.expand(list(shards), "data"), "data")
        for shards in (config.data.train, config.data.val)
    ]


def header_copy(config: RunConfig) -> dict[str, Any]:
    """What somebody achieves who copies K: and M: of the tune that is meant into the query, and looks at nothing else.

    Returns:
        "MRR": of text to ABC, candidates with both fields in front, in any order among each other (the expectation);
        "queries", "candidates"; "probes": by field, what a linear probe finds in the two fields.
    """
    (train_headers, _, train_fields), (headers, text_ids, fields) = (_headers(config, i) for i in _indices(config))
    means = []
    for text in np.unique(text_ids):
        asked = headers[text_ids == text][0]
        front = (headers == asked).all(axis=1)
        relevant = int((text_ids[front] == text).sum())
        means.append(chance(int(front.sum()), np.array([relevant]))["chance_MRR"])
    result: dict[str, Any] = {"MRR": float(np.mean(means)), "queries": len(means), "candidates": len(headers)}
    result["probes"] = {}
    seen = [_one_hot(rows, train_headers) for rows in (train_headers, headers)]
    for field in config.evaluate.fields:
        labels = read_labels(field, fields, train_fields)
        (scored, known), (of_test, of_train) = labels.known, labels.sets
        if scored.any() and len(np.unique(of_train[known])) > 1:
            arrays = seen[0][known], of_train[known], seen[1][scored], of_test[scored]
            result["probes"][field] = probe("linear", *arrays, labels.classes)[0]
    return result


def _headers(config: RunConfig, index: ShardIndex) -> tuple[np.ndarray, np.ndarray, list[dict[str, Any]]]:
    """K: and M: (n, 2) as the encoder sees them in the rows that have ABC and a text, with text ids and metadata."""
    abc = replace(config, data=replace(config.data, symbolic=replace(config.data.symbolic, notations=("abc",))))
    headers, ids, fields = [], [], []
    for chunk in evaluation_chunks(abc, index, Storage.of(config.data)):
        for i in np.flatnonzero(chunk["valid_symbolic"] & chunk["valid_text"]):
            text = to_text(chunk["patches"][i])
            found = [re.search(rf"^{name}:(.*)$", text, re.M) for name in "KM"]
            headers.append([match[1].strip() if match else "" for match in found])
            ids.append(int(chunk["text_id"][i]))
            fields.append(json.loads(chunk["fields"][i]))
    return np.array(headers), np.array(ids), fields


def _one_hot(rows: np.ndarray, among: np.ndarray) -> np.ndarray:
    """(n, values of both columns) float32."""
    parts = [rows[:, i, None] == np.unique(among[:, i])[None] for i in range(rows.shape[1])]
    return np.concatenate(parts, axis=1).astype(np.float32)
