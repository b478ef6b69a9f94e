"""The benchmark of the loss runs, needs neither Ray nor DeepSpeed, and writes what it promises."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.mark.slow  # eighty seconds, nearly all of it imports
def test_measures_and_writes_json_and_page(tmp_path: Path) -> None:
    out = tmp_path / "results.json"
    options = ["--sizes", "64", "--memory", "128", "256", "--rounds", "1"]
    command = [sys.executable, BENCHMARKS / "objective.py", "--json", out, *options]
    subprocess.run(command, check=True, timeout=600)
    results = json.loads(out.read_text())
    assert {"command", "commit", "cpu", "gpu", "versions", "rows", "ratios"} <= set(results)
    promised = ("time_over_open_clip_w1", "time_over_open_clip_w2", "bytes_over_open_clip_w2", "memory_over_open_clip")
    assert all(results["ratios"][name] > 0 for name in promised)
    assert "| ours |" in out.with_suffix(".md").read_text()


def test_the_loss_needs_neither_ray_nor_deepspeed() -> None:
    blocked = "import sys; sys.modules.update(ray=None, deepspeed=None); sys.path.insert(0, sys.argv[1]); "
    code = (
        blocked + "import objective_measure as m; m.step(m.ours, m.make_features(8, 2, 'cpu', 0), m.torch.ones(2), 2)"
    )
    subprocess.run([sys.executable, "-c", code, str(BENCHMARKS)], check=True, timeout=120)
