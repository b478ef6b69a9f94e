"""Every row that a run was dealt is counted: read = used + quarantined."""

import json
from collections import Counter
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import torch.distributed as dist

from muser_dist.data.chunks import Chunk, chain_digest, chunk_digest
from muser_dist.objectives.collectives import world

Moment = tuple[int, int]


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
    clips: Counter[bool]  # rows that were heard, by whether their clip came from the cache


class Accounting:
    """Every row that the run was dealt: read = used + quarantined, and a digest of their order.

    A row is used when it takes part in at least one pair of the objective, or has a label that is learned. The
    quarantine says for every other row why not, and also names the missing part of rows that are used in part.

    Args:
        taking_part: RunConfig.taking_part.
        totals: of an earlier start.

    Attributes:
        totals: "rows_read", "rows_used", "rows_quarantined"; "rows_surplus", samples of shards
            beyond their index; "rows_in_val", rows read that validation holds too; and "digest",
            a SHA-256 over step, chunk, keys and crops of all chunks of all ranks up to the last
            flush: equal where two runs saw the same rows in the same global batches.
    """

    def __init__(self, taking_part: tuple[tuple[str, str], ...], totals: dict[str, Any] | None = None) -> None:
        self.taking_part = taking_part
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
        self._clips: Counter[bool] = Counter()

    def add(self, chunk: Chunk) -> None:
        """Counts a chunk that this rank has trained on."""
        moment = int(chunk["step"]), int(chunk["chunk"])
        used = np.logical_or.reduce([chunk[f"valid_{a}"] & chunk[f"valid_{b}"] for a, b in self.taking_part])
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
                Counter(chunk["cached"][chunk["heard"]].tolist()),
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
            self._clips += part.clips
            self._rows += read
            problems += part.problems
        return problems

    def decode_ms_per_row(self) -> float:
        """Milliseconds of reading and decoding for each row flushed since the last call."""
        value = 1000 * self._seconds / max(1, self._rows)
        self._seconds, self._rows = 0.0, 0
        return round(value, 3)

    def clips(self) -> dict[str, int]:
        """Rows flushed since the last call whose clip came from the cache, and whose was decoded."""
        counts = {"clips_cached": self._clips[True], "clips_decoded": self._clips[False]}
        self._clips.clear()
        return counts

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
