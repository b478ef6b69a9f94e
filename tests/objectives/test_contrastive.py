import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from muser_dist.config import ObjectiveConfig, PairConfig
from muser_dist.errors import ConfigError
from muser_dist.objectives.contrastive import Batch, contrastive, load_objective
from muser_dist.objectives.reference import reference_loss

MODALITIES = ("audio", "spectrogram", "text")


def random_case(seed: int, rows: int, repeats: bool = True) -> tuple[dict[str, torch.Tensor], torch.Tensor, Batch]:
    """Features in float64, scales, and a batch with masked rows, missing modalities and duplicates."""
    g = torch.Generator().manual_seed(seed)
    features = {name: torch.randn(rows, 6, generator=g, dtype=torch.float64, requires_grad=True) for name in MODALITIES}
    scale = torch.tensor([3.0, 11.0], dtype=torch.float64, requires_grad=True)
    valid = {name: torch.rand(rows, generator=g) < 0.8 for name in MODALITIES}
    row = torch.randint(0, max(1, rows - 2), (rows,), generator=g) if repeats else torch.arange(rows)
    text_id = torch.randint(0, 3, (rows,), generator=g)
    text_id[~valid["text"]] = -1
    return features, scale, Batch(valid, row, text_id)


def gradients(loss: torch.Tensor, features: dict[str, torch.Tensor], scale: torch.Tensor) -> list[torch.Tensor]:
    grads = torch.autograd.grad(loss, [*features.values(), scale], allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for g, x in zip(grads, [*features.values(), scale], strict=True)]


@given(
    st.integers(0, 10_000),
    st.integers(1, 9),
    st.sampled_from(["instance", "same_text"]),
    st.sampled_from([1.0, 2.5]),
)
@settings(max_examples=60, deadline=None)
def test_equals_the_reference_in_value_and_gradient(seed, rows, targets, weight):
    config = ObjectiveConfig(
        pairs=(PairConfig("audio", "text", weight), PairConfig("spectrogram", "text")), targets=targets
    )
    features, scale, batch = random_case(seed, rows)
    loss = contrastive(features, scale, batch, config)
    expected = reference_loss(features, scale, batch, config)
    torch.testing.assert_close(loss.share, expected, rtol=1e-10, atol=1e-12)
    if expected.requires_grad:
        for got, want in zip(gradients(loss.share, features, scale), gradients(expected, features, scale), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)


def test_the_reference_by_hand():
    # Two rows, orthogonal features, scale s: each anchor has logits (s, 0).
    features = {"audio": torch.eye(2), "text": torch.eye(2)}
    batch = Batch({name: torch.tensor([True, True]) for name in MODALITIES}, torch.arange(2), torch.tensor([5, 6]))
    config = ObjectiveConfig(pairs=(PairConfig("audio", "text"),))
    s = 2.0
    expected = math.log(math.exp(s) + 1.0) - s
    assert reference_loss(features, torch.tensor([s]), batch, config) == pytest.approx(expected, rel=1e-6)
    # The same text twice: both columns are positives, so the loss is log(e^s + 1) - s/2.
    same = Batch(batch.valid, batch.row, torch.tensor([5, 5]))
    assert reference_loss(features, torch.tensor([s]), same, config) == pytest.approx(expected + s / 2, rel=1e-6)


def test_loss_minus_entropy_is_zero_when_perfect():
    # Four rows, two texts; embeddings of a text coincide, those of different ones are opposite.
    x = torch.tensor([[1.0, 0.0], [1.0, 0.0], [-1.0, 0.0], [-1.0, 0.0]], dtype=torch.float64)
    batch = Batch({n: torch.ones(4, dtype=torch.bool) for n in MODALITIES}, torch.arange(4), torch.tensor([1, 1, 2, 2]))
    config = ObjectiveConfig(pairs=(PairConfig("audio", "text"),))
    loss = contrastive({"audio": x, "text": x}, torch.tensor([40.0], dtype=torch.float64), batch, config)
    assert loss.metrics["loss"].item() == pytest.approx(math.log(2), abs=1e-9)
    assert loss.metrics["loss_minus_entropy"].item() == pytest.approx(0.0, abs=1e-9)


def test_equal_pairs_give_a_loss_that_does_not_depend_on_their_number():
    features, scale, batch = random_case(1, 6)
    features["spectrogram"] = features["audio"]
    batch.valid["spectrogram"] = batch.valid["audio"]
    scale = torch.full((2,), 5.0, dtype=torch.float64)
    one = ObjectiveConfig(pairs=(PairConfig("audio", "text", 3.0),))
    two = ObjectiveConfig(pairs=(PairConfig("audio", "text", 0.5), PairConfig("spectrogram", "text", 7.0)))
    torch.testing.assert_close(
        contrastive(features, scale[:1], batch, one).share, contrastive(features, scale, batch, two).share
    )


def test_a_batch_without_a_valid_row_has_loss_and_gradient_zero():
    features, scale, batch = random_case(3, 4)
    nothing = Batch({name: torch.zeros(4, dtype=torch.bool) for name in MODALITIES}, batch.row, batch.text_id)
    loss = contrastive(features, scale, nothing, ObjectiveConfig())
    assert loss.share.item() == 0.0
    assert all((g == 0).all() for g in gradients(loss.share, features, scale))


def test_what_is_in_masked_rows_does_not_matter():
    features, scale, batch = random_case(4, 8, repeats=False)
    before = contrastive(features, scale, batch, ObjectiveConfig())
    grads = gradients(before.share, features, scale)
    for name in MODALITIES:
        assert (grads[MODALITIES.index(name)][~batch.valid[name]] == 0).all()
    changed = {
        name: torch.where(batch.valid[name][:, None], x, torch.full_like(x, 99.0)) for name, x in features.items()
    }
    torch.testing.assert_close(contrastive(changed, scale, batch, ObjectiveConfig()).share, before.share)


def test_two_copies_of_a_clip_are_never_negatives():
    features, scale, _ = random_case(5, 3)
    valid = {name: torch.ones(3, dtype=torch.bool) for name in MODALITIES}
    config = ObjectiveConfig(targets="instance")
    twice = Batch(valid, torch.tensor([7, 7, 8]), torch.tensor([1, 2, 3]))
    with_copy = contrastive(features, scale, twice, config).share
    # If the copy were a negative, making it resemble the anchor's partner would change row 0's loss.
    moved = {name: x.detach().clone() for name, x in features.items()}
    moved["text"][1] = moved["text"][0]
    anchor_only = torch.tensor([True, False, True])
    a = contrastive(features, scale, Batch({n: anchor_only for n in MODALITIES}, twice.row, twice.text_id), config)
    b = contrastive(moved, scale, Batch({n: anchor_only for n in MODALITIES}, twice.row, twice.text_id), config)
    torch.testing.assert_close(a.share, b.share)
    apart = Batch(valid, torch.tensor([7, 9, 8]), twice.text_id)
    assert contrastive(features, scale, apart, config).share > with_copy


def test_stays_finite_at_scale_100():
    x = torch.tensor([[1.0, 0.0], [-1.0, 0.0]], requires_grad=True)
    batch = Batch({n: torch.ones(2, dtype=torch.bool) for n in MODALITIES}, torch.arange(2), torch.tensor([1, 2]))
    config = ObjectiveConfig(pairs=(PairConfig("audio", "text"),))
    loss = contrastive({"audio": x, "text": -x}, torch.tensor([100.0]), batch, config)
    assert loss.share.item() == pytest.approx(200.0)
    loss.share.backward()
    assert torch.isfinite(x.grad).all()


def my_objective(features, scale, batch, config):
    return contrastive(features, scale, batch, config)


def test_an_objective_of_the_users_own():
    assert load_objective(ObjectiveConfig(name=f"{__name__}:my_objective")) is my_objective
    with pytest.raises(ConfigError, match=r"objective\.name: no 'contrastiv'; did you mean 'contrastive'"):
        load_objective(ObjectiveConfig(name="contrastiv"))
