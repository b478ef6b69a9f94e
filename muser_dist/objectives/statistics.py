"""What losses need to know of a row of similarities: a few sums over its candidates.

A loss never sees the N x N similarities. It names a statistic, gets its values for each anchor, and
is an ordinary function of those; tiles.py takes their gradient back to the features.

A statistic is computed tile by tile. What is known of some rows after some tiles is a state (C, n);
states of different tiles merge, wherever the tiles were seen. Shapes: n anchors of a tile, m candidates.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from muser_dist.objectives.targets import Masks

LOWEST = -1e30
"""Stands for minus infinity, whose differences are not numbers."""

LARGEST_EXPONENT = 70.0
"""Up to here e^s and its inverse, summed over a million rows, are ordinary float32 numbers: then one exponential
of each similarity serves both directions and needs no maximum first."""


@dataclass(frozen=True)
class Rows:
    """The finished statistic of some rows and the loss's gradient with respect to it, (S, n) each."""

    value: Tensor
    grad: Tensor

    def part(self, where: slice) -> "Rows":
        """The same of some of the rows."""
        return Rows(self.value[:, where], self.grad[:, where])


class Statistic(Protocol):
    """A statistic of rows, and of columns, of the logits."""

    def empty(self, n: int, like: Tensor) -> Tensor:
        """The state (C, n) before any tile."""
        ...

    def tile(self, s: Tensor, masks: Masks, largest: float) -> tuple[Tensor, Tensor]:
        """The states (C, n) and (C, m) of a tile's rows and columns.

        Args:
            s: (n, m) logits; may be overwritten.
            masks: of the tile. Features of rows that are not valid are zero.
            largest: no logit is larger in absolute value.
        """
        ...

    def merge(self, a: Tensor, b: Tensor) -> Tensor:
        """The state of what two states have seen."""
        ...

    def finish(self, state: Tensor) -> Tensor:
        """The statistic (S, n)."""
        ...

    def gradient(self, s: Tensor, masks: Masks, largest: float, rows: Rows, columns: Rows) -> Tensor:
        """(n, m) gradient with respect to the logits; finite, of no meaning where a row is not valid."""
        ...


@dataclass(frozen=True)
class LogSumExp:
    """log Σ exp(α·s_ij) over the candidates j of i, for each α; and last Σ s_ij over its positives.

    Sums are float32 or finer, of terms relative to a maximum where they could leave its range.

    Attributes:
        alphas: factors α; 0 gives the logarithm of the number of candidates.
        decoupled: leaves positives out of the sums of exponentials.
    """

    alphas: tuple[float, ...] = (1.0,)
    decoupled: bool = False

    # A state is, for each α, the maximum that terms are relative to; then, for each α, the sum of terms; then the
    # sum over positives.

    def empty(self, n: int, like: Tensor) -> Tensor:
        k = len(self.alphas)
        state = like.new_zeros(2 * k + 1, n)
        state[:k] = LOWEST
        return state

    def tile(self, s: Tensor, masks: Masks, largest: float) -> tuple[Tensor, Tensor]:
        k = len(self.alphas)
        row_state, column_state = s.new_zeros(2 * k + 1, s.shape[0]), s.new_zeros(2 * k + 1, s.shape[1])
        if masks.positive is not None:
            positive = s.masked_fill(~masks.positive, 0.0)
            torch.mv(positive, masks.valid_columns, out=row_state[2 * k])
            torch.mv(positive.T, masks.valid_rows, out=column_state[2 * k])
        out = self._out(masks)
        for i, alpha in enumerate(self.alphas):
            terms = self._exponents(s, alpha, last=i == k - 1)
            if out is not None:
                terms.masked_fill_(out, LOWEST)
            if abs(alpha) * largest <= LARGEST_EXPONENT:
                terms.exp_()
                torch.mv(terms, masks.valid_columns, out=row_state[k + i])
                torch.mv(terms.T, masks.valid_rows, out=column_state[k + i])
                continue
            if not masks.all_valid:
                terms += (masks.valid_columns - 1.0) * -LOWEST
                terms += (masks.valid_rows[:, None] - 1.0) * -LOWEST
            row_state[i] = terms.amax(dim=1).clamp(min=LOWEST / 2)  # where nothing takes part, terms stay at zero
            column_state[i] = terms.amax(dim=0).clamp(min=LOWEST / 2)
            row_state[k + i] = (terms - row_state[i, :, None]).exp_().sum(dim=1)
            column_state[k + i] = terms.sub_(column_state[i]).exp_().sum(dim=0)
        return row_state, column_state

    def merge(self, a: Tensor, b: Tensor) -> Tensor:
        k = len(self.alphas)
        top = torch.maximum(a[:k], b[:k])
        total = a[k : 2 * k] * (a[:k] - top).exp() + b[k : 2 * k] * (b[:k] - top).exp()
        return torch.cat([top, total, a[2 * k :] + b[2 * k :]])

    def finish(self, state: Tensor) -> Tensor:
        k = len(self.alphas)
        return torch.cat([state[:k] + state[k : 2 * k].log(), state[2 * k :]])  # -inf where there is no candidate

    def gradient(self, s: Tensor, masks: Masks, largest: float, rows: Rows, columns: Rows) -> Tensor:
        k = len(self.alphas)
        out = self._out(masks)
        of_positives = None
        if masks.positive is not None:
            of_positives = (rows.grad[k, :, None] + columns.grad[k]).masked_fill_(~masks.positive, 0.0)
        gradient = None
        for i, alpha in enumerate(self.alphas):
            if alpha == 0.0:
                continue
            terms = self._exponents(s, alpha, last=i == k - 1)
            if out is not None:
                terms.masked_fill_(out, LOWEST)
            of_rows, of_columns = alpha * rows.grad[i], alpha * columns.grad[i]
            if abs(alpha) * largest <= LARGEST_EXPONENT:
                # e^s · (g_i e^{-lse_i} + g_j e^{-lse_j})
                weights = _scaled(of_rows, rows.value[i])[:, None] + _scaled(of_columns, columns.value[i])
                part = terms.exp_().mul_(weights)
            else:
                if not masks.all_valid:
                    terms += (masks.valid_columns - 1.0) * -LOWEST
                    terms += (masks.valid_rows[:, None] - 1.0) * -LOWEST
                part = (terms - _finite(rows.value[i])[:, None]).exp_().mul_(of_rows[:, None])
                part += terms.sub_(_finite(columns.value[i])).exp_().mul_(of_columns)
            gradient = part if gradient is None else gradient.add_(part)
        assert gradient is not None
        return gradient if of_positives is None else gradient.add_(of_positives)

    def _out(self, masks: Masks) -> Tensor | None:
        """(n, m) bool, what does not enter the sums of exponentials."""
        if not self.decoupled or masks.positive is None:
            return masks.barred
        return masks.positive if masks.barred is None else masks.positive | masks.barred

    def _exponents(self, s: Tensor, alpha: float, last: bool) -> Tensor:
        """α·s, in place of s where nobody needs it any more."""
        if last:
            return s if alpha == 1.0 else s.mul_(alpha)
        return s * alpha


@dataclass(frozen=True)
class SoftplusSum:
    """Σ log(1 + exp(-z_ij·s_ij)) over the candidates j of i, with z = 1 for positives and -1 for others."""

    def empty(self, n: int, like: Tensor) -> Tensor:
        return like.new_zeros(1, n)

    def tile(self, s: Tensor, masks: Masks, largest: float) -> tuple[Tensor, Tensor]:
        terms = F.softplus(self._turned(s, masks), threshold=40.0)  # above, it is its argument even in float64
        return torch.mv(terms, masks.valid_columns)[None], torch.mv(terms.T, masks.valid_rows)[None]

    def merge(self, a: Tensor, b: Tensor) -> Tensor:
        return a + b

    def finish(self, state: Tensor) -> Tensor:
        return state

    def gradient(self, s: Tensor, masks: Masks, largest: float, rows: Rows, columns: Rows) -> Tensor:
        gradient = self._turned(s, masks).sigmoid_().mul_(rows.grad[0, :, None] + columns.grad[0])
        return gradient if masks.positive is None else torch.where(masks.positive, -gradient, gradient)

    def _turned(self, s: Tensor, masks: Masks) -> Tensor:
        """-z·s, in place of s; so low that nothing is left of it where the pair takes no part."""
        if masks.positive is not None:
            s = torch.where(masks.positive, -s, s)
        return s if masks.barred is None else s.masked_fill_(masks.barred, LOWEST)


def _scaled(grad: Tensor, lse: Tensor) -> Tensor:
    # No lse of a row that takes part in such a tile is lower; others must not become infinite.
    return grad * torch.exp(-lse.clamp(min=-LARGEST_EXPONENT))


def _finite(lse: Tensor) -> Tensor:
    """Log-sum-exps; 0 for rows without any candidate, whose gradient is zero."""
    return lse.masked_fill(lse.isinf(), 0.0)
