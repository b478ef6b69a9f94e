"""Every corpus trains: from its original layout through shards and the reader to steps of the optimizer."""

import math
from pathlib import Path

import pytest
import torch

from muser_dist.config import RunConfig
from muser_dist.data.chunks import Chunk
from muser_dist.data.corpora.writer import write_tracks
from muser_dist.models.model import MultimodalModel
from muser_dist.objectives.batch import global_metrics
from muser_dist.objectives.contrastive import contrastive
from muser_dist.train.engine import PlainEngine
from muser_dist.train.step import to_device, train_step
from tests.data.corpora.layouts import LAYOUTS
from tests.small import reader_of, small_config

STEPS = 3


def read_chunks(config: RunConfig) -> list[Chunk]:
    """The chunks of all steps, as a run would read them."""
    (pattern,) = config.data.train
    return list(reader_of(config, pattern).read(range(STEPS * config.train.chunks_per_step)))


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_shards_train(cluster, tmp_path: Path, name: str):
    layout = LAYOUTS[name]
    layout.make(tmp_path)
    write_tracks(tmp_path / "out", layout.read(tmp_path), 4)
    config = small_config(data={"train": (f"{tmp_path}/out/train-*.tar",), "templates": layout.templates})
    chunks = read_chunks(config)
    problems = [problem for chunk in chunks for problem in chunk["problems"]]
    assert not problems
    assert all(chunk["valid_text"].all() and chunk["valid_audio"].all() for chunk in chunks)

    torch.set_num_threads(1)
    device = torch.device("cpu")
    engine = PlainEngine(MultimodalModel(config), config, device)
    per_step = config.train.chunks_per_step
    for step in range(STEPS):
        mine = [
            to_device(chunk, tuple(config.model.towers()), device)
            for chunk in chunks[step * per_step : (step + 1) * per_step]
        ]
        loss, *_ = train_step(engine, contrastive, config, mine, 1.0)
        assert math.isfinite(global_metrics(loss)["loss"]) and math.isfinite(engine.grad_norm())
