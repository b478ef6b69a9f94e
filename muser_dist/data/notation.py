"""The notation of a chunk's rows, and another notation of the same piece where it is asked for."""

from collections.abc import Callable, Sequence

import numpy as np

from muser_dist.data.config import DataConfig
from muser_dist.data.decoder import Piece, decoder
from muser_dist.data.rows import Row
from muser_dist.data.symbolic.characters import PATCH_BYTES
from muser_dist.data.symbolic.members import draw_members
from muser_dist.errors import DataError

Seeds = tuple[int, int]
"""Of a row's notation and of the other one."""


def notation_bytes(data: DataConfig) -> int:
    """Size of a row's notation."""
    return data.symbolic.max_patches * PATCH_BYTES


def read_notation(
    rows: Sequence[Row | None],
    seeds: Sequence[Seeds | None],
    data: DataConfig,
    report: Callable[[int, str, Exception], None],
    other: bool,
    needs_other: bool,
) -> dict[str, np.ndarray]:
    """Encodes the rows of a chunk.

    Args:
        rows: c of them; where there is none, or it has a problem, there is nothing to read.
        seeds: of what is drawn; None in evaluation.
        data: how notation is read.
        report: told of a row, a member, and what is wrong with it.
        other: whether the piece's other notation is wanted too, of rows that have both. What is drawn of it is drawn
            apart.
        needs_other: whether a row without it is of no use, and is told.

    Returns:
        "patches" uint8 (c, max_patches, 64), "patches_length" int32 (c,) and "valid_symbolic" bool (c,); with `other`
        also "notation_patches", "notation_length" and "valid_notation", the same of the other notation.
    """
    pieces: tuple[dict[int, Piece], dict[int, Piece]] = {}, {}
    for i, (row, drawn) in enumerate(zip(rows, seeds, strict=True)):
        if row is None or row.problem is not None:
            continue
        seed, other_seed = drawn or (None, None)
        try:
            first, *further = draw_members(row.extensions, data.symbolic, seed)
            if needs_other and not further:
                raise DataError(f"no other notation beside .{first}, and objective.pairs contrasts two")
        except DataError as error:
            report(i, "", error)
            continue
        for of_row, extension, its_seed in zip(pieces, [first, *further], (seed, other_seed), strict=False):
            if member := row.member(extension):
                of_row[i] = Piece(member, extension, its_seed)
    made: dict[str, np.ndarray] = {}
    columns = (
        ("patches", "patches_length", "valid_symbolic"),
        ("notation_patches", "notation_length", "valid_notation"),
    )
    for of_rows, (patches, length, valid) in zip(pieces[: 1 + other], columns, strict=False):
        c = len(rows)
        made[patches] = np.zeros((c, data.symbolic.max_patches, PATCH_BYTES), np.uint8)
        made[length], made[valid] = np.zeros(c, np.int32), np.zeros(c, bool)
        for i, encoded in decoder(data).encode(of_rows, made[patches]).items():
            if isinstance(encoded, DataError):
                report(i, of_rows[i].extension, encoded)
            else:
                made[length][i], made[valid][i] = encoded, True
    return made
