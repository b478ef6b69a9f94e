"""What needs a Ray of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.slow


def found(what: str, folder: Path) -> Any:
    command = [sys.executable, "-m", "tests.cluster.own_ray", what, str(folder)]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"RAY_ADDRESS": "local"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-5000:]
    return json.loads((folder / "found.json").read_text())


def test_it_has_room_for_the_largest_stage_of_each_run(tmp_path):
    assert found("sizes", tmp_path) == {"CPU": 14.0, "trainer": 8.0}


def test_scores_during_training_compute_on_a_gpu_only_where_the_task_has_one(tmp_path):
    """No machine of the tests has one: the task that is given it says what it lacks."""
    without, given = found("scores", tmp_path)
    assert 0 < without["val_MRR"] <= 1
    assert "CUDA" in given["error"] or "NVIDIA" in given["error"]
