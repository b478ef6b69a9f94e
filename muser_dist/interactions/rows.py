"""Rows of a log as rows of `log.SCHEMA`: names, times and values of whatever type, and what is wrong with them."""

from collections import Counter
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from muser_dist.errors import DataError
from muser_dist.interactions.log import SCHEMA, LogLayout

MALFORMED = "malformed row"
EMPTY = "empty history"
EARLIEST = 631_152_000
"""1990-01-01: nobody's log is older, but a clock that has lost its time says 1970 or 1980."""

_PER_SECOND = {"s": 1, "ms": 1_000, "us": 1_000_000, "ns": 1_000_000_000}


def normalise(table: pa.Table, layout: LogLayout, latest: int | None, place: str) -> tuple[pa.Table, Counter[str]]:
    """The rows of a batch that can be used, by `SCHEMA`, and how many others there are, by reason.

    A row is counted once, under the first reason that holds: a missing or undecodable name, a missing, unreadable or
    impossible time, a value that is no number.

    Args:
        table: the columns that the layout uses; a column "" holds places in lists where those are the positions.
        layout: what they mean.
        latest: a time beyond this, in seconds, is in the future; None: none is.
        place: of the log, for errors.

    Raises:
        DataError: a column is of a type that cannot be what the layout says.
    """
    good = np.ones(table.num_rows, bool)
    reasons: Counter[str] = Counter()

    def leave_out(reason: str, bad: np.ndarray) -> None:
        nonlocal good
        if number := int((good & bad).sum()):
            reasons[reason] += number
            good = good & ~bad

    def column(name: str) -> pa.Array:
        return _one(table[name])

    user = _names(column(layout.user), layout.user, place)
    leave_out("missing user", _nulls(user))
    parts = [_names(column(name), name, place) for name in layout.item]
    item = pc.binary_join_element_wise(*parts, " - ", null_handling="emit_null") if len(parts) > 1 else parts[0]
    leave_out("missing item", _nulls(item))
    if layout.ordered:
        cells = column(layout.order or "")
        leave_out("missing time or position", _missing(cells))
        time = _times(cells, layout) if layout.time else _floor(*_numbers(cells))
        leave_out("unreadable time or position", _nulls(time))
        values = time.fill_null(0).to_numpy(zero_copy_only=False)
        if layout.time and not layout.relative_time:
            leave_out("time before 1990", values < EARLIEST)
            leave_out("time in the future", values > (np.iinfo(np.int64).max if latest is None else latest))
        leave_out("negative time or position", values < 0)
    else:
        time = pa.nulls(table.num_rows, pa.int64())
    signal = _signals(column(layout.signal_column), layout, place) if layout.signal_column else None
    if layout.value:
        cells = column(layout.value)
        numbers, known = _numbers(cells)
        leave_out("unreadable value", ~known & ~_missing(cells))
        value = pa.array(numbers.astype(np.float32), mask=~known)
    else:
        value = pa.nulls(table.num_rows, pa.float32())
    if signal is None:
        signal = pa.array(np.full(table.num_rows, layout.signal.lower(), object), pa.string())
    rows = pa.table([user, item, time, signal, value], names=SCHEMA.names)
    return rows.filter(pa.array(good)).cast(SCHEMA), reasons


def explode(table: pa.Table, layout: LogLayout, place: str) -> tuple[pa.Table, Counter[str]]:
    """One row for each element of a row's lists.

    Raises:
        DataError: the column of items holds no lists.
    """
    left_out: Counter[str] = Counter()
    columns = {name: _one(table[name]) for name in table.column_names}
    lists = [name for name, array in columns.items() if _is_list(array.type)]
    if missing := [name for name in layout.item if name not in lists]:
        raise DataError(f"{place}: the layout has lists, and the column {missing[0]!r} holds none; leave lists out")
    lengths = {n: pc.fill_null(pc.list_value_length(columns[n]), 0).to_numpy(zero_copy_only=False) for n in lists}
    length = lengths[layout.item[0]]
    alike = np.all([lengths[name] == length for name in lists], axis=0)
    left_out += Counter({MALFORMED: int((~alike).sum()), EMPTY: int((alike & (length == 0)).sum())})
    keep = pa.array(alike & (length > 0))
    length = length[keep.to_numpy(zero_copy_only=False)]
    parents = pa.array(np.repeat(np.arange(len(length)), length))
    flat = {
        name: pc.list_flatten(array.filter(keep)) if name in lists else array.filter(keep).take(parents)
        for name, array in columns.items()
    }
    if layout.order is None:
        ends = np.cumsum(length)
        flat[""] = pa.array(np.arange(ends[-1] if len(ends) else 0) - np.repeat(ends - length, length))
    return pa.table(flat), left_out


def explode_json(row: dict[str, Any], layout: LogLayout, left_out: Counter[str]) -> list[dict[str, Any]]:
    """As `explode`, for one JSON object."""
    cells = {name: row.get(name) for name in layout.used()}
    items = [cells[name] for name in layout.item]
    lengths = {len(cell) for cell in cells.values() if isinstance(cell, list)}
    if not all(isinstance(cell, list) or cell is None for cell in items) or len(lengths) > 1:
        left_out[MALFORMED] += 1
        return []
    if not lengths or lengths == {0} or None in items:
        left_out[EMPTY] += 1
        return []
    return [
        {name: cell[i] if isinstance(cell, list) else cell for name, cell in cells.items()} | {"": i}
        for i in range(*lengths)
    ]


# --- Cells of any type ---


def _one(column: pa.ChunkedArray) -> pa.Array:
    array = column.combine_chunks() if column.num_chunks != 1 else column.chunk(0)
    array = array if isinstance(array, pa.Array) else pa.concat_arrays(array.chunks)
    return array.dictionary_decode() if pa.types.is_dictionary(array.type) else array


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind)


def _is_text(kind: pa.DataType) -> bool:
    return (
        pa.types.is_string(kind)
        or pa.types.is_large_string(kind)
        or pa.types.is_binary(kind)
        or pa.types.is_large_binary(kind)
    )


def _nulls(array: pa.Array) -> np.ndarray:
    return pc.is_null(array).to_numpy(zero_copy_only=False)


def _missing(array: pa.Array) -> np.ndarray:
    """Where a cell is null, not a number, or empty text."""
    missing = pc.is_null(array, nan_is_null=pa.types.is_floating(array.type)).to_numpy(zero_copy_only=False)
    if _is_text(array.type):
        missing = missing | pc.equal(pc.binary_length(array), 0).fill_null(True).to_numpy(zero_copy_only=False)
    return missing


def _decoded(array: pa.Array) -> pa.Array:
    """Text as strings; null where it is not UTF-8."""
    try:
        return array.cast(pa.string())
    except pa.ArrowInvalid:

        def decode(text: bytes | None) -> str | None:
            try:
                return None if text is None else text.decode()
            except UnicodeDecodeError:
                return None

        return pa.array(list(map(decode, array.to_pylist())), pa.string())


def _names(array: pa.Array, column: str, place: str) -> pa.Array:
    """Names as strings; null where there is none."""
    if _is_text(array.type):
        names = _decoded(array)
        return pc.if_else(pa.array(_missing(names)), pa.scalar(None, pa.string()), names)
    if pa.types.is_floating(array.type):  # whole numbers, among which something was missing when they were written
        array = pc.if_else(pc.is_nan(array), pa.scalar(None, array.type), array)
        try:
            return array.cast(pa.int64()).cast(pa.string())
        except pa.ArrowInvalid:
            pass
    elif pa.types.is_integer(array.type) or pa.types.is_null(array.type):
        return array.cast(pa.string())
    raise DataError(f"{place}: the column {column!r} holds {array.type}, not names; is the layout the right one?")


def _signals(array: pa.Array, layout: LogLayout, place: str) -> pa.Array:
    names = _names(array, layout.signal_column or "", place).fill_null(layout.signal)
    encoded = pc.utf8_lower(names).dictionary_encode()
    renamed = {name.lower(): signal.lower() for name, signal in layout.signals.items()}
    known = [renamed.get(name, name) for name in encoded.dictionary.to_pylist()]
    return pa.array(known, pa.string()).take(encoded.indices)


def _numbers(array: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of cells, int64 where all are whole and else float64, and where there are any."""
    if _is_text(array.type):
        text = pc.utf8_trim_whitespace(_decoded(array))
        known = pc.match_substring_regex(text, r"^-?\d{1,18}(\.\d*)?([eE][+-]?\d{1,2})?$").fill_null(False)
        text = pc.if_else(known, text, "0")
        whole = pc.all(pc.match_substring_regex(text, r"^-?\d+$")).as_py() is not False
        known = known.to_numpy(zero_copy_only=False)
        if whole:
            return text.cast(pa.int64()).to_numpy(zero_copy_only=False), known
        array = text.cast(pa.float64())
    else:
        known = ~_missing(array)
    if pa.types.is_integer(array.type):
        return array.fill_null(0).cast(pa.int64(), safe=False).to_numpy(zero_copy_only=False), known
    if pa.types.is_floating(array.type) or pa.types.is_decimal(array.type):
        values = array.cast(pa.float64()).fill_null(0).to_numpy(zero_copy_only=False)
        known = known & (np.abs(values) < 2.0**62)  # also where it is infinite
        return np.where(known, values, 0), known
    return np.zeros(len(array), np.int64), np.zeros(len(array), bool)


def _floor(numbers: np.ndarray, known: np.ndarray, per: int = 1) -> pa.Array:
    return pa.array(np.floor_divide(numbers, per).astype(np.int64), mask=~known)


def _times(array: pa.Array, layout: LogLayout) -> pa.Array:
    """Seconds since 1970, or since the log's own beginning; null where a cell cannot be read."""
    if pa.types.is_timestamp(array.type) or pa.types.is_date(array.type):
        return _floor(*_numbers(array.cast(pa.timestamp("us"), safe=False).cast(pa.int64())), 1_000_000)
    if layout.time_format == "unix" or not _is_text(array.type):
        return _floor(*_numbers(array), _PER_SECOND[layout.time_unit])
    text = pc.utf8_trim_whitespace(_decoded(array))
    plain = pc.replace_substring_regex(text, r"^(\d{4}-\d\d-\d\d)[T ](\d\d:\d\d:\d\d)(\.\d+)?Z?$", r"\1 \2")
    plain = pc.replace_substring_regex(plain, r"^(\d{4}-\d\d-\d\d)$", r"\1 00:00:00")
    parsed = pc.strptime(plain, format="%Y-%m-%d %H:%M:%S", unit="s", error_is_null=True)
    return parsed.cast(pa.int64())
