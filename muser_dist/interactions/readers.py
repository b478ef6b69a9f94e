"""Reads logs in pieces, each in batches: a log of any size is never in memory as a whole.

A piece is some row groups of a Parquet file, or some bytes of a text file, from the first line that begins in them to
the last. Compressed text has no places to begin at, so each such file is one piece. Lines are what ends in a line
break, also inside of quotation marks.

Every row of the log becomes a row of `log.SCHEMA` or is counted under the reason why it could not.
"""

import csv
import io
import json
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any, BinaryIO, get_args

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from muser_dist.data.storage import Storage, redact
from muser_dist.errors import DataError
from muser_dist.interactions.log import Format, LogLayout
from muser_dist.interactions.rows import MALFORMED, explode, explode_json, normalise

PIECE_BYTES = 64 << 20
"""Bytes of a piece of text: about a million rows."""

PIECE_ROWS = 1 << 20
"""Rows of a piece of a Parquet file, or entries of its lists; one row group where that has more."""

BATCH_ROWS = 1 << 17
"""Most rows of a batch of Parquet or JSON lines."""

_BLOCK_BYTES = 8 << 20
_COMPRESSIONS = {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd"}


@dataclass(frozen=True)
class Piece:
    """A part of a log that one task reads.

    Attributes:
        url: path or URL of the file.
        start, stop: row groups of a Parquet file; bytes of text; all bytes of a file where text is compressed.
        rows: of the row groups, or the entries of their lists where these are more; 0 where text is not counted yet.
    """

    url: str
    start: int
    stop: int
    rows: int = 0


def pieces_of(storage: Storage, urls: list[str], layout: LogLayout) -> list[Piece]:
    """The pieces of a log's files, in their order.

    Raises:
        DataError: a file cannot be read, has no such columns, or its name does not tell its format.
    """
    return [piece for url in urls for piece in _of_file(storage, url, layout)]


def _of_file(storage: Storage, url: str, layout: LogLayout) -> Iterator[Piece]:
    kind, compression = format_of(url, layout)
    if layout.lists and kind in ("csv", "tsv"):
        raise DataError(f"{redact(url)}: the layout has lists, which {kind} cannot hold; give Parquet or JSON lines")
    with _opened(storage, url) as file:
        if kind == "parquet":
            parquet = pq.ParquetFile(file)
            _require_columns(parquet.schema_arrow.names, url, layout)
            start, rows = 0, 0
            groups = parquet.metadata.num_row_groups
            for group in range(groups):
                rows += _rows_of(parquet.metadata.row_group(group), layout)
                if rows >= PIECE_ROWS or group == groups - 1:
                    yield Piece(url, start, group + 1, rows)
                    start, rows = group + 1, 0
            return
        if kind != "jsonl":
            _require_columns(_column_names(file, url, kind, layout, compression), url, layout)
        size = file.seek(0, io.SEEK_END)
        step = max(size, 1) if compression else PIECE_BYTES
        for start in range(0, size, step):
            yield Piece(url, start, min(start + step, size))


def _rows_of(group: pq.RowGroupMetaData, layout: LogLayout) -> int:
    """Rows of a row group, or entries of its lists: what becomes an interaction each."""
    names = tuple(f"{name}." for name in layout.used())  # a path is a name, of lists with ".list.element" behind it
    columns = (group.column(i) for i in range(group.num_columns))
    used = [column.num_values for column in columns if f"{column.path_in_schema}.".startswith(names)]
    return max([group.num_rows, *used])


def partitions_for(pieces: list[Piece], layout: LogLayout) -> int:
    """A power of two, so that a partition holds a million interactions or so."""
    parts = 0.0
    for piece in pieces:
        kind, compression = format_of(piece.url, layout)
        size = piece.rows / PIECE_ROWS if kind == "parquet" else (piece.stop - piece.start) / PIECE_BYTES
        parts += 4 * size if compression else size
    return min(1 << max(math.ceil(parts) - 1, 0).bit_length(), 1 << 16)


def read_piece(
    storage: Storage, piece: Piece, layout: LogLayout, latest: int | None
) -> Iterator[tuple[pa.Table, Counter[str]]]:
    """Yields the rows of a piece in batches, each with the numbers of rows that are left out, by reason.

    Args:
        storage: where the file lies.
        piece: which part of it.
        layout: what its columns mean.
        latest: a time beyond this, in seconds, is in the future; None: none is.

    Raises:
        DataError: the file is broken as a whole, or changed its columns.
    """
    kind, compression = format_of(piece.url, layout)
    with _opened(storage, piece.url) as file:
        read: Any = {"parquet": _parquet, "jsonl": _jsonl}.get(kind, partial(_delimited, kind=kind))
        for table, left_out in read(file, piece, layout, compression=compression):
            rows, reasons = normalise(table, layout, latest, redact(piece.url))
            yield rows, left_out + reasons


def format_of(url: str, layout: LogLayout) -> tuple[Format, str | None]:
    """Format and compression of a file, by its name where the layout does not say it.

    Raises:
        DataError: the name does not tell.
    """
    name, compression = url.lower(), None
    for ending, codec in _COMPRESSIONS.items():
        if name.endswith(ending):
            name, compression = name.removesuffix(ending), codec
    if layout.format:
        return layout.format, compression
    for kind in get_args(Format):
        if name.endswith(f".{kind}"):
            return kind, compression
    raise DataError(
        f"{redact(url)}: a log is .parquet, .csv, .tsv or .jsonl, text perhaps with .gz, .bz2 or .zst; rename it, or "
        'say "format" in a layout of your own'
    )


class _opened:
    """A file of a log; what is wrong with it as a whole becomes a DataError that names it."""

    def __init__(self, storage: Storage, url: str) -> None:
        self._storage, self._url = storage, url

    def __enter__(self) -> BinaryIO:
        fs, path = self._storage.filesystem(self._url, "log")
        try:
            self._file = fs.open(path, "rb", block_size=_BLOCK_BYTES)
        except OSError as error:
            raise DataError(f"{redact(self._url)} cannot be opened: {redact(error.strerror or str(error))}") from None
        return self._file

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self._file.close()
        if isinstance(error, (OSError, EOFError, pa.ArrowException)):
            raise DataError(f"{redact(self._url)} cannot be read: {redact(str(error))}") from None


def _require_columns(names: list[str], url: str, layout: LogLayout) -> None:
    for name in layout.used():
        if name not in names:
            raise DataError(
                f"{redact(url)}: there is no column {name!r}; there are {', '.join(map(repr, names)) or 'none'}: give "
                "the layout that fits (--layout)"
            )


# --- Text ---


class _Range(io.RawIOBase):
    """Part of a file, as a file.

    Args:
        file: where it lies.
        start, stop: its first byte, and the one after its last.
    """

    def __init__(self, file: BinaryIO, start: int, stop: int) -> None:
        super().__init__()
        self._file, self._left = file, stop - start
        file.seek(start)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._file.read(min(len(buffer), self._left))
        buffer[: len(data)] = data
        self._left -= len(data)
        return len(data)


def _line_start(file: BinaryIO, offset: int) -> int:
    """Where the first line begins that does not begin before the offset."""
    if offset == 0:
        return 0
    file.seek(offset - 1)
    while block := file.read(1 << 16):
        if (found := block.find(b"\n")) >= 0:
            return file.tell() - len(block) + found + 1
    return file.tell()


def _decompressed(file: BinaryIO, compression: str | None) -> BinaryIO:
    if compression is None:
        return file
    own = _Range(file, 0, file.seek(0, io.SEEK_END))  # Arrow's streams close what they read
    return pa.CompressedInputStream(pa.PythonFile(own, "r"), compression)


def _text(file: BinaryIO, piece: Piece, compression: str | None) -> BinaryIO | None:
    """The lines of a piece; None where no line begins in it."""
    if compression is not None:
        return io.BufferedReader(_decompressed(file, compression), _BLOCK_BYTES)  # type: ignore[type-var]
    start, stop = _line_start(file, piece.start), _line_start(file, piece.stop)
    return io.BufferedReader(_Range(file, start, stop), _BLOCK_BYTES) if start < stop else None


def _quoted(kind: str, layout: LogLayout) -> bool:
    return layout.quoted if layout.quoted is not None else kind == "csv"


def _column_names(file: BinaryIO, url: str, kind: str, layout: LogLayout, compression: str | None) -> list[str]:
    """Names of all columns, those of the first line unless the layout has them."""
    if layout.columns:
        return list(layout.columns)
    file.seek(0)
    try:
        beginning = _decompressed(file, compression).read(1 << 20).decode("utf-8-sig", errors="replace")
        line = beginning.partition("\n")[0].rstrip("\r")
        cells = next(
            csv.reader(
                [line],
                delimiter="," if kind == "csv" else "\t",
                quoting=csv.QUOTE_MINIMAL if _quoted(kind, layout) else csv.QUOTE_NONE,
            ),
            [],
        )
    except csv.Error as error:
        raise DataError(f"{redact(url)}: the first line names no columns: {error}") from None
    if doubles := {name for name in cells if cells.count(name) > 1}:
        raise DataError(f"{redact(url)}: the column {min(doubles)!r} occurs twice; rename one")
    return cells


def _delimited(
    file: BinaryIO, piece: Piece, layout: LogLayout, compression: str | None, kind: str
) -> Iterator[tuple[pa.Table, Counter[str]]]:
    with_names = not layout.columns and piece.start == 0
    names = _column_names(file, piece.url, kind, layout, compression)
    text = _text(file, piece, compression)
    if text is None or (with_names and _only_line(text)) or not text.peek(1):  # type: ignore[attr-defined]
        return
    left_out: Counter[str] = Counter()

    def skip(row: Any) -> str:
        left_out[MALFORMED] += 1
        return "skip"

    reader = pa.csv.open_csv(
        text,
        pa.csv.ReadOptions(use_threads=False, block_size=_BLOCK_BYTES, column_names=names),
        pa.csv.ParseOptions(
            delimiter="," if kind == "csv" else "\t",
            quote_char='"' if _quoted(kind, layout) else False,
            invalid_row_handler=skip,
        ),
        # Bytes: text that is not UTF-8 costs its row, not the file.
        pa.csv.ConvertOptions(include_columns=layout.used(), column_types=dict.fromkeys(names, pa.binary())),
    )
    for batch in reader:
        yield pa.Table.from_batches([batch]), left_out.copy()
        left_out.clear()
    if left_out:
        yield reader.schema.empty_table(), left_out


def _only_line(text: BinaryIO) -> bool:
    """Skips the line of names; returns whether nothing follows it."""
    text.readline()
    return not text.peek(1)  # type: ignore[attr-defined]


def _jsonl(
    file: BinaryIO, piece: Piece, layout: LogLayout, compression: str | None
) -> Iterator[tuple[pa.Table, Counter[str]]]:
    lines = _text(file, piece, compression)
    if lines is None:
        return
    used = layout.used()
    while block := list(islice(lines, BATCH_ROWS)):
        left_out: Counter[str] = Counter()
        rows: list[dict[str, Any]] = []
        for line in block:
            if line.isspace():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                row = None
            if not isinstance(row, dict):
                left_out[MALFORMED] += 1
            else:
                rows += explode_json(row, layout, left_out) if layout.lists else [row]
        columns = {name: pa.array([_cell(row.get(name)) for row in rows], pa.string()) for name in used}
        if layout.lists and layout.order is None:
            columns[""] = pa.array([row[""] for row in rows], pa.int64())
        yield pa.table(columns), left_out


def _cell(value: Any) -> str | None:
    """Text of a JSON value; None where that is neither text nor a number."""
    if isinstance(value, str):
        return value if value.isprintable() else value.encode(errors="replace").decode()  # lone surrogates
    return str(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


# --- Parquet ---


def _parquet(
    file: BinaryIO, piece: Piece, layout: LogLayout, compression: str | None
) -> Iterator[tuple[pa.Table, Counter[str]]]:
    groups = list(range(piece.start, piece.stop))
    for batch in pq.ParquetFile(file).iter_batches(BATCH_ROWS, groups, layout.used(), use_threads=False):
        table = pa.Table.from_batches([batch])
        yield explode(table, layout, redact(piece.url)) if layout.lists else (table, Counter())
