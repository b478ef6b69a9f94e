"""The phases of mining over files: which tasks there are, what each reads and writes, and what became of every row.

    read    a piece of the log        -> interactions by user, names by item
    mine    a partition of users      -> supports by trigger, counts by item
    items   a partition of items      -> items/part-*.parquet
    pairs   a partition of triggers   -> pairs/part-*.parquet

A task of a phase needs all tasks of the phases before and none of its own, runs anywhere where the folder is seen, and
leaves its account last: what has one is never made again. `job.py` runs tasks on Ray.
"""

import hashlib
import json
import shutil
from collections import Counter, defaultdict
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from muser_dist.data.config import Strict
from muser_dist.data.storage import Storage, redact
from muser_dist.errors import ConfigError, DataError, require
from muser_dist.files import whole_file, write_whole
from muser_dist.interactions.ids import hash_names
from muser_dist.interactions.log import LogLayout
from muser_dist.interactions.mining import COUNTS, INTERACTIONS, NAMES, SUPPORTS, MiningConfig, mine, number
from muser_dist.interactions.readers import Piece, read_piece
from muser_dist.interactions.reduce import reduce_items, reduce_pairs
from muser_dist.interactions.spill import map_tables, read_spill, write_spill, write_table
from muser_dist.interactions.split import SplitConfig

Phase = Literal["read", "mine", "items", "pairs"]
PHASES: tuple[Phase, ...] = get_args(Phase)

FORMAT = 1
MANIFEST, SUMMARY = "manifest.json", "summary.json"
_FLUSH_ROWS = 1 << 21
"""Rows of the log that a task keeps before it writes them: a compressed file is one task, whatever its size."""


@dataclass(frozen=True)
class Job(Strict):
    """What decides the result.

    Attributes:
        pieces: of the log.
        layout: what the log's columns mean.
        mining: what a pair is.
        split: what is held out.
        latest: times beyond this, in seconds, are in the future; None: none is.
        items: file of the items that there are, one name in a line; empty: all items of the log.
        partitions: of users, and of items: a power of two, so many that one fits in the memory of a task.
    """

    pieces: tuple[Piece, ...]
    layout: LogLayout
    mining: MiningConfig
    split: SplitConfig
    latest: int | None
    items: str
    partitions: int

    def __post_init__(self) -> None:
        require(
            1 <= self.partitions <= 1 << 16 and self.partitions & (self.partitions - 1) == 0,
            f"partitions is {self.partitions}; it must be a power of two, at most 65536",
        )
        require(
            self.layout.ordered or self.mining.rule != "explicit",
            'mining.rule "explicit" needs to know what came first, and the layout has neither time nor position; '
            'take "cooccurrence"',
        )
        require(
            self.layout.time is not None or not self.split.by_time,
            "split.val_from and split.test_from need times, and the layout has none; hold out users or items",
        )
        self.split.check_times(self.layout.relative_time, self.latest)


class Phases:
    """The phases of a job, in a folder.

    Args:
        job: what is made.
        storage: where the log lies.
        folder: for the result, and for what lies between phases until the result is there; all nodes must see it.
    """

    def __init__(self, job: Job, storage: Storage, folder: Path) -> None:
        self.job, self.storage, self.folder = job, storage, folder
        self._work = folder / "work"

    def claim(self, made_by: dict[str, Any]) -> None:
        """Makes the folder this job's. A job that goes on keeps the `latest` of its first start.

        Args:
            made_by: command, commit and versions; they are not compared.

        Raises:
            DataError: it holds another job's pairs, or something else; or a file of the job is gone.
            ConfigError: it cannot be written.
        """
        wanted = self._definition()
        path = self.folder / MANIFEST
        try:
            if path.exists():
                there = _read_json(path)
                before = there.get("job")
                if there.get("format") != FORMAT or not isinstance(before, dict) or set(before) != set(wanted):
                    raise DataError(f"{path} is of another version; give another --out")
                changed = [name for name, value in wanted.items() if name != "latest" and before[name] != value]
                if changed:
                    raise DataError(
                        f"{self.folder} holds pairs of another log or other settings ({', '.join(changed)} differ); "
                        "give another --out, or delete that folder"
                    )
                self.job = replace(self.job, latest=before["latest"])
            else:
                self.folder.mkdir(parents=True, exist_ok=True)
                # Hidden files are the manifest of a job that died as it wrote it, or a file system's own.
                if not all(file.name.startswith(".") for file in self.folder.iterdir()):
                    raise DataError(f"{self.folder} holds something else; give another --out")
                write_whole(path, json.dumps({"format": FORMAT, "job": wanted, "made_by": made_by}, indent=1))
            for name in ("pairs", "items", *(() if self.summary_path.exists() else ("work",))):
                (self.folder / name).mkdir(exist_ok=True)
        except OSError as error:
            raise ConfigError(f"out: cannot write to {self.folder} ({error.strerror}); give another --out") from None

    def _definition(self) -> dict[str, Any]:
        """The job as JSON values, with what tells its files from other versions of them."""
        made = json.loads(json.dumps(asdict(self.job)))
        for piece in made["pieces"]:
            piece["url"] = redact(piece["url"])
        urls = dict.fromkeys(piece.url for piece in self.job.pieces)
        made["files"] = {redact(url): self.storage.version(url) for url in urls}
        made["items_content"] = _items_hash(self.job.items) if self.job.items else ""
        return made

    # --- Tasks ---

    def tasks(self, phase: Phase) -> int:
        """How many tasks a phase has."""
        return len(self.job.pieces) if phase == "read" else self.job.partitions

    def missing(self, phase: Phase) -> list[int]:
        """The tasks of a phase that have not ended."""
        there = {path.name for path in self._work.glob(f"{phase}-*.json")}
        return [i for i in range(self.tasks(phase)) if self._account(phase, i).name not in there]

    def run(self, phase: Phase, i: int) -> None:
        """Does a task.

        Raises:
            DataError: of a file of the log, or of names that cannot be told apart.
        """
        account = getattr(self, f"_{phase}")(i)
        write_whole(self._account(phase, i), json.dumps(account))

    def _read(self, i: int) -> dict[str, Any]:
        job = self.job
        reasons: Counter[str] = Counter()
        signals: Counter[str] = Counter()
        known = _known_items(job.items) if job.items else None
        numbers: list[pa.Table] = []
        names: list[pa.Table] = []
        files = rows = 0

        def flush() -> None:
            nonlocal files
            write_spill(self._spill("read", i, files), pa.concat_tables(numbers), "user", job.partitions)
            named = pa.concat_tables(names).group_by(["item", "name"], use_threads=False).aggregate([])
            write_spill(self._spill("names", i, files), named, "item", job.partitions)
            numbers.clear()
            names.clear()
            files += 1

        for table, left_out in read_piece(self.storage, job.pieces[i], job.layout, job.latest):
            numbered, named, unused, seen = number(table, job.mining, known)
            rows += table.num_rows + left_out.total()
            reasons += left_out + unused
            signals += seen
            numbers.append(numbered)
            names.append(named)
            if sum(len(part) for part in numbers) >= _FLUSH_ROWS:
                flush()
        if numbers:
            flush()
        return {"rows": rows, "reasons": reasons, "signals": signals}

    def _mine(self, i: int) -> dict[str, Any]:
        interactions = read_spill(self._spills("read"), i, INTERACTIONS)
        mined = mine(interactions, self.job.mining, self.job.split, self.job.layout.ordered)
        write_spill(self._spill("mine", i), mined.supports, "trigger", self.job.partitions)
        write_spill(self._spill("counts", i), mined.counts, "item", self.job.partitions)
        return {"reasons": mined.reasons, "used": mined.used, "users": mined.users, "users_with_pairs": mined.paired}

    def _items(self, i: int) -> dict[str, Any]:
        counts = read_spill([self._spill("counts", part) for part in range(self.job.partitions)], i, COUNTS)
        items = reduce_items(read_spill(self._spills("names"), i, NAMES), counts, self.job.split)
        write_table(self._spill("items", i), items)
        _write_parquet(self.folder / "items" / f"part-{i:05d}.parquet", items.drop_columns("id"))
        return {"items": Counter(items["split"].to_pylist())}

    def _pairs(self, i: int) -> dict[str, Any]:
        supports = read_spill([self._spill("mine", part) for part in range(self.job.partitions)], i, SUPPORTS)
        items = map_tables(self._spill("items", part) for part in range(self.job.partitions))
        pairs = reduce_pairs(supports, items, self.job.mining, self.job.split)
        _write_parquet(self.folder / "pairs" / f"part-{i:05d}.parquet", pairs)
        return {"pairs": Counter(pairs["split"].to_pylist())}

    # --- Files ---

    @property
    def summary_path(self) -> Path:
        """What the job has made, in numbers; there when everything else is."""
        return self.folder / SUMMARY

    def _account(self, phase: Phase, i: int) -> Path:
        return self._work / f"{phase}-{i:05d}.json"

    def _spill(self, name: str, i: int, file: int = 0) -> Path:
        return self._work / f"{name}-{i:05d}-{file:05d}.arrow"

    def _spills(self, name: str) -> list[Path]:
        """What all tasks of the first phase have written under a name."""
        return sorted(self._work.glob(f"{name}-*.arrow"))

    def finish(self, made_by: dict[str, Any]) -> dict[str, Any]:
        """Adds up the accounts, writes summary.json, and removes what lies between phases.

        Args:
            made_by: command, commit and versions.

        Raises:
            DataError: no interaction of the log could be used.
        """
        if self.summary_path.exists():
            shutil.rmtree(self._work, ignore_errors=True)
            return _read_json(self.summary_path)
        accounts = [_read_json(self._account(phase, i)) for phase in PHASES for i in range(self.tasks(phase))]
        rows = sum(account.get("rows", 0) for account in accounts)
        added: defaultdict[str, Counter[str]] = defaultdict(Counter)
        for account in accounts:
            for name, numbers in account.items():
                if isinstance(numbers, dict):
                    added[name].update(numbers)
        used = added["used"].total()
        assert rows == used + added["reasons"].total(), "a row of the log is neither used nor accounted for"
        if not used:
            reasons = ", ".join(f"{reason}: {number:,}" for reason, number in added["reasons"].most_common())
            signals = ", ".join(f"{signal} ({number:,})" for signal, number in added["signals"].most_common(20))
            raise DataError(
                f"none of {rows:,} rows could be used ({reasons or 'the log is empty'}); the log's signals are: "
                f"{signals or 'none'}; see --layout, --mining.signals and --mining.triggers"
            )
        summary = {
            "rows": rows,
            "used": used,
            "left_out": dict(added["reasons"].most_common()),
            "signals": dict(added["signals"].most_common(100)),
            "interactions": dict(added["used"]),
            "users": dict(added["users"]),
            "users_with_pairs": dict(added["users_with_pairs"]),
            "items": dict(added["items"]),
            "pairs": dict(added["pairs"]),
            "made_by": made_by,
        }
        write_whole(self.summary_path, json.dumps(summary, indent=1))
        shutil.rmtree(self._work, ignore_errors=True)
        return summary


@lru_cache(maxsize=1)
def _known_items(path: str) -> np.ndarray:
    """Sorted numbers of the items that a file lists; they stay in the process from task to task."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            return np.unique(hash_names(pa.array([line.rstrip("\r\n") for line in file], pa.string())))
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"items: {path} cannot be read: {error}") from None


def _items_hash(path: str) -> str:
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"items: {path} cannot be read: {error}") from None


def _write_parquet(path: Path, table: pa.Table) -> None:
    with whole_file(path) as file:
        pq.write_table(table, file, compression="zstd")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({error}); delete the folder it lies in") from None
    return content if isinstance(content, dict) else {}
