"""Trackers hold each step of a run once, however often it was restarted, and cannot stop it."""

import json
import struct
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from muser_dist.errors import ConfigError
from muser_dist.train.trackers import TensorBoard, Trackers, check_trackers, trackers_of
from tests.small import small_config


def line(step: int, **values) -> dict:
    return {"step": step, "samples": 8 * step, "loss": 1 / step, "loss/audio-text": 0.5, "digest": "ab"} | values


def curve(folder, name: str) -> list[tuple[int, float]]:
    """What TensorBoard shows: (step, value)."""
    events = EventAccumulator(str(folder))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


def test_tensorboard_shows_what_was_written_so_far(tmp_path):
    board = TensorBoard(tmp_path, 0)
    board.metrics(line(1), 1)
    board.metrics(line(2), 2)
    assert curve(tmp_path, "loss") == [(1, 1.0), (2, 0.5)]  # before it is closed: a worker may die at any time
    board.close()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert sorted(events.Tags()["scalars"]) == ["loss", "loss/audio-text", "samples"]


def test_tensorboard_shows_scores_at_the_step_of_what_was_scored(tmp_path):
    trackers = Trackers({"board": lambda: TensorBoard(tmp_path, 0)})
    for step in (1, 2, 3):
        trackers.metrics(line(step), step)
    trackers.scores({"val_MRR": 0.5}, 1)
    trackers.close()
    assert curve(tmp_path, "val_MRR") == [(1, 0.5)] and len(curve(tmp_path, "loss")) == 3


def test_tensorboard_shows_each_step_once_after_a_restart(tmp_path):
    died = TensorBoard(tmp_path, 0)
    for step in range(1, 6):
        died.metrics(line(step), step)
    resumed = TensorBoard(tmp_path, 3)
    for step in range(4, 8):
        resumed.metrics(line(step, loss=-1.0), step)
    resumed.close()
    assert curve(tmp_path, "loss") == [(1, 1.0), (2, 0.5), (3, pytest.approx(1 / 3))] + [(s, -1.0) for s in range(4, 8)]


class Broken:
    """A tracker of a service that goes away."""

    def __init__(self) -> None:
        self.calls = 0

    def metrics(self, line: dict, step: int) -> None:
        self.calls += 1
        raise OSError("the service does not answer")

    def close(self) -> None:
        raise AssertionError("was switched off before")


def test_a_tracker_that_fails_is_switched_off_with_one_warning(tmp_path, caplog):
    broken = Broken()

    def missing() -> Broken:
        raise ConnectionError("no such host")

    trackers = Trackers({"missing": missing, "broken": lambda: broken, "board": lambda: TensorBoard(tmp_path, 0)})
    for step in (1, 2, 3):
        trackers.metrics(line(step), step)
    trackers.close()
    assert broken.calls == 1
    assert [record.args[0] for record in caplog.records] == ["missing", "broken"]
    assert "OSError: the service does not answer" in caplog.text
    assert [step for step, _ in curve(tmp_path, "loss")] == [1, 2, 3]


def test_the_run_s_folder_holds_the_event_files(tmp_path):
    config = small_config(name="a-run", storage=str(tmp_path))
    trackers = trackers_of(["tensorboard"], config, 0)
    trackers.metrics(line(1), 1)
    trackers.close()
    assert curve(config.folder / "tensorboard", "loss") == [(1, 1.0)]


def test_what_is_missing_is_said_beforehand(monkeypatch):
    for name in ("tensorboard", "wandb"):
        monkeypatch.setitem(sys.modules, name, None)  # as if it were not installed
        with pytest.raises(ConfigError, match=rf"{name} needs the package {name}.*muser_dist\[{name}\]"):
            check_trackers([name])
    check_trackers(["ray"])
    with pytest.raises(ConfigError, match="there is no 'mlflow', only tensorboard, wandb, ray"):
        check_trackers(["mlflow"])


def test_weights_and_biases_needs_a_key_or_to_be_offline(monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    with pytest.raises(ConfigError, match="WANDB_API_KEY"):
        check_trackers(["wandb"])
    monkeypatch.setenv("WANDB_MODE", "offline")
    check_trackers(["wandb"])


def records_in(path: Path) -> list[Any]:
    """What the file of an offline run holds so far: wandb goes on writing for a moment after a run is closed."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, start, found = path.read_bytes(), 7, []
    while start + 7 <= len(content):  # records of LevelDB's log format; so few fit one block, and none is cut
        _, length, kind = struct.unpack_from("<IHB", content, start)
        assert kind == 1
        start += 7 + length
        if start <= len(content):
            found.append(Record.FromString(content[start - length : start]))
    return found


def records(folder: Path) -> list[tuple[str, Any]]:
    """(run's id, record) of all that is in the files that offline runs left, the oldest file first."""
    found = []
    for path in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        deadline = time.monotonic() + 30
        while not any(r.WhichOneof("record_type") == "exit" for r in records_in(path)) and time.monotonic() < deadline:
            time.sleep(0.1)
        found += [(path.stem.removeprefix("run-"), record) for record in records_in(path)]
    return found


def logged(folder) -> list[tuple[str, dict]]:
    """(run's id, values) of every row that offline runs left."""
    rows = []
    for run, record in records(folder):
        if record.WhichOneof("record_type") == "history":
            items = ((item.key or "/".join(item.nested_key), item.value_json) for item in record.history.item)
            rows.append((run, {key: json.loads(value) for key, value in items}))
    return rows


def test_weights_and_biases_offline_has_each_step_once_and_no_secret(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    key = "0123456789abcdef" * 3
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_API_KEY", key)
    config = small_config(name="a-run", storage=str(tmp_path))
    config.folder.mkdir()
    for first, last in ((0, 5), (3, 8)):  # the second start goes on from an older checkpoint
        trackers = trackers_of(["wandb"], config, first)
        for step in range(first + 1, last + 1):
            trackers.metrics(line(step), step)
        trackers.close()
        time.sleep(1.1)  # wandb names its folders by the second
    rows = logged(config.folder)
    assert len({run for run, _ in rows}) == 1
    assert [row["_step"] for _, row in rows] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert rows[1][1]["loss"] == 0.5 and rows[1][1]["loss/audio-text"] == 0.5 and "digest" not in rows[1][1]
    assert not any(key.encode() in path.read_bytes() for path in config.folder.rglob("*") if path.is_file())
    trackers_of(["wandb"], config, 0).close()  # begun anew: another run
    (id_of_rows,) = {run for run, _ in rows}
    assert json.loads((config.folder / "wandb-run.json").read_text())["id"] != id_of_rows


def test_weights_and_biases_has_scores_at_the_step_of_what_was_scored(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    config = small_config(name="a-run", storage=str(tmp_path))
    config.folder.mkdir()
    trackers = trackers_of(["wandb"], config, 0)
    for step in (10, 20, 30, 40):
        trackers.metrics(line(step), step)
        if step == 30:  # when steps after the snapshot's are over
            trackers.scores({"val_MRR": 0.5, "val_MRR/text->audio": 0.25}, 20)
    trackers.scores({"val_MRR": 0.75}, 40)  # with no line after it
    trackers.scores({"error": "ValueError: of the task"}, 40)
    trackers.close()
    rows = [row for _, row in logged(config.folder)]
    assert [row["_step"] for row in rows if "loss" in row] == [10, 20, 30, 40]
    scored = [(row["scored_step"], row["val_MRR"], row.get("val_MRR/text->audio")) for row in rows if "val_MRR" in row]
    assert scored == [(20, 0.5, 0.25), (40, 0.75, None)]
    metrics = [record.metric for _, record in records(config.folder) if record.WhichOneof("record_type") == "metric"]
    assert {metric.glob_name: metric.step_metric for metric in metrics} == {"val_*": "scored_step"}


WORKER = """
import sys
import ray
from muser_dist.train.trackers import RayMetrics

@ray.remote
class Worker:
    def __init__(self):
        self.metrics = RayMetrics("a-run")

    def log(self):
        self.metrics.metrics({"step": 1, "loss": 2.5, "grad_norm/audio": 0.25, "digest": "ab"}, 1)

ray.init("local", num_cpus=1, include_dashboard=False, _system_config={"metrics_report_interval_ms": 1000})
worker = Worker.remote()
ray.get(worker.log.remote())
print(ray.nodes()[0]["MetricsExportPort"], flush=True)
sys.stdin.read()
"""


@pytest.mark.slow
def test_ray_exports_the_numbers_of_a_run():
    """A worker's gauges, read where Prometheus would."""
    with subprocess.Popen(
        [sys.executable, "-c", WORKER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        port = int(process.stdout.readline())
        deadline, exported = time.monotonic() + 60, ""
        while "ray_muser_grad_norm" not in exported and time.monotonic() < deadline:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as page:
                exported = page.read().decode()
            time.sleep(0.2)
        process.stdin.close()
    lines = [text for text in exported.splitlines() if text.startswith("ray_muser")]
    values = {text.split("{")[0]: float(text.split()[-1]) for text in lines}
    assert values == {"ray_muser_loss": 2.5, "ray_muser_grad_norm": 0.25}
    assert all('run="a-run"' in text for text in lines)
    assert any('part="audio"' in text for text in lines)
