"""Masked patches: the loss by hand; and through the engine on two ranks at ZeRO 2 and 3."""

import pytest
import torch

from muser_dist.config import ObjectiveConfig
from muser_dist.errors import ConfigError
from muser_dist.models.model import MultimodalModel
from muser_dist.objectives.batch import Batch, Logits, global_metrics
from muser_dist.objectives.registry import check_objective, load_objective
from muser_dist.train.engine import DeepSpeedEngine
from muser_dist.train.step import train_step
from tests.distributed.engine_cells import Recording, global_chunks, on_device
from tests.distributed.loss_cells import TOLERANCE, errors
from tests.distributed.test_gradients import plain
from tests.distributed.workers import run_workers
from tests.models.test_symbolic import pretraining

CPU = torch.device("cpu")
CONFIG = ObjectiveConfig("masked_patches", pairs=())
MASKED_PATCHES = load_objective(CONFIG)


def test_the_loss_by_hand():
    sums = torch.tensor([[6.0, 3.0], [float("nan"), 5.0], [0.0, 0.0], [4.0, 1.0]], requires_grad=True)
    batch = Batch({"audio": torch.tensor([True, False, True, True])}, *3 * [torch.arange(4)])
    loss = MASKED_PATCHES({"audio": sums}, Logits(torch.zeros(0)), batch, CONFIG)
    loss.share.backward()
    assert loss.metrics["loss"].item() == loss.share.item() == pytest.approx(10 / 4)
    torch.testing.assert_close(sums.grad, torch.tensor([[0.25, 0], [0, 0], [0.25, 0], [0.25, 0]]))


def test_a_batch_without_a_valid_row_has_loss_and_gradient_zero():
    sums = torch.ones(2, 2, requires_grad=True)
    batch = Batch({"audio": torch.zeros(2, dtype=torch.bool)}, *3 * [torch.arange(2)])
    loss = MASKED_PATCHES({"audio": sums}, Logits(torch.zeros(0)), batch, CONFIG)
    loss.share.backward()
    assert loss.share.item() == 0 and not sums.grad.any()


def test_rows_with_notation_take_part():
    config = pretraining(1, 2)
    check_objective(config)
    assert config.taking_part == (("audio", "audio"),)


def test_embeddings_are_refused():
    batch = Batch({"audio": torch.ones(2, dtype=torch.bool)}, *3 * [torch.arange(2)])
    with pytest.raises(ConfigError, match=r"a sum and a count for each row.*model\.audio gives 16 numbers"):
        MASKED_PATCHES({"audio": torch.ones(2, 16)}, Logits(torch.zeros(0)), batch, CONFIG)


def worker(rank: int, world: int, folder: str) -> None:
    for stage in (2, 3):
        config = pretraining(world, 5, stage)
        recording = Recording(DeepSpeedEngine(MultimodalModel(config), config, CPU))
        mine = on_device(global_chunks(config)[rank::world], config)
        made = train_step(recording, MASKED_PATCHES, config, mine, 1.0)
        value = global_metrics(made.loss)["loss"]
        if rank == 0:
            torch.save((value, recording.gradients), f"{folder}/{stage}.pt")


@pytest.mark.slow  # in one process, in tests/models/test_symbolic.py
def test_two_ranks_equal_one_process(tmp_path):
    run_workers(worker, 2, 2, str(tmp_path))
    value, want = plain(pretraining(1, 5))
    for stage in (2, 3):
        got_value, got = torch.load(tmp_path / f"{stage}.pt")
        assert got_value == pytest.approx(value, rel=TOLERANCE)
        assert max(errors(got, {name: gradient.double() for name, gradient in want.items()}).values()) <= TOLERANCE
