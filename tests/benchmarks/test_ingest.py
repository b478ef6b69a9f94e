"""The ingest benchmark runs and writes what it promises."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
CONTESTANTS = ("limit", "usual_stack", "webdataset_same_decode")  # those that need no Ray


@pytest.mark.slow  # forty seconds, and too few batches on a busy machine
def test_measures_and_writes_json_and_page(tmp_path: Path) -> None:
    out = tmp_path / "results.json"
    options = "--formats flac --seconds 8 --rounds 1 --cores 2 --shards 2 --rows-per-shard 32 --distinct 2 --plan"
    subprocess.run(
        [sys.executable, BENCHMARKS / "ingest.py", "--json", out, *options.split(), "--contestants", *CONTESTANTS],
        check=True,
        timeout=600,
    )
    results = json.loads(out.read_text())
    assert {"command", "commit", "cpu", "gpu", "versions", "rows", "ratios"} <= set(results)
    assert [row["contestant"] for row in results["rows"]] == list(CONTESTANTS)
    for row in results["rows"]:
        assert row["rows_delivered"] >= 64
        assert row["rows_per_second"] > 0
        assert row["cpu_seconds_per_clip"] > 0
        assert row["cpu_seconds_by_process"]["worker"] > 0
        assert row["wait_seconds"]["p50"] <= row["wait_seconds"]["p99"]
    page = out.with_suffix(".md").read_text()
    assert all(f"| {name} |" in page for name in CONTESTANTS)
