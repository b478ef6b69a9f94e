"""HTCL's audio encoder: the published network, deaf to padding."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from muser_dist.config import DataConfig, TowerConfig
from muser_dist.errors import ConfigError
from muser_dist.models.htcl import HTCLAudio
from muser_dist.models.model import build_tower
from muser_dist.models.recompute import repeated_layers

RATE, HOP, WINDOW = 8_000, 80, 256
DATA = DataConfig(sample_rate=RATE, crop_seconds=1.0)
SIZES = {"width": 32, "depth": 2, "heads": 4, "channels": 24, "mels": 16, "window": WINDOW, "hop": HOP}


def tower(**options) -> HTCLAudio:
    torch.manual_seed(0)
    return HTCLAudio(DATA, **(SIZES | options)).eval()


def sound(rows: int, samples: int, seed: int = 0) -> Tensor:
    return torch.randint(-9000, 9000, (rows, samples), generator=torch.Generator().manual_seed(seed)).to(torch.int16)


def test_the_published_size():
    data = DataConfig(sample_rate=16_000, crop_seconds=120.0)
    with torch.device("meta"):
        published = build_tower(
            "spectrogram", TowerConfig("htcl_audio", {"mels": 128, "window": 2048, "hop": 1536}), data
        )
    parameters = sum(p.numel() for p in published.parameters())
    assert parameters == 88_500_511
    # The number that a comment in the released code tells is of kernels 5, 3, 2 and, for the position, 15.
    assert parameters - 512 * 512 - 16 * (768 * 768 // 16 + 1) == 87_648_527
    assert published.width == 768


@settings(deadline=None, max_examples=30)
@given(samples=st.integers(WINDOW // 2 + 16 * HOP, RATE - 1), padding=st.integers(1, 3000), seed=st.integers(0, 99))
def test_a_padded_clip_has_the_embedding_of_the_unpadded_one(samples, padding, seed):
    encoder, clip = tower(), sound(1, samples, seed)
    length = torch.tensor([samples], dtype=torch.int32)
    alone = encoder({"audio": clip, "audio_length": length})
    for behind in (torch.zeros(1, padding, dtype=torch.int16), sound(1, padding, seed + 1)):
        padded = encoder({"audio": torch.cat([clip, behind], dim=1), "audio_length": length})
        torch.testing.assert_close(padded, alone, rtol=1e-4, atol=1e-5)
    if samples >= RATE // 2:  # a longer clip is another one
        shorter = encoder({"audio": clip, "audio_length": length // 2})
        assert (shorter - alone).abs().max() > 1e-3


def test_spectrograms_of_decoding_tasks_are_those_made_here():
    encoder, clips, lengths = tower(), sound(3, RATE), torch.tensor([RATE, 5000, 2000], dtype=torch.int32)
    made = {"spectrogram": encoder.front_end(clips).half(), "audio_length": lengths}
    torch.testing.assert_close(encoder(made), encoder({"audio": clips, "audio_length": lengths}), rtol=1e-2, atol=1e-2)
    before = encoder(made)
    made["spectrogram"][2, :, :, 2000 // HOP :] = 7.0
    torch.testing.assert_close(encoder(made), before)


def released(encoder: HTCLAudio, frames: Tensor) -> Tensor:
    """The released network, out of torch's Transformer, with the weights of ours: (1, frames, mels) to (1, width)."""
    mean, deviation = frames.mean(), frames.std(correction=0)
    x = (frames - mean) / deviation
    for ours in encoder.convolutions:
        x = F.conv1d(x.transpose(1, 2), ours.convolution.weight, stride=2).transpose(1, 2)
        x = F.gelu(F.layer_norm(x, x.shape[2:], ours.norm.weight, ours.norm.bias))
    x = encoder.projection(x)
    position = F.conv1d(
        x.transpose(1, 2), encoder.position.convolution.weight, encoder.position.convolution.bias, padding=15, groups=16
    )
    x = encoder.norm(x + F.gelu(encoder.position.norm(position.transpose(1, 2))))
    x = torch.cat([encoder.cls[None, None], x], dim=1)
    layer = nn.TransformerEncoderLayer(32, 4, 128, activation="gelu", batch_first=True)
    theirs = nn.TransformerEncoder(layer, 2).eval()
    for there, ours in zip(theirs.layers, encoder.transformer.layer, strict=True):
        attention = ours.attention.self
        parts = attention.query, attention.key, attention.value
        there.load_state_dict(
            {
                "self_attn.in_proj_weight": torch.cat([part.weight for part in parts]),
                "self_attn.in_proj_bias": torch.cat([part.bias for part in parts]),
            }
            | {f"self_attn.out_proj.{name}": x for name, x in ours.attention.output.dense.named_parameters()}
            | {f"norm1.{name}": x for name, x in ours.attention.output.LayerNorm.named_parameters()}
            | {f"linear1.{name}": x for name, x in ours.intermediate.dense.named_parameters()}
            | {f"linear2.{name}": x for name, x in ours.output.dense.named_parameters()}
            | {f"norm2.{name}": x for name, x in ours.output.LayerNorm.named_parameters()}
        )
    return theirs(x).mean(dim=1)


@torch.no_grad()
def test_it_is_the_released_network():
    encoder = tower()
    for module in encoder.modules():
        if isinstance(module, (nn.Linear, nn.LayerNorm)):  # weights and biases that matter
            module.weight.normal_(0.3, 0.2)
            module.bias.normal_(0.0, 0.2)
    frames = torch.randn(1, 16, 60)
    # As many samples as make the last frame's window end with the clip.
    length = torch.tensor([59 * HOP + WINDOW // 2])
    got = encoder({"spectrogram": frames[:, None], "audio_length": length})
    torch.testing.assert_close(got, released(encoder, frames.transpose(1, 2)), rtol=1e-4, atol=1e-4)


def test_silence_and_rows_without_a_sound_are_finite_with_finite_gradients():
    encoder = tower().train()
    lengths = torch.tensor([RATE, 0, 40], dtype=torch.int32)
    out = encoder({"audio": torch.zeros(3, RATE, dtype=torch.int16), "audio_length": lengths})
    out.square().sum().backward()
    assert torch.isfinite(out).all()
    assert all(torch.isfinite(p.grad).all() for p in encoder.parameters())


def test_activations_are_recomputed_by_layer():
    assert len(repeated_layers(tower())) == 3 + 2


@pytest.mark.parametrize(
    ("options", "seconds", "message"),
    [
        ({"kind": "cropped_linear", "mels": None}, 1.0, r"options\.kind: HTCL's encoder takes log_mel"),
        ({}, 0.15, r"data\.crop_seconds: a crop of 16 frames is too short"),
        ({"width": 40, "heads": 4}, 1.0, r"model\.spectrogram\.options: htcl_audio cannot be built: .*groups"),
        ({"heads": 3}, 1.0, r"model\.spectrogram\.options: htcl_audio cannot be built: .*attention heads"),
        ({"layers": 3}, 1.0, r"model\.spectrogram\.options: .*layers"),
    ],
)
def test_what_cannot_be_built_says_why(options, seconds, message):
    options = {name: value for name, value in (SIZES | options).items() if value is not None}
    with pytest.raises(ConfigError, match=message):
        build_tower("spectrogram", TowerConfig("htcl_audio", options), replace(DATA, crop_seconds=seconds))
