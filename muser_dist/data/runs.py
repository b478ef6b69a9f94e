"""Pieces of notation and features of songs as a tower reads them in use: whole, in runs of the most that it takes."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from muser_dist.data.config import DataConfig
from muser_dist.data.features import read_song


def read_runs(modality: str, item: Any, data: DataConfig) -> Iterator[tuple[np.ndarray, int, int]]:
    """The runs of an item, of which the last ends with it.

    Args:
        modality: "symbolic" or "features".
        item: as of `symbolic.encode.read_piece` or `features.read_song`.
        data: how much is read at a time.

    Yields:
        what the tower reads, its length before the padding, and how much of it no run before had.

    Raises:
        DataError: as there.
    """
    if modality == "features":
        return read_song(item, data.features)
    from muser_dist.data.symbolic.encode import read_piece  # libraries that only notation needs

    return read_piece(item, data.symbolic)


def first_runs(modality: str, items: Sequence[Any], data: DataConfig) -> tuple[np.ndarray, np.ndarray]:
    """The first run of each of some items, and their lengths (len(items),) int32; errors as of `read_runs`."""
    read, lengths, _ = zip(*(next(read_runs(modality, item, data)) for item in items), strict=True)
    return np.stack(read), np.array(lengths, np.int32)
