"""What pages tell a user to do: the commands of data.md, muser.md, htcl.md and clamp.md, in order, in a folder with
music; options of all."""

import csv
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import ray

from tests.data.corpora.layouts import LAYOUTS, audio
from tests.data.corpora.score_layouts import SCORES
from tests.data.symbolic.notation import note, score
from tests.scores import abc, midi, write_scores
from tests.shardmaker import INSTRUMENTS

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "data.md"
MUSER = ROOT / "docs" / "muser.md"
HTCL = ROOT / "docs" / "htcl.md"
CLAMP = ROOT / "docs" / "clamp.md"


@pytest.fixture(scope="module")
def address():
    """A Ray that the commands join, so that not each of them has to start one."""
    started = not ray.is_initialized()
    if started:
        ray.init("local", num_cpus=4, log_to_driver=False)
    yield ray.get_runtime_context().gcs_address
    if started:
        ray.shutdown()


def make_music(folder: Path) -> None:
    """What the page assumes: audio files and tracks.csv with the columns that it shows."""
    (header,) = re.findall(r"```\n(audio,.*)\n", PAGE.read_text())
    rows = [header.split(",")]
    for i in range(64):
        genre = ("rock", "folk")[i % 2]
        file = audio(folder / genre / f"{i:02d}. Song.{('mp3', 'flac', 'ogg')[i % 3]}", i)
        name = str(file.relative_to(folder))
        instrument = "" if i % 8 == 7 else INSTRUMENTS[i % 4]
        rows.append([name, f"Song {i}", "Ann", genre, instrument, f"Song {i}.", "val" if i % 5 == 4 else "train"])
    with (folder / "tracks.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)


def run_blocks(page: str, folder: Path, address: str) -> None:
    """Runs a page's blocks of bash and Python beside its corpora."""
    (folder / "jobs").symlink_to(ROOT / "jobs")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    for language, block in re.findall(r"```(bash|python)\n(.*?)```", page, re.S):
        done = subprocess.run(
            ["bash", "-euc", block] if language == "bash" else [sys.executable, "-c", block],
            cwd=folder,
            env={**os.environ, "PATH": path, "RAY_ADDRESS": address, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, f"{block}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_commands_of_the_page(address, tmp_path):
    make_music(tmp_path / "music")
    corpora = {name: LAYOUTS[name] for name in ("gtzan", "fma", "magnatagatune", "jamendo")}
    corpora |= {name: SCORES[name] for name in ("wikimt", "midicaps", "clamp")}
    for name, layout in corpora.items():
        layout.make(tmp_path / name)
    SCORES["folder"].make(tmp_path / "tunes")
    (mix,) = re.findall(r"```json\n(.*?)```", PAGE.read_text(), re.S)
    (tmp_path / "mix.json").write_text(mix)
    run_blocks(PAGE.read_text(), tmp_path, address)
    index = json.loads((tmp_path / "shards" / "muser-index.json").read_text())
    assert index["rows"] == {"train-00000.tar": 52, "val-00000.tar": 12}
    assert (tmp_path / "shards" / "skipped.jsonl").read_text() == ""
    for name, layout in (corpora | {"tunes": SCORES["folder"]}).items():
        index = json.loads((tmp_path / f"{name}-shards" / "muser-index.json").read_text())
        assert sum(index["rows"].values()) == sum(layout.rows.values())
    run = tmp_path / "runs" / "trial"
    assert (run / "report.html").exists() and (run / "model" / "model.safetensors").exists()
    assert (run / "quarantine.jsonl").read_text() == ""
    assert {"genre", "instrument"} <= set(json.loads((run / "evaluation.json").read_text())["zero_shot"])


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_the_commands_of_the_page_on_muser(address, tmp_path):
    for name in ("gtzan", "fma", "magnatagatune"):
        LAYOUTS[name].make(tmp_path / name)
    (trial,) = re.findall(r"add\n`(--train\.samples [^`]*)`", MUSER.read_text())
    page = re.sub(r"pretrain\.py muser ", f"pretrain.py tiny {trial} ", MUSER.read_text())
    page = re.sub(r"finetune\.py (\S+) ", rf"finetune.py \1 {trial} ", page)
    run_blocks(page, tmp_path, address)
    for folder, rows in (("gtzan-embeddings", 14), ("gtzan-files", 17)):
        parts = sorted((tmp_path / folder).glob("part-*.parquet"))
        assert sum(pq.read_table(part).num_rows for part in parts) == rows
        assert (tmp_path / folder / "quarantine.jsonl").read_text() == ""
    assert "| train | 1 | 1 | 9 |" in (tmp_path / "gtzan-muser" / "README.md").read_text()


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_the_commands_of_the_page_on_htcl(address, tmp_path):
    make_music(tmp_path / "music")
    tracks = tmp_path / "music" / "tracks.csv"
    header, *rows = tracks.read_text().splitlines()
    tracks.write_text("\n".join([f"track,{header}", *(f"t{i:02d},{row}" for i, row in enumerate(rows))]))
    likes = ["user,item,time,signal,value"]
    for user in range(8):  # each hears a song, and likes the next of its genre a minute later
        for i in range(0, 62, 2):
            song = i + user % 2
            likes += [f"u{user},t{song:02d},{1.6e9 + 9e3 * i:.0f},play,30", ""]
            likes += [f"u{user},t{song + 2:02d},{1.6e9 + 9e3 * i + 60:.0f},like,1"] if song + 2 < 64 else []
    (tmp_path / "plays.csv").write_text("\n".join(filter(None, likes)))
    page = HTCL.read_text()
    (trial,) = re.findall(r"add\n`(--train\.samples [^`]*)`", page)
    run_blocks(page.replace("pretrain.py htcl ", f"pretrain.py htcl_tiny {trial} "), tmp_path, address)
    summary = json.loads((tmp_path / "pairs" / "summary.json").read_text())
    assert summary["rows"] == summary["used"] + sum(summary["left_out"].values()) > 0
    for stage in ("semantic", "preference"):
        assert (tmp_path / "runs" / "songs" / stage / "report.html").exists()
    assert sum(pq.read_table(part).num_rows for part in (tmp_path / "songs").glob("part-*.parquet")) == 64


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_commands_of_the_page_on_clamp(address, tmp_path, monkeypatch):
    write_scores(tmp_path / "music", 24, "abc", "mid", "flac", name="pdtunes-train")
    write_scores(tmp_path / "music", 8, "abc", "mid", "flac", name="pdtunes-val")
    monkeypatch.setenv("PDTUNES", str(tmp_path / "music"))
    sheet = score([[note("C5", 32)]]).encode()
    for name, data in {"jig.abc": abc(1), "jig.mid": midi(1), "sheet.musicxml": sheet}.items():
        (tmp_path / name).write_bytes(data)
    np.save(tmp_path / "song.npy", np.random.default_rng(0).standard_normal((3, 128)).astype(np.float16))
    (own,) = re.findall(r"```python\n((?:(?!```).)*def direct.*?)```", CLAMP.read_text(), re.S)
    (tmp_path / "my_recipes.py").write_text(own)
    trial = "--train.samples 32 --train.global-batch 8 --train.chunk 4 --train.warmup-samples 8"
    run_blocks(re.sub(r"pretrain\.py (\S+) ", rf"pretrain.py \1 {trial} ", CLAMP.read_text()), tmp_path, address)
    scores = json.loads((tmp_path / "runs" / "direct" / "evaluation.json").read_text())
    assert {"text->symbolic", "text->notation", "symbolic->notation"} <= scores["retrieval"].keys()
    bridged = json.loads((tmp_path / "runs" / "clamp3" / "repair" / "evaluation.json").read_text())
    assert {"features->symbolic", "symbolic->features"} <= bridged["retrieval"].keys()
    assert (tmp_path / "features" / "train" / "quarantine.jsonl").read_text() == ""
    (part,) = (tmp_path / "tunes").glob("part-*.parquet")
    assert pq.read_table(part).num_rows == 8


@pytest.mark.parametrize("job", ["embed", "search", "export"])
def test_every_option_of_the_page_on_muser_exists(job):
    commands = re.findall(rf"python jobs/{job}\.py((?:\\\n|[^\n`])*)", MUSER.read_text())
    assert commands
    done = subprocess.run(
        [sys.executable, f"jobs/{job}.py", "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for option in re.findall(r"(?<!\S)--[\w.-]+", " ".join(commands)):
        assert option in done.stdout, f"{job} has no {option}"


@pytest.mark.parametrize("page", [PAGE, PAGE.with_name("evaluation.md")], ids=lambda page: page.name)
def test_every_command_of_the_page_names_options_that_exist(page):
    """Also those that need a cluster or a bucket: each option occurs in the help of its job."""
    commands = re.findall(r"python (jobs/\w+\.py) (\w+)((?:\\\n|[^\n`])*)", page.read_text())
    assert commands
    helps: dict[tuple[str, str], str] = {}
    for job, subject, arguments in commands:
        if job == "jobs/finetune.py":
            subject = "tiny"  # in place of a run's folder
        if (job, subject) not in helps:
            done = subprocess.run(
                [sys.executable, job, subject, "--help"], cwd=ROOT, capture_output=True, text=True, check=True
            )
            helps[job, subject] = re.sub(r"-\n\s*|[\s│]+", " ", done.stdout)
        for option in re.findall(r"(?<!\S)--[\w.-]+", arguments):
            assert option in ("--help", "--digest") or option in helps[job, subject], f"{job} {subject} has no {option}"
