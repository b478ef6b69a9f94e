"""A run goes on while nodes leave and join, and neither its rows nor its curve change."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from muser_dist.data.pipeline import plan_digest
from muser_dist.models.model import MultimodalModel
from muser_dist.objectives.batch import global_metrics
from muser_dist.objectives.contrastive import contrastive
from muser_dist.train.engine import PlainEngine
from muser_dist.train.optimizer import lr_factor
from muser_dist.train.runlog import METRICS, read_lines
from muser_dist.train.step import to_device, train_step
from tests.cluster.elastic_run import BATCH, STEPS, run_config
from tests.cluster.plugins import ARMED, arm
from tests.small import reader_of

ROOT = Path(__file__).parents[2]


pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


def events_of(corpus: Path, folder: Path, mode: str) -> list[dict]:
    armed = folder / "armed"
    armed.mkdir()
    arm(armed, "slow", 0, ranks=(0, 1, 2), seconds=0.1)  # so that there is time for nodes to come and go
    command = [sys.executable, "-m", "tests.cluster.elastic_run", str(corpus), str(folder), mode]
    environment = os.environ | {ARMED: str(armed), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment, timeout=1700)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
    return json.loads((folder / "outcome.json").read_text())


def test_a_node_that_is_preempted_leaves_a_checkpoint_behind(corpus, tmp_path):
    events = events_of(corpus, tmp_path, "preempt")
    kinds = [event["event"] for event in events]
    notice = events[kinds.index("preemption")]
    assert len(notice["ranks"]) == 1
    first, second = [event for event in events if event["event"] == "start"]
    assert (first["workers"], second["workers"]) == (2, 1)
    # Written after the notice, not at one of the run's own intervals of 20 steps; little is done again.
    assert second["step"] >= notice["step"] and second["rows_repeated"] < 20 * BATCH


def test_two_then_one_then_three_workers(corpus, tmp_path):
    events = events_of(corpus, tmp_path, "kill")
    starts = [event for event in events if event["event"] == "start"]
    workers = [event["workers"] for event in starts]
    assert workers in ([2, 1, 3], [2, 1, 2, 3])  # of two nodes, one may be there first
    assert starts[1]["rows_repeated"] == starts[1]["steps_repeated"] * BATCH < 40 * BATCH
    lost = [event["seconds_lost"] for event in events if event["event"] == "caught up"]
    assert len(lost) == len(starts) - 1 and all(seconds > 0 for seconds in lost)

    # The same steps in one process: every row once, in its place, and the same curve.
    config = run_config(str(corpus), str(tmp_path))
    config = replace(config, train=replace(config.train, workers=1, resource=""))
    lines = read_lines(tmp_path / "elastic" / METRICS)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    reader = reader_of(config, f"{corpus}/train-*.tar")
    assert lines[-1]["digest"] == plan_digest(reader, STEPS)
    assert lines[-1]["rows_read"] == STEPS * BATCH
    engine = PlainEngine(MultimodalModel(config), config, torch.device("cpu"))
    modalities = tuple(config.model.towers())
    for step, line in enumerate(lines):
        chunks = reader.read(range(step * reader.slots_per_step, (step + 1) * reader.slots_per_step))
        mine = [to_device(chunk, modalities, engine.device) for chunk in chunks]
        loss, *_ = train_step(engine, contrastive, config, mine, lr_factor((step + 1) * BATCH, config.train))
        assert line["loss"] == pytest.approx(global_metrics(loss)["loss"], abs=1e-3), step
