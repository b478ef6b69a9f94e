"""Every loss in one process against its definition; what they promise of masks, repeats and large scales."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from muser_dist.config import ObjectiveConfig, PairConfig
from muser_dist.errors import ConfigError
from muser_dist.objectives.batch import Batch, Logits
from muser_dist.objectives.reference import reference_loss
from muser_dist.objectives.registry import load_objective
from muser_dist.objectives.tiles import TorchTiles
from tests.objectives.cases import LOSSES, MODALITIES, Case, config_of, gradients

EVERYTHING = slice(None)

IN_DOUBLE = [name for name, fields in LOSSES.items() if not fields.get("bf16")]
"""Those that compute in float64 where features are; the others in tests/distributed."""


def both(case: Case, dtype: torch.dtype = torch.float64):
    """(loss, gradients) of the objective in `dtype` and of the reference in float64."""
    results = []
    for function, used in ((load_objective(case.config), dtype), (None, torch.float64)):
        features, logits, batch = case.part(EVERYTHING, used)
        if function is None:
            share = reference_loss(features, logits, batch, case.config, **case.config.options)
        else:
            share = function(features, logits, batch, case.config).share
        if share.requires_grad:
            share.backward()
        results.append((share.item(), gradients(features, logits)))
    return results


@given(st.sampled_from(IN_DOUBLE), st.integers(0, 10_000), st.integers(1, 9), st.booleans())
@settings(max_examples=120)
def test_equals_its_definition_in_value_and_gradient(name, seed, rows, repeats):
    case = Case(name, rows, seed, repeats)
    (value, got), (expected, want) = both(case)
    assert value == pytest.approx(expected, rel=1e-10, abs=1e-11)
    for part, exact in want.items():
        torch.testing.assert_close(got[part], exact, rtol=1e-8, atol=1e-10, msg=part)


@pytest.mark.parametrize("name", IN_DOUBLE)
def test_tiles_of_any_size_give_the_same(name, monkeypatch):
    case = Case(name, 11, seed=5)
    (value, got), _ = both(case)
    monkeypatch.setattr(TorchTiles, "rows", 3)
    monkeypatch.setattr(TorchTiles, "columns", 4)
    (again, in_tiles), _ = both(case)
    assert again == pytest.approx(value, rel=1e-12)
    for part, gradient in got.items():
        torch.testing.assert_close(in_tiles[part], gradient, rtol=1e-10, atol=1e-12)


def test_the_reference_by_hand():
    # Two rows, orthogonal features, scale s: each anchor has logits (s, 0).
    features = {"audio": torch.eye(2), "text": torch.eye(2)}
    flags = {name: torch.tensor([True, True]) for name in MODALITIES}
    logits, s = Logits(torch.tensor([2.0])), 2.0

    def value(name: str, ids: list[int], biases: torch.Tensor | None = None, **fields) -> float:
        batch = Batch(flags, torch.arange(2), torch.tensor(ids), torch.tensor(ids))
        config = ObjectiveConfig(name=name, pairs=(PairConfig("audio", "text"),), **fields)
        return reference_loss(features, Logits(logits.scale, biases), batch, config).item()

    expected = math.log(math.exp(s) + 1.0) - s
    assert value("contrastive", [5, 6]) == pytest.approx(expected, rel=1e-6)
    # The same text twice: both columns are positives, so the loss is log(e^s + 1) - s/2.
    assert value("contrastive", [5, 5]) == pytest.approx(expected + s / 2, rel=1e-6)
    assert value("contrastive", [5, 5], targets="same_label") == pytest.approx(expected + s / 2, rel=1e-6)
    # NT-Xent: besides the other clip's second view, its first one is a negative too, and both are orthogonal.
    views = {"audio": torch.eye(2), "view": torch.eye(2)}
    batch = Batch({name: torch.tensor([True, True]) for name in views}, torch.arange(2), *2 * [torch.tensor([5, 5])])
    config = ObjectiveConfig(pairs=(PairConfig("audio", "view"),))  # that they share a text does not matter
    assert reference_loss(views, logits, batch, config).item() == pytest.approx(math.log1p(2 * math.exp(-s)), rel=1e-6)
    # Without the positive in the denominator only e^0 is left.
    assert value("decoupled", [5, 6]) == pytest.approx(-s, rel=1e-6)
    assert value("muser_poster", [5, 6]) == pytest.approx(-s, rel=1e-6)
    assert value("muser_code", [5, 6]) == pytest.approx(2 * expected, rel=1e-6)
    one_pair = math.log1p(math.exp(-(s - 3.0))) + math.log1p(math.exp(-3.0))
    assert value("sigmoid", [5, 6], torch.tensor([-3.0]), bias=-3.0) == pytest.approx(one_pair, rel=1e-6)


def test_loss_minus_entropy_is_zero_when_perfect():
    # Four rows, two texts; embeddings of a text coincide, those of different ones are opposite.
    x = torch.tensor([[1.0, 0.0], [1.0, 0.0], [-1.0, 0.0], [-1.0, 0.0]], dtype=torch.float64)
    ids = torch.tensor([1, 1, 2, 2])
    batch = Batch({n: torch.ones(4, dtype=torch.bool) for n in MODALITIES}, torch.arange(4), ids, ids)
    config = ObjectiveConfig(pairs=(PairConfig("audio", "text"),))
    scale = torch.tensor([40.0], dtype=torch.float64)
    loss = load_objective(config)({"audio": x, "text": x}, Logits(scale), batch, config)
    assert loss.metrics["loss"].item() == pytest.approx(math.log(2), abs=1e-9)
    assert loss.metrics["loss_minus_entropy"].item() == pytest.approx(0.0, abs=1e-9)


@pytest.mark.parametrize("name", IN_DOUBLE)
def test_the_metrics_of_pairs_and_dimensions_make_up_the_loss(name):
    case = Case(name, 9, seed=6)
    features, logits, batch = case.part(EVERYTHING, torch.float64)
    loss = load_objective(case.config)(features, logits, batch, case.config)
    pairs = case.config.pairs
    shares = {
        "muser_poster": [pair.weight for pair in pairs],
        "muser_code": [2 / math.factorial(len(pairs))] * len(pairs),
    }.get(case.config.name, [pair.weight / sum(p.weight for p in pairs) for pair in pairs])
    names = [f"loss/{pair.first}-{pair.second}" for pair in pairs]
    if case.batch.labels:
        names, shares = [f"loss/{field}" for field in case.batch.labels], [1 / 3] * 3
    together = sum(share * loss.metrics[name].item() for share, name in zip(shares, names, strict=True))
    assert together == pytest.approx(loss.share.item()) == loss.metrics["loss"].item()
    for name in names if case.config.dims else []:
        of_dims = [loss.metrics[f"{name}@{dim}"].item() for dim in case.config.dims]
        assert sum(of_dims) / len(of_dims) == pytest.approx(loss.metrics[name].item())


def test_equal_pairs_give_a_loss_that_does_not_depend_on_their_number():
    case = Case("InfoNCE, same text", 6, seed=1)
    features, _, batch = case.part(EVERYTHING, torch.float64)
    features["spectrogram"] = features["audio"]
    batch.valid["spectrogram"] = batch.valid["audio"]
    one = config_of("InfoNCE", pairs=(PairConfig("audio", "text", 3.0),))
    two = config_of("InfoNCE", pairs=(PairConfig("audio", "text", 0.5), PairConfig("spectrogram", "text", 7.0)))
    values = [load_objective(c)(features, Logits(torch.full((len(c.pairs),), 5.0)), batch, c).share for c in (one, two)]
    torch.testing.assert_close(values[0], values[1])


@pytest.mark.parametrize("name", LOSSES)
def test_a_batch_without_a_valid_row_has_loss_and_gradient_zero(name):
    case = Case(name, 4, seed=3)
    for flags in case.batch.valid.values():
        flags[:] = False
    (value, got), _ = both(case)
    assert value == 0.0
    assert all((gradient == 0).all() for gradient in got.values())


@pytest.mark.parametrize("name", LOSSES)
def test_what_is_in_masked_rows_does_not_matter(name):
    case = Case(name, 8, seed=4)
    (before, got), _ = both(case)
    for modality in MODALITIES:
        assert (got[modality][~case.batch.valid[modality]] == 0).all()
        case.features[modality][~case.batch.valid[modality]] = float("nan")
    for modality, there in case.batch.negatives.items():
        case.features[f"{modality}_negatives"][~there] = float("nan")
    (after, again), _ = both(case)
    assert after == before
    assert all(torch.equal(again[part], gradient) for part, gradient in got.items())


def test_two_copies_of_a_clip_are_never_negatives():
    case = Case("InfoNCE", 3, seed=5, repeats=False)
    case.batch.row[:] = torch.tensor([7, 7, 8])
    anchor_only = torch.tensor([True, False, True])
    for flags in case.batch.valid.values():
        flags[:] = anchor_only
    (alone, _), _ = both(case)
    # If the copy were a negative, making it resemble the anchor's partner would change row 0's loss.
    case.features["text"][1] = case.features["text"][0]
    (moved, _), _ = both(case)
    assert moved == alone
    for flags in case.batch.valid.values():
        flags[:] = True
    (with_copy, _), _ = both(case)
    case.batch.row[:] = torch.tensor([7, 9, 8])
    (apart, _), _ = both(case)
    assert apart > with_copy


def test_own_hard_negatives_that_are_not_there_are_not_seen_however_similar():
    # CompA's released code multiplies by a large negative number, which raises negative similarities.
    case = Case("own hard negatives", 6, seed=2)
    case.batch.negatives["text"][:] = False
    case.features["text_negatives"][:] = -case.features["audio"][:, None]
    (value, _), (expected, _) = both(case)
    case.batch.negatives.clear()
    (without, _), _ = both(case)
    assert value == pytest.approx(without, rel=1e-12) == expected


@pytest.mark.parametrize("bf16", [False, True])
def test_one_match_among_opposites_at_scale_100_is_finite_and_exact(bf16):
    """exp(100·(1 + 0.9)) does not fit float32: one maximum for a whole tile would leave columns empty."""
    # e_0 against -0.9 e_0 + ...; all numbers that bfloat16 holds exactly, so that nothing is rounded.
    n = 64
    x = torch.zeros(n, 2)
    x[:, 0] = 1.0
    y = x * -0.90625
    y[5] = x[5]
    config = ObjectiveConfig(pairs=(PairConfig("audio", "text"),), targets="instance", normalise=False, bf16=bf16)
    flags = {name: torch.ones(n, dtype=torch.bool) for name in MODALITIES}
    batch = Batch(flags, torch.arange(n), torch.arange(n), torch.full((n,), -1))
    results = []
    for dtype in (torch.float32, torch.float64):
        features = {"audio": x.to(dtype, copy=True), "text": y.to(dtype, copy=True)}
        for leaf in features.values():
            leaf.requires_grad_()
        logits = Logits(torch.tensor([100.0], dtype=dtype, requires_grad=True))
        if dtype == torch.float32:
            loss = load_objective(config)(features, logits, batch, config).share
        else:
            loss = reference_loss(features, logits, batch, config)
        loss.backward()
        results.append((loss.item(), gradients(features, logits)))
    (value, got), (expected, want) = results
    assert value == pytest.approx(expected, rel=1e-6)
    for part, exact in want.items():
        assert torch.isfinite(got[part]).all()
        assert (got[part].double() - exact).norm() <= 1e-5 * exact.norm() + 1e-6, part


def test_exponentials_of_matching_features_at_scale_100_do_not_overflow():
    # log(exp(x).sum()) without a maximum is infinite from 88 on, as in Inf-CLIP's ring and in MuQ.
    x = torch.tensor([[1.0, 0.0], [-1.0, 0.0]], requires_grad=True)
    ids = torch.tensor([1, 2])
    batch = Batch({n: torch.ones(2, dtype=torch.bool) for n in MODALITIES}, torch.arange(2), ids, ids)
    config = ObjectiveConfig(pairs=(PairConfig("audio", "text"),))
    loss = load_objective(config)({"audio": x, "text": -x}, Logits(torch.tensor([100.0])), batch, config)
    assert loss.share.item() == pytest.approx(200.0)
    loss.share.backward()
    assert torch.isfinite(x.grad).all()


def my_objective(features, logits, batch, config, *, strength: float = 1.0):
    return load_objective(ObjectiveConfig(pairs=config.pairs))(features, logits, batch, config)


def test_an_objective_of_the_users_own_and_its_options():
    case = Case("InfoNCE", 5)
    config = replace(config_of("InfoNCE"), name=f"{__name__}:my_objective", options={"strength": 2.0})
    features, logits, batch = case.part(EVERYTHING, torch.float32)
    assert torch.isfinite(load_objective(config)(features, logits, batch, config).share)
    with pytest.raises(ConfigError, match=r"objective\.name: no 'contrastiv'; did you mean 'contrastive'"):
        load_objective(ObjectiveConfig(name="contrastiv"))
    with pytest.raises(ConfigError, match=r"objective\.options: debiased: .*'betta'"):
        load_objective(ObjectiveConfig(name="debiased", options={"betta": 1.0}))
    with pytest.raises(ConfigError, match=r"objective\.bias: the sigmoid loss needs a bias"):
        ObjectiveConfig(name="sigmoid")
