"""Tables between two phases, in files: a task writes one file, in which each partition is a record batch of its own.

So n tasks and p partitions make n files and not n times p; a task of the next phase reads its own batch of each. Files
are whole or not there, and two tasks may write the same one at a time: a task whose node seemed to be dead may live.
"""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pyarrow as pa

from muser_dist.files import whole_file
from muser_dist.interactions.ids import partition_of


def write_spill(path: Path, table: pa.Table, column: str, partitions: int) -> None:
    """Writes a table as so many batches, by the partition that `ids.partition_of` gives to the numbers of a column.

    Args:
        path: of the file; what was there is replaced.
        table: with any rows, in any order.
        column: uint64.
        partitions: a power of two, at most 2^16.
    """
    # Numbers of 16 bits are sorted in linear time.
    partition = partition_of(table[column].to_numpy(), partitions).astype(np.uint16)
    table = table.take(pa.array(np.argsort(partition, kind="stable"))).combine_chunks()
    ends = np.cumsum(np.bincount(partition, minlength=partitions)).tolist()
    with whole_file(path) as file, pa.ipc.new_file(file, table.schema, options=_LZ4) as writer:
        for begin, end in zip([0, *ends], ends, strict=False):
            batches = table.slice(begin, end - begin).to_batches()
            writer.write_batch(batches[0] if batches else _empty(table.schema))


def read_spill(paths: Iterable[Path], partition: int, schema: pa.Schema) -> pa.Table:
    """The rows of a partition out of all files that `write_spill` has written."""
    batches = []
    for path in paths:
        with pa.memory_map(str(path)) as file:
            batches.append(pa.ipc.open_file(file).get_batch(partition))
    return pa.Table.from_batches(batches, schema)


def write_table(path: Path, table: pa.Table) -> None:
    """Writes a table as `map_tables` reads it."""
    with whole_file(path) as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)


def map_tables(paths: Iterable[Path]) -> pa.Table:
    """The tables of files, one after the other; their columns stay in the files, so all processes share the memory."""
    return pa.concat_tables([pa.ipc.open_file(pa.memory_map(str(path))).read_all() for path in paths])


_LZ4 = pa.ipc.IpcWriteOptions(compression="lz4")


def _empty(schema: pa.Schema) -> pa.RecordBatch:
    return pa.RecordBatch.from_arrays([pa.array([], kind) for kind in schema.types], schema=schema)
