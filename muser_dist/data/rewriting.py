"""What jobs have in common that write shards anew with other members in them: a task on Ray for each shard.

A new shard has the name of its source and those of its rows, with their keys, that have no problem; the others, which
are of no use to training, are in the job's quarantine. It is whole or not there.
"""

import io
import logging
import os
import tarfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from muser_dist.data.shards import ShardIndex
from muser_dist.data.storage import Storage, local_path, redact
from muser_dist.data.tar import Sample, Stored
from muser_dist.errors import ClusterError, ConfigError, DataError
from muser_dist.files import whole_file


def check_names(index: ShardIndex, folder: Path) -> None:
    """Raises ConfigError where new shards in a folder would overwrite each other or their sources."""
    names = Counter(Path(url).name for url in index.urls)
    if twice := next((name for name, count in names.items() if count > 1), None):
        raise ConfigError(f"--shards: two shards are called {twice}, and so would the new ones; take them apart")
    if any(Path(path).parent == folder for path in map(local_path, index.urls) if path is not None):
        raise ConfigError(f"--out {folder} is where the shards lie, which would be overwritten; give another folder")


def open_source(storage: Storage, url: str) -> BinaryIO:
    """A source, opened; raises DataError where it cannot be."""
    try:
        return storage.open(url)
    except (DataError, OSError) as error:
        raise DataError(f"--shards: {redact(url)} {error}; the same command goes on when it can be read") from None


def unreadable(url: str, reason: object) -> DataError:
    """What to raise where a source cannot be read, so that it is blamed, and neither its rows nor what is written."""
    reason = getattr(reason, "strerror", None) or reason  # an OSError's own words
    return DataError(f"--shards: {redact(url)} cannot be read ({reason}); the same command goes on when it can be")


def identity(url: str, source: BinaryIO) -> list[Any]:
    """What tells an open source from another version of it, as JSON values, without reading it."""
    # A copy of a remote shard is named after its version, and its time is that of its last use.
    stat = os.fstat(source.fileno())
    return [Path(source.name).name] if local_path(url) is None else [stat.st_size, stat.st_mtime_ns]


def extension_of(sample: Sample, kind: str) -> str:
    """The extension of the member that is a row's `kind`, by the rule of `Row`; `kind` where there is none."""
    dotted = [extension for extension in sample.members if extension.endswith(f".{kind}")]
    return kind if kind in sample.members or not dotted else dotted[-1]


def write_shard(path: Path, copied: Iterable[tuple[Sample, Mapping[str, bytes | None]]], source: BinaryIO) -> None:
    """Writes a shard, whole or not at all.

    Args:
        path: of the new one.
        copied: its samples, with the content by extension of members that are new, or in place of the source's; None
            where all of the source's are left out.
        source: the shard that they are samples of.

    Raises:
        DataError: the source cannot be read.
        OSError: it cannot be written.
    """
    with whole_file(path) as file, tarfile.open(fileobj=file, mode="w") as tar:
        for sample, new in copied:
            left = {extension_of(sample, kind): content for kind, content in new.items() if content is not None}
            for extension, member in sample.members.items():
                if new.get(extension.rpartition(".")[2], b"") is None:
                    continue
                content = left.pop(extension, None)
                if content is None:
                    try:
                        content = Stored(source.fileno(), member.offset, member.size).read()
                    except OSError as error:
                        raise unreadable(str(source.name), error) from None
                _add(tar, member.name, content)
            for extension, content in left.items():
                _add(tar, f"{sample.key}.{extension}", content)


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    """Adds a member. Equal content makes equal bytes: no times, no owners."""
    info = tarfile.TarInfo(name)
    info.size = len(content)
    info.uname = info.gname = "muser"
    tar.addfile(info, io.BytesIO(content))


def on_ray(count: int, work: Callable[[int], Iterator[str]], gpu_share: float = 0.0) -> Iterator[str]:
    """Yields what `work` yields for the numbers from 0 to count - 1, in any order.

    Args:
        count: of numbers, each a task with a CPU.
        work: what a task does.
        gpu_share: of a GPU that a task has besides.

    Raises:
        ClusterError: the cluster has no CPU, or no GPU where one is needed, or its nodes die.
        MuserError: as `work`.
    """
    import pyarrow as pa  # takes seconds, as does Ray
    import ray
    import ray.data
    import ray.exceptions

    from muser_dist.data.executor import TaskNumbers, set_context
    from muser_dist.data.session import error_of_user

    cpus, gpus = (ray.cluster_resources().get(name, 0) for name in ("CPU", "GPU"))
    slots = int(min(cpus, gpus / gpu_share) if gpu_share else cpus)
    if cpus < 1:
        raise ClusterError("the cluster has no CPU that could read shards; start nodes with --num-cpus")
    if slots < 1:
        raise ClusterError("--gpu: the cluster has no GPU; leave it out, or start nodes that have some")

    def task(batch: dict[str, np.ndarray]) -> Iterator[pa.Table]:
        return (pa.table({"made": [text]}) for number in batch["id"].tolist() for text in work(number))

    class Task:
        """An actor, because a process keeps to the GPU that it was given first."""

        def __call__(self, batch: dict[str, np.ndarray]) -> Iterator[pa.Table]:
            return task(batch)

    set_context(slots)
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    dataset = TaskNumbers(count, slots).dataset()
    if gpu_share:
        # Not restarted: where no other GPU is free, what an actor had in hand would wait for one without end.
        once: dict[str, Any] = {"max_restarts": 0, "max_task_retries": 0}
        pool = ray.data.ActorPoolStrategy(
            min_size=1, initial_size=min(slots, count), max_size=slots, max_tasks_in_flight_per_actor=1
        )
        with warnings.catch_warnings(action="ignore", category=DeprecationWarning):  # of the only way to say so
            dataset = dataset.map_batches(Task, batch_size=1, num_cpus=1, num_gpus=gpu_share, compute=pool, **once)
    else:
        dataset = dataset.map_batches(task, batch_size=None, num_cpus=1)
    try:
        for block in dataset.iter_batches(batch_size=None, batch_format="numpy", prefetch_batches=4):
            yield from block["made"].tolist()
    except ray.exceptions.RayError as error:
        if (cause := error_of_user(error)) is not None:
            raise cause from None
        last = str(error).strip().splitlines()[-1]
        raise ClusterError(f"reading or writing shards ended: {last}; the same command goes on") from error
