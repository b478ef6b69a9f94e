"""Embeds on Ray: tasks of some rows go to whatever machines there are, and the job writes what comes back as parts.

On CPUs one task decodes and encodes, so that any number of CPUs will do; on GPUs decoding tasks hand windows to actors
that encode. What a dying node took along is made again, by Ray or by another pass over what is left; the job puts each
row into its part once, and asserts it. Parts do not wait for each other, so nothing depends on the order in which Ray
finishes tasks.
"""

import json
import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import ray.data
import ray.exceptions

from muser_dist.config import Modality
from muser_dist.data.chunks import Chunk
from muser_dist.data.decoder_child import keep_freed_memory
from muser_dist.data.executor import TaskNumbers, set_context
from muser_dist.data.pipeline import to_block
from muser_dist.data.session import DEATHS, connected, error_of_user
from muser_dist.embed.parts import Parts
from muser_dist.embed.songs import SongReader, Wanted, encode_windows
from muser_dist.errors import ClusterError, DataError
from muser_dist.evaluate.retrieval import unit_rows
from muser_dist.files import alone_in
from muser_dist.muser import Muser

TASK_ROWS = 64
"""Rows of a task: enough to be worth starting, few enough to be made again without much loss."""


def embed(model: Path, songs: SongReader, parts: Parts, gpu: bool, progress: Callable[[int, int], None]) -> None:
    """Claims the folder of the parts, and makes those that are missing.

    Args:
        model: folder of the exported model; every node must see it, and the shards or files.
        songs: reads the rows.
        parts: takes the embeddings.
        gpu: encodes on the cluster's GPUs, an actor on each, and not on its CPUs.
        progress: called with (rows done, rows).

    Raises:
        ClusterError: no cluster answers, or it has no GPU or CPU.
        ConfigError, DataError: as `Parts.claim`.
        DataError: the model that a node sees is another one, or another job works in the folder.
    """
    with alone_in(parts.folder):
        parts.claim()
        manifest = parts.manifest
        missing = parts.missing()
        done = manifest.rows - sum(stop - first for first, stop in map(manifest.range, missing))
        progress(done, manifest.rows)
        if not missing:
            return
        ranges = [
            (first, min(first + TASK_ROWS, end))
            for begin, end in map(manifest.range, missing)
            for first in range(begin, end, TASK_ROWS)
        ]
        collector = Collector(parts, songs.wanted)
        with connected():
            encoder = Encoder(str(model), manifest.model, songs.wanted, "cuda" if gpu else "cpu")
            while ranges:
                cpus, gpus = (int(ray.cluster_resources().get(name, 0)) for name in ("CPU", "GPU"))
                if gpu and gpus < 1:
                    raise ClusterError("--gpu: the cluster has no GPU; leave it out, or start nodes that have some")
                if cpus < 1:
                    raise ClusterError("the cluster has no CPU that could decode; start nodes with --num-cpus")
                before = done
                try:
                    for result in results(ranges, songs, encoder, cpus, gpus if gpu else 0):
                        if complete := collector.add(result):
                            done += complete
                            progress(done, manifest.rows)
                except ray.exceptions.RayError as error:
                    if (cause := error_of_user(error)) is not None:
                        raise cause from None
                    if not isinstance(error, DEATHS) or done == before:
                        raise ClusterError(f"embedding ended: {str(error).strip().splitlines()[-1]}") from error
                    print("A node or process died; what it had in hand is made again", file=sys.stderr, flush=True)
                assert done > before, "Ray says that all tasks ended, and nothing came"
                ranges = collector.left(ranges)
        assert collector.complete, "all tasks ended, and a part lacks rows"


@lru_cache(maxsize=1)
def load_model(model: str, sha256: str, device: str) -> Muser:
    """The model; it stays in the process from task to task.

    Raises:
        DataError: the node sees another one than that with this `Muser.sha256`.
    """
    muser = Muser.from_pretrained(model, device)
    if muser.sha256 != sha256:
        raise DataError(f"{model} holds another model on a node than where the job started")
    return muser


@dataclass(frozen=True)
class Encoder:
    """Encodes batches; a process loads the model once.

    Attributes:
        model: folder of the model.
        sha256: of the model that it must be.
        wanted: what is encoded.
        device: where it computes.
    """

    model: str
    sha256: str
    wanted: Wanted
    device: str

    def __call__(self, batch: Chunk) -> dict[str, Any]:
        """As `encode_windows`."""
        return encode_windows(load_model(self.model, self.sha256, self.device), batch, self.wanted)


def results(
    ranges: list[tuple[int, int]], songs: SongReader, encoder: Encoder, slots: int, gpus: int
) -> Iterator[dict[str, Any]]:
    """Yields what `encode_windows` gives for each batch of all tasks, in any order.

    Args:
        ranges: rows of each task, first and one after the last.
        songs: reads them.
        encoder: encodes their batches.
        slots: tasks that run at a time, with a CPU each.
        gpus: actors that encode, with a GPU each; where there are none, the tasks that decode encode as well.
    """
    table = np.array(ranges, np.int64)

    def windows(batch: dict[str, np.ndarray]) -> Iterator[Chunk]:
        keep_freed_memory()
        for task in batch["id"].tolist():
            yield from songs.read(*table[task].tolist())

    def decode(batch: dict[str, np.ndarray]) -> Iterator[pa.Table]:
        return (to_block(chunk) for chunk in windows(batch))

    def decode_and_encode(batch: dict[str, np.ndarray]) -> Iterator[pa.Table]:
        return (_columns(encoder(chunk)) for chunk in windows(batch))

    class Encode:
        """An actor, because a process keeps to the GPU that it was given first."""

        def __call__(self, block: dict[str, np.ndarray]) -> pa.Table:
            return _columns(encoder({name: column[0] for name, column in block.items()}))

    set_context(slots)
    logging.getLogger("ray.data").setLevel(logging.ERROR)  # progress says what matters

    tasks = TaskNumbers(len(ranges), slots).dataset()
    if gpus:
        # Not restarted: where no other GPU is free, what an actor had in hand would wait for one without end.
        once: dict[str, Any] = {"max_restarts": 0, "max_task_retries": 0}
        pool = ray.data.ActorPoolStrategy(min_size=1, initial_size=gpus, max_tasks_in_flight_per_actor=2)
        dataset = tasks.map_batches(decode, batch_size=None, num_cpus=1)
        with warnings.catch_warnings(action="ignore", category=DeprecationWarning):  # of the only way to say so
            # A row is a block: None would do, if Ray Data did not ask for a number where there are GPUs.
            dataset = dataset.map_batches(Encode, batch_size=1, num_cpus=0, num_gpus=1, compute=pool, **once)
    else:
        dataset = tasks.map_batches(decode_and_encode, batch_size=None, num_cpus=1)
    for block in dataset.iter_batches(batch_size=None, batch_format="numpy", prefetch_batches=4):
        yield {name: column[0] for name, column in block.items()}


def _columns(result: dict[str, Any]) -> pa.Table:
    """A result as the one row of a block."""
    return pa.table({name: pa.array([value]) for name, value in _flat(result)})


def _flat(result: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in result.items():
        if isinstance(value, np.ndarray) and value.ndim:
            yield name, value.ravel()
        else:
            yield name, np.asarray(value).item()


class Collector:
    """Puts results together, and writes a part when all its rows are there.

    Args:
        parts: takes them.
        wanted: what was embedded.
    """

    def __init__(self, parts: Parts, wanted: Wanted) -> None:
        self._parts = parts
        self._wanted = wanted
        self._tasks: dict[int, dict[int, dict[str, Any]]] = {}  # results by first row of the task and batch
        self._done: set[int] = set()  # first rows of whole tasks
        self._ready: dict[int, dict[int, list[dict[str, Any]]]] = {}  # those of whole tasks, by part and first row

    @property
    def complete(self) -> bool:
        """Whether nothing waits for anything else."""
        return not self._tasks and not self._ready

    def add(self, result: dict[str, Any]) -> int:
        """Takes the result of a batch; returns how many rows have all of theirs with it."""
        first, stop, number = int(result["first"]), int(result["stop"]), int(result["batch"])
        part = first // self._parts.manifest.part_rows
        task = self._tasks.setdefault(first, {})
        assert number not in task and first not in self._done, f"rows from {first} on came twice"
        task[number] = result
        if not task[max(task)]["about"] or len(task) <= max(task):
            return 0
        ready = self._ready.setdefault(part, {})
        ready[first] = [task[i] for i in range(len(task))]
        del self._tasks[first]
        self._done.add(first)
        begin, end = self._parts.manifest.range(part)
        if sum(int(results[0]["stop"]) - task for task, results in ready.items()) == end - begin:
            self._write(part, [ready[task] for task in sorted(ready)])
            del self._ready[part]
        return stop - first

    def left(self, ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
        """The tasks that are not whole, to be made from their first batch on."""
        self._tasks.clear()
        return [task for task in ranges if task[0] not in self._done]

    def _write(self, part: int, tasks: list[list[dict[str, Any]]]) -> None:
        told: list[dict[str, Any]] = []
        problems: list[dict[str, Any]] = []
        for results in tasks:
            about = json.loads(results[-1]["about"])
            told += about["rows"]
            problems += about["problems"]
        place = {row["row"]: i for i, row in enumerate(told)}
        embeddings: dict[Modality, np.ndarray] = {}
        for modality in self._wanted.modalities:
            sums = np.zeros((len(told), self._parts.manifest.dim))
            if modality == "text":
                valid = np.array([row["text"] is not None for row in told], bool)
                sums[valid] = np.concatenate([results[-1]["text"] for results in tasks]).reshape(-1, sums.shape[1])
            else:
                valid = np.array([row["windows"] > 0 for row in told], bool)
                for result in (result for results in tasks for result in results):
                    # A row that failed after some of its windows is among them, and not valid.
                    sums[[place[row] for row in result["rows"]]] += result[modality].reshape(-1, sums.shape[1])
            embeddings[modality] = unit_rows(sums, f"{modality} embeddings").astype(np.float32)
            embeddings[modality][~valid] = np.nan
        used = [i for i in range(len(told)) if any(not np.isnan(values[i, 0]) for values in embeddings.values())]
        embeddings = {modality: values[used] for modality, values in embeddings.items()}
        self._parts.write(part, [told[i] for i in used], embeddings, problems)
