"""Decoupled contrastive learning: InfoNCE whose denominator leaves the positives out."""

import torch
from torch import Tensor

from muser_dist.config import ObjectiveConfig
from muser_dist.objectives.batch import Batch, Logits, Loss
from muser_dist.objectives.contrastive import Anchors, mean_over_anchors
from muser_dist.objectives.statistics import LOWEST, LogSumExp


def decoupled(features: dict[str, Tensor], logits: Logits, batch: Batch, config: ObjectiveConfig) -> Loss:
    """log Σ_{j not in P_i} exp(s_ij) - mean over P_i of s_ij, in both directions (Yeh et al. 2022).

    MuQ-MuLan trains with it (Zhu et al. 2025). Anchors without any negative do not count.
    """
    return mean_over_anchors(features, logits, batch, config, LogSumExp(decoupled=True), decoupled_loss)


def decoupled_loss(anchors: Anchors) -> tuple[Tensor, Tensor]:
    """The loss of each anchor over `LogSumExp(decoupled=True)`."""
    log_sum = anchors.log_sum()
    counts = log_sum > LOWEST / 2
    return torch.where(counts, log_sum, 0.0) - anchors.mean_positive(), counts.to(log_sum.dtype)
