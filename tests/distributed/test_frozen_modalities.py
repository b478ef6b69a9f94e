"""A modality that is kept as it is, head and all, and one that is not even run: DeepSpeed at each ZeRO stage."""

from dataclasses import replace

import pytest
import torch

from muser_dist.config import ObjectiveConfig, PairConfig, RunConfig
from muser_dist.models.model import MultimodalModel
from muser_dist.objectives.batch import global_metrics
from muser_dist.objectives.registry import load_objective
from muser_dist.train.engine import DeepSpeedEngine
from muser_dist.train.step import train_step
from tests.distributed.engine_cells import Recording, config_for, global_chunks, on_device
from tests.distributed.loss_cells import TOLERANCE, errors
from tests.distributed.test_gradients import plain
from tests.distributed.workers import run_workers

CPU = torch.device("cpu")
KEPT = {"freeze": True, "freeze_head": True}


def kept_config(world: int, stage: int = 0) -> RunConfig:
    """Audio is trained against frozen texts; spectrograms are there for whoever uses the model."""
    config = config_for("InfoNCE, same text", world, 4, stage)
    model = config.model
    return replace(
        config,
        model=replace(model, text=replace(model.text, **KEPT), spectrogram=replace(model.spectrogram, **KEPT)),
        objective=ObjectiveConfig(pairs=(PairConfig("audio", "text"),), temperature=config.objective.temperature),
    )


def worker(rank: int, world: int, folder: str) -> None:
    for stage in range(4):
        config = kept_config(world, stage)
        engine = DeepSpeedEngine(MultimodalModel(config), config, CPU)
        recording, objective = Recording(engine), load_objective(config.objective)
        mine = on_device(global_chunks(config)[rank::world], config)
        value = global_metrics(train_step(recording, objective, config, mine, 1.0).loss)["loss"]
        train_step(engine, objective, config, mine, 1.0)
        after = engine.state_dict()
        if rank == 0:
            torch.save((value, recording.gradients, after), f"{folder}/{stage}.pt")


def test_gradients_are_those_of_one_process_and_the_rest_stays(tmp_path):
    run_workers(worker, 2, 2, str(tmp_path))
    exact, want = plain(kept_config(1))
    before = MultimodalModel(kept_config(1)).state_dict()
    assert {name.split(".")[1] for name in want if not name.startswith("logits")} == {"audio"}
    for stage in range(4):
        value, got, after = torch.load(tmp_path / f"{stage}.pt")
        assert value == pytest.approx(exact, rel=TOLERANCE)
        assert got.keys() == want.keys()
        assert max(errors(got, {name: g.double() for name, g in want.items()}).values()) <= TOLERANCE
        changed = {name for name, weight in before.items() if not torch.equal(after[name], weight)}
        assert after.keys() == before.keys()
        assert {name.split(".")[1] for name in changed if not name.startswith("logits")} == {"audio"}
        assert any(name.startswith("heads.audio.") for name in changed)
