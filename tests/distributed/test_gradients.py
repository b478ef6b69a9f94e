"""Every parameter's gradient through the engine: ZeRO stages, numbers of chunks, W, against float64 in one process."""

from dataclasses import replace

import pytest
import torch

from muser_dist.models.model import MultimodalModel
from muser_dist.objectives.batch import global_metrics
from muser_dist.objectives.registry import load_objective
from muser_dist.train.engine import PlainEngine
from muser_dist.train.step import train_step
from tests.distributed.engine_cells import (
    OBJECTIVES,
    Recording,
    config_for,
    engine_results,
    expected,
    global_chunks,
    on_device,
)
from tests.distributed.loss_cells import TOLERANCE, errors

# bfloat16 has 8 bits: 0.4 % in each product of a tower. These bound the whole gradient after 16 chunks; the loss and
# the sums over chunks are float32, so more chunks make it no worse.
BF16_ANGLE, BF16_LENGTH, BF16_LOSS = 0.99, 0.1, 0.02


def plain(config, factor: float = 1.0) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of one step on one process."""
    recording = Recording(PlainEngine(MultimodalModel(config), config, torch.device("cpu")), factor)
    chunks = on_device(global_chunks(config), config)
    loss, *_ = train_step(recording, load_objective(config.objective), config, chunks, 1.0)
    return global_metrics(loss)["loss"], recording.gradients


@pytest.mark.parametrize("world", [*(pytest.param(w, marks=pytest.mark.slow) for w in (1, 2, 4)), 3])
def test_gradients_equal_the_reference_at_every_stage_and_number_of_chunks(world):
    seen = 0
    for objective, stage, words, (value, exact), (got, want) in engine_results(world):
        assert value == pytest.approx(exact, rel=TOLERANCE), (objective, stage, words)
        worst = max(errors(got, want).items(), key=lambda item: item[1])
        assert worst[1] <= TOLERANCE, (objective, stage, words, worst)
        seen += 1
    assert seen == 2 * 4 * 5


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("cached", [False, True])
def test_the_plain_engine_equals_the_reference(objective, cached):
    config = config_for(objective, 1, 5, cache_gradients=cached)
    (value, got), (exact, want) = plain(config), expected(config)
    assert value == pytest.approx(exact, rel=TOLERANCE)
    assert max(errors(got, want).values()) <= TOLERANCE


def test_a_second_encoding_drops_out_the_same_units():
    def with_dropout(cached: bool):
        config = config_for("InfoNCE, same text", 1, 4, cache_gradients=cached)
        towers = {
            name: replace(tower, options={**tower.options, "dropout": 0.3})
            for name, tower in config.model.towers().items()
            if name != "spectrogram"
        }
        return plain(replace(config, model=replace(config.model, **towers)))

    (value, once), (cached_value, twice) = with_dropout(False), with_dropout(True)
    assert cached_value == pytest.approx(value, rel=1e-6)
    assert max(errors(twice, {name: g.double() for name, g in once.items()}).values()) <= TOLERANCE
    _, without = plain(config_for("InfoNCE, same text", 1, 4))
    assert max(errors(without, {name: g.double() for name, g in once.items()}).values()) > 0.01


@pytest.mark.slow
def test_bf16_gradients_point_the_right_way_after_many_chunks():
    for _, stage, _, (value, exact), (got, want) in engine_results(
        2, ["InfoNCE, same text"], {"16 a rank": 32}, precision="bf16"
    ):
        assert value == pytest.approx(exact, rel=BF16_LOSS), stage
        together = torch.cat([got[name].flatten().double() for name in want])
        all_exact = torch.cat([g.flatten() for g in want.values()])
        assert torch.cosine_similarity(together, all_exact, dim=0) > BF16_ANGLE, stage
        assert together.norm() / all_exact.norm() == pytest.approx(1.0, abs=BF16_LENGTH), stage


def test_the_check_notices_a_wrong_scale_and_a_lost_gradient():
    # The factor W that undoes DeepSpeed's mean, dropped.
    for _, _, _, _, (got, want) in engine_results(2, ["sigmoid"], {"2 a rank": 4}, factor=0.5):
        found = errors(got, want)
        assert found["logits.log_scale.0"] == pytest.approx(0.5, abs=1e-3)
        assert max(found.values()) == pytest.approx(0.5, abs=1e-3)
    _, gradients = expected(config_for("InfoNCE, same text", 1, 2))
    name = "logits.log_scale.0"
    assert errors({**gradients, name: 0 * gradients[name]}, gradients)[name] == pytest.approx(1.0)
