"""Tiles on NVIDIA GPUs: products whose epilogue makes the statistics, or the gradient, of a tile.

In bfloat16 they run on the tensor cores; float32 is exact, and slow.

The logits exist in registers alone. What is written is, for each piece of 128 by 128, the state of its rows
and columns; in backward the tile's gradient in the features' own precision, which two products of the
library take to the features.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from muser_dist.objectives.blocks import Block, Similarities
from muser_dist.objectives.statistics import LOWEST, LogSumExp, Rows, SoftplusSum, Statistic

PIECE = 128
DEPTHS = {torch.bfloat16: 64, torch.float32: 16}
"""Of the features, how many numbers are in shared memory at a time: as much as the smaller cards have too."""

WARPS, STAGES = 8, 3

_LOWEST = tl.constexpr(LOWEST)


def supports(statistic: Statistic, dtype: torch.dtype) -> bool:
    """Whether there is a kernel; others take `TorchTiles`."""
    plain = isinstance(statistic, LogSumExp) and statistic.alphas == (1.0,)
    return dtype in (torch.float32, torch.bfloat16) and (plain or isinstance(statistic, SoftplusSum))


class FusedTiles:
    """See `tiles.Tiles`."""

    # A tile's gradient takes 512 MB in bfloat16, and twice that in float32.
    rows, columns = 16_384, 16_384

    def __init__(self, of: Similarities, x: Block, y: Block) -> None:
        self.of, self.x, self.y = of, x, y
        self.sigmoid = isinstance(of.statistic, SoftplusSum)
        self.decoupled = isinstance(of.statistic, LogSumExp) and of.statistic.decoupled
        assert x.features.is_contiguous() and y.features.is_contiguous()

    def states(self, i: slice, j: slice) -> tuple[Tensor, Tensor]:
        n, m = i.stop - i.start, j.stop - j.start
        parts = 1 if self.sigmoid else 3
        like = self.x.features.new_empty(0, dtype=torch.float32)
        of_rows = like.new_empty(parts, triton.cdiv(m, PIECE), n)
        of_columns = like.new_empty(parts, triton.cdiv(n, PIECE), m)
        _launch(_states, self, i, j, of_rows, of_columns)
        return self._together(of_rows), self._together(of_columns)

    def gradient(self, i: slice, j: slice, rows: Rows, columns: Rows) -> Tensor:
        g = torch.empty(i.stop - i.start, j.stop - j.start, device=self.x.features.device, dtype=self.x.features.dtype)
        known = [torch.cat([of.value, of.grad]).contiguous() for of in (rows, columns)]
        _launch(_gradient, self, i, j, *known, g)
        return g

    def _together(self, pieces: Tensor) -> Tensor:
        """(C, pieces, n) to (C, n)."""
        if self.sigmoid:
            return pieces.sum(dim=1)
        top = pieces[0].amax(dim=0)
        total = (pieces[1] * (pieces[0] - top).exp()).sum(dim=0)
        return torch.stack([top, total, pieces[2].sum(dim=0)])


def _launch(kernel: triton.JITFunction, tiles: FusedTiles, i: slice, j: slice, *outputs: Tensor) -> None:
    of, x, y = tiles.of, tiles.x, tiles.y
    rows, columns = x.features[i], y.features[j]
    (n, depth), m = rows.shape, len(columns)
    at_rows, at_columns = x.places(i), y.places(j)
    matches = of.matches
    barred = (*matches.barred, matches.label, matches.label)[:2]  # two at most; labels stand in for those not there
    grid = (triton.cdiv(n, PIECE) * triton.cdiv(m, PIECE),)
    with torch.cuda.device_of(rows):
        kernel[grid](
            rows,
            columns,
            matches.valid[at_rows].to(torch.int8),
            matches.valid[at_columns].to(torch.int8),
            matches.label[at_rows],
            matches.label[at_columns],
            barred[0][at_rows],
            barred[0][at_columns],
            barred[1][at_rows],
            barred[1][at_columns],
            *outputs,
            n,
            m,
            of.scale,
            of.bias or 0.0,
            DIM=depth,
            BARRED=len(matches.barred),
            DECOUPLED=tiles.decoupled,
            SIGMOID=tiles.sigmoid,
            PIECE=PIECE,
            DEPTH=DEPTHS[rows.dtype],
            num_warps=WARPS,
            num_stages=STAGES,
        )


@triton.jit
def _piece(n, m, PIECE: tl.constexpr, GROUP: tl.constexpr):
    """Which rows and columns this program has; neighbours in time share columns, which stay in the cache."""
    program = tl.program_id(0)
    down, across = tl.cdiv(n, PIECE), tl.cdiv(m, PIECE)
    first = program // (GROUP * across) * GROUP
    height = min(down - first, GROUP)
    return first + program % (GROUP * across) % height, program % (GROUP * across) // height


@triton.jit
def _logits(x, y, i, j, n, m, scale, bias, DIM: tl.constexpr, DEPTH: tl.constexpr, PIECE: tl.constexpr):
    s = tl.zeros((PIECE, PIECE), tl.float32)
    k = tl.arange(0, DEPTH)
    for start in range(0, DIM, DEPTH):
        inside = start + k < DIM
        a = tl.load(x + i[:, None] * DIM + start + k, mask=(i < n)[:, None] & inside, other=0.0)
        b = tl.load(y + j[:, None] * DIM + start + k, mask=(j < m)[:, None] & inside, other=0.0)
        s = tl.dot(a, tl.trans(b), s, input_precision="ieee")
    return s * scale + bias


@triton.jit
def _masks(
    i, j, n, m, valid_x, valid_y, label_x, label_y, id0_x, id0_y, id1_x, id1_y, BARRED: tl.constexpr
):  # fmt: skip
    """(positive, takes part), both without rows that are not valid."""
    there_i, there_j = i < n, j < m
    valid_i = tl.load(valid_x + i, mask=there_i, other=0) != 0
    valid_j = tl.load(valid_y + j, mask=there_j, other=0) != 0
    valid = valid_i[:, None] & valid_j
    positive = tl.load(label_x + i, mask=there_i, other=-1)[:, None] == tl.load(label_y + j, mask=there_j, other=-2)
    part = valid
    if BARRED > 0:
        same = tl.load(id0_x + i, mask=there_i, other=-1)[:, None] == tl.load(id0_y + j, mask=there_j, other=-2)
        part = part & (positive | (same == 0))
    if BARRED > 1:
        same = tl.load(id1_x + i, mask=there_i, other=-1)[:, None] == tl.load(id1_y + j, mask=there_j, other=-2)
        part = part & (positive | (same == 0))
    return positive & valid, part


@triton.jit
def _states(
    x, y, valid_x, valid_y, label_x, label_y, id0_x, id0_y, id1_x, id1_y, of_rows, of_columns, n, m, scale, bias,
    DIM: tl.constexpr, BARRED: tl.constexpr, DECOUPLED: tl.constexpr, SIGMOID: tl.constexpr,
    PIECE: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    at_i, at_j = _piece(n, m, PIECE, 8)
    i, j = at_i * PIECE + tl.arange(0, PIECE), at_j * PIECE + tl.arange(0, PIECE)
    s = _logits(x, y, i, j, n, m, scale, bias, DIM, DEPTH, PIECE)
    positive, part = _masks(i, j, n, m, valid_x, valid_y, label_x, label_y, id0_x, id0_y, id1_x, id1_y, BARRED)
    pieces_across, pieces_down = tl.cdiv(m, PIECE), tl.cdiv(n, PIECE)
    row, column = of_rows + at_j * n + i, of_columns + at_i * m + j
    if SIGMOID:
        turned = tl.where(positive, -s, s)
        small = tl.exp(-tl.abs(turned))
        rounded = 1.0 + small
        # log(1 + e) as accurate as e: what rounding has taken from 1 + e is put back as a factor.
        log1p = tl.where(rounded == 1.0, small, tl.log(rounded) * (small / tl.maximum(rounded - 1.0, 1e-30)))
        terms = tl.where(part, tl.maximum(turned, 0.0) + log1p, 0.0)
        tl.store(row, tl.sum(terms, 1), mask=i < n)
        tl.store(column, tl.sum(terms, 0), mask=j < m)
    else:
        if DECOUPLED:
            part = part & (positive == 0)
        kept = tl.where(part, s, _LOWEST)
        of_positives = tl.where(positive, s, 0.0)
        top = tl.maximum(tl.max(kept, 1), _LOWEST / 2)
        tl.store(row, top, mask=i < n)
        tl.store(row + pieces_across * n, tl.sum(tl.exp(kept - top[:, None]), 1), mask=i < n)
        tl.store(row + 2 * pieces_across * n, tl.sum(of_positives, 1), mask=i < n)
        top = tl.maximum(tl.max(kept, 0), _LOWEST / 2)
        tl.store(column, top, mask=j < m)
        tl.store(column + pieces_down * m, tl.sum(tl.exp(kept - top), 0), mask=j < m)
        tl.store(column + 2 * pieces_down * m, tl.sum(of_positives, 0), mask=j < m)


@triton.jit
def _gradient(
    x, y, valid_x, valid_y, label_x, label_y, id0_x, id0_y, id1_x, id1_y, rows, columns, g, n, m, scale, bias,
    DIM: tl.constexpr, BARRED: tl.constexpr, DECOUPLED: tl.constexpr, SIGMOID: tl.constexpr,
    PIECE: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    at_i, at_j = _piece(n, m, PIECE, 8)
    i, j = at_i * PIECE + tl.arange(0, PIECE), at_j * PIECE + tl.arange(0, PIECE)
    s = _logits(x, y, i, j, n, m, scale, bias, DIM, DEPTH, PIECE)
    positive, part = _masks(i, j, n, m, valid_x, valid_y, label_x, label_y, id0_x, id0_y, id1_x, id1_y, BARRED)
    there_i, there_j = i < n, j < m
    if SIGMOID:
        grad_i = tl.load(rows + n + i, mask=there_i, other=0.0)
        grad_j = tl.load(columns + m + j, mask=there_j, other=0.0)
        turned = tl.where(positive, -s, s)
        share = (grad_i[:, None] + grad_j) / (1.0 + tl.exp(-turned))
        result = tl.where(part, tl.where(positive, -share, share), 0.0)
    else:
        # Rows: log-sum-exp, sum over positives, and the gradients of the two.
        lse_i = tl.load(rows + i, mask=there_i, other=0.0)
        lse_j = tl.load(columns + j, mask=there_j, other=0.0)
        grad_i = tl.load(rows + 2 * n + i, mask=there_i, other=0.0)
        grad_j = tl.load(columns + 2 * m + j, mask=there_j, other=0.0)
        positive_i = tl.load(rows + 3 * n + i, mask=there_i, other=0.0)
        positive_j = tl.load(columns + 3 * m + j, mask=there_j, other=0.0)
        if DECOUPLED:
            part = part & (positive == 0)
        kept = tl.where(part, s, _LOWEST)
        lse_i = tl.maximum(lse_i, _LOWEST / 2)  # no candidate at all: minus infinity
        lse_j = tl.maximum(lse_j, _LOWEST / 2)
        result = tl.exp(kept - lse_i[:, None]) * grad_i[:, None] + tl.exp(kept - lse_j) * grad_j
        result += tl.where(positive, positive_i[:, None] + positive_j, 0.0)
    at = i.to(tl.int64)[:, None] * m + j
    tl.store(g + at, result.to(g.dtype.element_ty), mask=there_i[:, None] & there_j)
