"""Rows of shards, or files, as batches of windows, and the windows' embeddings: plain Python, which Ray calls.

A task is a range of rows. Its windows come in batches of a fixed number of rows each, dicts of arrays:

    first, stop      int64 ()            the rows of the task
    batch            int64 ()            number of the batch in the task
    row              int64 (c,)          row of each window; -1 is padding
    audio            int16 (c, samples), where sound is read
    audio_length     int32 (c,)          samples before the padding
    patches          uint8 (c, patches, 64), where notation is read in its place
    patches_length   int32 (c,)          patches before the padding
    new              int32 (c,)          patches that no window of the piece before it has
    about            str                 "" but in the task's last batch: JSON, {"rows": [...], "problems": [...]}

A row there has "row", "key", "shard", "windows" (how many were made of it, 0 where it was not heard), "text" (its
sentence or None) and "fields"; a problem is an entry of the quarantine.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from muser_dist.config import Modality
from muser_dist.data.chunks import Chunk
from muser_dist.data.config import DataConfig
from muser_dist.data.decoder import Crop, Piece, decoder
from muser_dist.data.rewriting import unreadable
from muser_dist.data.rows import FileReader, Row, RowReader
from muser_dist.data.symbolic.characters import PATCH_BYTES
from muser_dist.data.symbolic.members import draw_members
from muser_dist.data.text import TextPolicy, joined, read_fields
from muser_dist.data.windows import Windows
from muser_dist.errors import DataError, UnreadError, require
from muser_dist.muser import Muser


@dataclass(frozen=True)
class Wanted:
    """What is embedded of each row.

    Attributes:
        modalities: of the model's.
        windows: whether whole clips are heard or their middle, as of `Muser.encode_audio`.
        hop_seconds: from a window's begin to the next one's.
        fields: metadata fields that are copied, as text.
    """

    modalities: tuple[Modality, ...]
    windows: Windows
    hop_seconds: float
    fields: tuple[str, ...]

    def __post_init__(self) -> None:
        require(
            self.heard == ("symbolic",) or "symbolic" not in self.heard,
            "modalities: sound and notation are read apart; embed them into a folder each",
        )

    @property
    def heard(self) -> tuple[Modality, ...]:
        """The modalities that are made of windows: of sound, or notation alone."""
        return tuple(name for name in self.modalities if name != "text")

    @property
    def notation(self) -> bool:
        """Whether windows are of notation."""
        return "symbolic" in self.modalities


class SongReader:
    """Reads tasks.

    Args:
        rows: reads single rows.
        data: how clips and texts are treated.
        wanted: what is read of each.
        batch: windows in a batch (c).
    """

    def __init__(self, rows: RowReader | FileReader, data: DataConfig, wanted: Wanted, batch: int) -> None:
        self.rows = rows
        self.data = data
        self.wanted = wanted
        self.batch = batch
        self._policy = TextPolicy(data, data.templates)
        self._first = np.concatenate([[0], np.cumsum(rows.index.rows)])

    def read(self, first: int, stop: int) -> Iterator[Chunk]:
        """Yields the batches of a task, the rows first <= r < stop.

        Raises:
            DataError: a shard cannot be opened or read, so that what it lacks is not taken for damage of its rows.
        """
        told: dict[int, dict[str, Any]] = {}
        problems: list[dict[str, Any]] = []
        pieces: dict[int, Piece] = {}
        kept: list[Row] = []  # their files stay open as long as they are there

        def report(number: int, row: Row, member: str, reason: object, **fields: Any) -> None:
            place = {"row": number, "shard": row.shard, "key": row.key}
            problems.append(place | {"member": member, "reason": str(reason), "count": 1} | fields)

        for number in range(first, stop):
            row = self._row(number, report)
            kept.append(row)
            if row.problem is not None:
                report(number, row, "", row.problem)
                continue
            told[number] = {"row": number, "key": row.key, "shard": row.shard, "windows": 0}
            told[number] |= self._read_text(number, row, report)
            if self.wanted.heard:
                try:
                    pieces[number] = self._piece(row)
                except DataError as error:
                    report(number, row, "", error)

        def unheard(number: int, error: DataError) -> None:
            if isinstance(error, UnreadError) and isinstance(self.rows, RowReader):
                raise unreadable(kept[number - first].shard, error)
            told[number]["windows"] = 0
            report(number, kept[number - first], pieces[number].extension, error)

        batch, filled = self._empty(first, stop, 0), 0
        for number, window in self._windows(pieces, unheard):
            if filled == self.batch:
                yield batch
                batch, filled = self._empty(first, stop, int(batch["batch"]) + 1), 0
            batch["row"][filled] = number
            for name, value in window.items():
                batch[name][filled] = value
            filled += 1
            told[number]["windows"] += 1
        batch["about"] = np.str_(json.dumps({"rows": list(told.values()), "problems": problems}))
        yield batch

    def _row(self, number: int, report: Callable[..., None]) -> Row:
        shard = int(np.searchsorted(self._first, number, side="right")) - 1
        within = number - int(self._first[shard])
        row = self.rows.row(shard, within)
        if row.unread:
            raise unreadable(row.shard, row.problem)
        if within == 0 and (surplus := self.rows.surplus(shard)):  # told once: by whoever reads the shard's first row
            reason = f"the shard holds {surplus} samples more than its index says; they are not used"
            report(number, row, "", reason, row=None, key="", count=surplus)
        return row

    def _read_text(self, number: int, row: Row, report: Callable[..., None]) -> dict[str, Any]:
        """The sentence and the fields of a row, as far as they are wanted."""
        told: dict[str, Any] = {"text": None, "fields": {}}
        if "text" not in self.wanted.modalities and not self.wanted.fields:
            return told
        try:
            metadata, text = row.read("json"), row.read("txt")
            if metadata is None and text is None:
                raise DataError("no .json and no .txt member")
            values = read_fields(metadata, text)
            lines = joined(values)
            told["fields"] = {name: lines[name] for name in self.wanted.fields if name in lines}
            if "text" in self.wanted.modalities:
                told["text"], _ = self._policy.say(values, None)
        except OSError as error:
            raise unreadable(row.shard, error) from None
        except DataError as error:
            report(number, row, "json", error)
        return told

    def _piece(self, row: Row) -> Piece:
        """The member that windows are made of; raises DataError where there is none."""
        if not self.wanted.notation:
            return Piece(row.sound(), row.audio or "", None)
        extension, *_ = draw_members(row.extensions, self.data.symbolic)
        member = row.member(extension)
        assert member is not None, "a member that the row does not have"
        return Piece(member, extension, None)

    def _windows(
        self, pieces: dict[int, Piece], unheard: Callable[[int, DataError], None]
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        """Row and arrays of each window of some members; those that have none are told."""
        if self.wanted.windows == "middle" and not self.wanted.notation:
            yield from self._middles(pieces, unheard)
            return
        for number, piece in pieces.items():
            try:
                for window in self._all(piece):
                    yield number, window
            except DataError as error:
                unheard(number, error)

    def _middles(
        self, sounds: dict[int, Piece], unheard: Callable[[int, DataError], None]
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        numbers = list(sounds)
        into = np.empty((len(sounds), self.data.crop_samples), np.int16)
        crops = {i: Crop(sounds[number].member, 0.5, None) for i, number in enumerate(numbers)}
        for i, decoded in decoder(self.data).decode(crops, into).items():
            if isinstance(decoded, DataError):
                unheard(numbers[i], decoded)
            else:
                yield numbers[i], {"audio": into[i], "audio_length": decoded.length}

    def _all(self, piece: Piece) -> Iterator[dict[str, Any]]:
        isolated = decoder(self.data)
        if self.wanted.notation:
            for patches, length, new in isolated.pieces(piece.member, piece.extension):
                yield {"patches": patches, "patches_length": length, "new": new}
        else:
            for waveform, length in isolated.windows(piece.member, self.wanted.hop_seconds):
                yield {"audio": waveform, "audio_length": length}

    def _empty(self, first: int, stop: int, number: int) -> Chunk:
        c = self.batch
        if self.wanted.notation:
            patches = np.zeros((c, self.data.symbolic.max_patches, PATCH_BYTES), np.uint8)
            windows = {"patches": patches, "patches_length": np.zeros(c, np.int32), "new": np.zeros(c, np.int32)}
        else:
            waveforms = np.zeros((c, self.data.crop_samples), np.int16)
            windows = {"audio": waveforms, "audio_length": np.zeros(c, np.int32)}
        task = {"first": np.int64(first), "stop": np.int64(stop), "batch": np.int64(number)}
        return {**task, "row": np.full(c, -1, np.int64), **windows, "about": np.str_("")}


def encode_windows(muser: Muser, batch: Chunk, wanted: Wanted) -> dict[str, Any]:
    """What a batch of `SongReader` adds to its task's embeddings.

    Returns:
        "first", "stop", "batch" and "about" as they are; "rows" (n,) int64, the rows that have a window in it; for each
        modality (n, dim) float64, the sums of their windows' embeddings of unit length, of notation each weighted with
        its new patches, and for "text" the sentences' of all rows that "about" has one of, in order.
    """
    there = batch["row"] >= 0
    rows, place = np.unique(batch["row"][there], return_inverse=True)
    result = {name: batch[name] for name in ("first", "stop", "batch", "about")} | {"rows": rows}
    names = ("patches", "patches_length", "new") if wanted.notation else ("audio", "audio_length")
    windows = {name: batch[name][there] for name in names}
    for modality in wanted.heard:
        sums = np.zeros((len(rows), muser.dim))
        if len(rows):
            embeddings = muser.encode_chunks(modality, [windows])
            np.add.at(sums, place, windows["new"][:, None] * embeddings if wanted.notation else embeddings)
        result[modality] = sums
    if "text" in wanted.modalities:
        about = json.loads(str(batch["about"]) or '{"rows": []}')
        sentences = [row["text"] for row in about["rows"] if row["text"] is not None]
        result["text"] = muser.encode_text(sentences).astype(np.float64)
    return result
