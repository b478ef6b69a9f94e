"""Blocks of features, and what is wanted of the similarities of two of them."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from muser_dist.objectives.statistics import Statistic
from muser_dist.objectives.targets import Matches


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

    def places(self, part: slice) -> slice:
        """Where rows of the block stand in the global batch."""
        return slice(self.first + part.start, self.first + part.stop)

    def parts(self, size: int) -> Iterator[slice]:
        """Its rows, so many at a time."""
        for start in range(0, len(self.features), size):
            yield slice(start, min(start + size, len(self.features)))

    def largest(self) -> float:
        """The largest norm of a row."""
        return float(torch.linalg.vector_norm(wide(self.features), dim=1).max())


def wide(features: Tensor) -> Tensor:
    """In the precision of products: bfloat16 becomes float32."""
    return features.float() if features.dtype == torch.bfloat16 else features
