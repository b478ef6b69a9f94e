"""The main job through `ray start --head` and `ray job submit`, as a user types them."""

import contextlib
import os
import secrets
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
ENV = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")} | {
    "PATH": f"{BIN}:{os.environ['PATH']}",
    "RAY_AUTH_MODE": "token",  # as the README says; without, a head of Ray 2.60 refuses its own machine's jobs
    "RAY_AUTH_TOKEN": secrets.token_hex(32),
}


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture(scope="module")
def head() -> Iterator[str]:
    """A Ray head node with a dashboard of its own; gives the dashboard's address."""
    dashboard = free_port()
    # Sockets lie in this folder, and their paths may have only 107 characters.
    with tempfile.TemporaryDirectory(prefix="ray", dir="/tmp", ignore_cleanup_errors=True) as temporary:
        command = [BIN / "ray", "start", "--head", "--block", "--num-cpus", "4", "--port", str(free_port())]
        command += [
            "--dashboard-port",
            str(dashboard),
            "--dashboard-agent-listen-port",  # the default may be that of another cluster on this machine
            str(free_port()),
            "--ray-client-server-port",
            str(free_port()),
            "--temp-dir",
            temporary,
        ]
        ray = subprocess.Popen(command, env=ENV, stdout=subprocess.DEVNULL)
        try:
            address = f"http://127.0.0.1:{dashboard}"
            wait_for(lambda: answers(f"{address}/api/version") or ray.poll() is not None)
            assert ray.poll() is None, "ray start failed"
            yield address
        finally:
            # At once: told to end, it would give each of its processes half a minute.
            processes = [*psutil.Process(ray.pid).children(recursive=True), ray]
            for process in processes:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            ray.wait(60)


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5):
            return True
    except urllib.error.HTTPError:
        return True  # it wants Ray's token, which `ray job submit` finds by itself
    except (urllib.error.URLError, OSError):
        return False


def wait_for(event, seconds: float = 90) -> None:
    end = time.monotonic() + seconds
    while not event():
        assert time.monotonic() < end, "it did not come up"
        time.sleep(0.2)


def submit(head: str, *job: str) -> subprocess.CompletedProcess:
    command = [str(BIN / "ray"), "job", "submit", "--address", head, "--working-dir", ".", "--", "python", *job]
    end = time.monotonic() + 60
    while True:
        done = subprocess.run(command, cwd=ROOT, env=ENV, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        # The job agent comes up some seconds after the dashboard that takes the jobs.
        if "No available agent" not in done.stdout or time.monotonic() > end:
            return done
        time.sleep(0.5)


def test_a_job_trains_and_streams_its_log(head, corpus, tmp_path):
    done = submit(
        head,
        "jobs/pretrain.py",
        "tests.small:small_config",
        *("--data.train", f"{corpus}/train-*.tar", "--data.val", f"{corpus}/val-*.tar"),
        *("--storage", str(tmp_path), "--name", "submitted", "--train.workers", "2"),
    )
    assert done.returncode == 0, done.stdout
    assert "Joined the Ray cluster" in done.stdout
    assert "samples        24/24" in done.stdout
    assert "zero-shot" in done.stdout
    assert (tmp_path / "submitted" / "report.html").exists()
    assert (tmp_path / "submitted" / "model" / "model.safetensors").exists()


@pytest.mark.slow
def test_a_submitted_sweep_finds_a_best_trial(head, corpus, tmp_path):
    """Also one whose driver was sent along with the working directory, to a cluster of which nobody told it."""
    (tmp_path / "space.json").write_text('{"model.projection_dim": {"choice": [4, 8]}}')
    options = ["--space", str(tmp_path / "space.json"), "--search", "grid", "--early-stopping", "none"]
    done = submit(
        head,
        "jobs/sweep.py",
        "tests.small:small_config",
        *options,
        *("--data.train", f"{corpus}/train-*.tar", "--data.val", f"{corpus}/val-*.tar", "--data.decode-slots", "1"),
        *("--data.cache-folder", str(tmp_path / "cache"), "--storage", str(tmp_path), "--name", "swept"),
    )
    assert done.returncode == 0, done.stdout
    assert "2 trials at a time" in done.stdout and "[2 finished of 2" in done.stdout
    assert (tmp_path / "swept" / "sweep.html").exists()
    assert (tmp_path / "swept" / "trials" / "001" / "model" / "model.safetensors").exists()
    wrong = submit(head, "jobs/sweep.py", "tests.small:small_config", "--space", "temprature")
    assert wrong.returncode == 1 and "error: space: cannot read temprature" in wrong.stdout


def test_a_job_that_cannot_run_fails_with_one_clear_line(head):
    done = submit(head, "jobs/pretrain.py", "tests.small:small_config", "--data.train", "shards/train-*.tar")
    assert done.returncode == 1  # ray's status for a job that exited with 2
    assert "error: data.train: 'shards/train-*.tar' is a relative path" in done.stdout
