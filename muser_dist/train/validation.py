"""Scores of the model so far, made by a task of the cluster while training goes on."""

import contextlib
import shutil
from typing import Any

import ray
import torch.distributed as dist
from torch import Tensor

from muser_dist.config import RunConfig
from muser_dist.data.shards import ShardIndex
from muser_dist.data.storage import Storage
from muser_dist.muser import save_model

SNAPSHOT = "snapshot"
"""Folder in the run's folder that holds the weights that are being scored."""


class Validation:
    """One snapshot at a time is scored; what becomes due meanwhile is left out. All work is rank 0's.

    The task takes a GPU where the cluster has more of them than workers, and else no slot of its own: decoding holds
    those of the CPUs, and a task that asked for one would wait for ever.
    """

    def __init__(self, config: RunConfig) -> None:
        self._config = config
        self._task: tuple[int, Any] | None = None

    def idle(self) -> bool:
        """Whether none is being scored."""
        return self._task is None

    def start(self, step: int, weights: dict[str, Tensor]) -> None:
        """Begins to score the weights of a step; those of ranks other than 0 are empty."""
        if dist.get_rank() > 0:
            return
        config, spare = self._config, ray.available_resources().get("GPU", 0)  # other runs may have the rest
        folder = config.folder / SNAPSHOT
        save_model(folder, weights, config)
        index = ShardIndex.load(config.folder / "val-index.json")
        gpu = config.train.gpu and spare >= 1
        task = ray.remote(_validate).options(num_cpus=0, num_gpus=int(gpu))
        self._task = step, task.remote(folder, config, index, Storage.of(config.data), "cuda" if gpu else "cpu")

    def poll(self) -> tuple[int, dict[str, Any]] | None:
        """The step and the scores of a snapshot that have become ready."""
        if self._task is None:
            return None
        step, task = self._task
        if not ray.wait([task], timeout=0)[0]:
            return None
        self._task = None
        try:
            return step, ray.get(task)
        except Exception as error:  # training is worth more than a score
            return step, {"error": f"{type(error).__name__}: {str(error).strip().splitlines()[-1]}"}

    def close(self) -> None:
        """Ends what is not ready: the trained model is scored anyway."""
        if self._task is not None:
            with contextlib.suppress(Exception):
                ray.cancel(self._task[1], force=True)
        if dist.get_rank() == 0:
            shutil.rmtree(self._config.folder / SNAPSHOT, ignore_errors=True)


def _validate(*arguments: Any) -> dict[str, float]:
    from muser_dist.evaluate.validation import validate

    return validate(*arguments)
