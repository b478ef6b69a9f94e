"""Shards with features of windows, and a small config with a tower that reads them."""

import io
from dataclasses import replace
from pathlib import Path

import numpy as np

from muser_dist.config import ModelConfig, ObjectiveConfig, PairConfig, RunConfig, TemperatureConfig, TowerConfig
from muser_dist.data.config import FeaturesConfig
from tests.scores import piece as notated
from tests.scores import symbolic_config
from tests.shardmaker import sample, write_shard

FEATURES = TowerConfig("features", {"width": 16, "depth": 1, "heads": 2, "dropout": 0.0})
SIZE, MOST = 12, 6


def npy(values: np.ndarray) -> bytes:
    """An array in NumPy's format."""
    buffer = io.BytesIO()
    np.save(buffer, values, allow_pickle=False)
    return buffer.getvalue()


def song(index: int, windows: int | None = None, dtype: type = np.float16) -> np.ndarray:
    """A song's features, which the index decides, of 1 to 11 windows."""
    windows = 1 + index * 7 % 11 if windows is None else windows
    return np.random.default_rng(index).standard_normal((windows, SIZE)).astype(dtype)


def piece(index: int, *extensions: str) -> dict[str, bytes]:
    """Metadata with members of these kinds: npy, abc, mid, flac."""
    made = {"npy": npy(song(index))} | notated(index, "abc", "mid") | sample(index)
    return {name: made[name] for name in (*extensions, "json")}


def write_songs(folder: Path, rows: int, *extensions: str, name: str = "train") -> str:
    """Shards of up to 8 rows with these members, npy by default; returns a pattern for all of them."""
    for first in range(0, rows, 8):
        numbers = range(first, min(rows, first + 8))
        samples = [(f"piece{i:05d}", piece(i, *(extensions or ("npy",)))) for i in numbers]
        write_shard(folder / f"{name}-{first:05d}.tar", samples)
    return f"{folder}/{name}-*.tar"


def features_config(train: dict | None = None, **features: int) -> RunConfig:
    """The small config with features and text."""
    small = symbolic_config(train=train)
    return replace(
        small,
        data=replace(small.data, features=FeaturesConfig(**({"size": SIZE, "max_windows": MOST} | features))),
        model=ModelConfig(features=FEATURES, text=small.model.text, projection_dim=8),
        objective=ObjectiveConfig(pairs=(PairConfig("features", "text"),), temperature=TemperatureConfig(init=0.2)),
    )
