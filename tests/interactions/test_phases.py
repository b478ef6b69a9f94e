"""Files of the phases: what is made again, whose folder it is, and that no row is lost; the job's command line."""

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from muser_dist.errors import DataError
from muser_dist.interactions import phases, readers
from muser_dist.interactions.log import LAYOUTS
from muser_dist.interactions.mining import MiningConfig
from muser_dist.interactions.phases import PHASES
from muser_dist.interactions.spill import read_spill, write_spill
from muser_dist.interactions.split import SplitConfig
from tests.interactions.cases import items_of, pairs_of, phases_of, run

ROOT = Path(__file__).parents[2]
EVENTS = LAYOUTS["events"]
SPLIT = SplitConfig(val_users=0.2, val_items=0.1)


@pytest.fixture
def log(tmp_path, monkeypatch):
    """Sessions of 40 users over 60 songs, in a file that is read in several pieces."""
    monkeypatch.setattr(readers, "PIECE_BYTES", 20_000)
    draw = np.random.default_rng(0)
    lines = ["user,item,time,signal,value"]
    for _ in range(300):
        user, start = draw.integers(40), draw.integers(10**9, 11 * 10**8)
        lines += [f"user {user},song {draw.integers(60)},{start + 200 * i},play,{draw.integers(100)}" for i in range(8)]
    path = tmp_path / "log.csv"
    path.write_text("\n".join(lines))
    return path


def test_a_job_that_was_interrupted_goes_on(log, tmp_path):
    whole = run(phases_of([log], tmp_path / "whole", EVENTS, split=SPLIT, latest=2 * 10**9))
    expected = pairs_of(tmp_path / "whole")
    assert whole["rows"] == 2400 and len(expected) > 100 and not (tmp_path / "whole" / "work").exists()
    for ended in range(4):
        # Each time a new process takes over in the middle of a phase, perhaps on another day.
        folder = tmp_path / f"interrupted {ended}"
        first = phases_of([log], folder, EVENTS, split=SPLIT, latest=2 * 10**9)
        first.claim({})
        for phase in PHASES[:ended]:
            for task in first.missing(phase):
                first.run(phase, task)
        tasks = first.missing(PHASES[ended])
        assert len(tasks) == first.tasks(PHASES[ended]) > 2
        for task in tasks[1:]:
            first.run(PHASES[ended], task)
        again = phases_of([log], folder, EVENTS, split=SPLIT, latest=2 * 10**9 + 86_400)
        again.claim({})
        assert again.job.latest == 2 * 10**9
        assert again.missing(PHASES[ended]) == tasks[:1]
        assert run(again) == whole
        assert pairs_of(folder) == expected
        files = [path for path in folder.rglob("*") if path.is_file()]
        assert not [path for path in files if path.name.endswith(".part")]


def test_a_job_that_is_done_stays_done(log, tmp_path):
    summary = run(phases_of([log], tmp_path / "out", EVENTS, split=SPLIT))
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.parquet")}
    again = phases_of([log], tmp_path / "out", EVENTS, split=SPLIT)
    again.claim({})
    assert again.finish({}) == summary
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.parquet")} == before


def test_another_job_is_refused_the_folder(log, tmp_path):
    run(phases_of([log], tmp_path / "out", EVENTS))
    for changes in ({"mining": MiningConfig(window=60)}, {"split": SPLIT}, {"partitions": 8}):
        with pytest.raises(DataError, match=rf"\({next(iter(changes))} differ\); give another --out"):
            phases_of([log], tmp_path / "out", EVENTS, **changes).claim({})
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").touch()
    with pytest.raises(DataError, match="holds something else"):
        phases_of([log], tmp_path / "other", EVENTS).claim({})


def test_a_job_does_not_go_on_with_other_input(log, tmp_path):
    pq.write_table(pa.csv.read_csv(log), tmp_path / "log.parquet")
    items = tmp_path / "items.txt"
    items.write_text("song 1\nsong 2\n")

    def claim():
        phases_of([tmp_path / "log.parquet"], tmp_path / "out", EVENTS, items=str(items)).claim({})

    claim()
    claim()
    items.write_text("song 1\nsong 3\n")
    with pytest.raises(DataError, match=r"\(items_content differ\)"):
        claim()
    items.write_text("song 1\nsong 2\n")
    os.utime(tmp_path / "log.parquet", (1, 1))
    with pytest.raises(DataError, match=r"\(files differ\)"):
        claim()


def test_a_job_that_died_as_it_claimed_the_folder_goes_on(log, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / ".manifest.json.part").write_text('{"for')
    run(phases_of([log], out, EVENTS))
    (out / "manifest.json").write_text('{"format": 1}')
    with pytest.raises(DataError, match="is of another version"):
        phases_of([log], out, EVENTS).claim({})


def test_partitions_pieces_and_formats_do_not_matter(log, tmp_path, monkeypatch):
    def result(folder):
        key = ("split", "trigger", "item")
        return sorted(pairs_of(folder), key=lambda row: [row[name] for name in key]), items_of(folder)

    run(phases_of([log], tmp_path / "one", EVENTS, split=SPLIT, partitions=1))
    run(phases_of([log], tmp_path / "many", EVENTS, split=SPLIT, partitions=16))
    monkeypatch.setattr(phases, "_FLUSH_ROWS", 100)
    monkeypatch.setattr(readers, "BATCH_ROWS", 64)
    table = pa.csv.read_csv(log)
    for i in range(3):
        pq.write_table(table.slice(800 * i, 800), tmp_path / f"{i}.parquet", row_group_size=300)
    run(phases_of([tmp_path / f"{i}.parquet" for i in (2, 0, 1)], tmp_path / "parquet", EVENTS, split=SPLIT))
    expected = result(tmp_path / "one")
    assert result(tmp_path / "many") == result(tmp_path / "parquet") == expected
    assert {item["split"] for item in expected[1].values()} == {"train", "val"}
    assert {row["split"] for row in expected[0]} == {"train", "val"}


def test_items_that_are_not_there_are_counted(log, tmp_path):
    (tmp_path / "items.txt").write_text("".join(f"song {i}\n" for i in range(0, 60, 2)))
    summary = run(phases_of([log], tmp_path / "out", EVENTS, items=str(tmp_path / "items.txt")))
    table = pa.csv.read_csv(log)["item"].to_pylist()
    assert summary["left_out"]["unknown item"] == sum(int(item.removeprefix("song ")) % 2 for item in table)
    assert set(items_of(tmp_path / "out")) == {f"song {i}" for i in range(0, 60, 2)}
    with pytest.raises(DataError, match=r"items: .*gone\.txt cannot be read"):
        run(phases_of([log], tmp_path / "other", EVENTS, items=str(tmp_path / "gone.txt")))


def test_a_log_of_which_nothing_can_be_used(log, tmp_path):
    layout = replace(EVENTS, signals={"play": "stream"})
    with pytest.raises(DataError, match=r"none of 2,400 rows .*signal not used: 2,400.*signals are: stream \(2,400\)"):
        run(phases_of([log], tmp_path / "out", layout))


def test_spilled_rows_come_back_by_partition(tmp_path):
    draw = np.random.default_rng(0)
    schema = pa.schema([("id", pa.uint64()), ("row", pa.int64())])
    tables = [
        pa.table([draw.integers(0, 2**64, rows, np.uint64), np.arange(rows)], schema=schema) for rows in (1000, 0, 1)
    ]
    paths = [tmp_path / f"{i}.arrow" for i in range(3)]
    for path, table in zip(paths, tables, strict=True):
        write_spill(path, table, "id", 8)
    parts = [read_spill(paths, i, schema) for i in range(8)]
    for i, part in enumerate(parts):
        assert (part["id"].to_numpy() >> np.uint64(61) == i).all()
    rows = sorted(row for part in parts for row in zip(*part.to_pydict().values(), strict=True))
    assert rows == sorted(row for table in tables for row in zip(*table.to_pydict().values(), strict=True))
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in paths}


def test_what_tasks_import_is_light():
    """Neither torch nor Ray: a pool of small machines can mine, and tests of functions start fast."""
    code = "import sys, muser_dist.interactions.phases; print({'torch', 'ray'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


# --- The command line ---


def mine_pairs(*arguments):
    return subprocess.run(
        [sys.executable, "jobs/mine_pairs.py", *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )


def test_a_dry_run_shows_how_the_log_is_read(log, tmp_path):
    log.write_text(log.read_text() + "\n,song 1,1000000000,play,1")
    out = tmp_path / "out"
    done = mine_pairs(log, "--layout", "events", "--out", out, "--mining.min-value", "play", "50", "--dry-run")
    assert done.returncode == 0, done.stderr
    for line in ("1 files, 1 pieces, 1 partitions", "the first 2,401 rows: 2,400 can be read", "missing user"):
        assert line in done.stdout
    assert "left out: value below the minimum" in done.stdout and "signals: play (2,400)" in done.stdout
    assert not out.exists()


def test_a_dry_run_shows_what_is_held_out(log, tmp_path):
    done = mine_pairs(log, "--layout", "events", "--out", tmp_path / "out", "--split.val-from", "20200101", "--dry-run")
    assert done.returncode == 0, done.stderr
    first, last = re.search(r"times: (\S+) .* to (\S+) ", done.stdout).groups()
    assert "2001-09-09" <= first < last < "2004-11-10" and "splits: 2,400 train, 0 val\n" in done.stdout


def test_what_is_wrong_is_said_in_one_line(log, tmp_path):
    for arguments, message in (
        ((log, "--layout", "yambda", "--out", tmp_path / "out"), "there is no column 'uid'"),
        ((log, "--layout", "spotify", "--out", tmp_path / "out"), "layout 'spotify': there are events"),
        ((tmp_path / "*.gone", "--layout", "events", "--out", tmp_path / "out"), "*.gone"),
        ((log, "--layout", "events", "--out", tmp_path), "holds something else"),
        ((log, "--layout", "events", "--out", tmp_path / "out", "--split.val-from", "20000000"), "before 1990"),
    ):
        done = mine_pairs(*arguments)
        assert done.returncode == 2 and done.stderr.startswith("error: ") and message in done.stderr, done.stderr
        assert len(done.stderr.splitlines()) == 1
