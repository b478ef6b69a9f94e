"""torch.compile of towers: the same embeddings and gradients, names of weights, and a compiler that is not there."""

import copy

import pytest
import torch
from torch import nn

from muser_dist.config import RunConfig
from muser_dist.errors import ConfigError
from muser_dist.models.model import MultimodalModel
from muser_dist.muser import Muser, save_model
from muser_dist.train.engine import PlainEngine
from tests.distributed.engine_cells import config_for
from tests.distributed.loss_cells import TOLERANCE, errors
from tests.distributed.test_gradients import plain
from tests.models.test_frozen import with_towers
from tests.models.test_model import batch_of
from tests.models.test_recompute import config_with, recomputed


def compiled(config: RunConfig, *modalities: str) -> RunConfig:
    return with_towers(config, **{name: {"compile": True} for name in modalities or config.model.towers()})


EAGER: list[int] = []
"""Calls of Small that were not compiled."""


class Small(nn.Module):
    """A tower with dropout that is compiled in seconds."""

    def __init__(self, data, *, width: int = 4) -> None:
        super().__init__()
        self.width = width
        self.linear, self.drop = nn.Linear(1, width), nn.Dropout(0.3)

    def forward(self, batch):
        if not torch.compiler.is_compiling():
            EAGER.append(1)
        return self.drop(torch.tanh(self.linear(batch["audio"].float().abs().mean(dim=1, keepdim=True) / 32768)))


def small(**audio) -> RunConfig:
    config = config_for("sigmoid", 1, 4)
    return with_towers(config, audio={"build": f"{__name__}:Small", "options": {}} | audio)


def same_gradients(config: RunConfig, *modalities: str, tolerance: float = TOLERANCE) -> None:
    (value, got), (exact, want) = plain(compiled(config, *modalities)), plain(config)
    assert value == pytest.approx(exact, rel=tolerance)
    assert max(errors(got, {name: g.double() for name, g in want.items()}).values()) <= tolerance


@pytest.mark.slow
def test_training_runs_the_compiled_tower_with_the_same_dropout():
    EAGER.clear()
    plain(compiled(small(), "audio"))  # both passes over each chunk
    assert not EAGER
    same_gradients(small(), "audio")


def test_inference_and_copies_are_not_compiled_and_names_stay(tmp_path):
    config = compiled(small(), "audio")
    engine = PlainEngine(MultimodalModel(config), config, torch.device("cpu"))
    engine.model(batch_of(config), (0, 0))
    weights = engine.state_dict()
    assert weights.keys() == MultimodalModel(small()).state_dict().keys()
    save_model(tmp_path, weights, config)
    EAGER.clear()
    loaded = Muser.from_pretrained(tmp_path).model
    batch = batch_of(config, rows=3)
    out, copied = loaded(batch), copy.deepcopy(engine.model).eval()(batch)
    assert len(EAGER) == 2
    torch.testing.assert_close(out, copied)


def test_without_a_compiler_the_option_is_named():
    config = compiled(small(options={"width": 5}), "audio")
    patch = torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",), "force_disable_caches": True})
    with (
        patch,
        pytest.raises(ConfigError, match=r"model\.audio\.compile: .*C\+\+ compiler.*leave --model\.audio\.compile out"),
    ):
        plain(config)


@pytest.mark.slow
@pytest.mark.parametrize("recompute", [False, True])
# Statistics of the few rows of a chunk enlarge rounding.
@pytest.mark.parametrize(("spectrogram", "tolerance"), [("convnext_atto", TOLERANCE), ("resnet10t", 1e-4)])
def test_every_tower_gives_the_same_gradients_compiled(spectrogram, tolerance, recompute):
    config = config_with(spectrogram)
    same_gradients(recomputed(config) if recompute else config, tolerance=tolerance)
