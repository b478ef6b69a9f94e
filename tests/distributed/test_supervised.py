"""Classification and tagging: the loss by hand; and through the engine on two ranks at ZeRO 2 and 3."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from muser_dist.config import ModelConfig, ObjectiveConfig, RunConfig
from muser_dist.models.model import MultimodalModel
from muser_dist.objectives.batch import Batch, Logits, global_metrics
from muser_dist.objectives.registry import load_objective
from muser_dist.train.engine import DeepSpeedEngine, PlainEngine
from muser_dist.train.step import to_device, train_step
from tests.distributed.engine_cells import Recording, config_for, global_chunks
from tests.distributed.loss_cells import TOLERANCE, errors
from tests.distributed.workers import run_workers

CPU = torch.device("cpu")
CONFIG = ObjectiveConfig("supervised", pairs=())
SUPERVISED = load_objective(CONFIG)
VALUES = {"genre": ("folk", "rock", "ska"), "tags": ("old", "slow"), "absent": ("a", "b")}


def test_the_loss_by_hand():
    features = {
        "audio": torch.zeros(3, 4),
        "label/genre": torch.tensor([[2.0, 0.0, 0.0], [0.0, 0.0, 0.0], [9.0, 9.0, 9.0]]),
        "label/tags": torch.tensor([[1.0, -1.0], [3.0, 0.0], [5.0, 5.0]]),
        "label/absent": torch.zeros(3, 2),
    }
    labels = {
        "genre": torch.tensor([0, -1, 1]),
        "tags": torch.tensor([[1, 0], [0, 1], [-1, -1]], dtype=torch.int8),
        "absent": torch.tensor([-1, -1, -1]),
    }
    batch = Batch({"audio": torch.tensor([True, True, False])}, *3 * [torch.arange(3)], labels=labels)
    loss = SUPERVISED(features, Logits(torch.zeros(0)), batch, CONFIG)
    genre = math.log(math.exp(2) + 2) - 2  # of the first row alone: the second has no label, the third no sound
    tags = (2 * math.log1p(math.exp(-1)) + math.log1p(math.exp(3)) + math.log(2)) / 4
    assert loss.metrics["loss/genre"].item() == pytest.approx(genre, rel=1e-6)
    assert loss.metrics["loss/tags"].item() == pytest.approx(tags, rel=1e-6)
    assert loss.metrics["loss/absent"].item() == 0.0
    assert loss.share.item() == pytest.approx((genre + tags) / 3, rel=1e-6)


def config_of(workers: int, stage: int, **train: object) -> RunConfig:
    config = config_for("InfoNCE, same text", workers, 5, stage, **train)
    data = replace(config.data, classes=("genre", "absent"), tags=("tags",), label_values=VALUES)
    return replace(config, data=data, model=ModelConfig(audio=config.model.audio), objective=CONFIG)


def labelled_chunks(config: RunConfig) -> list[dict]:
    """Chunks of which some rows have labels: the fourth none, and of the field "absent" none has any."""
    chunks = []
    for number, chunk in enumerate(global_chunks(config)):
        rng, c = np.random.default_rng(number), len(chunk["row"])
        tags = rng.integers(0, 2, (c, 2)).astype(np.int8)
        tags[rng.random(c) < 0.4] = -1
        genre = rng.integers(-1, 3, c)
        if number == 3:
            genre[:], tags[:] = -1, -1
        chunks.append(chunk | {"label/genre": genre, "label/tags": tags, "label/absent": np.full(c, -1)})
    return chunks


def expected(config: RunConfig) -> tuple[float, dict[str, torch.Tensor]]:
    """The definition in float64, row by row."""
    model = MultimodalModel(replace(config, train=replace(config.train, workers=1))).double().train()
    by_field: dict[str, list[torch.Tensor]] = {name: [] for name in VALUES}
    zero = torch.zeros((), dtype=torch.float64)
    for chunk in labelled_chunks(config):
        on_device = to_device(chunk, config.features, CPU)
        out = model(on_device.tensors(), on_device.moment)
        zero = zero + sum(0.0 * x.sum() for x in out.values())
        for i in np.flatnonzero(chunk["valid_audio"]).tolist():
            genre, tags = int(chunk["label/genre"][i]), torch.from_numpy(chunk["label/tags"][i]).double()
            if genre >= 0:
                by_field["genre"].append(-out["label/genre"][i].log_softmax(0)[genre])
            if tags[0] >= 0:
                p = out["label/tags"][i].sigmoid()
                by_field["tags"].append(-(tags * p.log() + (1 - tags) * (1 - p).log()).mean())
    loss = zero + sum(torch.stack(losses).mean() for losses in by_field.values() if losses) / len(by_field)
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters()}


def worker(rank: int, world: int, folder: str) -> None:
    for stage in (2, 3):
        config = config_of(world, stage)
        recording = Recording(DeepSpeedEngine(MultimodalModel(config), config, CPU))
        mine = [to_device(chunk, config.features, CPU) for chunk in labelled_chunks(config)[rank::world]]
        made = train_step(recording, SUPERVISED, config, mine, 1.0)
        value = global_metrics(made.loss)["loss"]
        if rank == 0:
            torch.save((value, recording.gradients), f"{folder}/{stage}.pt")


@pytest.mark.slow  # of features alone, in test_losses.py
def test_two_ranks_equal_one_process(tmp_path):
    run_workers(worker, 2, 2, str(tmp_path))
    value, want = expected(config_of(1, 0))
    plain = Recording(PlainEngine(MultimodalModel(config_of(1, 0)), config_of(1, 0), CPU))
    mine = [to_device(chunk, config_of(1, 0).features, CPU) for chunk in labelled_chunks(config_of(1, 0))]
    made = train_step(plain, SUPERVISED, config_of(1, 0), mine, 1.0)
    results = [torch.load(tmp_path / f"{stage}.pt") for stage in (2, 3)]
    for got_value, got in (*results, (global_metrics(made.loss)["loss"], plain.gradients)):
        assert got_value == pytest.approx(value, rel=TOLERANCE)
        assert max(errors(got, want).values()) <= TOLERANCE
    of_heads = want["label_heads.weight"]
    assert (of_heads[:3].norm() > 0) and of_heads[3:5].norm() == 0  # genre, absent, tags: in the config's order
