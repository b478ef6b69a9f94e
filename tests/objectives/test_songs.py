"""HTCL's second stage, computed by hand from its formulas."""

import torch
import torch.nn.functional as F

from muser_dist.config import ObjectiveConfig, PairConfig
from muser_dist.models.heads import Fusion
from muser_dist.objectives.batch import Batch, Logits
from muser_dist.objectives.registry import load_objective
from tests.objectives.cases import SONGS


def clip(x: torch.Tensor, y: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    logits = scale * F.normalize(x, dim=1) @ F.normalize(y, dim=1).T
    right = torch.arange(len(x))
    return (F.cross_entropy(logits, right) + F.cross_entropy(logits.T, right)) / 2


def test_the_loss_is_the_sum_of_the_three_of_the_paper():
    torch.manual_seed(0)
    pairs, dim = 5, 6
    a1, a2, t1, t2 = (torch.randn(pairs, dim, dtype=torch.float64, requires_grad=True) for _ in range(4))
    fusion = Fusion(dim).double()
    f1, f2 = fusion(a1, t1), fusion(a2, t2)
    scales = torch.tensor([13.46, 9.0, 5.0], dtype=torch.float64, requires_grad=True)
    l1 = clip(torch.cat([a1, a2]), torch.cat([t1, t2]), scales[0])
    l2 = clip(a1, a2, scales[1])
    l3 = (clip(a1, f2, scales[2]) + clip(a2, f1, scales[2])) / 2
    leaves = (a1, a2, t1, t2, scales, *fusion.parameters())
    by_hand = torch.autograd.grad(l1 + l2 + l3, leaves, retain_graph=True)

    def rows(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:  # songs of a pair side by side
        return torch.stack([first, second], 1).reshape(2 * pairs, dim)

    flags = torch.ones(2 * pairs, dtype=torch.bool)
    config = ObjectiveConfig(pairs=tuple(PairConfig(p.first, p.second) for p in SONGS), targets="instance")
    batch = Batch({"audio": flags, "text": flags}, torch.arange(2 * pairs), *[torch.full((2 * pairs,), -1)] * 2)
    features = {"audio": rows(a1, a2), "text": rows(t1, t2), "fused": rows(f1, f2)}
    loss = load_objective(config)(features, Logits(scales), batch, config)
    torch.testing.assert_close(3 * loss.share, l1 + l2 + l3)  # ours is the mean of pairs of equal weight
    torch.testing.assert_close(loss.metrics["loss/audio-partner"], l2.detach())
    for ours, theirs in zip(torch.autograd.grad(3 * loss.share, leaves), by_hand, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_liked_song_is_no_negative_only_where_that_is_asked_for():
    # Songs 0-1 and 2-3 are pairs, and listeners like 3 after 0 too. All cosines are 1.
    features = {name: torch.ones(4, 2) for name in ("audio", "text", "fused")}
    flags = torch.ones(4, dtype=torch.bool)
    none = torch.full((4,), -1)

    def value(exclude: bool) -> float:
        config = ObjectiveConfig(pairs=(PairConfig("audio", "partner"),), exclude_liked=exclude)
        liked = torch.tensor([[1, 3], [-1, -1], [3, -1], [-1, -1]]) if exclude else None
        batch = Batch({"audio": flags, "text": flags}, torch.arange(4), none, none, liked=liked)
        return load_objective(config)(features, Logits(torch.ones(1)), batch, config).share.item()

    log2 = torch.tensor(2.0).log().item()
    assert abs(value(False) - log2) < 1e-6  # each anchor has one positive and one negative
    # Anchor 0 over candidates 1 and 3 has lost its only negative, and so has 3 as anchor; 2 and 1 have not.
    assert abs(value(True) - log2 / 2) < 1e-6
