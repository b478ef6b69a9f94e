"""The oracle: every loss written as its definition, for one process and few rows.

Read this first to know what is computed; contrastive.py and its neighbours compute the same over many
workers without ever holding the similarities. Nothing here is fast. Tests run it in float64.

All take the whole batch: features by modality (N, D), logits (scale and bias by pair), the flags and
ids of all N rows, and the config. Their value is the loss, a scalar; zero when no row is valid.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from muser_dist.config import ObjectiveConfig, PairConfig
from muser_dist.objectives.batch import Batch, Logits


class Similarities:
    """The logits of one direction of a pair, and what rows are to each other.

    Attributes:
        anchors: the rows that are valid in both modalities; they are the candidates too.
        scale: of the pair.
    """

    def __init__(
        self,
        features: dict[str, Tensor],
        logits: Logits,
        batch: Batch,
        config: ObjectiveConfig,
        pair: PairConfig,
        reverse: bool,
        dim: int,
    ) -> None:
        p = config.pairs.index(pair)
        x, y = (pair.second, pair.first) if reverse else (pair.first, pair.second)
        self.config, self.batch = config, batch
        self.targets = "instance" if pair.of_one else config.targets
        self.of_views = pair.of_views
        self.scale = logits.scale[p]
        self.bias = logits.bias[p] if logits.bias is not None else 0.0
        self.x, self.y = self._compared(features[x], dim), self._compared(features[y], dim)
        self.hard = self._compared(features[f"{y}_negatives"], dim) if y in batch.negatives else None
        self.hard_there = batch.negatives.get(y)
        self.anchors = [i for i in range(len(batch.row)) if batch.valid[x][i] and batch.valid[y][i]]

    def _compared(self, features: Tensor, dim: int) -> Tensor:
        leading = features[..., :dim]
        return leading / leading.norm(dim=-1, keepdim=True) if self.config.normalise else leading

    def s(self, i: int, j: int) -> Tensor:
        """s_ij = scale · <x_i, y_j> + bias."""
        return self.scale * torch.dot(self.x[i], self.y[j]) + self.bias

    def positives(self, i: int) -> list[int]:
        """P_i: i itself, and under same_text or same_label the candidates that share its id."""
        ids = {"instance": None, "same_text": self.batch.text_id, "same_label": self.batch.label_id}[self.targets]
        return [j for j in self.anchors if j == i or (ids is not None and ids[i] >= 0 and ids[i] == ids[j])]

    def negatives(self, i: int) -> list[int]:
        """All other candidates, without copies of the same clip and what the config leaves out."""
        batch, positives = self.batch, self.positives(i)
        return [
            j
            for j in self.anchors
            if j not in positives
            and not (batch.row[i] >= 0 and batch.row[i] == batch.row[j])
            and not (self.config.exclude_same_text and batch.text_id[i] >= 0 and batch.text_id[i] == batch.text_id[j])
        ]

    def further_negatives(self, i: int) -> list[Tensor]:
        """Logits of negatives that are not of the other modality's rows."""
        return self.own_view(i) + self.hard_negatives(i)

    def own_view(self, i: int) -> list[Tensor]:
        """Of two views: <x_i, x_j> for the same negatives j in the anchor's own view. So NT-Xent sums over all other
        views of the batch, k != i in its equation (Chen et al. 2020, eq. 1)."""
        return [self.scale * torch.dot(self.x[i], self.x[j]) for j in self.negatives(i)] if self.of_views else []

    def hard_negatives(self, i: int) -> list[Tensor]:
        """Logits of the row's own hard negatives, which no other row sees."""
        if self.hard is None:
            return []
        assert self.hard_there is not None
        return [
            self.scale * torch.dot(self.x[i], self.hard[i, k])
            for k in range(self.hard.shape[1])
            if self.hard_there[i, k]
        ]

    def mean_positive(self, i: int) -> Tensor:
        """The mean logit over P_i."""
        return torch.stack([self.s(i, j) for j in self.positives(i)]).mean()


class OfSongs(Similarities):
    """The same of pairs of songs: anchor k is the x of one song of rows 2k and 2k + 1, candidate k the y of the other.

    Only the anchor's own partner is a positive. No negatives are the anchor's song again, its partner again, and with
    config.exclude_liked songs that either of the two lists as liked.
    """

    def __init__(
        self,
        features: dict[str, Tensor],
        logits: Logits,
        batch: Batch,
        config: ObjectiveConfig,
        pair: PairConfig,
        anchor: tuple[str, int],
        candidate: tuple[str, int],
        dim: int,
    ) -> None:
        p = config.pairs.index(pair)
        self.config, self.scale = config, logits.scale[p]
        self.bias = logits.bias[p] if logits.bias is not None else 0.0
        self.hard, self.of_views = None, False
        (x, mine), (y, theirs) = anchor, candidate
        self.x, self.y = self._compared(features[x][mine::2], dim), self._compared(features[y][theirs::2], dim)
        self.song, self.partner = batch.row[mine::2].tolist(), batch.row[theirs::2].tolist()
        lists = [set(row) for row in batch.liked.tolist()] if batch.liked is not None else [set()] * len(batch.row)
        self.likes, self.liked_by = lists[mine::2], lists[theirs::2]

        def there(name: str, row: int) -> bool:
            return all(bool(batch.valid[of][row]) for of in ((pair.first, "text") if name == "fused" else (name,)))

        rows = range(len(self.song))
        self.anchors = [k for k in rows if there(x, 2 * k + mine) and there(y, 2 * k + theirs)]

    def positives(self, i: int) -> list[int]:
        """Its partner."""
        return [i]

    def negatives(self, i: int) -> list[int]:
        """The other candidates that are apart from it."""
        return [
            j
            for j in self.anchors
            if j != i
            and self.song[i] not in (self.song[j], self.partner[j])
            and self.partner[i] != self.partner[j]
            and self.partner[j] not in self.likes[i]
            and self.song[i] not in self.liked_by[j]
        ]


AnchorLoss = Callable[[Similarities, int], Tensor | None]
"""The loss of anchor i; None where it has none."""


def info_nce(sim: Similarities, i: int) -> Tensor:
    """l_i = log( Σ_{j candidate} exp(s_ij) ) - mean_{j in P_i} s_ij."""
    candidates = [sim.s(i, j) for j in sim.positives(i) + sim.negatives(i)] + sim.further_negatives(i)
    return torch.logsumexp(torch.stack(candidates), dim=0) - sim.mean_positive(i)


def decoupled(sim: Similarities, i: int) -> Tensor | None:
    """l_i = log( Σ_{j not in P_i} exp(s_ij) ) - mean_{j in P_i} s_ij."""
    negatives = [sim.s(i, j) for j in sim.negatives(i)] + sim.further_negatives(i)
    return torch.logsumexp(torch.stack(negatives), dim=0) - sim.mean_positive(i) if negatives else None


def debiased(tau_plus: float, beta: float) -> AnchorLoss:
    """l_i = -log( exp(s_ii) / (exp(s_ii) + g_i) ), with g_i as in debiased.py."""

    def loss(sim: Similarities, i: int) -> Tensor | None:
        negatives = [sim.s(i, j) for j in sim.negatives(i)] + sim.further_negatives(i)
        if not negatives:
            return None
        s, own, m = torch.stack(negatives), sim.s(i, i), len(negatives)
        w = m * torch.softmax(beta * s, dim=0)
        g = ((w * s.exp()).sum() - tau_plus * m * own.exp()) / (1 - tau_plus)
        return torch.log(own.exp() + torch.maximum(g, m * torch.exp(-sim.scale))) - own

    return loss


def softplus_sum(sim: Similarities, i: int) -> Tensor:
    """l_i = Σ_j log(1 + exp(-z_ij s_ij)), z = 1 for positives and -1 for negatives."""
    turned = [-sim.s(i, j) for j in sim.positives(i)] + [sim.s(i, j) for j in sim.negatives(i)]
    return torch.nn.functional.softplus(torch.stack(turned), threshold=40.0).sum()


def resemblance(kappa: float) -> Callable[[Similarities, int], Tensor]:
    """w_i = exp( mean_j <x_i, x_j> / kappa ), without gradient."""

    def weight(sim: Similarities, i: int) -> Tensor:
        x = sim.x.detach()
        return torch.exp(torch.stack([torch.dot(x[i], x[j]) for j in sim.anchors]).mean() / kappa)

    return weight


def supervised(features: dict[str, Tensor], batch: Batch) -> Tensor:
    """Of each field the mean of l_i over the rows that are valid and have it, 0 without any; of those the mean.

    With z_i the logits, l_i = -log softmax(z_i)_y of the right class y; or of tags t_k in {0, 1} the mean over k of
    -t_k log σ(z_ik) - (1 - t_k) log(1 - σ(z_ik)).
    """
    valid, means = next(iter(batch.valid.values())), []
    for name, label in batch.labels.items():
        losses = []
        for i in range(len(valid)):
            z, y = features[f"label/{name}"][i], label[i]
            if valid[i] and (y >= 0).all():
                of_tags = torch.where(y == 1, z.sigmoid(), 1 - z.sigmoid())
                losses.append(-z.log_softmax(dim=0)[y] if y.ndim == 0 else -of_tags.log().mean())
        means.append(torch.stack(losses).mean() if losses else 0.0 * features[f"label/{name}"].nan_to_num().sum())
    return torch.stack(means).mean()


def reference_loss(
    features: dict[str, Tensor],
    logits: Logits,
    batch: Batch,
    config: ObjectiveConfig,
    tau_plus: float = 0.0,
    beta: float = 0.0,
    kappa: float = 1.0,
) -> Tensor:
    """The loss that config.name stands for; the keywords are its options.

    Of each pair and direction the mean of l_i over its anchors (weighted for "similarity_weighted"); of those the
    sum with the factors below; and with config.dims the mean of all that over leading dimensions.
    """
    if config.name == "supervised":
        return supervised(features, batch)
    anchor_loss: AnchorLoss = {
        "contrastive": info_nce,
        "similarity_weighted": info_nce,
        "muser_code": info_nce,
        "decoupled": decoupled,
        "muser_poster": decoupled,
        "debiased": debiased(tau_plus, beta),
        "sigmoid": softplus_sum,
    }[config.name]
    weigh = resemblance(kappa) if config.name == "similarity_weighted" else None
    total = logits.scale.new_zeros(())
    dims = config.dims or (next(iter(features.values())).shape[-1],)
    for dim in dims:
        for pair in config.pairs:
            for reverse in (False, True):
                parts = _similarities(features, logits, batch, config, pair, reverse, dim)
                for sim in parts:
                    losses = {i: loss for i in sim.anchors if (loss := anchor_loss(sim, i)) is not None}
                    if losses:
                        weights = torch.stack([weigh(sim, i) if weigh else torch.ones_like(total) for i in losses])
                        mean = (weights * torch.stack(list(losses.values()))).sum() / weights.sum()
                        total = total + _factor(config, pair, reverse) * mean / len(dims) / len(parts)
    return total


def _similarities(
    features: dict[str, Tensor],
    logits: Logits,
    batch: Batch,
    config: ObjectiveConfig,
    pair: PairConfig,
    reverse: bool,
    dim: int,
) -> list[Similarities]:
    """Those of a direction of a pair; of songs and fusions there are two, CLIP(a1, f2) and CLIP(f1, a2)."""
    if not pair.of_songs:
        return [Similarities(features, logits, batch, config, pair, reverse, dim)]
    x, y = pair.first, pair.first if pair.second == "partner" else pair.second
    found: list[Similarities] = []
    for first, second in dict.fromkeys([(x, y), (y, x)]):
        ends = ((second, 1), (first, 0)) if reverse else ((first, 0), (second, 1))
        found.append(OfSongs(features, logits, batch, config, pair, *ends, dim))
    return found


def _factor(config: ObjectiveConfig, pair: PairConfig, reverse: bool) -> float:
    if config.name == "muser_poster":
        return 0.0 if reverse else pair.weight
    if config.name == "muser_code":
        return 1.0 / math.factorial(len(config.pairs))
    return pair.weight / sum(p.weight for p in config.pairs) / 2  # both directions of "sigmoid" are the same
