"""cluster/preflight.py on a cluster of two raylets with planted faults."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

import preflight
from preflight import Finding, Preflight
from probe import Probe

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def address(tmp_path_factory) -> Iterator[str]:
    """A cluster with a node whose muser_dist is another version, and whose object store is tiny."""
    other = tmp_path_factory.mktemp("other")
    shutil.copytree(ROOT / "muser_dist", other / "muser_dist", ignore=shutil.ignore_patterns("__pycache__"))
    init = other / "muser_dist" / "__init__.py"
    init.write_text(init.read_text().replace('__version__ = "', '__version__ = "99.'))
    command = [sys.executable, "-m", "tests.cluster.faulty_cluster", str(other)]
    with subprocess.Popen(
        command, cwd=ROOT, env=without_ray(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as cluster:
        assert cluster.stdin and cluster.stdout
        yield cluster.stdout.readline().strip()
        cluster.stdin.close()


def without_ray() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}


def check(address: str, folder: Path, *arguments: str) -> tuple[subprocess.CompletedProcess, dict[str, dict]]:
    """Runs the command as a user would; gives it and its findings by check."""
    report = folder / "report.json"
    command = [sys.executable, ROOT / "cluster" / "preflight.py", "--address", address, "--json", report, *arguments]
    # Not in the checkout: Ray puts a driver's working directory before all else on the path of its workers.
    # Nor with what a Ray of the tests' own process has set in its environment.
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=without_ray())
    assert report.exists(), done.stdout + done.stderr
    return done, {finding["check"]: finding for finding in json.loads(report.read_text())["findings"]}


def test_it_finds_a_version_mismatch_unwritable_storage_and_a_tiny_object_store(address, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    # A busy machine may take more than the usual minute to start a worker: who stays silent is another test's matter.
    options = ("--buffer-mib", "256", "--timeout", "300")
    done, findings = check(address, tmp_path, "--storage", str(tmp_path / "file" / "runs"), *options)
    assert done.returncode == 1, done.stdout + done.stderr
    versions, storage, store = findings["versions"], findings["storage"], findings["object store"]
    assert versions["verdict"] == "broken"
    assert "muser_dist" in versions["what"] and "99.0" in versions["what"] and "torch" not in versions["what"]
    assert storage["verdict"] == "broken"
    assert storage["what"].count("NotADirectoryError") == 2  # of both nodes
    assert store["verdict"] == "will hurt"
    assert "faulty" in store["what"] and "0.08 GiB" in store["what"] and "sound" not in store["what"]
    for finding in (versions, storage, store):
        assert f"{finding['verdict']:<10} {finding['check']}" in done.stdout and finding["mend"] in done.stdout
    # What is sound is not complained of.
    assert findings["nodes"]["verdict"] == findings["GPUs"]["verdict"] == findings["decoding"]["verdict"] == "ok"
    assert findings["collective"]["verdict"] != "broken" and "gloo" in findings["collective"]["what"]


@pytest.mark.slow
def test_a_node_that_hangs_is_named_and_the_others_are_checked(address, tmp_path):
    (raylet,) = (p for p in psutil.Process().children(recursive=True) if "--node-name=faulty" in p.cmdline())
    raylet.suspend()
    try:
        done, findings = check(address, tmp_path, "--storage", str(tmp_path / "runs"), "--timeout", "15")
    finally:
        raylet.resume()
    assert done.returncode == 1
    assert findings["nodes"]["verdict"] == "broken"
    assert "faulty" in findings["nodes"]["what"] and "no answer in 15 s" in findings["nodes"]["what"]
    assert "sound" not in findings["nodes"]["what"]
    assert findings["storage"]["verdict"] == findings["versions"]["verdict"] == "ok"


# --- The verdicts, on nodes that a test makes up ---


class MadeUp:
    """Nodes in this process: what they report, and probes to ask."""

    def __init__(self, reports: dict[str, dict], probes: dict[str, Probe] | None = None) -> None:
        healthy = {"slots": 8.0, "cpus": 8.0, "ray_gpus": 0, "gpus": 0, "object_store": 8 << 30, "shm": 8 << 30}
        self.reports = {name: healthy | report for name, report in reports.items()}
        self.answering = self.reports
        self.probes = probes or {}

    def ask(self, method, arguments=lambda name: (), among=None):
        names = self.probes if among is None else among
        return {name: getattr(self.probes[name], method)(*arguments(name)) for name in names}, {}


class Elsewhere(Probe):
    """A probe on a node that has another folder under the same path."""

    def write(self, path, size, seed):
        return super().write(path.replace("/runs/", "/elsewhere/"), size, seed)

    def read(self, files, size):
        here = {path.replace("/runs/", "/elsewhere/"): path for path in files}
        wrong = super().read({path: files[there] for path, there in here.items()}, size)
        return {here[path]: reason for path, reason in wrong.items()}


class Decoding(Probe):
    def decode(self, seconds):
        return 100.0


def test_a_folder_that_each_node_has_for_itself_is_no_storage(tmp_path):
    options = Preflight(storage=tmp_path / "runs")
    shared = preflight.check_storage(MadeUp({"a": {}, "b": {}}, {"a": Probe(), "b": Probe()}), options)
    assert shared.verdict == "ok"
    apart = preflight.check_storage(MadeUp({"a": {}, "b": {}}, {"a": Probe(), "b": Elsewhere()}), options)
    assert apart.verdict == "broken"
    assert "a: does not see what b has written" in apart.what and "FileNotFoundError" in apart.what


@pytest.mark.parametrize(
    ("check", "report", "verdict", "says"),
    [
        ("gpus", {"ray_gpus": 2, "gpus": 1}, "broken", "b: Ray has 2, torch sees 1"),
        ("gpus", {"ray_gpus": 1, "gpus": 2}, "will hurt", "b: Ray has 1, torch sees 2"),
        ("gpus", {"ray_gpus": 2, "gpus": 2}, "ok", "2 on 1 nodes"),
        ("cpus", {"slots": 16.0}, "will hurt", "b: 16 logical CPUs on 8"),
        ("shared_memory", {"shm": 64 << 20}, "will hurt", "b: 0.06 GiB for an object store of 8.00 GiB"),
        ("object_store", {"object_store": 1 << 30}, "will hurt", "b: 1.00 GiB of the"),
        ("object_store", {"object_store": 1 << 30, "slots": 0.0}, "ok", "on each node"),
        # 8 cores of the one node and 6 of the other, whose 2 GPUs' workers take a CPU each, at 100 clips a second.
        ("decoding", {"ray_gpus": 2}, "will hurt", "1400 clips/s on 14.0 cores"),
        ("decoding", {"ray_gpus": 1}, "ok", "1500 clips/s on 15.0 cores"),
    ],
)
def test_verdicts(check: str, report: dict, verdict: str, says: str):
    nodes = MadeUp({"a": {}, "b": report}, {"a": Decoding(), "b": Decoding()})
    options = Preflight(storage=Path("/runs"), clips_per_gpu=1000.0)
    finding: Finding = getattr(preflight, f"check_{check}")(nodes, options)
    assert finding.verdict == verdict and says in finding.what
    assert bool(finding.mend) == (verdict != "ok")


def test_a_relative_storage_is_refused(tmp_path):
    command = [sys.executable, ROOT / "cluster" / "preflight.py", "--storage", "runs"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and "error: --storage: runs is a relative path" in done.stderr
