"""A run config small enough for tests, with three towers of a few thousand parameters, and its readers."""

from dataclasses import replace
from typing import Any

from muser_dist.config import (
    DataConfig,
    EvaluateConfig,
    ModelConfig,
    ObjectiveConfig,
    RunConfig,
    TemperatureConfig,
    TowerConfig,
    TrainConfig,
)
from muser_dist.data.chunks import ChunkReader
from muser_dist.data.pipeline import training_reader
from muser_dist.data.shards import ShardIndex, index_shards
from muser_dist.data.storage import Storage

LOCAL = Storage.of(DataConfig())
"""Storage as a config without any setting describes it."""


def small_config(train: dict[str, Any] | None = None, data: dict[str, Any] | None = None, **fields: Any) -> RunConfig:
    """The small config with these fields replaced."""
    config = RunConfig(
        data=DataConfig(
            sample_rate=8_000,
            crop_seconds=0.5,
            templates=("A piece for {instrument}, in a {mode} key", "{caption}"),
            vocabulary=64,
            max_tokens=12,
            window_shards=2,
        ),
        model=ModelConfig(
            audio=TowerConfig("waveform", {"width": 16, "depth": 1, "heads": 2}),
            spectrogram=TowerConfig(
                "spectrogram", {"depths": [1, 1, 1, 1], "dims": [8, 8, 8, 16], "mels": 32, "window": 256, "hop": 80}
            ),
            text=TowerConfig("text", {"width": 16, "depth": 1, "heads": 2}),
            projection_dim=8,
        ),
        objective=ObjectiveConfig(temperature=TemperatureConfig(init=0.2)),
        train=TrainConfig(
            workers=1,
            zero_stage=2,
            samples=24,
            global_batch=8,
            chunk=2,
            warmup_samples=8,
            log_steps=1,
            checkpoint_samples=16,
        ),
        evaluate=EvaluateConfig(fields=("instrument", "mode", "absent")),
    )
    return replace(
        config,
        train=replace(config.train, **(train or {})),
        data=replace(config.data, **(data or {})),
        **fields,
    )


def index_of(pattern: str, storage: Storage = LOCAL) -> ShardIndex:
    """The shards that a pattern names, counted."""
    return index_shards(storage, storage.expand([pattern], "data.train"), "data.train")


def reader_of(config: RunConfig, pattern: str, storage: Storage = LOCAL) -> ChunkReader:
    """The training reader of a config whose only source are these shards."""
    config = replace(config, data=replace(config.data, train=(pattern,)))
    return training_reader(config, [index_of(pattern, storage)], storage).for_workers(config.train.worker_range[0])
