"""Classification and tagging: what the model's linear heads say of metadata fields, against what the metadata says."""

import torch
import torch.nn.functional as F
from torch import Tensor

from muser_dist.config import ObjectiveConfig
from muser_dist.data.labels import LABEL
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
        batch: `labels` by field, and the flags of the one tower.

    Returns:
        the rank's share; metrics "loss" and "loss/<field>".
    """
    (valid,) = batch.valid.values()
    sums, counts = [], []
    for name, label in batch.labels.items():
        loss_b, known = cross_entropy(features[LABEL + name], label)
        taking_part = valid & known
        sums.append(torch.where(taking_part, loss_b, 0.0).sum())
        counts.append(taking_part.sum())
    means = torch.stack(sums) / sum_over_ranks(torch.stack(counts)).clamp(min=1)
    share = means.mean()
    of_fields = {f"loss/{name}": mean for name, mean in zip(batch.labels, means.detach(), strict=True)}
    return Loss(share, {"loss": share.detach()} | of_fields)


def cross_entropy(logits: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
    """The loss of each row and whether it has a label, (b,) each, of logits (b, C) and of labels as in `Batch`."""
    if label.ndim == 1:
        known = label >= 0
        return F.cross_entropy(logits, label.clamp(min=0), reduction="none"), known
    target = label.clamp(min=0).to(logits.dtype)
    return F.binary_cross_entropy_with_logits(logits, target, reduction="none").mean(dim=1), label[:, 0] >= 0
