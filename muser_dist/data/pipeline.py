"""The data path from a config: which reader a run needs, and its chunks as a Ray Dataset.

Ray Data reads and decodes in tasks and deals chunk j of a step to worker j mod W.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from muser_dist.config import RunConfig
from muser_dist.data.chunks import Chunk, ChunkReader, chain_digest, chunk_digest
from muser_dist.data.config import SourceConfig
from muser_dist.data.decoder_child import keep_freed_memory
from muser_dist.data.leakage import file_id, title_id
from muser_dist.data.partners import Partners
from muser_dist.data.plan import Plan
from muser_dist.data.rows import RowReader
from muser_dist.data.shards import ShardIndex
from muser_dist.data.storage import Storage
from muser_dist.data.text import read_fields
from muser_dist.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa
    import ray.data

# Most rows of one task. Starting one costs the time of decoding a few rows, and it walks the headers of the
# shards of its window when its process has not yet, so it should decode many.
ROWS_PER_TASK = 256

_MOST_OPEN = 256
"""Shards that a task keeps open where it may need any."""

_LEAST_OPEN = 32
"""And otherwise, if its windows have fewer: a small corpus is walked once, not in each epoch."""


def training_reader(
    config: RunConfig,
    indices: Sequence[ShardIndex],
    storage: Storage,
    val_ids: np.ndarray | None = None,
    partners: Partners | None = None,
) -> ChunkReader:
    """The reader of a training run's chunks, for one worker; its `for_workers` gives those for more.

    Args:
        config: the run.
        indices: the shards of each of config.data.training_sources().
        storage: where they are read from.
        val_ids: what `known_ids` gives for the validation rows; rows that match are marked.
        partners: of the rows of all sources, where data.pairs is given.

    Raises:
        ConfigError: a source's share of a global batch is less than a row.
        DataError: no song of a source has a partner.
    """
    data = config.data
    sources = data.training_sources()
    plan = Plan(
        [index.rows for index in indices],
        [source.weight for source in sources],
        config.train.global_batch,
        config.seed,
        data.window_shards,
        shuffle=True,
        share=data.train_share,
        partners=partners,
    )
    for source, epochs in zip(sources, plan.sources, strict=True):
        if not epochs.length:
            raise DataError(
                f"data.pairs: no song of the source {source.name} is the trigger of a pair, so it has no share of a "
                "batch; leave it out of data.sources, or give pairs of its songs too"
            )
    # Partners are anywhere, but open files have a limit.
    kept = _MOST_OPEN if partners is not None else max(_LEAST_OPEN, 2 * data.window_shards * len(sources))
    return ChunkReader(
        RowReader(ShardIndex.join(list(indices)), storage, kept),
        plan,
        sources,
        config,
        chunk=config.train.chunk,
        chunks_per_step=config.train.chunks_per_step,
        val_ids=np.zeros(0, np.int64) if val_ids is None else val_ids,
        partners=partners,
    )


def evaluation_chunks(config: RunConfig, index: ShardIndex, storage: Storage, first: int = 0) -> Iterator[Chunk]:
    """One pass over the first config.evaluate.rows rows in order, in this process; the last chunk is padded.

    `first` is the number of the chunk to begin with.
    """
    size = config.train.chunk
    before = np.cumsum(index.rows) - index.rows
    rows = np.clip(config.evaluate.rows - before, 0, index.rows)
    plan = Plan([rows], [1.0], size, config.seed, config.data.window_shards, shuffle=False)
    # Waveforms come along whatever training does: the towers make their spectrograms themselves.
    config = replace(config, data=replace(config.data, spectrogram_on="device"))
    source = SourceConfig("val", config.data.val)
    nothing = np.zeros(0, np.int64)
    reader = ChunkReader(RowReader(index, storage), plan, [source], config, size, 1, nothing)
    yield from reader.read(range(first, -(-plan.total // size)))


def known_ids(index: ShardIndex, storage: Storage, rows: int) -> np.ndarray:
    """Ids (file_id, title_id) of the first rows of some shards, sorted, by which training finds them again.

    Raises:
        DataError: a shard cannot be had.
    """
    reader = RowReader(index, storage)
    ids: set[int] = set()
    for shard, count in enumerate(index.rows.tolist()):
        for number in range(min(count, rows)):
            row = reader.row(shard, number)
            if row.unread:
                raise DataError(f"{row.shard}: {row.problem}; start again when it can be, or take the shard out")
            with contextlib.suppress(DataError, OSError):  # evaluation says what is wrong with it
                ids.add(file_id(row.sound()))
            with contextlib.suppress(DataError, OSError):
                ids.update(title_id(read_fields(row.read("json"), None)))
        rows -= min(count, rows)
    return np.array(sorted(ids), np.int64)


def plan_digest(reader: ChunkReader, steps: int) -> str:
    """The digest that a run of so many steps must end with, from the headers of the shards alone.

    It equals "digest" in metrics.jsonl where every row was delivered in its place.
    """
    digest = ""
    for step in range(steps):
        for number in range(reader.chunks_per_step):
            outline = reader.outline(step * reader.slots_per_step + number)
            digest = chain_digest(digest, chunk_digest(step, number, outline.keys, outline.crop))
    return digest


def ray_dataset(reader: ChunkReader, first_step: int, steps: int, slots: int) -> "ray.data.Dataset":
    """The chunks of all steps from `first_step` on, as a Ray Dataset that deals them in order.

    Reading and decoding are one task. One chunk is one row and one block; split with the
    options of muser_dist/data/executor.py, block i goes to split i mod W.

    Args:
        reader: makes the chunks.
        first_step, steps: first step, and the one after the last.
        slots: chunks that are decoded at a time; more when nodes join, unless data.max_decode_slots bounds them.
    """
    import ray

    from muser_dist.data.executor import TaskNumbers, set_context

    first, last = first_step * reader.slots_per_step, steps * reader.slots_per_step
    # Chunks are dealt in order, so those of later tasks wait for all of the first: those of the tasks that run or wait
    # in Ray's queue, two for each slot, take at most half of the buffer.
    fitting = (reader.data.buffer_mib << 20) // (4 * slots * reader.chunk_bytes)
    at_once = max(1, min(ROWS_PER_TASK // reader.chunk, fitting))
    tasks = -(-(last - first) // at_once)

    def read(batch: dict[str, np.ndarray]) -> "Iterator[pa.Table]":
        keep_freed_memory()  # chunks come and go
        for task in batch["id"].tolist():
            start = first + task * at_once
            for chunk in reader.read(range(start, min(last, start + at_once))):
                del chunk["fields"], chunk["text"]  # for evaluation only
                yield to_block(chunk)

    # No task holds a CPU while it waits for somebody to take its chunks. If a node dies, chunks that it had are made
    # again by a task that needs a CPU, and until it is done nobody takes any of what comes after them.
    set_context(slots, blocks=at_once)
    # Tasks, and no actors: what an actor had in hand when its node died would wait for a CPU to start the actor on, and
    # all later chunks with it, perhaps for ever. Their need of CPUs keeps Ray from fusing the source with decoding,
    # which would make few tasks of all.
    pool = ray.data.TaskPoolStrategy(size=reader.data.max_decode_slots or None)
    return TaskNumbers(tasks, slots).dataset().map_batches(read, batch_size=None, num_cpus=1, compute=pool)


def to_block(chunk: Chunk) -> "pa.Table":
    """A chunk as the one row of an Arrow table."""
    import pyarrow as pa
    from ray.data.extensions import ArrowTensorArray

    return pa.table(
        {
            name: pa.array([value])
            if isinstance(value, list)
            else ArrowTensorArray.from_numpy(value[None])
            if value.ndim
            else pa.array([value.item()])
            for name, value in chunk.items()
        }
    )
