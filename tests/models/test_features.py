"""The Transformer over features of windows: the published network, deaf to padding."""

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import BertConfig, BertModel

from muser_dist.config import DataConfig, TowerConfig
from muser_dist.data.config import FeaturesConfig
from muser_dist.errors import ConfigError
from muser_dist.models.features import FeatureTower
from muser_dist.models.model import build_tower
from muser_dist.models.weights import match_weights

DATA = DataConfig()
SIZES = {"width": 16, "depth": 2, "heads": 2}


def songs(lengths: list[int], windows: int = 8, inputs: int = 16) -> dict[str, Tensor]:
    features = torch.randn(len(lengths), windows, inputs, generator=torch.Generator().manual_seed(0))
    return {"features": features, "features_length": torch.tensor(lengths, dtype=torch.int32)}


def tower(size: int = 16, **options) -> FeatureTower:
    torch.manual_seed(0)
    return FeatureTower(DataConfig(features=FeaturesConfig(size, 8)), **(SIZES | options))


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
    encoder = tower(inputs).train()
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


def test_positions_are_those_of_the_data_or_more():
    assert tower().positions == 10
    batch = songs([8, 3])
    longer = tower(positions=40).eval()
    assert longer.positions == 40 and longer(batch).shape == (2, 16)
    few = batch | {"features_length": torch.tensor([3, 1])}  # what no song has is not computed
    torch.testing.assert_close(longer(few), longer(few | {"features": few["features"][:, :5]}))
    with pytest.raises(ConfigError, match=r"8 windows and two zero vectors do not fit into 9 .*max_windows \+ 2"):
        tower(positions=9)(batch)
