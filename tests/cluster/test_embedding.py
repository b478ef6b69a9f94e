"""jobs/embed.py on Ray: every clip once, whoever dies; on one machine, with GPUs or without."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from muser_dist import Muser
from muser_dist.models.model import MultimodalModel
from muser_dist.muser import save_model
from muser_dist.search import Index
from tests.scores import abc, midi, piece, symbolic_config, write_scores
from tests.shardmaker import encode, sample, tone, write_shard
from tests.small import small_config

ROOT = Path(__file__).parents[2]
ROWS, SHARDS = 60, 8


def song(i):
    return encode(tone(i, 0.4 + 0.5 * (i % 5)))


@pytest.fixture
def music(tmp_path):
    """480 clips of up to 2.4 s in shards, one of each shard broken, and a model."""
    config = small_config()
    save_model(tmp_path / "model", MultimodalModel(config).state_dict(), config)
    for number in range(SHARDS):
        rows = [(f"piece{i:05d}", sample(i) | {"flac": song(i)}) for i in range(ROWS * number, ROWS * (number + 1))]
        rows[7][1]["flac"] = b"no music"
        write_shard(tmp_path / f"music-{number}.tar", rows)
    return tmp_path


TWO_STAGES = """
import sys, ray
from muser_dist.embed import job
ray.init("local", num_cpus=2, num_gpus=1, log_to_driver=False)  # no machine of the tests has a GPU
encoder = job.Encoder
job.Encoder = lambda model, sha256, wanted, device: encoder(model, sha256, wanted, "cpu")
from jobs.embed import job as run
run(sys.argv[1:])
"""


@pytest.mark.slow
def test_a_node_that_dies_takes_no_clip_along_and_a_clip_finds_itself(music):
    out, apart, marks = music / "out", music / "apart", music / "marks"
    marks.mkdir()
    arguments = [str(music / "model"), "--shards", f"{music}/music-*.tar", "--part-rows", "50"]
    arguments += ["--fields", "instrument"]
    died = run("-m", "tests.cluster.dying_embedder", str(marks), *arguments, "--out", str(out))
    assert died.returncode == 0, died.stderr[-5000:]
    assert (marks / "died").exists(), "the node was never killed"
    assert len(list(marks.iterdir())) >= 3  # both nodes worked
    assert "480 rows: 472 embedded; 8 entries in" in died.stdout
    broken = {f"piece{ROWS * number + 7:05d}" for number in range(SHARDS)}
    keys = Counter(key for part in out.glob("part-*.parquet") for key in pq.read_table(part)["key"].to_pylist())
    assert set(keys.values()) == {1}
    assert set(keys) == {f"piece{i:05d}" for i in range(ROWS * SHARDS)} - broken
    assert {json.loads(line)["key"] for line in (out / "quarantine.jsonl").read_text().splitlines()} == broken
    muser, index = Muser.from_pretrained(music / "model"), Index.open(out)
    for i in range(0, ROWS * SHARDS, 37):
        (hit,) = muser.search(song(i), index, k=1)
        assert hit.key == f"piece{i:05d}" and hit.metadata["instrument"] == json.loads(sample(i)["json"])["instrument"]

    # With decoding and encoding apart, as on GPUs, and on one machine, it is the same.
    done = run("-c", TWO_STAGES, *arguments, "--gpu", "--out", str(apart))
    assert done.returncode == 0, done.stderr[-5000:]
    for part in sorted(out.glob("part-*.parquet")):
        mine, theirs = (pq.read_table(path).to_pydict() for path in (part, apart / part.name))
        vectors, others = (np.array(table.pop("audio_embedding")) for table in (mine, theirs))
        np.testing.assert_allclose(vectors, others, atol=1e-6)
        assert mine == theirs
    assert (apart / "quarantine.jsonl").read_text() == (out / "quarantine.jsonl").read_text()
    again = run("jobs/embed.py", *arguments, "--out", str(apart), "--windows", "middle")
    assert again.returncode == 2 and "windows: 'all' there, 'middle' here" in again.stderr


def run(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True)


@pytest.mark.slow
def test_notation_in_shards_and_folders_on_ray_with_and_without_a_gpu(tmp_path):
    """The tower that the model has is the one that embeds: nobody has to say that this is notation."""
    config = symbolic_config(max_patches=8)
    save_model(tmp_path / "model", MultimodalModel(config).state_dict(), config)
    pattern = write_scores(tmp_path, 40)
    write_shard(tmp_path / "train-99999.tar", [("broken", piece(1, "abc") | {"abc": b"no notes"})])
    (tmp_path / "tunes").mkdir()
    for i in range(12):
        (tmp_path / "tunes" / f"{i:02d}.{('abc', 'mid')[i % 2]}").write_bytes((abc, midi)[i % 2](i))
    muser = Muser.from_pretrained(tmp_path / "model")
    shards = [str(tmp_path / "model"), "--shards", pattern, "--fields", "instrument", "--part-rows", "16"]
    done = run("jobs/embed.py", *shards, "--out", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr[-5000:]
    assert "41 rows: 40 embedded; 1 entries in" in done.stdout
    index = Index.open(tmp_path / "out")
    assert index.modalities == ("symbolic",)
    for i in range(0, 40, 7):
        (hit,) = muser.search(abc(i), index, k=1)
        assert hit.score > 0.9999
        found = vector_of(tmp_path / "out", hit.key)
        np.testing.assert_allclose(muser.encode_symbolic([abc(i)])[0] @ found, hit.score, atol=1e-5)
    done = run("-c", TWO_STAGES, *shards, "--gpu", "--out", str(tmp_path / "apart"))
    assert done.returncode == 0, done.stderr[-5000:]
    for part in sorted((tmp_path / "out").glob("part-*.parquet")):
        mine, theirs = (pq.read_table(path).to_pydict() for path in (part, tmp_path / "apart" / part.name))
        np.testing.assert_allclose(mine.pop("symbolic_embedding"), theirs.pop("symbolic_embedding"), atol=1e-6)
        assert mine == theirs
    done = run("jobs/embed.py", shards[0], "--folder", str(tmp_path / "tunes"), "--out", str(tmp_path / "files"))
    assert done.returncode == 0, done.stderr[-5000:]
    found = run("jobs/search.py", str(tmp_path / "files"), shards[0], "медленный вальс", "--k", "3")
    assert found.returncode == 0 and found.stdout.count(".abc") + found.stdout.count(".mid") == 3


def vector_of(folder: Path, key: str) -> np.ndarray:
    """A row's embedding."""
    for part in folder.glob("part-*.parquet"):
        for row in pq.read_table(part).to_pylist():
            if row["key"] == key:
                return np.array(row["symbolic_embedding"])
    raise KeyError(key)
