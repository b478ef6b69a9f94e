"""InfoNCE whose anchors count by how much they resemble the rest of the batch."""

import torch
import torch.nn.functional as F
from torch import Tensor

from muser_dist.config import ObjectiveConfig
from muser_dist.errors import require
from muser_dist.objectives.batch import Batch, Logits, Loss
from muser_dist.objectives.collectives import sum_over_ranks
from muser_dist.objectives.contrastive import Anchors, info_nce, mean_over_anchors
from muser_dist.objectives.statistics import LogSumExp


def similarity_weighted(
    features: dict[str, Tensor], logits: Logits, batch: Batch, config: ObjectiveConfig, *, kappa: float
) -> Loss:
    """Symmetric InfoNCE, anchors weighted by w_i = exp(mean_j <x_i, x_j> / kappa) over the modality's own rows.

    The weighted mean is divided by the sum of weights, which have no gradient (LAION-CLAP's
    weight_loss_kappa, Wu et al. 2023).

    Args:
        features, logits, batch, config: see `Objective`; features must be normalised.
        kappa: at least 0.02; the smaller, the more weights differ.
    """
    require(kappa >= 0.02, f"objective.options.kappa is {kappa}; below 0.02 weights leave the range of float32")
    require(config.normalise, 'objective.normalise: "similarity_weighted" needs normalised features')

    def loss(anchors: Anchors) -> tuple[Tensor, Tensor]:
        loss_b, _ = info_nce(anchors)
        x_bD = F.normalize(torch.where(anchors.valid[:, None], anchors.features.detach(), 0.0), dim=1)
        sums = sum_over_ranks(torch.cat([x_bD.sum(dim=0), anchors.valid.sum()[None].to(x_bD)]))
        mean_similarity = x_bD @ sums[:-1] / sums[-1].clamp(min=1.0)
        return loss_b, torch.exp((mean_similarity - 1.0) / kappa)  # -1: a common factor, which keeps it finite

    return mean_over_anchors(features, logits, batch, config, LogSumExp(), loss)
