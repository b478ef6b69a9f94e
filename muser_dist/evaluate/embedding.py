"""A set of shards as arrays: every row's embeddings, validity and metadata."""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from muser_dist.config import Modality, RunConfig
from muser_dist.data.pipeline import evaluation_chunks
from muser_dist.data.shards import ShardIndex
from muser_dist.data.storage import Storage

_SECONDS = 2.0  # between two calls of `progress`


class Encoder(Protocol):
    """What is scored: `muser_dist.Muser`, or what `muser_dist.evaluate.external` makes of any other model."""

    @property
    def modalities(self) -> tuple[Modality, ...]:
        """What it encodes."""
        ...

    def encode_chunk(self, modality: Modality, chunk: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
        """A chunk of muser_dist/data/chunks.py to (rows, D) in the joint space and (rows, width) before the head."""
        ...

    def encode_text(self, sentences: list[str]) -> np.ndarray:
        """(n, D) in the joint space."""
        ...


@dataclass(frozen=True)
class Embedded:
    """Rows of a set of shards, in their order. Arrays hold whatever they hold where a modality is not valid.

    `joint` and `tower`: (n, D) in the joint space and (n, width) before the heads, float32, by modality; `valid`:
    (n,) bool; `text_ids`: (n,) int64, equal where texts state the same; `fields`: metadata, `keys`: the rows' names;
    `problems`: why rows cannot be used.
    """

    joint: dict[str, np.ndarray]
    tower: dict[str, np.ndarray]
    valid: dict[str, np.ndarray]
    text_ids: np.ndarray
    keys: list[str]
    fields: list[dict[str, Any]]
    problems: list[str]

    def __len__(self) -> int:
        return len(self.keys)


def embed(
    model: Encoder,
    config: RunConfig,
    index: ShardIndex,
    storage: Storage,
    progress: Callable[[int, int], None] | None = None,
) -> Embedded:
    """Embeds the first config.evaluate.rows rows of some shards.

    Args:
        model: encodes.
        config: `data` says how clips are heard, `evaluate.rows` how many.
        index: the shards.
        storage: where they are read from.
        progress: called now and then with the rows that are done and all.
    """
    total = min(int(index.rows.sum()), config.evaluate.rows)
    joint: dict[str, list[np.ndarray]] = {name: [] for name in model.modalities}
    tower: dict[str, list[np.ndarray]] = {name: [] for name in model.modalities}
    valid: dict[str, list[np.ndarray]] = {name: [] for name in model.modalities}
    text_ids: list[np.ndarray] = []
    keys: list[str] = []
    fields: list[dict[str, Any]] = []
    problems: list[str] = []
    told = time.monotonic()
    for chunk in evaluation_chunks(config, index, storage):
        real = chunk["row"] >= 0
        for name in model.modalities:
            in_joint, in_tower = model.encode_chunk(name, chunk)
            joint[name].append(in_joint[real])
            tower[name].append(in_tower[real])
            valid[name].append(chunk[f"valid_{name}"][real])
        text_ids.append(chunk["text_id"][real])
        keys += [key for key, use in zip(chunk["key"], real, strict=True) if use]
        fields += [json.loads(values) for values, use in zip(chunk["fields"], real, strict=True) if use]
        problems += chunk["problems"]
        if progress and (len(keys) == total or time.monotonic() > told + _SECONDS):
            told = time.monotonic()
            progress(min(total, len(keys)), total)

    def together(parts: dict[str, list[np.ndarray]]) -> dict[str, np.ndarray]:
        return {name: np.concatenate(arrays) for name, arrays in parts.items()}

    return Embedded(together(joint), together(tower), together(valid), np.concatenate(text_ids), keys, fields, problems)
