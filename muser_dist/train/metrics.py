"""What a run writes down while it trains: metrics, quarantine and accounts, and the live line.

Rank 0 writes; the driver follows the metrics and prints. All files can be cut back to a step, so
that a run which goes on from a checkpoint leaves no line twice.
"""

import json
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from threading import Event, Thread
from typing import Any, TextIO

import numpy as np
import torch.distributed as dist

from muser_dist.config import PairConfig, RunConfig
from muser_dist.data.chunks import Chunk, chain_digest, chunk_digest
from muser_dist.objectives.collectives import world

Moment = tuple[int, int]

METRICS = "metrics.jsonl"
QUARANTINE = "quarantine.jsonl"
ACCOUNTS = "accounts.jsonl"

TIMES = ("seconds", "samples_per_second", "wait_share", "decode_ms_per_row")
"""Fields of metrics.jsonl that differ between two runs of the same seed."""


@dataclass(frozen=True)
class _Read:
    """What one chunk adds to the accounts."""

    moment: Moment
    digest: str
    read: Counter[tuple[str, int, str]]  # by (source, pass, shard)
    used: Counter[tuple[str, int, str]]
    in_val: int
    problems: list[dict[str, Any]]
    seconds: float


class Accounting:
    """Every row that the run was dealt: read = used + quarantined, and a digest of their order.

    A row is used when it takes part in at least one pair of the objective. The quarantine says
    for every other row why not, and also names the missing part of rows that are used in part.

    Attributes:
        totals: "rows_read", "rows_used", "rows_quarantined"; "rows_surplus", samples of shards
            beyond their index; "rows_in_val", rows read that validation holds too; and "digest",
            a SHA-256 over step, chunk, keys and crops of all chunks of all ranks up to the last
            flush: equal where two runs saw the same rows in the same global batches.
    """

    def __init__(self, pairs: tuple[PairConfig, ...], totals: dict[str, Any] | None = None) -> None:
        self.pairs = pairs
        nothing: dict[str, Any] = {
            "rows_read": 0,
            "rows_used": 0,
            "rows_quarantined": 0,
            "rows_surplus": 0,
            "rows_in_val": 0,
        }
        self.totals = totals or nothing | {"digest": ""}
        self._new: list[_Read] = []
        self._read: Counter[tuple[str, int, str]] = Counter()
        self._used: Counter[tuple[str, int, str]] = Counter()
        self._seconds = 0.0
        self._rows = 0

    def add(self, chunk: Chunk) -> None:
        """Counts a chunk that this rank has trained on."""
        moment = int(chunk["step"]), int(chunk["chunk"])
        pairs = [chunk[f"valid_{pair.first}"] & chunk[f"valid_{pair.second}"] for pair in self.pairs]
        used = np.logical_or.reduce(pairs)
        real = chunk["row"] >= 0
        where = list(zip(chunk["source"], chunk["epoch"].tolist(), chunk["shard"], strict=True))
        self._new.append(
            _Read(
                moment,
                chunk_digest(*moment, chunk["key"], chunk["crop"]),
                Counter(place for place, counts in zip(where, real, strict=True) if counts),
                Counter(place for place, counts in zip(where, used, strict=True) if counts),
                int(chunk["in_val"].sum()),
                [{"step": moment[0], **json.loads(entry)} for entry in chunk["problems"]],
                float(chunk["seconds"]),
            )
        )

    def flush(self) -> list[dict[str, Any]]:
        """Brings all ranks' rows since the last flush into the totals; a collective.

        Returns:
            the new quarantine entries, in an order that does not depend on the number of ranks.
        """
        of_ranks: list[Any] = [self._new]
        if world()[1] > 1:
            of_ranks = [None] * world()[1]
            dist.all_gather_object(of_ranks, self._new)
        self._new = []
        problems = []
        for part in sorted(chain.from_iterable(of_ranks), key=lambda part: part.moment):
            read, used = part.read.total(), part.used.total()
            self.totals["rows_read"] += read
            self.totals["rows_used"] += used
            self.totals["rows_quarantined"] += read - used
            self.totals["rows_in_val"] += part.in_val
            self.totals["rows_surplus"] += sum(entry["count"] for entry in part.problems if entry["row"] is None)
            if read:  # an all-masked chunk that pads the step says nothing about the data
                self.totals["digest"] = chain_digest(self.totals["digest"], part.digest)
            self._read += part.read
            self._used += part.used
            self._seconds += part.seconds
            self._rows += read
            problems += part.problems
        return problems

    def decode_ms_per_row(self) -> float:
        """Milliseconds of reading and decoding for each row flushed since the last call."""
        value = 1000 * self._seconds / max(1, self._rows)
        self._seconds, self._rows = 0.0, 0
        return round(value, 3)

    def accounts(self) -> list[dict[str, Any]]:
        """What was flushed since the last call: read = used + quarantined for each source, pass and shard."""
        lines = []
        for place, read in self._read.items():
            source, epoch, shard = place
            used = self._used[place]
            counts = {"read": read, "used": used, "quarantined": read - used}
            lines.append({"source": source, "pass": epoch, "shard": shard} | counts)
        self._read.clear()
        self._used.clear()
        return lines


class Stopwatch:
    """Times of the steps since the last lap: what was spent waiting for data, and overall."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._waited = 0.0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Counts the block as time spent waiting for data."""
        start = time.perf_counter()
        yield
        self._waited += time.perf_counter() - start

    def lap(self, samples: int) -> dict[str, float]:
        """Seconds, samples per second and the share of waiting since the last lap."""
        now = time.perf_counter()
        seconds = now - self._start
        times = {
            "seconds": round(seconds, 3),
            "samples_per_second": round(samples / seconds, 2),
            "wait_share": round(self._waited / seconds, 4),
        }
        self._start, self._waited = now, 0.0
        return times


class RunLog:
    """Appends to the files of a run's folder; only rank 0 makes one."""

    def __init__(self, folder: Path, step: int) -> None:
        """Opens the files of a run that goes on after `step` optimizer steps: later lines are dropped."""
        self._metrics = _reopen(folder / METRICS, lambda entry: entry["step"] <= step)
        self._quarantine = _reopen(folder / QUARANTINE, lambda entry: entry["step"] < step)
        self._accounts = _reopen(folder / ACCOUNTS, lambda entry: entry["step"] <= step)

    def quarantine(self, problems: list[dict[str, Any]]) -> None:
        """Writes quarantine entries."""
        self._quarantine.writelines(json.dumps(problem) + "\n" for problem in problems)
        self._quarantine.flush()

    def accounts(self, step: int, lines: list[dict[str, Any]]) -> None:
        """Writes what was read since the last checkpoint: the sums over the file are the run's accounts."""
        self._accounts.writelines(json.dumps({"step": step} | line) + "\n" for line in lines)
        self._accounts.flush()

    def metrics(self, line: dict[str, Any]) -> None:
        """Writes a line of metrics."""
        self._metrics.write(json.dumps(line) + "\n")
        self._metrics.flush()

    def close(self) -> None:
        """Closes the files."""
        self._metrics.close()
        self._quarantine.close()
        self._accounts.close()


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The entries of a .jsonl file; a last line that was cut short is left out, a missing file is empty."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def last_line(path: Path) -> dict[str, Any] | None:
    """The last whole entry of a .jsonl file, without reading what is before; None where there is none."""
    if not path.exists():
        return None
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 65_536))
        lines = file.read().split(b"\n")[:-1]  # what follows the last line break is still being written
    return json.loads(lines[-1]) if lines else None


def _reopen(path: Path, keep: Any) -> TextIO:
    kept = [entry for entry in read_lines(path) if keep(entry)]
    temporary = path.with_suffix(".part")
    temporary.write_text("".join(json.dumps(entry) + "\n" for entry in kept))
    temporary.replace(path)
    return path.open("a")


@contextmanager
def live_line(config: RunConfig, out: TextIO = sys.stdout) -> Iterator[None]:
    """Prints each new line of metrics.jsonl while the block runs; on a terminal, over the one before."""
    done = Event()
    before = last_line(config.folder / METRICS)  # of an earlier start of this run; read before the block can write

    def follow() -> None:
        shown = before["step"] if before else None
        ended = False
        while not ended:
            ended = done.wait(0.5)  # one more look after the block has ended
            entry = last_line(config.folder / METRICS)
            if entry and entry["step"] != shown:
                shown = entry["step"]
                print(describe(entry, config), file=out, flush=True, end="\r" if out.isatty() else "\n")
        if out.isatty() and shown is not None:
            print(file=out, flush=True)

    thread = Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def describe(metrics: dict[str, Any], config: RunConfig) -> str:
    """One line for the screen."""
    left = (config.train.steps * config.train.global_batch - metrics["samples"]) / metrics["samples_per_second"]
    temperatures = "/".join(f"{v:.3f}" for k, v in metrics.items() if k.startswith("temperature/"))
    bad = f"  quarantined {metrics['rows_quarantined']:,}" if metrics["rows_quarantined"] else ""
    return (
        f"samples {metrics['samples']:>9,}/{config.train.steps * config.train.global_batch:,}  "
        f"loss {metrics['loss']:.4f}  temperature {temperatures}  "
        f"{metrics['samples_per_second']:,.1f} samples/s  waiting for data {metrics['wait_share']:4.0%}  "
        f"ETA {int(left // 3600)}:{int(left % 3600 // 60):02d}:{int(left % 60):02d}{bad}"
    )
