"""Whole runs on a real Ray cluster: order, accounting, death of a worker, what is left behind."""

import json
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import ray

from muser_dist import Muser
from muser_dist.config import ObjectiveConfig, RunConfig, TowerConfig, from_dict, to_dict
from muser_dist.data.shards import ShardIndex
from muser_dist.errors import CheckpointError, ClusterError, DataError, MuserError
from muser_dist.models.model import MultimodalModel
from muser_dist.train.cluster import connect
from muser_dist.train.launch import pretrain, print_digest
from muser_dist.train.runlog import ACCOUNTS, EVENTS, QUARANTINE, TIMES, read_lines
from tests.cluster.conftest import CPUS
from tests.cluster.plugins import arm
from tests.shardmaker import bad_samples, tone
from tests.small import small_config

ROOT = Path(__file__).parents[2]
STEPS = 20  # of 16 rows over 63: more than five epochs
GOOD, BAD = 48, len(bad_samples()) + 1


def run_config(corpus: Path, storage: Path, name: str) -> RunConfig:
    """Two workers with two chunks a step each, so that gradients are cached; with dropout."""
    config = small_config(
        train={
            "workers": 2,
            "samples": STEPS * 16,
            "global_batch": 16,
            "chunk": 4,
            "checkpoint_samples": 64,
            "max_failures": 1,
            "trackers": ("tensorboard",),
            "profile": (2, 3),
        },
        data={"train": (f"{corpus}/train-*.tar",), "val": (f"{corpus}/val-*.tar",)},
        objective=ObjectiveConfig(name="tests.cluster.plugins:faulty"),
        name=name,
        storage=str(storage),
    )
    text = TowerConfig("text", {"width": 16, "depth": 1, "heads": 2, "dropout": 0.2})
    return replace(config, model=replace(config.model, text=text))


@pytest.fixture(scope="module")
def storage(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def straight(cluster, corpus, storage) -> Path:
    """The folder of a run that nothing happened to."""
    return pretrain(run_config(corpus, storage, "straight"), ["test"])


def without_times(folder: Path) -> list[dict]:
    return [{k: v for k, v in line.items() if k not in TIMES} for line in read_lines(folder / "metrics.jsonl")]


def test_every_row_is_counted(straight):
    lines = read_lines(straight / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert all(line["rows_read"] == line["rows_used"] + line["rows_quarantined"] for line in lines)
    assert lines[-1]["rows_read"] == STEPS * 16
    entries = read_lines(straight / QUARANTINE)
    rows = {(entry["epoch"], entry["row"]) for entry in entries}
    assert len(rows) == lines[-1]["rows_quarantined"]
    for epoch in range(STEPS * 16 // (GOOD + BAD)):  # whole epochs hold every bad row once, and name its reason
        of_epoch = {entry["key"] for entry in entries if entry["epoch"] == epoch}
        assert of_epoch == {key for key, _, _ in bad_samples()} | {"caf\ufffd"}


def test_the_accounts_add_up_by_pass_and_shard(straight):
    last, lines = read_lines(straight / "metrics.jsonl")[-1], read_lines(straight / ACCOUNTS)
    for name in ("read", "used", "quarantined"):
        assert sum(line[name] for line in lines) == last[f"rows_{name}"]
    assert all(line["read"] == line["used"] + line["quarantined"] for line in lines)
    whole = Counter()
    for line in lines:
        if line["pass"] == 0:
            whole[line["shard"]] += line["read"]
    index = ShardIndex.load(straight / "train-index.json")
    assert whole == dict(zip(index.urls, index.rows.tolist(), strict=True))


def test_the_loss_goes_down(straight):
    losses = [line["loss_minus_entropy"] for line in read_lines(straight / "metrics.jsonl")]
    assert np.mean(losses[-5:]) < np.mean(losses[:5])


def test_killed_workers_and_a_checkpoint_cut_short_change_nothing(cluster, straight, corpus, storage):
    """One worker dies in the middle of writing, then all die once too often, and a checkpoint is damaged."""
    arm(cluster, "write", call=5, ranks=(1,))  # the checkpoint of step 8
    arm(cluster, "kill", call=11, ranks=(0, 1))  # of the second start
    config = run_config(corpus, storage, "killed")
    with pytest.raises(MuserError, match=r"(?s)train\.max_failures \(1\).*goes on from step (8|12)"):
        pretrain(config, ["test"])
    assert not list(cluster.iterdir()), "a fault did not happen"
    killed, others = config.folder, storage / "others" / "killed"
    shutil.copytree(killed, others)

    newest = max(killed.glob("checkpoint-*"))
    part = newest / "rank-00000.safetensors"
    part.write_bytes(part.read_bytes()[:-1])
    pretrain(config, ["test"])
    events = read_lines(killed / EVENTS)
    (broken,) = (event for event in events if event["event"] == "broken checkpoint")
    assert newest.name == f"checkpoint-{broken['step']:08d}"
    assert broken["error"].startswith("rank-00000.safetensors has ")
    starts = [event for event in events if event["event"] == "start"]
    # From the last checkpoint that was complete: writing takes as long as some of these short steps.
    assert [event["step"] for event in starts] in ([0, 4, 4], [0, 4, 8])
    assert starts[2]["step"] == broken["step"] - 4
    assert starts[2]["rows_repeated"] == (14 - starts[2]["step"]) * 16
    assert sum(event["event"] == "caught up" for event in events) == 2
    check_same(killed, straight)

    train = replace(config.train, workers=1, zero_stage=3)
    pretrain(replace(config, train=train, storage=str(others.parent)), ["test"])
    assert [event["workers"] for event in read_lines(others / EVENTS) if event["event"] == "start"] == [2, 2, 1]
    check_same(others, straight, bitwise=False)


def check_same(folder: Path, straight: Path, bitwise: bool = True) -> None:
    got, want = without_times(folder), without_times(straight)
    assert [line["step"] for line in got] == [line["step"] for line in want]
    for line, expected in zip(got, want, strict=True):
        assert line["digest"] == expected["digest"]  # the same keys in the same batches
        assert line["loss"] == pytest.approx(expected["loss"], rel=0 if bitwise else 1e-5)
        assert line["rows_quarantined"] == expected["rows_quarantined"]
    for name in (QUARANTINE, ACCOUNTS) if bitwise else (QUARANTINE,):
        assert (folder / name).read_text() == (straight / name).read_text()
    if bitwise:
        weights = [run / "model" / "model.safetensors" for run in (folder, straight)]
        assert sha256(weights[0].read_bytes()).digest() == sha256(weights[1].read_bytes()).digest()


def test_what_was_delivered_is_the_plan(straight, corpus, storage, capsys):
    print_digest(run_config(corpus, storage, "straight"))
    planned, delivered = (line.split() for line in capsys.readouterr().out.splitlines())
    assert planned[0] == delivered[0] == read_lines(straight / "metrics.jsonl")[-1]["digest"]
    assert delivered[1:6] == f"delivered up to step {STEPS} by".split()[:5]


def test_the_run_leaves_everything_behind(straight):
    config = from_dict(json.loads((straight / "config.json").read_text()), "config.json")
    assert config.train.workers == 2
    record = json.loads((straight / "run.json").read_text())
    assert record["command"] == "test"
    assert record["versions"]["ray"] == ray.__version__
    evaluation = json.loads((straight / "evaluation.json").read_text())
    assert evaluation["rows"] == 30
    assert set(evaluation["zero_shot"]) == {"instrument", "mode"}
    assert "absent" in evaluation["skipped_fields"]
    assert set(evaluation["retrieval"]) == {
        "text->audio",
        "audio->text",
        "text->spectrogram",
        "spectrogram->text",
        "audio->spectrogram",
        "spectrogram->audio",
    }
    assert "<svg" in (straight / "report.html").read_text()


def test_what_a_run_is_watched_by(straight):
    line = read_lines(straight / "metrics.jsonl")[-1]
    parts = [line[f"grad_norm/{part}"] for part in ("audio", "spectrogram", "text", "logits")]
    assert np.linalg.norm(parts) == pytest.approx(line["grad_norm"], rel=1e-5) and min(parts[:3]) > 0
    assert {"variance/audio", "alignment/audio-text", "duplicates", "rank_wait_share", "restarts"} <= line.keys()
    assert {path.name for path in (straight / "profile").iterdir()} == {
        f"rank{rank}-steps-2-3.json.gz" for rank in range(2)
    }
    assert list((straight / "tensorboard").glob("events.*"))


@pytest.mark.slow
def test_the_model_is_scored_while_it_trains(cluster, corpus, storage):
    config = run_config(corpus, storage, "scored")
    config = replace(config, evaluate=replace(config.evaluate, every_samples=32))
    arm(cluster, "slow", 0, seconds=1.0)  # else training is over before a score is there
    try:
        scored = pretrain(config, ["test"])
    finally:
        (cluster / "slow-1").unlink()
    scores = [event for event in read_lines(scored / EVENTS) if event["event"] == "validation"]
    assert scores and scores[0]["step"] == 2 and 0 <= scores[0]["val_R@10/text->audio"] <= 1
    assert not (scored / "snapshot").exists()


def test_the_same_command_again_trains_nothing_and_another_config_is_refused(straight, corpus, storage, capsys):
    before = (straight / "metrics.jsonl").read_text()
    config = run_config(corpus, storage, "straight")
    assert pretrain(config, ["test"]) == straight
    assert "Already trained" in capsys.readouterr().out
    assert (straight / "metrics.jsonl").read_text() == before
    other = replace(config, train=replace(config.train, lr=0.5))
    with pytest.raises(CheckpointError, match=r"another config \(train\.lr: 0\.001 there, 0\.5 here\).*--name"):
        pretrain(other, ["test"])


def test_the_model_works_without_ray_and_deepspeed(straight, tmp_path):
    np.save(tmp_path / "tone.npy", tone(3, rate=8000))
    code = f"""
import sys
for name in ("ray", "deepspeed", "tyro", "fsspec", "matplotlib", "sklearn", "webdataset"):
    sys.modules[name] = None  # importing it raises ImportError
import numpy as np, muser_dist
muser = muser_dist.Muser.from_pretrained({str(straight)!r})
tone = np.load({str(tmp_path / "tone.npy")!r})
print((muser.encode_text(["a piece for flute"]) @ muser.encode_audio([tone]).T).shape)
print(muser.encode_spectrogram([tone]).shape)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.split("\n")[:2] == ["(1, 1)", "(1, 8)"], done.stderr


def test_the_exported_model_is_the_trained_one(straight, corpus):
    muser = Muser.from_pretrained(straight / "model")
    assert to_dict(muser.config)["data"]["train"] == []
    initial = MultimodalModel(muser.config).state_dict()
    assert all((value != initial[name]).any() for name, value in muser.model.named_parameters())
    done = subprocess.run(
        [sys.executable, "jobs/evaluate.py", str(straight), "--val", f"{corpus}/val-*.tar", "--json", "/dev/stdout"],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    scores = json.loads((straight / "evaluation.json").read_text())
    assert f"{scores['retrieval']['text->audio']['MRR']:.3f}" in done.stdout


@pytest.mark.slow
def test_a_run_that_died_between_its_last_checkpoint_and_the_export(straight, corpus, storage):
    weights = straight / "model" / "model.safetensors"
    exported = weights.read_bytes()
    shutil.rmtree(straight / "model")
    pretrain(run_config(corpus, storage, "straight"), ["test"])
    assert weights.read_bytes() == exported


@pytest.mark.slow
def test_rows_that_all_fail_stop_the_run_with_the_reason(cluster, corpus, storage):
    config = run_config(corpus, storage, "notext")
    config = replace(config, data=replace(config.data, templates=("{composer}",)))
    with pytest.raises(MuserError, match=r"none of the first 16 rows of training can be used; .*the templates name"):
        pretrain(config, ["test"])
    assert len(read_lines(config.folder / QUARANTINE)) >= 16


@pytest.mark.parametrize(
    ("workers", "message"),
    [
        (CPUS + 1, f"reserve {CPUS + 1} CPUs, but the cluster has {CPUS}"),
        (CPUS, "leaves no slot to decode; start Ray with --num-cpus"),
    ],
)
def test_what_the_cluster_cannot_place_is_said_before_the_start(cluster, corpus, tmp_path, workers, message):
    config = run_config(corpus, tmp_path, "many")
    config = replace(config, train=replace(config.train, workers=workers))
    with pytest.raises(ClusterError, match=message):
        pretrain(config, ["test"])


def test_a_later_stage_that_the_cluster_cannot_place_is_said_before_the_first(cluster):
    first, later = (small_config(train={"workers": workers}) for workers in (1, CPUS + 1))
    connect(first)
    with pytest.raises(ClusterError, match=f"reserve {CPUS + 1} CPUs, but the cluster has {CPUS}"):
        connect(first, later=[later])


def test_gpus_that_are_not_there(cluster, corpus, tmp_path):
    config = run_config(corpus, tmp_path, "gpu")
    with pytest.raises(ClusterError, match="the cluster has 0 GPUs"):
        pretrain(replace(config, train=replace(config.train, gpu=True)), ["test"])


def test_shards_that_changed_since_the_run_began(straight, corpus, storage):
    index = straight / "train-index.json"
    kept = index.read_text()
    try:
        index.write_text(kept.replace("train-00003.tar", "train-00009.tar"))
        with pytest.raises(DataError, match=r"data\.train: 4 shards match now, but the run began with 4 others"):
            pretrain(run_config(corpus, storage, "straight"), ["test"])
    finally:
        index.write_text(kept)
