"""Activation checkpointing: the same gradients out of less memory, with dropout, batch norms and bf16."""

import copy

import pytest
import torch
from torch import nn
from torch.autograd.profiler import profile

from muser_dist.config import RunConfig
from muser_dist.models.model import MultimodalModel
from muser_dist.models.recompute import repeated_layers
from muser_dist.objectives.registry import load_objective
from muser_dist.train.engine import PlainEngine
from muser_dist.train.step import train_step
from tests.distributed.engine_cells import config_for, global_chunks, on_device
from tests.distributed.test_gradients import plain
from tests.models.test_frozen import with_towers
from tests.models.test_model import batch_of


def recomputed(config: RunConfig) -> RunConfig:
    return with_towers(config, **{name: {"checkpoint_activations": True} for name in config.model.towers()})


class Plain(nn.Module):
    """A user's own tower without repeated layers, with dropout and a parameter of its own."""

    def __init__(self, data, *, width: int) -> None:
        super().__init__()
        self.width = width
        self.first, self.second, self.drop = nn.Linear(data.crop_samples, 64), nn.Linear(64, width), nn.Dropout(0.3)
        self.scale = nn.Parameter(torch.ones(64))

    def forward(self, batch):
        hidden = self.drop(torch.tanh(self.first(batch["audio"].float() / 32768) * self.scale))
        return self.second(torch.tanh(hidden) * hidden)


def config_with(spectrogram: str, audio: str = "waveform", **train) -> RunConfig:
    """Three towers with dropout wherever they know it, several layers each."""
    config = config_for("InfoNCE, same text", 1, 4, **train)
    mels = {"mels": 32, "window": 256, "hop": 80}
    sizes = {"depths": [2, 1, 2, 1], "dims": [8, 8, 8, 16]} if spectrogram.startswith("convnext") else {}
    transformer = {"width": 16, "depth": 2, "heads": 2, "dropout": 0.3}
    return with_towers(
        config,
        audio={"build": audio, "options": transformer if audio == "waveform" else {"width": 16}},
        spectrogram={"options": {"model": spectrogram} | sizes | mels},
        text={"options": transformer},
    )


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize(
    ("spectrogram", "audio", "precision"),
    [
        ("convnext_atto", "waveform", "fp32"),
        ("resnet10t", f"{__name__}:Plain", "fp32"),  # batch norms; their rows differ from chunk to chunk
        ("convnext_atto", f"{__name__}:Plain", "bf16"),
    ],
)
def test_gradients_are_bitwise_those_without(spectrogram, audio, precision, cached):
    config = config_with(spectrogram, audio, precision=precision, cache_gradients=cached)
    (value, want), (again, got) = plain(config), plain(recomputed(config))
    assert again == value
    for name, gradient in want.items():
        assert torch.equal(got[name], gradient), name


@pytest.mark.parametrize("cached", [True, False])
def test_running_statistics_move_as_without(cached):
    config = config_with("resnet10t", cache_gradients=cached)

    def after_a_step(config: RunConfig) -> dict[str, torch.Tensor]:
        engine = PlainEngine(MultimodalModel(config), config, torch.device("cpu"))
        mine = on_device(global_chunks(config), config)
        train_step(engine, load_objective(config.objective), config, mine, 1.0)
        return {name: value for name, value in engine.state_dict().items() if "running_" in name}

    want, got = after_a_step(config), after_a_step(recomputed(config))
    assert any((value != 1.0).any() for name, value in want.items() if name.endswith("var"))
    for name, value in want.items():
        assert torch.equal(got[name], value), name


def bytes_kept(model: MultimodalModel, batch: dict[str, torch.Tensor]) -> int:
    """What a forward pass with gradient has allocated and not freed while its graph is there."""
    with profile(profile_memory=True) as profiled:
        out = model(batch, (0, 0))
    kept = sum(event.self_cpu_memory_usage for event in profiled.function_events)
    assert out["text"].requires_grad
    return kept


@pytest.mark.parametrize("modality", ["audio", "spectrogram", "text"])
def test_a_recomputed_tower_keeps_less(modality):
    config = config_with("convnext_atto")
    less = with_towers(config, **{modality: {"checkpoint_activations": True}})
    all_of_it, rest = (bytes_kept(MultimodalModel(c), batch_of(c, rows=16)) for c in (config, less))
    alone = bytes_kept(MultimodalModel(recomputed(config)), batch_of(config, rows=16))
    assert rest < 0.95 * all_of_it
    assert alone < 0.6 * all_of_it


def test_layers_are_found_in_every_tower():
    towers = MultimodalModel(config_with("convnext_atto")).towers
    assert [len(repeated_layers(towers[name])) for name in ("audio", "spectrogram", "text")] == [3 + 2, 6, 2]
    towers = MultimodalModel(config_with("resnet10t", f"{__name__}:Plain")).towers
    assert [len(repeated_layers(towers[name])) for name in ("audio", "spectrogram")] == [0, 4]


def test_a_copy_has_layers_of_its_own():
    config = recomputed(config_with("convnext_atto"))
    model, batch = MultimodalModel(config), batch_of(config)
    copied, before = copy.deepcopy(model), model(batch, (0, 0))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    again = copied(batch, (0, 0))
    assert all(torch.equal(again[name], before[name]) for name in config.model.towers())
    again["audio"].sum().backward()
    assert all(p.grad is None for p in model.parameters())


def test_names_of_weights_stay_and_without_gradient_nothing_is_recomputed():
    config = config_with("convnext_atto")
    model, same = MultimodalModel(config), MultimodalModel(recomputed(config))
    assert model.state_dict().keys() == same.state_dict().keys()
    with torch.inference_mode():
        batch = batch_of(config)
        assert torch.equal(model.eval()(batch)["audio"], same.eval()(batch)["audio"])
