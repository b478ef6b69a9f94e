"""Symmetric InfoNCE over the global batch, exact on any number of workers.

Shape suffixes: b rows of this rank, N = W·b rows of all ranks, D dimensions, P pairs.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from muser_dist.config import ObjectiveConfig
from muser_dist.objectives.collectives import gather, sum_over_ranks, world
from muser_dist.objectives.targets import match
from muser_dist.plugins import resolve


@dataclass(frozen=True)
class Batch:
    """What an objective knows of this rank's rows besides their features.

    Attributes:
        valid: by modality, (b,) bool: False rows are neither anchors nor candidates.
        row: (b,) int64, number of the row in the data; padding is -1.
        text_id: (b,) int64, equal where the texts state the same facts; below zero without text.
    """

    valid: dict[str, Tensor]
    row: Tensor
    text_id: Tensor


@dataclass(frozen=True)
class Loss:
    """This rank's share: over all ranks, shares and metrics sum to those of the global batch.

    Attributes:
        share: scalar with gradient.
        metrics: by name, detached scalars.
    """

    share: Tensor
    metrics: dict[str, Tensor]


Objective = Callable[[dict[str, Tensor], Tensor, Batch, ObjectiveConfig], Loss]


def contrastive(features: dict[str, Tensor], scale_P: Tensor, batch: Batch, config: ObjectiveConfig) -> Loss:
    """Cross-entropy of softmax(scale · cosine) against p_ij = 1/|P_i| over the positives P_i.

    Per pair the mean over all valid anchors of the global batch and both directions (InfoNCE,
    van den Oord et al. 2018; symmetric as in Radford et al. 2021; several positives as in
    Khosla et al. 2020, outside the logarithm), then the weighted mean of the pairs.

    Args:
        features: by modality, (b, D) float, not normalised; b is the same on every rank.
        scale_P: (P,) inverse temperatures, in the order of config.pairs.
        batch: validity and ids of the rows.
        config: pairs, weights, targets.

    Returns:
        the rank's share; metrics "loss", "loss_minus_entropy" (0 is perfect: the loss cannot go
        below the entropy of its targets) and "loss/<pair>".
    """
    rank, _ = world()
    b = len(batch.row)
    local = {name: F.normalize(features[name], dim=1) for name in _modalities(config)}
    everywhere = {name: gather(x_bD) for name, x_bD in local.items()}
    valid_N = {name: gather(batch.valid[name]) for name in local}
    position_b = torch.arange(rank * b, (rank + 1) * b, device=batch.row.device)
    positive_bN, excluded_bN = match(
        batch.row, batch.text_id, gather(batch.row), gather(batch.text_id), position_b, config.targets
    )

    share = scale_P.new_zeros(())
    metrics = {"loss": share.detach().clone(), "loss_minus_entropy": share.detach().clone()}
    weights = sum(pair.weight for pair in config.pairs)
    for p, pair in enumerate(config.pairs):
        anchor_b = batch.valid[pair.first] & batch.valid[pair.second]
        candidate_N = valid_N[pair.first] & valid_N[pair.second]
        anchors = candidate_N.sum().clamp(min=1)
        targets_bN = positive_bN & candidate_N
        keep_bN = candidate_N & ~excluded_bN
        count_b = targets_bN.sum(dim=1).clamp(min=1)
        loss = sum(
            _cross_entropy(scale_P[p] * local[x] @ everywhere[y].T, targets_bN, keep_bN, count_b)[anchor_b].sum()
            for x, y in ((pair.first, pair.second), (pair.second, pair.first))
        ) / (2 * anchors)
        entropy = (count_b.to(loss.dtype).log() * anchor_b).sum() / anchors
        weight = pair.weight / weights
        share = share + weight * loss
        metrics[f"loss/{pair.first}-{pair.second}"] = loss.detach()
        metrics["loss"] += weight * loss.detach()
        metrics["loss_minus_entropy"] += weight * (loss.detach() - entropy)
    return Loss(share, metrics)


def _cross_entropy(logits_bN: Tensor, targets_bN: Tensor, keep_bN: Tensor, count_b: Tensor) -> Tensor:
    """(b,) cross-entropy of each row; rows without targets give finite values of no meaning."""
    lowest = torch.finfo(logits_bN.dtype).min
    lse_b = torch.logsumexp(logits_bN.masked_fill(~keep_bN, lowest), dim=1)
    return lse_b - (logits_bN * targets_bN).sum(dim=1) / count_b


def _modalities(config: ObjectiveConfig) -> list[str]:
    return list(dict.fromkeys(name for pair in config.pairs for name in (pair.first, pair.second)))


OBJECTIVES: dict[str, Objective] = {"contrastive": contrastive}


def load_objective(config: ObjectiveConfig) -> Objective:
    """The objective that `objective.name` names.

    Raises:
        ConfigError: there is none of that name.
    """
    return resolve(config.name, OBJECTIVES, "objective.name")


def global_metrics(loss: Loss) -> dict[str, float]:
    """The metrics of the global batch, equal on every rank; one collective."""
    values = sum_over_ranks(torch.stack(list(loss.metrics.values())))
    return dict(zip(loss.metrics, values.tolist(), strict=True))
