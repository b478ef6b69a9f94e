"""Negatives that may be false, and negatives that are hard: the debiased and the importance-weighted denominator."""

import torch
from torch import Tensor

from muser_dist.config import ObjectiveConfig
from muser_dist.errors import ConfigError, require
from muser_dist.objectives.batch import Batch, Logits, Loss
from muser_dist.objectives.contrastive import Anchors, mean_over_anchors
from muser_dist.objectives.statistics import LOWEST, LogSumExp


def debiased(
    features: dict[str, Tensor],
    logits: Logits,
    batch: Batch,
    config: ObjectiveConfig,
    *,
    tau_plus: float = 0.0,
    beta: float = 0.0,
) -> Loss:
    """InfoNCE with an estimate of the sum over true negatives in its denominator.

    For an anchor with M negatives j, of which each is a false one with probability tau_plus:

        w_ij = M · exp(β s_ij) / Σ_k exp(β s_ik)
        g_i  = max( (Σ_j w_ij exp(s_ij) - tau_plus · M · exp(s_ii)) / (1 - tau_plus), M · exp(-scale) )
        l_i  = -log( exp(s_ii) / (exp(s_ii) + g_i) )

    (Chuang et al. 2020 with β = 0; hard negatives by importance weights, Robinson et al. 2021,
    as DiHT uses them with tau_plus = 0, Radenovic et al. 2023.) The gradient goes through the weights.

    Args:
        features, logits, batch, config: see `Objective`; targets must be "instance", and features normalised.
        tau_plus: in [0, 1).
        beta: at least 0.
    """
    require(0.0 <= tau_plus < 1.0, f"objective.options.tau_plus is {tau_plus}; it is a probability below 1")
    require(beta >= 0.0, f"objective.options.beta is {beta}; it must be at least 0")
    if config.targets != "instance" or not config.normalise:
        raise ConfigError('objective.name: "debiased" needs targets "instance" and normalised features')

    def loss(anchors: Anchors) -> tuple[Tensor, Tensor]:
        hard, tilt, log_m = (anchors.log_sum(k, alpha) for k, alpha in enumerate((1.0 + beta, beta, 0.0)))
        counts = log_m > LOWEST / 2
        negatives, log_m = (torch.where(counts, x, 0.0) for x in (log_m + hard - tilt, log_m))
        own = anchors.mean_positive()
        top = torch.maximum(negatives, own).detach()
        estimate = torch.exp(negatives - top) - tau_plus * torch.exp(log_m + own - top)
        least = torch.exp(log_m - anchors.scale - top)
        g = torch.maximum(estimate / (1.0 - tau_plus), least)
        return torch.log(torch.exp(own - top) + g) + top - own, counts.to(own.dtype)

    statistic = LogSumExp((1.0 + beta, beta, 0.0), decoupled=True)
    return mean_over_anchors(features, logits, batch, config, statistic, loss)
