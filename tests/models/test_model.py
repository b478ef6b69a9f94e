import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from muser_dist.config import ObjectiveConfig, PairConfig, TemperatureConfig, TowerConfig
from muser_dist.data.spectrogram import LogMel
from muser_dist.errors import ConfigError
from muser_dist.models.heads import LogitScale, masked_mean
from muser_dist.models.model import MultimodalModel
from tests.small import small_config


def batch_of(config, rows: int = 4, seed: int = 0) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    samples, tokens = config.data.crop_samples, config.data.max_tokens
    return {
        "audio": torch.randint(-9000, 9000, (rows, samples), generator=g).to(torch.int16),
        "audio_length": torch.full((rows,), samples, dtype=torch.int32),
        "text_ids": torch.randint(2, config.data.vocabulary, (rows, tokens), generator=g).to(torch.int32),
        "text_length": torch.full((rows,), tokens, dtype=torch.int32),
    }


def test_every_modality_is_in_the_joint_space():
    config = small_config()
    out = MultimodalModel(config)(batch_of(config))
    assert {name: tuple(x.shape) for name, x in out.items()} == {
        "audio": (4, 8),
        "spectrogram": (4, 8),
        "text": (4, 8),
        "scale": (2,),
    }


@pytest.mark.parametrize("modality", ["audio", "spectrogram", "text"])
def test_rows_do_not_see_each_other(modality):
    config = small_config()
    model, batch = MultimodalModel(config), batch_of(config)
    alone = {name: x[1:2] for name, x in batch.items()}
    torch.testing.assert_close(model.encode(modality, batch)[1:2], model.encode(modality, alone), rtol=1e-4, atol=1e-6)


def test_text_padding_does_not_matter():
    config = small_config()
    model, batch = MultimodalModel(config), batch_of(config)
    batch["text_length"][:] = 5
    before = model.encode("text", batch)
    batch["text_ids"][:, 5:] = 7
    torch.testing.assert_close(model.encode("text", batch), before)


def test_rows_of_zero_length_are_finite_with_finite_gradients():
    config = small_config()
    model, batch = MultimodalModel(config), batch_of(config)
    batch["audio"][0], batch["audio_length"][0], batch["text_length"][0] = 0, 0, 0
    out = model(batch)
    sum(x.square().sum() for x in out.values()).backward()
    assert all(torch.isfinite(x).all() for x in out.values())
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_a_low_tone_changes_the_spectrogram():
    # MUSER's released code crops away everything below 1 kHz.
    log_mel = LogMel(16_000, mels=64, window=1024, hop=320)
    time = torch.arange(16_000) / 16_000
    noise = 300 * torch.randn(16_000, generator=torch.Generator().manual_seed(0))
    tone = 9000 * torch.sin(2 * math.pi * 200 * time)
    quiet, loud = (log_mel(x.to(torch.int16)[None]) for x in (noise, noise + tone))
    assert (loud - quiet).norm() / quiet.norm() > 0.05


def test_dropout_depends_on_the_moment_alone():
    config = small_config()
    towers = {
        n: replace(t, options={**t.options, "dropout": 0.5})
        for n, t in config.model.towers().items()
        if n != "spectrogram"
    }
    config = replace(config, model=replace(config.model, **towers))
    model, batch = MultimodalModel(config).train(), batch_of(config)
    first = model(batch, (3, 1))
    torch.rand(17)  # whatever else draws random numbers
    again, other = model(batch, (3, 1)), model(batch, (3, 2))
    for name in ("audio", "text"):
        torch.testing.assert_close(first[name], again[name], rtol=0, atol=0)
        assert (first[name] != other[name]).any()


def test_initial_weights_depend_on_the_seed_alone():
    one = MultimodalModel(small_config())
    torch.rand(5)
    two = MultimodalModel(small_config())
    assert all((a == b).all() for a, b in zip(one.parameters(), two.parameters(), strict=True))
    other = MultimodalModel(replace(small_config(), seed=1))
    assert any((a != b).any() for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_bf16_is_used_in_training_and_features_stay_float32():
    config = small_config(train={"precision": "bf16"})
    batch = batch_of(config)
    exact = MultimodalModel(small_config())(batch)
    rough = MultimodalModel(config)(batch)
    assert rough["audio"].dtype == torch.float32
    assert (rough["text"] != exact["text"]).any()
    torch.testing.assert_close(rough["text"], exact["text"], rtol=0.1, atol=0.05)


def logit_scale(pairs: int = 1, bias: float | None = None, **temperature) -> LogitScale:
    named = [PairConfig(*names) for names in (("audio", "text"), ("spectrogram", "text"), ("audio", "spectrogram"))]
    name = "contrastive" if bias is None else "sigmoid"
    temperatures = TemperatureConfig(**temperature)
    return LogitScale(ObjectiveConfig(name, pairs=tuple(named[:pairs]), bias=bias, temperature=temperatures))


def test_temperatures_and_biases():
    per_pair = logit_scale(3, init=0.1)
    torch.testing.assert_close(per_pair(), {"scale": torch.full((3,), 10.0)})
    assert [tuple(p.shape) for p in per_pair.parameters()] == [(1,)] * 3
    shared = logit_scale(3, init=0.1, shared=True)
    assert shared()["scale"].shape == (3,)
    assert len(list(shared.parameters())) == 1
    assert not any(p.requires_grad for p in logit_scale(learnable=False).parameters())
    torch.testing.assert_close(logit_scale(2, bias=-10.0)()["bias"], torch.full((2,), -10.0))


def test_a_temperature_beyond_its_bound_can_come_back():
    logits = logit_scale(init=0.01, minimum=0.01)
    with torch.no_grad():
        logits.log_scale[0] += 1.0  # colder than allowed
    assert logits()["scale"].item() == pytest.approx(100.0)
    # A step against the first gradient would raise the scale.
    (outward,) = torch.autograd.grad(-logits()["scale"].sum(), logits.parameters())
    (inward,) = torch.autograd.grad(logits()["scale"].sum(), logits.parameters())
    assert outward.item() == 0.0
    assert inward.item() == pytest.approx(100.0)
    # Shared, the sum of what the pairs ask decides.
    shared = logit_scale(2, init=0.01, minimum=0.01, shared=True)
    (together,) = torch.autograd.grad(shared()["scale"] @ torch.tensor([-5.0, 1.0]), shared.parameters())
    assert together.item() == 0.0


def test_masked_mean():
    x = torch.arange(12.0).reshape(2, 3, 2)
    torch.testing.assert_close(masked_mean(x, torch.tensor([1, 3])), torch.stack([x[0, 0], x[1].mean(dim=0)]))


class CountingTower(nn.Module):
    """A user's own tower: how loud the clip is."""

    def __init__(self, data, *, size: int) -> None:
        super().__init__()
        self.width = size
        self.linear = nn.Linear(1, size)

    def forward(self, batch):
        return self.linear(batch["audio"].float().abs().mean(dim=1, keepdim=True) / 32768)


def with_audio(build: str, **options):
    config = small_config()
    return replace(config, model=replace(config.model, audio=TowerConfig(build, options)))


def test_a_tower_of_the_users_own():
    config = with_audio(f"{__name__}:CountingTower", size=3)
    assert MultimodalModel(config)(batch_of(config))["audio"].shape == (4, 8)


@pytest.mark.parametrize(
    ("build", "options", "message"),
    [
        ("wavform", {}, r"model\.audio\.build: no 'wavform'; did you mean 'waveform'"),
        ("not_there:Tower", {}, "No module named 'not_there'.*PYTHONPATH"),
        (f"{__name__}:Missing", {}, "has no 'Missing'"),
        ("waveform", {"widht": 3}, r"model\.audio\.options: waveform cannot be built: .*widht"),
        ("torch.nn:Identity", {}, "no integer attribute `width`"),
        ("spectrogram", {"model": "resnet18", "batch_norm": "none"}, "no 'none'"),
        ("spectrogram", {"model": "no_such_net"}, "timm cannot build 'no_such_net'"),
    ],
)
def test_towers_that_cannot_be_built_say_why(build, options, message):
    with pytest.raises(ConfigError, match=message):
        MultimodalModel(with_audio(build, **options))
