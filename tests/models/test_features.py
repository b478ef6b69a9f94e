"""The Transformer over features of windows: the published network, deaf to padding."""

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import BertConfig, BertModel

from muser_dist.config import DataConfig, TowerConfig
from muser_dist.errors import ConfigError
from muser_dist.models.features import FeatureTower
from muser_dist.models.model import build_tower
from muser_dist.models.weights import match_weights

DATA = DataConfig()
SIZES = {"inputs": 16, "positions": 10, "width": 16, "depth": 2, "heads": 2}


def songs(lengths: list[int], windows: int = 8, inputs: int = 16) -> dict[str, Tensor]:
    features = torch.randn(len(lengths), windows, inputs, generator=torch.Generator().manual_seed(0))
    return {"features": features, "features_length": torch.tensor(lengths, dtype=torch.int32)}


def tower(**options) -> FeatureTower:
    torch.manual_seed(0)
    return FeatureTower(DATA, **(SIZES | options))


def test_the_published_size():
    with torch.device("meta"):
        published = build_tower("features", TowerConfig("features"), DATA)
    assert sum(p.numel() for p in published.parameters()) == 85_155_840
    assert published.width == 768


def test_padding_is_not_seen_and_rows_are_apart():
    encoder, batch = tower().eval(), songs([8, 3, 1, 0])
    whole = encoder(batch)
    beyond = torch.arange(8) >= batch["features_length"].clamp(min=1)[:, None]
    noisy = batch | {"features": batch["features"].masked_fill(beyond[:, :, None], float("inf"))}
    torch.testing.assert_close(encoder(noisy), whole)
    for row, length in enumerate([8, 3, 1, 1]):
        alone = {
            "features": batch["features"][row : row + 1, :length].half(),
            "features_length": torch.tensor([length]),
        }
        torch.testing.assert_close(encoder(alone)[0], whole[row], rtol=1e-2, atol=1e-2)
    swapped = batch | {"features": batch["features"].flip(1)}
    assert (encoder(swapped)[0] - whole[0]).abs().max() > 1e-3


@pytest.mark.parametrize("inputs", [16, 5])
def test_every_parameter_has_a_gradient(inputs):
    encoder = tower(inputs=inputs).train()
    encoder(songs([8, 3, 0], inputs=inputs)).square().sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in encoder.parameters())


def test_clamps_weights_give_clamps_embeddings(tmp_path):
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    theirs = BertModel(BertConfig(vocab_size=1, max_position_embeddings=10, **sizes)).eval()
    save_file({f"audio_model.{name}": x for name, x in theirs.state_dict().items()}, tmp_path / "clamp3.safetensors")
    encoder = tower().eval()
    match, tensors = match_weights("features", encoder, str(tmp_path / "clamp3.safetensors"))
    assert not match.missing and not match.other_shape
    encoder.load_state_dict(tensors)
    batch = songs([8, 3])
    for row, length in enumerate([8, 3]):
        zero = torch.zeros(1, 16)
        song = torch.cat([zero, batch["features"][row, :length], zero])
        want = theirs(inputs_embeds=song[None]).last_hidden_state[0].mean(dim=0)
        torch.testing.assert_close(encoder(batch)[row], want, rtol=1e-4, atol=1e-5)


def test_what_does_not_fit_says_why():
    with pytest.raises(ConfigError, match=r"options\.positions: 9 windows and two zero vectors do not fit into 10"):
        tower()(songs([3], windows=9))
    with pytest.raises(ConfigError, match="at least 3"):
        tower(positions=2)
