"""The benchmark of sweeps runs and writes what it promises."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.mark.slow
def test_measures_and_writes_json_and_page(tmp_path: Path) -> None:
    out = tmp_path / "results.json"
    options = ["--trials", "2", "--clips", "48", "--distinct", "2", "--folder", tmp_path]
    subprocess.run([sys.executable, BENCHMARKS / "sweep.py", "--json", out, *options], check=True, timeout=1200)
    results = json.loads(out.read_text())
    assert {"command", "commit", "cpu", "gpu", "versions", "rows", "ratios"} <= set(results)
    assert results["ratios"]["shared_decode_speedup"] > 0
    assert results["largest_difference_of_losses_from_a_run_alone"] <= 1e-5
    cached = [row["clips_cached"] for row in results["rows"] if row["case"] == "with cache"]
    assert cached == [0, 48]
    assert "shared_decode_speedup" in out.with_suffix(".md").read_text()
