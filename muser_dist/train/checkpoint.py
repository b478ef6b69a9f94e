"""A run's checkpoints: what one holds, and where the run goes on."""

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray.train
import ray.train.collective

from muser_dist.config import RunConfig
from muser_dist.errors import CheckpointError

if TYPE_CHECKING:  # Ray Train's controller imports this file, and need not wait for torch
    from muser_dist.train.engine import DeepSpeedEngine
    from muser_dist.train.metrics import Accounting

FORMAT = 2
_STATE = "muser.json"
_RAY_SNAPSHOT = "checkpoint_manager_snapshot.json"


@dataclass(frozen=True)
class Position:
    """Where a run stands.

    Attributes:
        step: optimizer steps done; with the chunks of a step it is the index of the next chunk.
        totals: the accounting of rows up to there.
    """

    step: int
    totals: dict[str, Any]


def save(engine: "DeepSpeedEngine", step: int, accounting: "Accounting") -> None:
    """Writes a checkpoint through Ray Train; every rank calls it and brings its own part."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        engine.save(folder)
        context = ray.train.get_context()
        if context.get_world_rank() == 0:
            workers = context.get_world_size()
            state = {"format": FORMAT, "step": step, "workers": workers, "totals": accounting.totals}
            (folder / _STATE).write_text(json.dumps(state))
        # A barrier: Ray merges the folders of all ranks into one checkpoint before it counts.
        ray.train.report(
            {"step": step},
            checkpoint=ray.train.Checkpoint.from_directory(folder),
            checkpoint_dir_name=f"checkpoint-{step:08d}",
        )


def load(engine: "DeepSpeedEngine") -> Position | None:
    """Restores the run's last checkpoint into the engine; None when there is none."""
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        return None
    with checkpoint.as_directory() as folder:
        state = json.loads((Path(folder) / _STATE).read_text())
        workers = ray.train.get_context().get_world_size()
        if state["format"] != FORMAT or state["workers"] != workers:
            raise CheckpointError(
                f"{checkpoint.path}: format {state['format']} written by {state['workers']} workers; "
                f"this run reads format {FORMAT} with {workers} workers"
            )
        engine.load(Path(folder))
        ray.train.collective.barrier()  # inside: leaving removes the folder when it was downloaded
    return Position(state["step"], state["totals"])


def committed_step(config: RunConfig) -> int:
    """Optimizer steps at the run's last committed checkpoint; 0 when there is none.

    Read from the snapshot that Ray Train's controller keeps: it decides what `load` will see,
    and datasets are made before workers exist.
    """
    try:
        snapshot = json.loads((config.folder / _RAY_SNAPSHOT).read_text())
    except (FileNotFoundError, NotADirectoryError):
        return 0
    latest = snapshot["latest_checkpoint_result"]
    return int(latest["checkpoint_dir_name"].rpartition("-")[2]) if latest else 0
