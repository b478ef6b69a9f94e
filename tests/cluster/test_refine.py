"""jobs/refine_text.py on Ray: killed amid the work it goes on, and pays once; the commands of docs/refine.md."""

import json
import os
import re
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
import ray
from ray.cluster_utils import Cluster

from tests.refine.stand_in import stand_in
from tests.shardmaker import sample, write_shard

ROOT = Path(__file__).parents[2]
ROWS, SHARDS = 15, 4
KEY = "sk-very-secret"


@pytest.fixture
def music(tmp_path):
    """60 items in shards; the metadata of one of each shard is broken."""
    for number in range(SHARDS):
        rows = [(f"piece{i:03d}", sample(i, title=f"item-{i:03d}")) for i in range(ROWS * number, ROWS * (number + 1))]
        rows[7][1]["json"] = b"{"
        write_shard(tmp_path / "DATA" / f"train-{number:05d}.tar", rows)
    return tmp_path


@pytest.fixture
def two_nodes(monkeypatch):
    """The address of a cluster of two raylets that work, and a head that does not."""
    if ray.is_initialized():
        ray.shutdown()
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    cluster.add_node(num_cpus=1)
    cluster.add_node(num_cpus=1)
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("LANGUAGE_MODEL_KEY", KEY)
    yield
    cluster.shutdown()


def command(music: Path, url: str, *more: str) -> list[str]:
    return [
        *(sys.executable, "jobs/refine_text.py", "--shards", f"{music}/DATA/*.tar", "--out", f"{music}/out"),
        *("--endpoint", url, "--model", "small", "--price-in", "2", "--price-out", "8", "--concurrency", "4"),
        *("--languages", "fr", "ru", "ja", "--key-variable", "LANGUAGE_MODEL_KEY", *more),
    ]


def run(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_a_job_that_is_killed_goes_on_and_pays_for_each_item_once(music, two_nodes):
    def schedule(item: str, before: int) -> str:
        time.sleep(0.05)  # as a model that takes a while, so that the job is killed amid the work
        return {"item-003": "nonsense", "item-020": "wrong_language"}.get(item, "good")

    with stand_in(schedule) as server:
        dry = run(*command(music, server.url, "--max-cost", "0"))
        assert dry.returncode == 0, dry.stderr[-5000:]
        assert "60 rows: 0 refined, 4 quarantined, 56 left" in dry.stdout and "at most; raise --max-cost" in dry.stdout
        assert not server.asked and not list((music / "out").glob("*.tar"))

        killed = subprocess.Popen(command(music, server.url, "--max-cost", "5"), cwd=ROOT, stderr=subprocess.DEVNULL)
        assert server.wait_until_asked(20, seconds=120)
        killed.kill()
        killed.wait()
        before = server.asked.total()
        assert before < 56

        done = run(*command(music, server.url, "--max-cost", "5"))
        assert done.returncode == 0, done.stderr[-5000:]
        assert "60 rows: 54 refined, 6 quarantined, 0 left" in done.stdout
        assert set(server.asked) == {f"item-{i:03d}" for i in range(60) if i % ROWS != 7}
        assert sum(count - 1 for count in server.asked.values()) <= 4 and max(server.asked.values()) <= 2
        report = json.loads((music / "out" / "report.json").read_text())
        assert server.charged / 10**12 <= report["spending"]["cost"] <= 5
        assert set(server.authorizations) == {f"Bearer {KEY}"}

        asked = server.asked.total()
        again = run(*command(music, server.url, "--max-cost", "5"))
        assert again.returncode == 0 and server.asked.total() == asked
        other = run(*command(music, server.url, "--max-cost", "5", "--fields", "title"))
        assert other.returncode == 2 and "fields differ" in other.stderr
    reasons = {p["key"]: p["reason"] for p in map(json.loads, (music / "out" / "quarantine.jsonl").open())}
    assert set(reasons) == {"piece003", "piece020", "piece007", "piece022", "piece037", "piece052"}
    for shard in (music / "out").glob("*.tar"):
        with tarfile.open(shard) as tar:
            for info in tar:
                if info.name.endswith(".json") and info.name.removesuffix(".json") not in reasons:
                    assert "summary_nen" in json.load(tar.extractfile(info))
    index = json.loads((music / "out" / "muser-index.json").read_text())
    assert index["rows"] == {f"train-{number:05d}.tar": ROWS for number in range(SHARDS)}
    for file in (music / "out").rglob("*"):
        assert not file.is_file() or KEY.encode() not in file.read_bytes(), file
    assert all(KEY not in told for told in (dry.stderr, done.stdout, done.stderr, again.stderr))


@pytest.mark.slow
def test_the_commands_of_the_page(music, two_nodes):
    page = (ROOT / "docs" / "refine.md").read_text()
    (music / "jobs").symlink_to(ROOT / "jobs")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    with stand_in() as server:
        for block in re.findall(r"```bash\n(.*?)```", page, re.S):
            block = block.replace("http://localhost:8000/v1", server.url)
            few = (
                "--train.workers 1 --train.samples 32 --train.global-batch 16 --train.chunk 8 --train.warmup-samples 8"
            )
            block = block.replace("--train.samples 512 --train.warmup-samples 128", few)
            done = subprocess.run(
                ["bash", "-euc", block],
                cwd=music,
                env={**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
                capture_output=True,
                text=True,
            )
            assert done.returncode == 0, f"{block}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
        assert server.asked.total() == 56
    assert len(list((music / "refined").glob("train-*.tar"))) == SHARDS
    assert list((music / "runs").glob("*/model/model.safetensors"))
