"""Classification and tagging: what the model's linear heads say of metadata fields, against what the metadata says."""

import torch
import torch.nn.functional as F
from torch import Tensor

from muser_dist.config import ObjectiveConfig
from muser_dist.data.config import LABEL
from muser_dist.objectives.batch import Batch, Logits, Loss
from muser_dist.objectives.collectives import sum_over_ranks


def supervised(features: dict[str, Tensor], logits: Logits, batch: Batch, config: ObjectiveConfig) -> Loss:
    """The mean over fields of the mean cross-entropy over the rows of the global batch that have the field.

    A field with one value a row (data.classes): -log softmax of the right one. One with any number (data.tags): binary
    cross-entropy, mean over its values. A field that no row of the batch has adds nothing, and its head gets a gradient
    of zero: ZeRO waits for one.

    Args:
        features: "label/<field>" (b, C), logits of its C values, as float.
        logits, config: not used.
        batch: `labels` by field; the first modality's flags count, whose tower has the heads.

    Returns:
        the rank's share; metrics "loss" and "loss/<field>".
    """
    valid = next(iter(batch.valid.values()))
    sums, counts = [], []
    for name, label in batch.labels.items():
        taking_part = valid & (label if label.ndim == 1 else label.amin(dim=1)).ge(0)
        # What stands in other rows must not matter, whatever it is.
        loss_b = cross_entropy(features[LABEL + name].masked_fill(~taking_part[:, None], 0.0), label.clamp(min=0))
        sums.append((loss_b * taking_part).sum())
        counts.append(taking_part.sum())
    means = torch.stack(sums) / sum_over_ranks(torch.stack(counts)).clamp(min=1)
    share = means.mean()
    of_fields = {f"loss/{name}": mean for name, mean in zip(batch.labels, means.detach(), strict=True)}
    return Loss(share, {"loss": share.detach()} | of_fields)


def cross_entropy(logits: Tensor, label: Tensor) -> Tensor:
    """(b,) the loss of each row, of logits (b, C) and of labels (b,) or (b, C) as in `Batch`, none of them lacking."""
    if label.ndim == 1:
        return F.cross_entropy(logits, label, reduction="none")
    return F.binary_cross_entropy_with_logits(logits, label.to(logits.dtype), reduction="none").mean(dim=1)
