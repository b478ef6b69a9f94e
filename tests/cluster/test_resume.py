"""A run that was killed ends with the same bits as one that was not: each ZeRO stage, on 1, 2 and 3 workers."""

from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import pytest

from muser_dist.config import ObjectiveConfig, RunConfig, TowerConfig
from muser_dist.data.pipeline import training_reader
from muser_dist.data.storage import Storage
from muser_dist.train.cluster import connect
from muser_dist.train.launch import train
from muser_dist.train.preflight import load_index, prepare_folder
from muser_dist.train.runlog import EVENTS, read_lines
from tests.cluster.plugins import arm
from tests.small import small_config

pytestmark = pytest.mark.slow

STEPS, BATCH = 40, 24


def run_config(corpus: Path, storage: Path, workers: int, stage: int, name: str) -> RunConfig:
    """Two chunks or more for each worker, so that gradients are cached; dropout; a moving average."""
    config = small_config(
        train={
            "workers": workers,
            "zero_stage": stage,
            "global_batch": BATCH,
            "chunk": 4,
            "samples": STEPS * BATCH,
            "checkpoint_samples": 5 * BATCH,
            "ema_samples": 100,
            "max_failures": 1,
        },
        data={"train": (f"{corpus}/train-*.tar",)},
        objective=ObjectiveConfig(name="tests.cluster.plugins:faulty"),
        name=name,
        storage=str(storage),
    )
    text = TowerConfig("text", {"width": 16, "depth": 1, "heads": 2, "dropout": 0.2})
    return replace(config, model=replace(config.model, text=text))


def trained(config: RunConfig) -> str:
    """Trains, and gives the SHA-256 of the exported weights."""
    storage = Storage.of(config.data)
    prepare_folder(config, ["test"])
    indices = [
        load_index(config, source, storage, storage.expand(source.shards, "data.train"))
        for source in config.data.training_sources()
    ]
    connect(config)
    train(config, training_reader(config, indices, storage))
    return sha256((config.folder / "model" / "model.safetensors").read_bytes()).hexdigest()


@pytest.mark.parametrize("workers", (1, 2, 3))
@pytest.mark.parametrize("stage", range(4))
def test_seventeen_steps_a_kill_and_the_rest_are_forty_steps(cluster, corpus, tmp_path, workers, stage):
    straight = trained(run_config(corpus, tmp_path, workers, stage, "straight"))
    arm(cluster, "kill", call=18, ranks=tuple(range(workers)))  # after 17 steps
    config = run_config(corpus, tmp_path, workers, stage, "killed")
    assert trained(config) == straight
    starts = [event for event in read_lines(config.folder / EVENTS) if event["event"] == "start"]
    assert [event["step"] for event in starts] == [0, 15]
    assert starts[1]["rows_repeated"] == 2 * BATCH
