"""How a run's chunks get to its workers: Ray Train asks anew whenever workers start."""

import json
from pathlib import Path
from typing import Any

import ray
import ray.data
import ray.train

from muser_dist.config import RunConfig
from muser_dist.data.chunks import ChunkReader
from muser_dist.data.executor import execution_options
from muser_dist.data.pipeline import ray_dataset
from muser_dist.files import write_whole

_POSITION = "position.json"

NOTHING: dict[str, Any] = {"train": lambda: ray.data.range(0)}
"""What stands for the dataset when a trainer is built: which chunks are left, and for how many workers, is known when
the workers have loaded their checkpoint."""


def deal_from(folder: Path, step: int) -> None:
    """Tells the dealer with which step the workers go on; rank 0 does, before it asks for its data."""
    write_whole(folder / _POSITION, json.dumps({"step": step}))


def decoding_slots(config: RunConfig, workers: int) -> int:
    """CPUs of the cluster that are left to decode beside so many workers, as the run may take them; at least one."""
    left = max(1, int(ray.cluster_resources()["CPU"] - workers * config.train.cpus_per_worker))
    return min(left, config.data.max_decode_slots or left)


class Dealer(ray.train.DataConfig):
    """Deals the chunks that are left of the run: chunk j of a step to worker j mod W, whatever W is now.

    Args:
        config: the run.
        reader: makes the chunks.
    """

    def __init__(self, config: RunConfig, reader: ChunkReader) -> None:
        super().__init__()
        self._config, self._reader = config, reader

    def configure(
        self, datasets: dict[str, Any], world_size: int, *_: Any, **__: Any
    ) -> list[dict[str, ray.data.DataIterator]]:
        """Ray Train's hook: called when rank 0 asks for its data."""
        config = self._config
        first_step = json.loads((config.folder / _POSITION).read_text())["step"]
        slots = decoding_slots(config, world_size)
        reader = self._reader.for_workers(world_size)
        dataset = ray_dataset(reader, first_step, config.train.steps, slots)
        dataset.context.execution_options = execution_options(
            config.data.buffer_mib, reader.chunk_bytes, slots, world_size
        )
        splits = dataset.streaming_split(world_size, equal=True)
        return [dict.fromkeys(datasets, split) for split in splits]
