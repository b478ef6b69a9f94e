"""What a run would need, told without a run."""

from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from muser_dist.config import PairConfig
from muser_dist.errors import DataError
from muser_dist.train.dry_run import dry_run
from muser_dist.train.find_chunk import state_bytes
from muser_dist.train.preflight import check_settings
from tests.models.test_frozen import with_towers
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


def test_a_pass_over_pairs_is_as_long_as_there_are_songs_with_a_partner(tmp_path):
    pattern = write_shards(tmp_path / "data", [12, 12])
    names = [f"piece{i:05d}" for i in range(5)]
    pairs = {"trigger": names[:4], "item": names[1:], "weight": [1.0] * 4}
    pq.write_table(pa.table(pairs), tmp_path / "pairs.parquet")
    small = small_config()
    config = small_config(
        data={"train": (pattern,), "pairs": str(tmp_path / "pairs.parquet")},
        train={"samples": 48},
        objective=replace(small.objective, pairs=(*small.objective.pairs, PairConfig("audio", "partner"))),
        storage=str(tmp_path / "runs"),
        name="x",
    )
    assert "24 rows in 2 shards, 6 steps of 8 rows (6.0 passes)" in dry_run(config)  # of 4 pairs each


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
    assert state_bytes(100, 100, train, workers) == expected


def test_frozen_towers_are_weights_alone(tmp_path):
    train = small_config(train={"optimizer": "sgd"}).train
    assert state_bytes(100, 10, train, 1) == (400, 40, 80)
    mib = 1 << 18  # of numbers
    config = small_config(data={"train": (write_shards(tmp_path, [12]),)}, train={"ema_samples": 8})
    wide = with_towers(config, text={"options": {"width": 512, "depth": 4, "heads": 2}, "freeze": True})
    parameters, trained = check_settings(wide)
    assert parameters > 40 * mib > mib > trained
    saved = (parameters + 3 * trained) * 4 / 2**30
    text = dry_run(wide)
    assert f"Disk: {saved:.2f} GiB a checkpoint" in text and "gradients (0.00) and optimizer (0.00)" in text
