import gzip
import json
from collections import Counter
from pathlib import Path

import torch
from torch.profiler import record_function

from muser_dist.train.profiler import FOLDER, Profiler


def run(folder: Path, steps: tuple[int, int] | None, of_run: range, rank: int = 0) -> None:
    """A training loop's way with the profiler."""
    profiler = Profiler(steps, folder, rank)
    for step in of_run:
        profiler.before(step)
        with record_function("encode"):
            x = torch.ones(4, 4, requires_grad=True)
            y = (x @ x).sum()
        with record_function("backward"):
            y.backward()
    profiler.close()


def ranges(path: Path) -> Counter[str]:
    """How often a trace holds each name of our own."""
    with gzip.open(path) as file:
        events = json.load(file)["traceEvents"]
    return Counter(event["name"] for event in events if event.get("cat") == "user_annotation")


def test_a_trace_holds_the_chosen_steps(tmp_path):
    run(tmp_path, (3, 4), range(1, 8))
    (path,) = (tmp_path / FOLDER).iterdir()
    assert path.name == "rank0-steps-3-4.json.gz"
    assert ranges(path) == {"optimizer step 3": 1, "optimizer step 4": 1, "encode": 2, "backward": 2}
    with gzip.open(path) as file:
        assert "aten::mm" in {event["name"] for event in json.load(file)["traceEvents"]}


def test_a_run_that_starts_or_ends_inside_the_range(tmp_path):
    run(tmp_path, (2, 20), range(4, 6), rank=1)
    path = tmp_path / FOLDER / "rank1-steps-4-5.json.gz"
    assert ranges(path)["encode"] == 2


def test_nothing_is_written_when_off_or_past(tmp_path):
    run(tmp_path, None, range(1, 4))
    run(tmp_path, (1, 3), range(4, 6))
    assert list(tmp_path.iterdir()) == []


def test_a_trace_that_cannot_be_written_does_not_stop_training(tmp_path, caplog):
    (tmp_path / FOLDER).write_text("a file in the folder's place")
    run(tmp_path, (1, 2), range(1, 5))
    assert "steps [1, 2] was not written" in caplog.text
