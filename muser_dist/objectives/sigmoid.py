"""The pairwise sigmoid loss of SigLIP: every pair of rows is a binary question of its own."""

import torch
from torch import Tensor

from muser_dist.config import ObjectiveConfig
from muser_dist.errors import ConfigError
from muser_dist.objectives.batch import Batch, Logits, Loss
from muser_dist.objectives.contrastive import Anchors, mean_over_anchors
from muser_dist.objectives.statistics import SoftplusSum


def sigmoid(features: dict[str, Tensor], logits: Logits, batch: Batch, config: ObjectiveConfig) -> Loss:
    """Σ_j log(1 + exp(-z_ij·s_ij)), summed over candidates, mean over anchors (Zhai et al. 2023).

    s_ij = scale · cos(x_i, y_j) + bias; z is 1 for positives and -1 for all others. Both directions
    are the same sum, so one counts.
    """
    if logits.bias is None:
        raise ConfigError("objective.bias: the sigmoid loss needs a bias; SigLIP starts at -10")
    if batch.negatives:
        raise ConfigError("objective.name: the sigmoid loss takes no hard negatives of single rows")

    def loss(anchors: Anchors) -> tuple[Tensor, Tensor]:
        return anchors.statistic[0], torch.ones_like(anchors.statistic[0])

    total = sum(pair.weight for pair in config.pairs)
    factors = torch.tensor([[pair.weight / total, 0.0] for pair in config.pairs], dtype=torch.float64)
    return mean_over_anchors(features, logits, batch, config, SoftplusSum(), loss, factors)
