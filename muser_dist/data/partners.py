"""Songs that listeners like together, as numbers of rows: what pairs of songs are drawn from.

A file of pairs (jobs/mine_pairs.py makes one) names songs by the keys of their samples. Before a run they are looked
up in the shards once, and kept in the run's folder as arrays that all tasks map into memory.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset

from muser_dist.data.rows import samples_of
from muser_dist.data.shards import ShardIndex
from muser_dist.data.storage import Storage
from muser_dist.errors import DataError

COLUMNS = ("trigger", "item", "weight")
"""Of a file of pairs: the song that was heard, the one that was liked after it, and how much the pair counts."""

_ARRAYS = ("offsets", "rows", "cumulative", "triggers")


@dataclass(frozen=True)
class Found:
    """What became of a file of pairs.

    Attributes:
        pairs: that are drawn from, of different songs.
        triggers: songs that have a partner.
        unknown: pairs of which a song is in no shard.
        broken: pairs of a song with itself, or with a weight that is no positive number.
        repeated_keys: samples whose key an earlier one has; pairs mean the first.
    """

    pairs: int
    triggers: int
    unknown: int
    broken: int
    repeated_keys: int

    def __str__(self) -> str:
        return (
            f"{self.pairs:,} pairs of {self.triggers:,} songs with the songs that are liked after them "
            f"({self.unknown:,} pairs of unknown songs, {self.broken:,} without a positive weight or of a song with "
            f"itself, {self.repeated_keys:,} repeated keys)"
        )


class Partners:
    """By row, the rows of songs that are liked after it, the likeliest first.

    Args:
        folder: what `find_partners` wrote.

    Attributes:
        triggers: (shards,) int64, how many rows of each shard have a partner.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __getstate__(self) -> Path:
        return self.folder  # tasks map the files themselves

    def __setstate__(self, folder: Path) -> None:
        self.folder = folder

    def _array(self, name: str) -> np.ndarray:
        return np.load(self.folder / f"{name}.npy", mmap_mode="r", allow_pickle=False)

    @cached_property
    def triggers(self) -> np.ndarray:
        """See the class."""
        return np.array(self._array("triggers"))

    @cached_property
    def _mapped(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return self._array("offsets"), self._array("rows"), self._array("cumulative")

    def with_partner(self, first: int, stop: int) -> np.ndarray:
        """The rows from `first` to before `stop` that have one: (n,) int64."""
        return first + np.flatnonzero(np.diff(self._mapped[0][first : stop + 1]))

    def draw(self, row: int, uniform: float) -> int:
        """A partner of a row, by its weight.

        Args:
            row: has a partner.
            uniform: a random number in [0, 1).
        """
        offsets, rows, cumulative = self._mapped
        start, stop = int(offsets[row]), int(offsets[row + 1])
        return int(rows[start + np.searchsorted(cumulative[start : stop - 1], uniform, side="right")])

    def likeliest(self, row: int, count: int) -> np.ndarray:
        """(count,) int64: that many partners of a row; -1 where it has fewer."""
        offsets, rows, _ = self._mapped
        found = np.full(count, -1)
        known = rows[int(offsets[row]) : int(offsets[row + 1])][:count]
        found[: len(known)] = known
        return found


def find_partners(
    path: str, index: ShardIndex, storage: Storage, folder: Path, progress: Callable[[int, int], None]
) -> Found:
    """Looks the songs of a file of pairs up in the shards, and writes what `Partners` reads.

    Needs about 100 bytes of memory for each sample and for each pair.

    Args:
        path: Parquet with COLUMNS, a file or a folder of them; where they have a column "split", pairs that it calls
            "train". Pairs that it holds twice count with both weights.
        index, storage: the training shards, whose headers are read.
        folder: of the run's; made.
        progress: called with (shards done, shards).

    Raises:
        DataError: the file cannot be read or lacks a column, or no pair of it is of songs in the shards.
    """
    setting = f"data.pairs: {path}"
    try:
        pairs = pyarrow.dataset.dataset(path, format="parquet")
        of_training = pc.field("split") == "train" if "split" in pairs.schema.names else None
        table = pairs.to_table(columns=list(COLUMNS), filter=of_training)
        table = table.cast(pa.schema([("trigger", pa.string()), ("item", pa.string()), ("weight", pa.float64())]))
    except (OSError, pa.ArrowException) as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"{setting}: {reason}; give what jobs/mine_pairs.py wrote ({', '.join(COLUMNS)})") from None
    every = len(table)
    keys, repeated = _row_of_keys(index, storage, progress)
    for name, column in (("trigger", "trigger_row"), ("item", "item_row")):
        table = table.join(keys.rename_columns([name, column]), keys=name, join_type="inner")
    unknown = every - len(table)
    weights = table["weight"]
    good = pc.and_(
        pc.not_equal(table["trigger_row"], table["item_row"]), pc.and_(pc.is_finite(weights), pc.greater(weights, 0))
    )
    table = table.filter(pc.fill_null(good, False))
    broken = every - unknown - len(table)
    if not len(table):
        raise DataError(
            f"{setting}: none of its {every:,} pairs is of two songs of the training shards ({unknown:,} name others)"
        )
    # In one order, which joins have not: sums of floats depend on it, and all that are drawn by them.
    table = table.sort_by([("trigger_row", "ascending"), ("item_row", "ascending"), ("weight", "ascending")])
    table = table.group_by(["trigger_row", "item_row"], use_threads=False).aggregate([("weight", "sum")])
    table = table.sort_by([("trigger_row", "ascending"), ("weight_sum", "descending"), ("item_row", "ascending")])
    trigger, weight = (table[name].to_numpy() for name in ("trigger_row", "weight_sum"))
    first = np.concatenate([[0], np.cumsum(index.rows)])
    counts = np.bincount(trigger, minlength=first[-1])
    offsets = np.concatenate([[0], np.cumsum(counts)])
    total = np.cumsum(weight)
    before = np.concatenate([[0.0], total])[offsets[:-1]][trigger]
    whole = np.bincount(trigger, weight, minlength=first[-1])[trigger]
    has = np.concatenate([[0], np.cumsum(counts > 0)])
    arrays = (offsets, table["item_row"].to_numpy(), (total - before) / whole, np.diff(has[first]))
    folder.mkdir(parents=True, exist_ok=True)
    for name, array in zip(_ARRAYS, arrays, strict=True):
        np.save(folder / f"{name}.npy", array, allow_pickle=False)
    return Found(len(table), int((counts > 0).sum()), unknown, broken, repeated)


def _row_of_keys(index: ShardIndex, storage: Storage, progress: Callable[[int, int], None]) -> tuple[pa.Table, int]:
    """The number of the row that has each key, and how many keys come again."""

    def keys_of(shard: int) -> list[str]:
        keys = [sample.key for sample, _ in samples_of(storage, index.url(shard))]
        rows = int(index.rows[shard])
        return (keys + [""] * rows)[:rows]

    columns = []
    with ThreadPoolExecutor(8) as pool:
        for done, keys in enumerate(pool.map(keys_of, range(len(index))), 1):
            columns.append(pa.array(keys, pa.string()))
            progress(done, len(index))
    table = pa.table({"key": pa.chunked_array(columns, pa.string()), "row": np.arange(int(index.rows.sum()))})
    table = table.filter(pc.not_equal(table["key"], ""))
    firsts = table.group_by("key").aggregate([("row", "min")]).select(["key", "row_min"])
    return firsts, len(table) - len(firsts)
