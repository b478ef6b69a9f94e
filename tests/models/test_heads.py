"""Heads of several layers, and the fusion of a song's sound and text."""

import json
from dataclasses import replace

import pytest
import torch
from torch import nn

from muser_dist.cli import parse_runs
from muser_dist.config import from_dict, to_dict
from muser_dist.errors import ConfigError
from muser_dist.models.heads import Fusion, ProjectionHead
from muser_dist.models.model import MultimodalModel
from tests.models.test_model import batch_of
from tests.small import small_config


def linear(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return x @ module.weight.T + module.bias


def test_the_heads_of_htcl():
    head, x = ProjectionHead(768, 100, (384, 192), "relu"), torch.randn(3, 768)
    first, second, last = (layer for layer in head if isinstance(layer, nn.Linear))
    want = linear(last, linear(second, linear(first, x).clamp(min=0)).clamp(min=0))
    torch.testing.assert_close(head(x), want, rtol=1e-4, atol=1e-5)
    assert [layer.out_features for layer in (first, second, last)] == [384, 192, 100]


def test_one_hidden_layer_and_none():
    assert [type(layer) for layer in ProjectionHead(8, 4, (6,), "gelu")] == [nn.Linear, nn.GELU, nn.Linear]
    (only,) = ProjectionHead(8, 4, (), "gelu")
    assert only.bias is None and only.weight.shape == (4, 8)


def test_fusion_by_hand():
    fusion, audio, text = Fusion(100), torch.randn(3, 100), torch.randn(3, 100)
    first, second, last = (layer for layer in fusion if isinstance(layer, nn.Linear))
    assert [(layer.in_features, layer.out_features) for layer in (first, second, last)] == [
        (200, 200),
        (200, 100),
        (100, 100),
    ]
    want = linear(last, linear(second, linear(first, torch.cat([audio, text], dim=1)).clamp(min=0)).clamp(min=0))
    torch.testing.assert_close(fusion(audio, text), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("arguments", "hidden"), [([], ()), (["12"], (12,)), (["12", "6"], (12, 6))])
def test_hidden_layers_are_an_option(arguments, hidden):
    given = ["--model.projection-hidden", *arguments] if arguments else []
    (config,) = parse_runs(["tiny", *given, "--model.projection-activation", "relu"], "pretrain")
    assert config.model.hidden_layers == hidden
    assert from_dict(json.loads(json.dumps(to_dict(config))), "file") == config


def test_a_model_has_them():
    config = small_config()
    config = replace(config, model=replace(config.model, projection_hidden=(12, 6), projection_activation="relu"))
    model = MultimodalModel(config)
    assert [type(layer) for layer in model.heads["text"]] == [nn.Linear, nn.ReLU, nn.Linear, nn.ReLU, nn.Linear]
    assert model(batch_of(config))["text"].shape == (4, 8)


@pytest.mark.parametrize("hidden", [(12, 0), -1])
def test_layers_without_units_are_refused(hidden):
    with pytest.raises(ConfigError, match=r"model\.projection_hidden: each layer needs at least 1 unit"):
        replace(small_config().model, projection_hidden=hidden)
