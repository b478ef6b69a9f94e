"""The benchmark of mining runs and writes what it promises."""

import json
import subprocess
import sys
from pathlib import Path

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def test_measures_and_writes_json_and_page(tmp_path: Path) -> None:
    out = tmp_path / "results.json"
    options = ["--rows", "20000", "--alone", "--rules", "cooccurrence", "explicit", "--folder", tmp_path]
    subprocess.run([sys.executable, BENCHMARKS / "mining.py", "--json", out, *options], check=True, timeout=300)
    results = json.loads(out.read_text())
    assert {"command", "commit", "cpu", "gpu", "versions", "rows", "ratios"} <= set(results)
    assert [row["rule"] for row in results["rows"]] == ["cooccurrence", "explicit"]
    for row in results["rows"]:
        assert row["summary"]["rows"] == 20_000
        assert min(row["summary"]["pairs"].values()) > 0
        assert row["peak_gib"] > 0.01
        assert set(row["phase_seconds"]) == {"read", "mine", "items", "pairs"}
    assert set(results["ratios"]) == {"seconds_over_limit", "memory_over_limit"}
    assert "| cooccurrence |" in out.with_suffix(".md").read_text()
