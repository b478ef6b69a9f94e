"""A block of similarities, tile by tile: statistics of its rows and columns, and the gradient back to features.

Two products make a gradient out of a tile's own one; nothing of a tile is kept. On GPUs tiles are
fused with their statistics (tiles_cuda.py); here is what every device can do, and CPUs do.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from muser_dist.objectives.statistics import Rows, Statistic
from muser_dist.objectives.targets import Masks, Matches

ROWS, COLUMNS = 512, 1024
"""Of a tile on a CPU: it stays in the second-level cache, and its products are large enough for BLAS
(benchmarks/LOG.md)."""


@dataclass(frozen=True)
class Similarities:
    """The logits of one pair of modalities: scale · <x_i, y_j> + bias.

    Attributes:
        scale, bias: numbers; None where there is no bias.
        matches: of all N rows.
        statistic: what is wanted of them.
    """

    scale: float
    bias: float | None
    matches: Matches
    statistic: Statistic


@dataclass(frozen=True)
class Block:
    """Features (n, D) of consecutive rows of the global batch, zero where the pair is not valid, and the first's place.

    They may be bfloat16: products of those are exact in float32.
    """

    features: Tensor
    first: int

    def tiles(self, size: int) -> Iterator[tuple[slice, slice]]:
        """Slices of this block and the same of the global batch."""
        for start in range(0, len(self.features), size):
            stop = min(start + size, len(self.features))
            yield slice(start, stop), slice(self.first + start, self.first + stop)

    def largest(self) -> float:
        """The largest norm of a row."""
        return float(torch.linalg.vector_norm(_wide(self.features), dim=1).max())


def statistics(of: Similarities, x: Block, y: Block) -> tuple[Tensor, Tensor]:
    """States (C, n) of the rows and (C, m) of the columns of the block x·yᵀ."""
    statistic, like = of.statistic, x.features.new_empty(0, dtype=_wide(x.features).dtype)
    rows, columns = statistic.empty(len(x.features), like), statistic.empty(len(y.features), like)
    for logits, i, j, masks, largest in _tiles(of, x, y):
        of_rows, of_columns = statistic.tile(logits, masks, largest)
        rows[:, i] = statistic.merge(rows[:, i], of_rows)
        columns[:, j] = statistic.merge(columns[:, j], of_columns)
    return rows, columns


def gradient(
    of: Similarities, x: Block, y: Block, rows: Rows, columns: Rows, into_x: Tensor | None, into_y: Tensor | None
) -> Tensor:
    """Adds the gradient with respect to the block's features, given those with respect to its statistics.

    Args:
        of, x, y: as for `statistics`.
        rows, columns: of all rows of x and of y.
        into_x, into_y: (n, D) and (m, D) float32; None where the gradient is not wanted.

    Returns:
        scalar, the gradient with respect to the bias.
    """
    of_bias = x.features.new_zeros((), dtype=torch.float64)
    for logits, i, j, masks, largest in _tiles(of, x, y):
        g = of.statistic.gradient(logits, masks, largest, rows.part(i), columns.part(j))
        if not masks.all_valid:
            g.mul_(masks.valid_rows[:, None]).mul_(masks.valid_columns)
        if into_x is not None:
            into_x[i].addmm_(g, _wide(y.features[j]), alpha=of.scale)
        if into_y is not None:
            into_y[j].addmm_(g.T, _wide(x.features[i]), alpha=of.scale)
        if of.bias is not None:
            of_bias += g.sum()
    return of_bias


def _tiles(of: Similarities, x: Block, y: Block) -> Iterator[tuple[Tensor, slice, slice, Masks, float]]:
    """Logits, overwritten by the next; rows, columns and masks of each tile; and the largest logit of all."""
    largest = abs(of.scale) * x.largest() * y.largest() + abs(of.bias or 0.0)
    buffer: Tensor | None = None
    for i, global_i in x.tiles(ROWS):
        scaled = _wide(x.features[i]) * of.scale
        for j, global_j in y.tiles(COLUMNS):
            candidates = _wide(y.features[j])
            if buffer is None or buffer.shape != (len(scaled), len(candidates)):
                buffer = scaled.new_empty(len(scaled), len(candidates))
            torch.mm(scaled, candidates.T, out=buffer)
            if of.bias is not None:
                buffer.add_(of.bias)
            yield buffer, i, j, of.matches.masks(global_i, global_j, buffer.dtype), largest


def _wide(features: Tensor) -> Tensor:
    """The features in the precision of their products."""
    return features.float() if features.dtype == torch.bfloat16 else features
