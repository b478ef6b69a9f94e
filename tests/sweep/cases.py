"""Small sweeps for tests: a base with data, and a record with trials in every state."""

import json
from pathlib import Path

from muser_dist.config import RunConfig
from muser_dist.sweep.config import SweepConfig
from muser_dist.sweep.record import Record
from tests.shardmaker import write_shards
from tests.small import small_config

SPACE = {
    "objective.temperature.init": {"log_uniform": [0.02, 1.0]},
    "objective.temperature.learnable": {"choice": [True, False]},
    "model.projection_dim": {"choice": [4, 8, 16]},
}


def base_of(folder: Path, **train) -> RunConfig:
    """A base whose shards lie in the folder; 90 samples, so that ASHA compares from 16 on."""
    data = {
        "train": (write_shards(folder / "data", [6, 6]),),
        "val": (write_shards(folder / "data", [6], "val"),),
        "decode_slots": 1,
        "keep_clips": True,
        "cache_folder": str(folder / "cache"),
    }
    settings = {"samples": 144, "global_batch": 8, "chunk": 4}
    return small_config(train=settings | train, data=data, storage=str(folder / "runs"))


def options_of(folder: Path, space: dict | None = None, **fields) -> SweepConfig:
    """A sweep over SPACE, or another space."""
    path = folder / "space.json"
    path.write_text(json.dumps(space or SPACE))
    return SweepConfig(str(path), **fields)


def fill(record: Record, points: list[dict]) -> None:
    """Trials in every state; of the finished ones, scores by projection_dim: the best is not the first."""
    states = ("finished", "stopped", "diverged", "failed", "finished", "finished", "running")
    for point, state in zip(points, states, strict=False):
        trial = record.add(point)
        trial.state = state
        if state in ("finished", "stopped", "running"):
            score = 0.1 + point["model.projection_dim"] / 100 + trial.number / 1000
            trial.curve = [(16, 0.1), (48 if state != "finished" else 144, score)]
            trial.scores = {"val_MRR": score, "val_R@10/text->audio": score / 2}
        trial.error = {"diverged": "the loss is <not> finite", "failed": "no memory"}.get(state)
    record.save()
