"""HTCL's audio encoder: the published network, deaf to padding."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from muser_dist.config import DataConfig, TowerConfig
from muser_dist.errors import ConfigError
from muser_dist.models.htcl import HTCLAudio
from muser_dist.models.model import build_tower
from muser_dist.models.recompute import repeated_layers
from muser_dist.models.weights import match_weights

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


@settings(max_examples=30)
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


class Released(nn.Module):
    """The released network under the names of its weights, with torch's own Transformer and without padding."""

    def __init__(self) -> None:
        super().__init__()
        strided = [(16, 5), (24, 3), (24, 3)]  # inputs and kernels; modules 0, 2 and 4 there have no weights
        self.feature_extractor = nn.ModuleDict(
            {
                "layers": nn.ModuleList(
                    nn.ModuleDict({"1": nn.Conv1d(i, 24, k, stride=2, bias=False), "3": nn.LayerNorm(24)})
                    for i, k in strided
                )
            }
        )
        self.feature_projection = nn.ModuleDict({"layer_norm": nn.LayerNorm(24), "projection": nn.Linear(24, 32)})
        convolution = weight_norm(nn.Conv1d(32, 32, 31, padding=15, groups=16), dim=2)
        self.pos_conv_embed = nn.ModuleDict({"conv": convolution, "layer_norm": nn.LayerNorm(32)})
        self.layer_norm = nn.LayerNorm(32)
        layer = nn.TransformerEncoderLayer(32, 4, 128, activation="gelu", batch_first=True)
        self.transformer_encoder = nn.TransformerEncoder(layer, 2)
        self.cls_token = nn.Parameter(torch.randn(1, 1, 32))

    def forward(self, frames: Tensor) -> Tensor:
        """(1, frames, mels) to (1, width)."""
        x = (frames - frames.mean()) / frames.std(correction=0)
        for layer in self.feature_extractor["layers"]:
            x = F.gelu(layer["3"](layer["1"](x.transpose(1, 2)).transpose(1, 2)))
        x = self.feature_projection["projection"](self.feature_projection["layer_norm"](x))
        position = self.pos_conv_embed["conv"](x.transpose(1, 2)).transpose(1, 2)
        x = self.layer_norm(x + F.gelu(self.pos_conv_embed["layer_norm"](position)))
        return self.transformer_encoder(torch.cat([self.cls_token, x], dim=1)).mean(dim=1)


@torch.no_grad()
def test_released_weights_give_released_embeddings(tmp_path):
    torch.manual_seed(1)
    theirs = Released().eval()
    for parameter in theirs.parameters():
        parameter.add_(0.2 * torch.randn_like(parameter))  # norms and biases that matter, layers that differ
    for prefix in ("", "audio_model."):  # of stage 1 alone, and of a whole model
        file = {prefix + name: value for name, value in theirs.state_dict().items()}
        save_file(file | {"audio_mlp.0.weight": torch.ones(2)}, tmp_path / "htcl.safetensors")
        encoder = tower()
        match, tensors = match_weights("spectrogram", encoder, str(tmp_path / "htcl.safetensors"))
        assert match.naming.startswith("HTCL's names")
        assert not match.missing and match.left_over == ["audio_mlp.0.weight"]
        encoder.load_state_dict(tensors, strict=False)  # the front end has constants of its own
        frames = torch.randn(1, 16, 60)
        # As many samples as make the last frame's window end with the clip.
        length = torch.tensor([59 * HOP + WINDOW // 2])
        got = encoder({"spectrogram": frames[:, None], "audio_length": length})
        torch.testing.assert_close(got, theirs(frames.transpose(1, 2)), rtol=1e-3, atol=1e-4)


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
