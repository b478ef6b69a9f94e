"""A sweep as a driver of its own, for tests that kill it or need a Ray of its own."""

import json
import sys
from pathlib import Path

from muser_dist.config import RunConfig
from muser_dist.sweep.config import SweepConfig
from muser_dist.sweep.launch import sweep
from tests.small import small_config

RECIPE = "tests.small:small_config"

OBJECTIVES = ("steady", "failing", "diverging", "against")
"""Of tests/cluster/plugins.py, in the order of the grid."""


def base_config(corpus: Path, storage: Path, name: str, **train) -> RunConfig:
    """What trials have in common: 20 steps of one worker."""
    settings = {"samples": 320, "global_batch": 16, "chunk": 8, "lr": 0.01, "checkpoint_samples": 64, "max_failures": 0}
    return small_config(
        train=settings | train,
        data={
            "train": (f"{corpus}/train-*.tar",),
            "val": (f"{corpus}/val-*.tar",),
            "decode_slots": 1,
            "keep_clips": True,
            "cache_folder": f"{storage}/cache",
        },
        storage=str(storage),
        name=name,
    )


def options_of(storage: Path, objectives: tuple[str, ...] = OBJECTIVES, **fields) -> SweepConfig:
    """A grid over objectives."""
    space = storage / "space.json"
    space.write_text(json.dumps({"objective.name": {"choice": [f"tests.cluster.plugins:{o}" for o in objectives]}}))
    return SweepConfig(str(space), search="grid", reduction=2, **fields)


def main(kind: str, corpus: str, storage: str) -> None:
    folder = Path(storage)
    if kind == "four":
        sweep(RECIPE, base_config(Path(corpus), folder, kind), options_of(folder, concurrent=1), ["test"])
    elif kind == "after-a-stopped-one":  # the job starts Ray, with CPUs for one
        base = base_config(Path(corpus), folder, kind)
        sweep(RECIPE, base, options_of(folder, ("steady", "against", "diverging"), concurrent=1), ["test"])
    elif kind == "two-at-once":
        base = base_config(Path(corpus), folder, kind)  # the job starts Ray, with CPUs for two
        sweep(RECIPE, base, options_of(folder, ("steady", "against"), early_stopping="none", concurrent=2), ["test"])


if __name__ == "__main__":
    main(*sys.argv[1:])
