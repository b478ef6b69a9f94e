"""jobs/inspect_shards.py as it is run."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fatal import install
from tests.planted import plant
from tests.shardmaker import sample, write_shard

ROOT = Path(__file__).parents[1]


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "jobs/inspect_shards.py", *arguments],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )


def test_it_reports_what_was_planted(tmp_path):
    plant(tmp_path)
    numbers = tmp_path / "new" / "numbers.json"
    done = run(
        f"{tmp_path}/train-*.tar",
        *("--against", f"{tmp_path}/val-*.tar", "--batch", "4", "--json", str(numbers)),
        PYTHONPATH=str(install(tmp_path)),
    )
    assert done.returncode == 0, done.stderr
    lines = [" ".join(line.split()) for line in done.stdout.splitlines()]
    for line in (
        f"{tmp_path}/train-00001.tar holds 16 rows, but muser-index.json says 15",
        "== usable: 8 of 24 rows (33.3%)",
        "first: train-00001.tar:fatal: its decoder died twice (SIGSEGV)",
        "format flac 12, wav 3, mp3 1",
        "seconds min 0.0, median 1.0, p95 10.0, max 10.0",
        "tags 8.3% 2 old (2)",
        "same recording 2 rows in 1 groups",
        "2 rows: train-00000.tar:music, train-00000.tar:musiccopy",
        "== false negatives: 4 rows in a batch out of 16, 8 texts",
        "rows in a batch with the anchor's text 0.725 on average",
        "same file 1 of 24 rows; 1 of 4 in --against",
        "train-00000.tar:plain = val-00000.tar:sametitle",
        "same recording 2 of 24 rows; 1 of 4 in --against",
    ):
        assert line in lines
    assert lines[0].startswith("3 shards, 24 rows,")
    assert "3 of 3 shards" in done.stderr and "1 of 1 shards" in done.stderr
    result = json.loads(numbers.read_text())
    assert set(result) == {"shards", "against", "leakage"}
    assert result["shards"]["usable"] == 8
    assert result["leakage"]["recording"]["rows"] == 2


def test_names_of_others_do_not_steer_the_terminal(tmp_path):
    write_shard(tmp_path / "a.tar", [(f"k{i}", sample(0, caption="\x1b[2J" + "\ud800")) for i in range(2)])
    done = run(f"{tmp_path}/a.tar", "--templates", "{mode}")
    assert done.returncode == 0, done.stderr
    assert "\x1b" not in done.stdout
    assert "�[2J? (2)" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing/*.tar"], "there is no folder missing"),
        (["*.md", "--batch", "1"], "--batch is 1"),
        (["*.md", "--rows", "0"], "--rows is 0"),
        (["*.md", "--storage-options", "missing.json"], "cannot read missing.json"),
    ],
)
def test_errors_are_one_line(arguments, message):
    done = run(*arguments)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert message in done.stderr
