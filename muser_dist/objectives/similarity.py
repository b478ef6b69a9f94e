"""Statistics of the global similarities as one differentiable step, which nobody ever stores.

Every rank has b rows of each modality and gets the statistics of its own rows, among all N = W·b candidates.
Each rank's gradient is that of the sum of all ranks' losses with respect to its own rows.

Two ways give the same results. Gathered: every rank holds all features; ranks then exchange numbers of
rows alone, no gradient of a feature, and compute the gradient of their own rows. Ring: blocks of features
travel, and with them what is known of their columns; a rank holds its own, the one it works on and the next.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from muser_dist.objectives import tiles
from muser_dist.objectives.blocks import Block, Similarities
from muser_dist.objectives.collectives import exchange, gather, pass_on, world
from muser_dist.objectives.statistics import Rows, Statistic
from muser_dist.objectives.targets import Matches


@dataclass(frozen=True)
class Pairs:
    """Which modalities meet, and what is wanted of their similarities.

    Attributes:
        which: (P) indices of the first and the second modality of each pair, which may be the same.
        matches: of each pair.
        statistics: of each pair; all have as many numbers.
        ring: whether features travel in a ring instead of being gathered.
        normalise: whether features are compared by cosine.
        bf16: whether features are rounded to bfloat16 before they travel and meet. Sums stay float32; the gradient
            is that of the rounded features.
    """

    which: tuple[tuple[int, int], ...]
    matches: tuple[Matches, ...]
    statistics: tuple[Statistic, ...]
    ring: bool = False
    normalise: bool = True
    bf16: bool = False

    def compared(self, features: Iterable[Tensor]) -> list[Tensor]:
        """The features as they travel and meet."""
        unit = (x / _norms(x) if self.normalise else x for x in map(Tensor.detach, features))
        return [(x.bfloat16() if self.bf16 else x).contiguous() for x in unit]

    def of_given(self, gradients: list[Tensor], features: Iterable[Tensor]) -> list[Tensor]:
        """Gradients with respect to the features as they were given, out of those as they meet; in place."""
        if self.normalise:
            for gradient, x in zip(gradients, features, strict=True):
                norms, x = _norms(x).to(gradient.dtype), x.to(gradient.dtype)
                along = torch.einsum("bd,bd->b", gradient, x)[:, None] / norms.square()
                gradient.addcmul_(x, along, value=-1.0).div_(norms)
        return gradients

    def similarities(self, scale_P: Tensor, bias_P: Tensor | None) -> list[Similarities]:
        """Of each pair; reads the numbers out of the tensors once."""
        scales = scale_P.tolist()
        biases: Sequence[float | None] = [None] * len(scales) if bias_P is None else bias_P.tolist()
        return [Similarities(*of_pair) for of_pair in zip(scales, biases, self.matches, self.statistics, strict=True)]


def row_statistics(pairs: Pairs, scale_P: Tensor, bias_P: Tensor | None, features: list[Tensor]) -> Tensor:
    """The statistics of this rank's rows, in both directions of each pair; a collective.

    Args:
        pairs: the same on every rank.
        scale_P, bias_P: of the logits scale · <x_i, y_j> + bias.
        features: of each modality (b, D) float32 or float64, not normalised; b is the same on all ranks.

    Returns:
        (P, 2, S, b) float32 or float64: [p, 0] of anchors of the pair's first modality over candidates of the
        second, [p, 1] of anchors of the second; the S numbers of `Statistic`.
    """
    backend = _Ring if pairs.ring and world()[1] > 1 else _Gathered
    return backend.apply(pairs, scale_P, bias_P, *features)


class _Gathered(torch.autograd.Function):
    """Products for each pair, of 2·b·N·D operations each: 1 in forward, 5 - 1/W in all."""

    @staticmethod
    def forward(ctx: Any, pairs: Pairs, scale_P: Tensor, bias_P: Tensor | None, *features: Tensor) -> Tensor:
        rank, ranks = world()
        b = len(features[0])
        own = pairs.compared(features)
        everywhere = [gather(x) for x in own]
        rows, columns = [], []
        for p, of in enumerate(pairs.similarities(scale_P, bias_P)):
            first, second = pairs.which[p]
            mine, theirs = _masked(own[first], of, rank * b), _masked(everywhere[second], of, 0)
            of_rows, of_columns = tiles.statistics(of, mine, theirs)
            rows.append(of_rows)
            columns.append(of_columns)
        # Of each column every rank has seen its own b rows; the rank that owns the column puts that together.
        seen = torch.stack(columns).unflatten(2, (ranks, b)).movedim(2, 0)
        parts = exchange(seen.contiguous())
        whole = parts[0]
        for part in parts[1:]:
            both = zip(pairs.statistics, whole, part, strict=True)
            whole = torch.stack([statistic.merge(a, c) for statistic, a, c in both])
        stats = torch.stack(
            [
                torch.stack([statistic.finish(row), statistic.finish(column)])
                for statistic, row, column in zip(pairs.statistics, rows, whole, strict=True)
            ]
        )
        ctx.pairs = pairs
        ctx.save_for_backward(scale_P, bias_P, stats, *features, *own, *everywhere)  # freed after backward
        return stats

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        scale_P, bias_P, stats, *saved = ctx.saved_tensors
        pairs, m = ctx.pairs, len(saved) // 3
        given, features, everywhere = saved[:m], saved[m : 2 * m], saved[2 * m :]
        rank, ranks = world()
        b = len(features[0])
        known = gather(torch.stack([stats, grads[0]])[None]).movedim(0, 4).flatten(4)  # (2, P, 2, S, N)
        of_features = [torch.zeros_like(x, dtype=stats.dtype) for x in features]
        of_scale, of_bias = torch.zeros_like(scale_P), torch.zeros_like(scale_P)
        own = slice(rank * b, (rank + 1) * b)
        others = [slice(0, own.start), slice(own.stop, ranks * b)]
        for p, of in enumerate(pairs.similarities(scale_P, bias_P)):
            first, second = pairs.which[p]
            x, y = _masked(features[first], of, own.start), _masked(features[second], of, own.start)
            rows, columns = (Rows(known[0, p, d], known[1, p, d]) for d in (0, 1))
            my_rows, my_columns = rows.part(own), columns.part(own)
            into_x = torch.zeros_like(of_features[first])
            # Of the block that is this rank's both ways, one product serves both.
            of_bias[p] += tiles.gradient(of, x, y, my_rows, my_columns, into_x, of_features[second])
            for part in others:
                if part.start == part.stop:
                    continue
                candidates = _masked(everywhere[second][part], of, part.start)
                of_bias[p] += tiles.gradient(of, x, candidates, my_rows, columns.part(part), into_x, None)
                anchors = _masked(everywhere[first][part], of, part.start)
                tiles.gradient(of, anchors, y, rows.part(part), my_columns, None, of_features[second])
            of_scale[p] = _of_scale(x, into_x, of)
            of_features[first] += into_x
        return (None, of_scale, None if bias_P is None else of_bias, *pairs.of_given(of_features, given))


class _Ring(torch.autograd.Function):
    """Products for each pair, of 2·b·N·D operations each: 1 in forward, 4 in all; a tile serves both directions.

    Of each pair one modality stays and the other travels; a modality that travels does so once for all pairs.
    """

    @staticmethod
    def forward(ctx: Any, pairs: Pairs, scale_P: Tensor, bias_P: Tensor | None, *features: Tensor) -> Tensor:
        rank, ranks = world()
        b = len(features[0])
        plan, own = _RingPlan.of(pairs.which), pairs.compared(features)
        similarities = plan.turned(pairs.similarities(scale_P, bias_P))
        like = features[0].new_empty(0)
        rows = [statistic.empty(b, like) for statistic in pairs.statistics]
        columns = [statistic.empty(b, like) for statistic in pairs.statistics]
        blocks = {m: own[m] for m in plan.travelling}
        for hop in range(ranks):
            owner = (rank - hop) % ranks
            for p, of in enumerate(similarities):
                x = _masked(own[plan.staying[p]], of, rank * b)
                y = _masked(blocks[plan.moving[p]], of, owner * b)
                of_rows, of_columns = tiles.statistics(of, x, y)
                merge = of.statistic.merge
                rows[p], columns[p] = merge(rows[p], of_rows), merge(columns[p], of_columns)
            columns = list(pass_on([torch.stack(columns)])[0])  # after the last hop they are home
            if hop < ranks - 1:
                blocks = dict(zip(blocks, pass_on(list(blocks.values())), strict=True))
        finished = [
            [statistic.finish(row), statistic.finish(column)]
            for statistic, row, column in zip(pairs.statistics, rows, columns, strict=True)
        ]
        stats = torch.stack([torch.stack(plan.in_order(p, pair)) for p, pair in enumerate(finished)])
        ctx.pairs = pairs
        ctx.save_for_backward(scale_P, bias_P, stats, *features, *own)
        return stats

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        scale_P, bias_P, stats, *saved = ctx.saved_tensors
        pairs, m = ctx.pairs, len(saved) // 2
        given, features = saved[:m], saved[m:]
        rank, ranks = world()
        b = len(features[0])
        plan = _RingPlan.of(pairs.which)
        similarities = plan.turned(pairs.similarities(scale_P, bias_P))
        of_features = [torch.zeros_like(x, dtype=stats.dtype) for x in features]
        of_scale, of_bias = torch.zeros_like(scale_P), torch.zeros_like(scale_P)
        known = [plan.in_order(p, [Rows(stats[p, d], grads[0][p, d]) for d in (0, 1)]) for p in range(len(stats))]
        columns = torch.stack([torch.stack([of_columns.value, of_columns.grad]) for _, of_columns in known])
        blocks = {m: features[m] for m in plan.travelling}
        carried = {m: torch.zeros_like(of_features[m]) for m in plan.travelling}
        into_x = [torch.zeros_like(of_features[m]) for m in plan.staying]
        for hop in range(ranks):
            owner = (rank - hop) % ranks
            for p, of in enumerate(similarities):
                x = _masked(features[plan.staying[p]], of, rank * b)
                y = _masked(blocks[plan.moving[p]], of, owner * b)
                of_columns = Rows(columns[p, 0], columns[p, 1])
                into_y = carried[plan.moving[p]]
                of_bias[p] += tiles.gradient(of, x, y, known[p][0], of_columns, into_x[p], into_y)
            carried = dict(zip(carried, pass_on(list(carried.values())), strict=True))
            if hop < ranks - 1:
                *moved, columns = pass_on([*blocks.values(), columns])
                blocks = dict(zip(blocks, moved, strict=True))
        for p, of in enumerate(similarities):
            of_scale[p] = _of_scale(_masked(features[plan.staying[p]], of, rank * b), into_x[p], of)
            of_features[plan.staying[p]] += into_x[p]
        for m, gradient in carried.items():
            of_features[m] += gradient
        return (None, of_scale, None if bias_P is None else of_bias, *pairs.of_given(of_features, given))


@dataclass(frozen=True)
class _RingPlan:
    """Which modality of each pair stays and which moves."""

    staying: tuple[int, ...]
    moving: tuple[int, ...]
    flipped: tuple[bool, ...]

    @classmethod
    def of(cls, which: tuple[tuple[int, int], ...]) -> "_RingPlan":
        """Lets those travel that most pairs share, until each pair has one that does."""
        travelling: set[int] = set()
        while left := [pair for pair in which if not travelling & set(pair)]:
            travelling.add(Counter(m for pair in left for m in pair).most_common(1)[0][0])
        flipped = tuple(second not in travelling for _, second in which)
        return cls(
            tuple(second if flip else first for flip, (first, second) in zip(flipped, which, strict=True)),
            tuple(first if flip else second for flip, (first, second) in zip(flipped, which, strict=True)),
            flipped,
        )

    @property
    def travelling(self) -> list[int]:
        """The modalities that travel."""
        return sorted(set(self.moving))

    def turned(self, similarities: list[Similarities]) -> list[Similarities]:
        """Those of what stays with what moves: turned round for pairs whose second modality stays."""
        both = zip(self.flipped, similarities, strict=True)
        return [replace(of, matches=of.matches.turned()) if flip else of for flip, of in both]

    def in_order(self, p: int, two: list[Any]) -> list[Any]:
        """Staying and moving to first and second, and back."""
        return two[::-1] if self.flipped[p] else two


def _masked(features: Tensor, of: Similarities, first: int) -> Block:
    """The block of these rows with zeros where the pair is not valid: what stands there must not matter."""
    if not of.matches.all_valid:
        features = features.masked_fill(~of.matches.valid[first : first + len(features), None], 0.0)
    return Block(features, first)


def _of_scale(x: Block, into_x: Tensor, of: Similarities) -> Tensor:
    """The gradient of the scale that x's rows give: dL/dx_i is scale · Σ g_ij y_j, so <x_i, dL/dx_i> holds it."""
    return torch.einsum("bd,bd->b", x.features.to(into_x.dtype), into_x).sum(dtype=torch.float64) / of.scale


def _norms(x: Tensor) -> Tensor:
    """(b, 1) lengths of rows, at least 1e-12, so that a row of zeros stays one."""
    return torch.linalg.vector_norm(x, dim=1, keepdim=True).clamp(min=1e-12)
