"""What a run would need, told without a run."""

from dataclasses import replace

import pytest

from muser_dist.errors import DataError
from muser_dist.train.dry_run import dry_run, state_bytes
from tests.shardmaker import write_shards
from tests.small import small_config


def test_the_plan_is_printed_and_nothing_is_written(tmp_path):
    pattern = write_shards(tmp_path / "data", [12, 12])
    config = small_config(
        data={"train": (pattern,)},
        train={"workers": "1:2", "resource": "trainer", "samples": 48},
        storage=str(tmp_path / "runs"),
        name="x",
    )
    text = dry_run(config)
    assert "24 rows in 2 shards, 6 steps of 8 rows (2.0 passes)" in text
    assert "Memory of each of 1 workers" in text and "Memory of each of 2 workers" in text
    assert "in 4 chunks; 48 samples" in text
    assert "rows/s on one core of this machine" in text
    assert not (tmp_path / "runs").exists()
    with pytest.raises(DataError, match="fewer than one global batch"):
        dry_run(replace(config, train=replace(config.train, global_batch=64, samples=64)))


@pytest.mark.parametrize(
    ("workers", "stage", "ema", "expected"),
    [
        (1, 0, 0, (400, 400, 800)),
        (4, 0, 0, (400, 400, 800)),
        (4, 1, 0, (400, 400, 300)),
        (4, 2, 8, (400, 100, 400)),
        (4, 3, 0, (100, 100, 200)),
    ],
)
def test_memory_is_shared_out_as_zero_does(workers, stage, ema, expected):
    train = small_config(train={"zero_stage": stage, "ema_samples": ema}).train
    assert state_bytes(100, train, workers) == expected
