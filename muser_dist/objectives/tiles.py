"""A block of similarities, tile by tile: statistics of its rows and columns, and the gradient back to features.

Two products make a gradient out of a tile's own one; nothing of a tile is kept. `TorchTiles` is what
every device can do, and CPUs do; on GPUs `tiles_cuda.FusedTiles` takes its place.
"""

from typing import Protocol

import torch
from torch import Tensor

from muser_dist.objectives.blocks import Block, Similarities, wide
from muser_dist.objectives.statistics import Rows


class Tiles(Protocol):
    """The tiles of one block x·yᵀ; i and j are rows of x and of y."""

    rows: int
    columns: int

    def states(self, i: slice, j: slice) -> tuple[Tensor, Tensor]:
        """States (C, n) and (C, m) of the tile's rows and columns."""
        ...

    def gradient(self, i: slice, j: slice, rows: Rows, columns: Rows) -> Tensor:
        """(n, m) gradient with respect to the tile's logits, zero where a row is not valid."""
        ...


def statistics(of: Similarities, x: Block, y: Block) -> tuple[Tensor, Tensor]:
    """States (C, n) of the rows and (C, m) of the columns of the block x·yᵀ."""
    tiles, statistic = _tiles(of, x, y), of.statistic
    like = x.features.new_empty(0, dtype=wide(x.features).dtype)
    rows, columns = statistic.empty(len(x.features), like), statistic.empty(len(y.features), like)
    for i in x.parts(tiles.rows):
        for j in y.parts(tiles.columns):
            of_rows, of_columns = tiles.states(i, j)
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
        into_x, into_y: (n, D) and (m, D) float32 or float64; None where the gradient is not wanted.

    Returns:
        scalar, the gradient with respect to the bias; zero where there is none.
    """
    tiles = _tiles(of, x, y)
    of_bias = x.features.new_zeros((), dtype=torch.float64)
    for i in x.parts(tiles.rows):
        for j in y.parts(tiles.columns):
            g = tiles.gradient(i, j, rows.part(i), columns.part(j))
            if into_x is not None:
                _add_product(into_x[i], g, y.features[j], of.scale)
            if into_y is not None:
                _add_product(into_y[j], g.T, x.features[i], of.scale)
            if of.bias is not None:
                of_bias += g.sum(dtype=wide(x.features).dtype)
    return of_bias


class TorchTiles:
    """Tiles in torch's operations, in the precision of the features or in float32 where those are bfloat16."""

    rows, columns = 1024, 1024  # on a CPU; of half or four times that the loss takes some percent more

    def __init__(self, of: Similarities, x: Block, y: Block) -> None:
        self.of, self.x, self.y = of, x, y
        if x.features.is_cuda:
            self.rows, self.columns = 4096, 8192
        self.largest = abs(of.scale) * x.largest() * y.largest() + abs(of.bias or 0.0)
        self._scaled: tuple[slice, Tensor] | None = None
        self._buffer: Tensor | None = None

    def states(self, i: slice, j: slice) -> tuple[Tensor, Tensor]:
        s = self._logits(i, j)
        masks = self.of.matches.masks(self.x.places(i), self.y.places(j), s.dtype)
        return self.of.statistic.tile(s, masks, self.largest)

    def gradient(self, i: slice, j: slice, rows: Rows, columns: Rows) -> Tensor:
        s = self._logits(i, j)
        masks = self.of.matches.masks(self.x.places(i), self.y.places(j), s.dtype)
        g = self.of.statistic.gradient(s, masks, self.largest, rows, columns)
        return g if masks.all_valid else g.mul_(masks.valid_rows[:, None]).mul_(masks.valid_columns)

    def _logits(self, i: slice, j: slice) -> Tensor:
        """The tile's logits, overwritten by the next tile's."""
        if self._scaled is None or self._scaled[0] != i:
            self._scaled = i, wide(self.x.features[i]) * self.of.scale
        scaled, candidates = self._scaled[1], wide(self.y.features[j])
        if self._buffer is None or self._buffer.shape != (len(scaled), len(candidates)):
            self._buffer = scaled.new_empty(len(scaled), len(candidates))
        torch.mm(scaled, candidates.T, out=self._buffer)
        return self._buffer if self.of.bias is None else self._buffer.add_(self.of.bias)


def _tiles(of: Similarities, x: Block, y: Block) -> Tiles:
    if x.features.is_cuda:
        from muser_dist.objectives import tiles_cuda

        if of.matches.songs is None and tiles_cuda.supports(of.statistic, x.features.dtype):
            return tiles_cuda.FusedTiles(of, x, y)
    return TorchTiles(of, x, y)


def _add_product(into: Tensor, g: Tensor, features: Tensor, scale: float) -> None:
    """into += scale · g·features, summed in into's precision."""
    if g.dtype == torch.bfloat16 and g.is_cuda:  # tensor cores; a tile's rounding is all that is lost
        into.add_(torch.mm(g, features, out_dtype=into.dtype), alpha=scale)
    else:
        into.addmm_(wide(g), wide(features), alpha=scale)
