"""Symmetric InfoNCE over the global batch, and the frame that all losses over pairs of modalities share.

A loss of this frame is a function of one direction of a pair: it gets what is known of each anchor
(`Anchors`) and returns a loss for each. Pairs, both directions, masks, ranks and normalisation are
done here once, and the similarities in similarity.py. Shape suffixes: b rows of this rank, N of all
ranks, D dimensions, P pairs.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from muser_dist.config import ObjectiveConfig
from muser_dist.errors import ConfigError
from muser_dist.objectives.batch import Batch, Logits, Loss
from muser_dist.objectives.collectives import equal_gradient, sum_over_ranks, world
from muser_dist.objectives.similarity import Pairs, row_statistics
from muser_dist.objectives.songs import Meeting, meetings_of_songs, of_songs
from muser_dist.objectives.statistics import LOWEST, LogSumExp, Statistic
from muser_dist.objectives.targets import GlobalBatch, Matches


@dataclass(frozen=True)
class Anchors:
    """One direction of a pair on this rank: anchors of one modality over candidates of the other.

    Attributes:
        features: (b, D) of the anchors' modality, not normalised; zeros where there are none.
        valid: (b,) bool.
        scale: scalar.
        statistic: (S, b), of `Statistic`.
        positives: (b,) how many candidates are positives.
        negatives: (b, K) logits of the rows' own hard negatives; LOWEST where there is none.
        own_view: (S, b) the statistic over the other rows of the anchors' own modality, where those are negatives too.
    """

    features: Tensor
    valid: Tensor
    scale: Tensor
    statistic: Tensor
    positives: Tensor
    negatives: Tensor | None = None
    own_view: Tensor | None = None

    def log_sum(self, k: int = 0, alpha: float = 1.0) -> Tensor:
        """(b,) the k-th log-sum-exp of `LogSumExp`, all kinds of negatives included; LOWEST without any candidate."""
        value = self.statistic[k].clamp(min=LOWEST)
        if self.own_view is not None:
            value = torch.logaddexp(value, self.own_view[k].clamp(min=LOWEST))
        if self.negatives is None:
            return value
        there = self.negatives > LOWEST / 2
        return torch.logaddexp(value, torch.logsumexp(torch.where(there, alpha * self.negatives, LOWEST), dim=1))

    def mean_positive(self) -> Tensor:
        """(b,) mean logit of the positives."""
        return self.statistic[-1] / self.positives


AnchorLoss = Callable[[Anchors], tuple[Tensor, Tensor]]
"""Returns a loss for each anchor and its weight in the mean, both (b,); weights have no gradient."""


def mean_over_anchors(
    features: dict[str, Tensor],
    logits: Logits,
    batch: Batch,
    config: ObjectiveConfig,
    statistic: Statistic,
    anchor_loss: AnchorLoss,
    factors: Tensor | None = None,
    floor: bool = False,
) -> Loss:
    """The frame: the weighted mean of `anchor_loss` over the valid anchors of the global batch, summed over directions.

    Of a pair of two views the other rows of an anchor's own view are negatives too, in whatever loss: with N clips
    an anchor then has 2N - 1 candidates (SimCLR, Chen et al. 2020).

    With config.dims the loss of each pair is the mean over these many leading dimensions, normalised
    anew (Matryoshka representation learning, Kusupati et al. 2022).

    Args:
        features, logits, batch, config: see `Objective`.
        statistic: what the loss needs of similarities.
        anchor_loss: the loss.
        factors: (P, 2) of each pair's two directions in the sum; by default the pairs' weights, divided by twice
            their sum.
        floor: whether no loss of an anchor can be below log |positives|: then "loss_minus_entropy" is told.

    Returns:
        the rank's share; metrics "loss" and "loss/<pair>", with several dims "loss/<pair>@<dim>".
    """
    factors = _weights(config) if factors is None else factors
    dims = config.dims or (next(iter(features.values())).shape[-1],)
    frame = _Frame(logits, config, statistic, anchor_loss, dims)
    means, floors = _means(frame, features, batch, [Meeting.of(p, pair) for p, pair in enumerate(config.pairs)])
    share_P = (factors[:, None].to(means) * means).sum(dim=2)  # (P, dims)
    share = share_P.mean(dim=1).sum()

    metrics = {"loss": share.detach()}
    if floor:
        lowest = (factors[:, None].to(means) * floors).sum(dim=2).mean(1).sum()
        metrics["loss_minus_entropy"] = share.detach() - lowest
    parts = factors.sum(dim=1).to(means)
    for p, pair in enumerate(config.pairs):
        own_mean = share_P[p].detach() / parts[p]
        metrics[f"loss/{pair.first}-{pair.second}"] = own_mean.mean()
        for d, value in zip(config.dims, own_mean, strict=False):
            metrics[f"loss/{pair.first}-{pair.second}@{d}"] = value
    return Loss(share, metrics)


@dataclass(frozen=True)
class _Frame:
    """What all pairs have in common; see `mean_over_anchors`."""

    logits: Logits
    config: ObjectiveConfig
    statistic: Statistic
    anchor_loss: AnchorLoss
    dims: tuple[int, ...]


def _means(
    frame: _Frame, features: dict[str, Tensor], batch: Batch, meetings: Sequence[Meeting]
) -> tuple[Tensor, Tensor]:
    """This rank's shares of the means over anchors: of losses, and of the least that they can be.

    Returns:
        twice (P, dims, 2): of each pair, number of dimensions and direction.
    """
    songs = [meeting for meeting in meetings if meeting.of_songs]
    if songs:  # rows of a batch of their own
        others = [meeting for meeting in meetings if not meeting.of_songs]
        whole = _means(frame, features, batch, others) if others else None
        of_two = _means(frame, *of_songs(features, batch, songs), meetings_of_songs(songs))
        return of_two if whole is None else (whole[0] + of_two[0], whole[1] + of_two[1])

    config, dims = frame.config, frame.dims
    rank, _ = world()
    rows = GlobalBatch.of(batch)
    b = rows.rows_each
    own = slice(rank * b, (rank + 1) * b)
    scale_P, bias_P = equal_gradient(frame.logits.scale), frame.logits.bias

    # Every pair at every number of dimensions is a pair of its own.
    cases = [(meeting, number, d) for number, meeting in enumerate(meetings) for d in dims]
    names = list(dict.fromkeys((name, d) for meeting, _, d in cases for name in (meeting.first, meeting.second)))
    views = [_shown(features[name][:, :d], batch.valid[name], b) for name, d in names]
    which = tuple((names.index((meeting.first, d)), names.index((meeting.second, d))) for meeting, _, d in cases)
    matches = Matches.of(rows, config, meetings)
    positives = [of_pair.positives()[own].to(scale_P.dtype) for of_pair in matches]
    # Behind them, what two views need besides: each of the two with itself.
    own_views = [(c, m) for c, (meeting, _, _) in enumerate(cases) if meeting.of_views for m in which[c]]
    all_cases = [*range(len(cases)), *(c for c, _ in own_views)]
    pairs = Pairs(
        (*which, *((m, m) for _, m in own_views)),
        tuple(matches[cases[c][1]] for c in all_cases),
        (*[frame.statistic] * len(cases), *[_without_self(frame.statistic) for _ in own_views]),
        _ring(views, config),
        config.normalise,
        config.bf16,
    )
    of_pair = torch.tensor([cases[c][0].pair for c in all_cases], device=scale_P.device)
    scales, biases = scale_P[of_pair], None if bias_P is None else bias_P[of_pair]
    statistics = row_statistics(pairs, scales, biases, views)

    losses, weights, floors = [], [], []
    for c, (meeting, number, d) in enumerate(cases):
        valid = matches[number].valid[own]
        for direction, other in enumerate((meeting.second, meeting.first)):
            x_bD = views[which[c][direction]]
            hard = None
            if other in batch.negatives:
                h_bKD = features[f"{other}_negatives"][..., :d]
                hard = _hard_negatives(x_bD, h_bKD, batch.negatives[other], scales[c], config.normalise)
            own_view = None
            if meeting.of_views:
                own_view = statistics[len(cases) + own_views.index((c, which[c][direction])), 0]
            anchors = Anchors(x_bD, valid, scales[c], statistics[c, direction], positives[number], hard, own_view)
            loss_b, weight_b = frame.anchor_loss(anchors)
            weight_b = weight_b.detach() * valid
            losses.append((torch.where(weight_b > 0, loss_b, 0.0) * weight_b).sum())
            weights.append(weight_b.sum())
            floors.append((positives[number].log() * weight_b).sum())
    total = sum_over_ranks(torch.stack(weights)).clamp(min=torch.finfo(statistics.dtype).tiny)
    shares = torch.tensor([meeting.share for meeting in meetings], device=total.device, dtype=total.dtype)
    at = torch.tensor([meeting.pair for meeting in meetings], device=total.device)

    def of_pairs(values: list[Tensor]) -> Tensor:
        of_meetings = (torch.stack(values) / total).view(len(meetings), len(dims), 2) * shares[:, None, None]
        return of_meetings.new_zeros(len(config.pairs), len(dims), 2).index_add(0, at, of_meetings)

    return of_pairs(losses), of_pairs(floors)


def _without_self(statistic: Statistic) -> Statistic:
    """The statistic of a modality with itself, where matches are `instance`: over all rows but the anchor."""
    if not isinstance(statistic, LogSumExp):
        raise ConfigError("objective.pairs: this loss does not contrast audio with its view; take contrastive")
    return replace(statistic, decoupled=True)


def contrastive(features: dict[str, Tensor], logits: Logits, batch: Batch, config: ObjectiveConfig) -> Loss:
    """Symmetric InfoNCE: cross-entropy of softmax over the candidates against 1/|P_i| over the positives P_i.

    With s_ij = scale · cos(x_i, y_j) the loss of anchor i is log Σ_j exp(s_ij) - mean over P_i of s_ij
    (van den Oord et al. 2018; both directions as in Radford et al. 2021). Several positives stand outside of
    the logarithm, as in supervised contrastive learning (Khosla et al. 2020, L_out): with
    config.targets = "same_label" it is that loss, across modalities.

    Of the pair audio and view it is NT-Xent (Chen et al. 2020, eq. 1), the loss of CLMR: the anchor's 2N - 1
    candidates are all other views of the batch, and the sum over both directions is that over 2N anchors.

    Of audio and "partner", and audio and "fused", it is HTCL's L2 and L3 (Pan et al. 2025): with a and f the audio and
    the fused embeddings of the songs 1 and 2 of each pair, CLIP(a1, a2) and the mean of CLIP(a1, f2) and CLIP(a2, f1).

    Algorithm 1 of MUSER is this with config.targets = "instance" and one shared temperature. With
    config.normalise = False and a constant temperature of 1 it is CLaMP 2's and 3's.
    """

    return mean_over_anchors(features, logits, batch, config, LogSumExp(), info_nce, floor=True)


def info_nce(anchors: Anchors) -> tuple[Tensor, Tensor]:
    """The loss of each anchor over `LogSumExp()`; all weigh the same."""
    loss_b = anchors.log_sum() - anchors.mean_positive()
    return loss_b, torch.ones_like(loss_b)


def _weights(config: ObjectiveConfig) -> Tensor:
    weights = torch.tensor([pair.weight for pair in config.pairs], dtype=torch.float64)
    return (weights / (2 * weights.sum()))[:, None].expand(-1, 2)


def _shown(x_bD: Tensor, valid_b: Tensor, b: int) -> Tensor:
    """The features padded to b rows, zeros in place of what nobody may see."""
    if not bool(valid_b.all()):
        x_bD = x_bD.masked_fill(~valid_b[:, None], 0.0)
    return x_bD if len(x_bD) == b else F.pad(x_bD, (0, 0, 0, b - len(x_bD)))


def _ring(views: list[Tensor], config: ObjectiveConfig) -> bool:
    """Whether the gathered features would take more memory than they may."""
    bytes_each = 2 if config.bf16 else views[0].element_size()
    return world()[1] * sum(x.numel() for x in views) * bytes_each > config.gather_mib << 20


def _hard_negatives(x_bD: Tensor, h_bKD: Tensor, there_bK: Tensor, scale: Tensor, normalise: bool) -> Tensor:
    """(b, K) logits of the anchors' own hard negatives (CompA, Ghosh et al. 2024); padded rows have none."""
    x, h = x_bD[: len(h_bKD)], h_bKD.masked_fill(~there_bK[..., None], 0.0)
    if normalise:
        x, h = F.normalize(x, dim=-1), F.normalize(h, dim=-1)
    # Minus infinity takes the place of what is not there. A large factor would raise negative similarities.
    logits = (scale * torch.einsum("bd,bkd->bk", x, h)).masked_fill(~there_bK, LOWEST)
    return F.pad(logits, (0, 0, 0, len(x_bD) - len(x)), value=LOWEST)
