"""Features of a song's consecutive windows, which a frozen network made: the member KEY.npy of a sample.

NumPy's format, (windows, size) float16 or float32. Of a member its header is read, and the windows that are wanted, so
that memory does not depend on what it holds or claims; nothing is ever unpickled.
"""

from collections.abc import Callable, Iterator, Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from muser_dist.data.config import DataConfig, FeaturesConfig
from muser_dist.errors import DataError

if TYPE_CHECKING:
    from muser_dist.data.rows import Row  # which needs packages that using a model does not

EXTENSION = "npy"
"""Of the member."""

_HEADER_BYTES = 4096  # NumPy's own has 128; what evaluates it must not be given a novel

Features = str | Path | bytes | np.ndarray
"""A song's: the path of a file in NumPy's format, its bytes, or (windows, size) itself."""


class Layout(NamedTuple):
    """What a member's header says: how many windows of which type begin at which byte."""

    windows: int
    dtype: np.dtype
    start: int


def read_layout(head: bytes, total: int, config: FeaturesConfig) -> Layout:
    """What a file in NumPy's format holds, by its header.

    Args:
        head: its first bytes.
        total: how many it has.
        config: says how many values a window has.

    Raises:
        DataError: it is of another format, type or shape, has no windows, or more or fewer bytes than its header says.
    """
    head = head[:_HEADER_BYTES]
    file = BytesIO(head)
    try:
        version = np.lib.format.read_magic(file)
        if version not in ((1, 0), (2, 0)):
            raise ValueError(f"version {version[0]}.{version[1]} of the format")
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(file, max_header_size=_HEADER_BYTES)
    except Exception as error:  # of what evaluates a header as Python: of tokens, syntax, recursion, values
        raise DataError(
            f"no features in NumPy's format ({(str(error) or type(error).__name__).splitlines()[0]})"
        ) from None
    if dtype.kind != "f" or dtype.itemsize not in (2, 4):
        raise DataError(f"features of the type {dtype}; float16 and float32 are read")
    if len(shape) != 2 or shape[1] != config.size:
        raise DataError(f"features of the shape {shape}, where (windows, {config.size}) is read (data.features.size)")
    if fortran:
        raise DataError("features that lie column by column; save numpy.ascontiguousarray of them")
    if shape[0] < 1:
        raise DataError("empty: no windows")
    start = file.tell()
    if total - start != shape[0] * shape[1] * dtype.itemsize:
        raise DataError(f"{total - start:,} bytes of features, where the shape {shape} of {dtype} has others")
    return Layout(shape[0], dtype, start)


def to_float16(values: np.ndarray) -> np.ndarray:
    """Features as chunks have them, (windows, size) float16.

    Raises:
        DataError: a value is not finite, or beyond what float16 holds.
    """
    with np.errstate(over="ignore"):
        made = values.astype(np.float16)
    if not np.isfinite(made).all():
        beyond = np.isfinite(values).all()
        raise DataError("features beyond 65,504, the most of float16; scale them" if beyond else "NaN or infinite")
    return made


def read_run(
    read: Callable[[int, int], bytes], total: int, config: FeaturesConfig, position: float
) -> tuple[np.ndarray, int]:
    """A run of the windows of a file in NumPy's format.

    Args:
        read: gives its bytes from one place to before another, as `Stored.read` does.
        total: how many it has.
        config: how many windows are wanted, and of what size.
        position: in [0, 1); of all runs of so many windows, the first is at 0 and the last before 1, all equally
            often. Of no more than are wanted all are taken.

    Returns:
        (max_windows, size) float16, zero behind the windows that there are, and their number.

    Raises:
        DataError: as `read_layout` and `to_float16`.
    """
    windows, dtype, start = read_layout(read(0, min(total, _HEADER_BYTES)), total, config)
    length = min(windows, config.max_windows)
    first = int(position * (windows - length + 1))
    width = config.size * dtype.itemsize
    data = read(start + first * width, start + (first + length) * width)
    made = np.zeros((config.max_windows, config.size), np.float16)
    made[:length] = to_float16(np.frombuffer(data, dtype).reshape(length, config.size))
    return made, length


def features_bytes(data: DataConfig) -> int:
    """Size of a row's features in a chunk."""
    return 2 * data.features.max_windows * data.features.size


def read_features(
    rows: "Sequence[Row | None]",
    positions: Sequence[float],
    data: DataConfig,
    report: Callable[[int, str, Exception], None],
) -> dict[str, np.ndarray]:
    """Reads the features of a chunk's rows.

    Args:
        rows: c of them; where there is none, or it has a problem, there is nothing to read.
        positions: where the run of windows of each lies in its song, as `read_run` takes it.
        data: how features are read.
        report: told of a row, a member, and what is wrong with it.

    Returns:
        "features" float16 (c, max_windows, size), "features_length" int32 (c,) and "valid_features" bool (c,).
    """
    c, config = len(rows), data.features
    made: dict[str, np.ndarray] = {
        "features": np.zeros((c, config.max_windows, config.size), np.float16),
        "features_length": np.zeros(c, np.int32),
        "valid_features": np.zeros(c, bool),
    }
    for i, (row, position) in enumerate(zip(rows, positions, strict=True)):
        if row is None or row.problem is not None:
            continue
        member = row.member(EXTENSION)
        try:
            if member is None:
                raise DataError(f"no member with features ({EXTENSION}); jobs/embed.py --features makes them")
            made["features"][i], made["features_length"][i] = read_run(member.read, member.size, config, position)
            made["valid_features"][i] = True
        except Exception as error:  # whatever it is, one row must not end the run
            report(i, EXTENSION if member else "", error)
    return made


def read_song(song: Features, config: FeaturesConfig) -> Iterator[tuple[np.ndarray, int, int]]:
    """All windows of a song, in runs of `config.max_windows` of which the last ends with the song.

    Yields:
        (max_windows, size) float16, the number of windows before the padding, and how many of them no run before had.

    Raises:
        DataError: as `read_run`, or there is no such file; the message says which.
    """
    name = str(song) if isinstance(song, (str, Path)) else f"features given as {type(song).__name__}"
    try:
        if isinstance(song, np.ndarray):
            buffer = BytesIO()
            np.lib.format.write_array(buffer, np.ascontiguousarray(song), allow_pickle=False)
            data = buffer.getvalue()
        else:
            data = song if isinstance(song, bytes) else Path(song).read_bytes()
        windows, dtype, start = read_layout(data, len(data), config)
        values = to_float16(np.frombuffer(data, dtype, offset=start).reshape(windows, config.size))
    except FileNotFoundError:
        raise DataError(f"{name}: there is no such file") from None
    except OSError as error:  # a folder, or what may not be read
        raise DataError(f"{name}: cannot be read: {error.strerror or error}") from None
    except (DataError, ValueError) as error:  # NumPy refuses to write objects
        raise DataError(f"{name}: {error}") from None
    most = config.max_windows
    for begin in range(0, windows, most):
        first = max(0, min(begin, windows - most))
        length = min(windows, most)
        run = np.zeros((most, config.size), np.float16)
        run[:length] = values[first : first + length]
        yield run, length, min(most, windows - begin)
