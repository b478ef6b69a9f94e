"""What passes between the training step and an objective."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from muser_dist.config import ObjectiveConfig
from muser_dist.objectives.collectives import sum_over_ranks


@dataclass(frozen=True)
class Batch:
    """What an objective knows of this rank's rows besides their features.

    Attributes:
        valid: by modality, (b,) bool: False rows are neither anchors nor candidates.
        row: (b,) int64, number of the row in the data; padding is -1.
        text_id: (b,) int64, equal where the texts state the same facts; below zero without text.
        label_id: (b,) int64, equal where the label is the same; below zero without a label.
        negatives: by modality, (b, K) bool: which of the row's own K hard negatives there are. Their
            features stand under "<modality>_negatives", (b, K, D).
        labels: by metadata field, int64 (b,), the number of the value that a row has of it; or int8 (b, C), 1 for each
            of the C values that it has and 0 for the others. -1 where it lacks the field.
        liked: (b, L) int64, numbers of rows of songs that are liked together with this row's, -1 where there are fewer.
        partner: (b,) int64, where a row stands for two songs: the number of the other one's row. Its `liked` are (b,
            2, L) then, of each of the two.
    """

    valid: dict[str, Tensor]
    row: Tensor
    text_id: Tensor
    label_id: Tensor
    negatives: dict[str, Tensor] = field(default_factory=dict)
    labels: dict[str, Tensor] = field(default_factory=dict)
    liked: Tensor | None = None
    partner: Tensor | None = None

    @classmethod
    def join(cls, batches: list["Batch"]) -> "Batch":
        """The rows of several chunks as one batch."""
        one = batches[0]
        return cls(
            {name: torch.cat([batch.valid[name] for batch in batches]) for name in one.valid},
            torch.cat([batch.row for batch in batches]),
            torch.cat([batch.text_id for batch in batches]),
            torch.cat([batch.label_id for batch in batches]),
            {name: torch.cat([batch.negatives[name] for batch in batches]) for name in one.negatives},
            {name: torch.cat([batch.labels[name] for batch in batches]) for name in one.labels},
            None if one.liked is None else torch.cat([batch.liked for batch in batches if batch.liked is not None]),
        )


@dataclass(frozen=True)
class Logits:
    """How similarities become logits: s_ij = scale · <x_i, y_j> + bias.

    Attributes:
        scale: (P,) inverse temperatures, in the order of config.pairs.
        bias: (P,) where the objective has one.
    """

    scale: Tensor
    bias: Tensor | None = None


@dataclass(frozen=True)
class Loss:
    """This rank's share: over all ranks, shares and metrics sum to those of the global batch.

    Attributes:
        share: scalar with gradient.
        metrics: by name, detached scalars.
    """

    share: Tensor
    metrics: dict[str, Tensor]


Objective = Callable[[dict[str, Tensor], Logits, Batch, ObjectiveConfig], Loss]
"""Takes this rank's features by modality, (b, D) float, not normalised; every rank calls it, outside of autocast."""


def global_metrics(loss: Loss) -> dict[str, float]:
    """The metrics of the global batch, equal on every rank; one collective."""
    values = sum_over_ranks(torch.stack(list(loss.metrics.values())))
    return dict(zip(loss.metrics, values.tolist(), strict=True))
