"""The message of a step that cannot be applied, where a model has heads for metadata fields."""

import math

import pytest
import torch
import torch.distributed as dist

from muser_dist.config import TrainConfig
from muser_dist.objectives.batch import Batch, Logits, Loss
from muser_dist.train.diagnosis import why_not_applied
from muser_dist.train.step import Step


@pytest.fixture
def alone(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'group'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_a_head_that_is_not_finite_is_named_with_its_rows(alone):
    said = torch.tensor([[1.0, math.nan], [1.0, 2.0], [math.nan, 1.0]])
    valid = {"audio": torch.tensor([True, True, False])}  # what is said of the last row counts for nothing
    rows = torch.arange(3)
    made = Step(
        Loss(torch.tensor(math.nan), {"loss/genre": torch.tensor(math.nan)}),
        Logits(torch.zeros(0)),
        {"audio": torch.ones(3, 2), "label/genre": said},
        Batch(valid, rows, rows, rows),
        applied=False,
    )
    chunk = {"shard": ["s.tar"] * 3, "key": ["x", "y", "z"]}
    why = why_not_applied(made, 3, [chunk], 1.0, TrainConfig())
    assert "Loss not finite: genre; rank 0." in why
    assert "not finite: s.tar: x (rank 0). The last" in why
