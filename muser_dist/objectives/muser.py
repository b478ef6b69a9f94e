"""The losses of MUSER (Chen et al. 2022), after which this project is named, where they differ from symmetric InfoNCE.

Its paper, its Algorithm 1 and its released code disagree. Algorithm 1 is `contrastive` with
targets "instance" and one shared temperature: its label Y_i is the row's index.
"""

import math

import torch
from torch import Tensor

from muser_dist.config import ObjectiveConfig
from muser_dist.objectives.batch import Batch, Logits, Loss
from muser_dist.objectives.contrastive import info_nce, mean_over_anchors
from muser_dist.objectives.decoupled import decoupled_loss
from muser_dist.objectives.statistics import LogSumExp


def muser_poster(features: dict[str, Tensor], logits: Logits, batch: Batch, config: ObjectiveConfig) -> Loss:
    """The equation as printed: the positive out of the denominator, the first modality as anchor alone, pairs summed.

    L(Q, K) = mean_i -log exp(s_ii) / Σ_{j != i} exp(s_ij); L = L(A, T) + L(S, T). Pairs' weights are factors.
    """
    factors = torch.tensor([[pair.weight, 0.0] for pair in config.pairs], dtype=torch.float64)
    return mean_over_anchors(features, logits, batch, config, LogSumExp(decoupled=True), decoupled_loss, factors)


def muser_code(features: dict[str, Tensor], logits: Logits, batch: Batch, config: ObjectiveConfig) -> Loss:
    """The released code's: the sum of both directions' cross-entropies of all pairs, divided by 1·2···P.

    With its three pairs that is the mean of six; with two or one it is twice the mean.
    Its own negatives stopped at the process; here they are those of the global batch.
    """
    pairs = len(config.pairs)
    factors = torch.full((pairs, 2), 1.0 / math.factorial(pairs), dtype=torch.float64)
    return mean_over_anchors(features, logits, batch, config, LogSumExp(), info_nce, factors)
