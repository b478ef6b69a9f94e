"""Your own table: CSV, TSV, JSON lines or Parquet with a column of audio files; other columns are metadata."""

import csv
import hashlib
import json
import math
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from muser_dist.data.corpora.writer import Track
from muser_dist.errors import DataError

SPLITS = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "test": "test",
    "testing": "test",
}
"""What corpora call their splits, and what shards call them."""


def read_table(
    table: Path,
    audio: str = "audio",
    root: Path | None = None,
    key: str | None = None,
    split: str | None = None,
    val_share: float = 0.0,
) -> list[Track]:
    """A track for each row.

    Empty cells and nulls are left out of the metadata. A row whose audio lies outside the root,
    or whose split is none, gets a problem and no place in a shard.

    Args:
        table: .csv and .tsv with a header line, .jsonl with an object in each line, or .parquet.
        audio: column of paths, relative to the root.
        root: folder of the audio; the table's when not given.
        key: column that names the rows; the audio's path does when not given.
        split: column with train, val or test; all rows are "train" when not given.
        val_share: share of the rows that goes to "val" when there is no such column. A hash of
            the key decides, so a row stays where it is when others come or go.

    Raises:
        DataError: the table is missing or broken, a column is missing, a key occurs twice, or
            options contradict each other; the message names it.
    """
    if not 0 <= val_share < 1 or (val_share and split):
        raise DataError(f"val_share is {val_share}: give 0 <= val_share < 1, and not together with a split column")
    root = Path(os.path.abspath(root or table.parent))
    if not root.is_dir():
        raise DataError(f"there is no audio folder {root}; name the folder that paths in {table} start from")
    rows = list(_rows(table))
    columns = dict.fromkeys(column for _, row in rows for column in row)
    for column in filter(None, (audio, key, split)):
        if column not in columns:
            raise DataError(
                f"{table}: there is no column {column!r}; there are {', '.join(map(repr, columns)) or 'none'}"
            )
    tracks: list[Track] = []
    keys: dict[str, str] = {}
    for place, row in rows:
        cell = row.get(audio)
        file = path_from(root, cell if isinstance(cell, str) else "")
        problem = None
        if _empty(cell):
            problem = f"the column {audio!r} is empty"
        elif not isinstance(cell, str):
            problem = f"the column {audio!r} holds no path but {type(cell).__name__}"
        elif not file.is_relative_to(root):
            problem = f"lies outside the audio folder {root}"
        name = os.path.splitext(os.path.relpath(file, root))[0]
        if key is not None and not _empty(row.get(key)):
            name = str(row[key])
            if name in keys:
                raise DataError(f"{place}: the key {name!r} is also that of {keys[name]}; name the rows uniquely")
            keys[name] = place
        part = "val" if hash_share(name) < val_share else "train"
        if split is not None:
            part = SPLITS.get(str(row.get(split)).strip().lower(), "")
            if not part:
                problem = problem or f"the column {split!r} says {row.get(split)!r}, not train, val or test"
        metadata = {column: value for column, value in row.items() if column not in (audio, key, split)}
        tracks.append(Track(name, file, _fields(metadata, place), part, problem))
    return tracks


def path_from(root: Path, path: str) -> Path:
    """A path that starts from a folder, without its "..": so that it tells whether it leads out.

    Not resolved: links that lie in the folder are its owner's, the path may be anybody's.
    """
    return Path(os.path.normpath(root / path))


def hash_share(name: str) -> float:
    """A number in [0, 1) that depends on the name alone."""
    return int.from_bytes(hashlib.blake2b(name.encode(errors="replace"), digest_size=8).digest(), "big") / 2**64


def _fields(row: dict[str, Any], place: str) -> dict[str, Any]:
    """The cells that say something, under names that templates can write: letters, digits and _."""
    fields: dict[str, Any] = {}
    for column, value in row.items():
        name = re.sub(r"\W+", "_", column).strip("_")
        if name in fields:
            raise DataError(f"{place}: two columns would be the field {{{name}}}; rename {column!r}")
        if isinstance(value, bytes):
            raise DataError(f"{place}: the column {column!r} holds bytes, which are no text; leave it out")
        if name and not _empty(value):
            fields[name] = value
    return fields


def _empty(value: Any) -> bool:
    return value is None or value in ("", [], {}) or (isinstance(value, float) and math.isnan(value))


def _rows(table: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields each row by its columns, after its place in the file."""
    kind = table.suffix.lower()
    if kind in (".csv", ".tsv"):
        yield from named(cells(table, "a table of your own", "\t" if kind == ".tsv" else ","))
    elif kind == ".jsonl":
        for place, line in _lines(table, "a table of your own"):
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise DataError(f"{place}: broken JSON: {error}") from None
            if not isinstance(row, dict):
                raise DataError(f"{place}: is no JSON object")
            yield place, row
    elif kind == ".parquet":
        yield from _parquet_rows(table)
    else:
        raise DataError(f"{table}: a table is .csv, .tsv, .jsonl or .parquet")


def _parquet_rows(table: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(table) as file:
            number = 0
            for batch in file.iter_batches():
                for row in batch.to_pylist():
                    number += 1
                    yield f"{table}, row {number}", row
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{table} cannot be read: {error}") from None


# --- Tables of text, for the readers of all corpora ---


def cells(path: Path, corpus: str, delimiter: str = ",", quoted: bool = True) -> Iterator[tuple[str, list[str]]]:
    """Yields the cells of each row, header lines included, after its place in the file.

    Args:
        path: a text file in UTF-8.
        corpus: whose layout has this file, for errors.
        delimiter: what stands between cells.
        quoted: whether quotation marks around cells are no part of them.

    Raises:
        DataError: the file is missing, no UTF-8 or malformed; the message names it.
    """
    reader = csv.reader(
        (line for _, line in _lines(path, corpus)),
        delimiter=delimiter,
        quoting=csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE,
    )
    try:
        for row in reader:
            if row:
                yield f"{path}, line {reader.line_num}", row
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num}: {error}") from None


def named(rows: Iterable[tuple[str, list[str]]]) -> Iterator[tuple[str, dict[str, str]]]:
    """Rows by the columns of the header, which is the first of them; short rows end with empty cells.

    Raises:
        DataError: a column occurs twice, or a row is longer than the header.
    """
    header: list[str] = []
    for place, row in rows:
        if not header:
            header = row
            if doubles := {column for column in header if header.count(column) > 1}:
                raise DataError(f"{place}: the column {min(doubles)!r} occurs twice; rename one")
            continue
        if len(row) > len(header):
            raise DataError(f"{place}: {len(row)} cells under {len(header)} columns; put quotes around cells with ,")
        yield place, dict(zip(header, row + [""] * (len(header) - len(row)), strict=True))


def require(row: dict[str, str], columns: Iterable[str], place: str, corpus: str) -> None:
    """Raises DataError when a row lacks a column that the layout of the corpus has."""
    for column in columns:
        if column not in row:
            raise DataError(f"{place}: there is no column {column!r}, which {corpus} has; is it the original file?")


def _lines(path: Path, corpus: str) -> Iterator[tuple[str, str]]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            for number, line in enumerate(file, start=1):
                yield f"{path}, line {number}", line
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: is not UTF-8 ({error.reason} at byte {error.start}); convert it") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); the layout is that of {corpus}") from None
