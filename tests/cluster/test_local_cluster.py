"""cluster/local.py as a user starts it: who has the token may use it, and nobody else."""

import ipaddress
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).parents[2]
PLAIN = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
WRONG = "0" * 64
HERE = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}  # without, Ray looks for 127.0.0.1 under the machine's other address


@dataclass(frozen=True)
class Running:
    """A cluster that cluster/local.py has started."""

    process: subprocess.Popen
    home: Path
    output: str
    gcs: str
    dashboard: str
    logs: Path

    @property
    def token(self) -> str:
        return (self.home / ".ray" / "auth_token").read_text()

    @property
    def client(self) -> dict[str, str]:
        """Environment of a user who has the token."""
        return PLAIN | {"HOME": str(self.home), "RAY_AUTH_MODE": "token", "RAY_ADDRESS": self.dashboard}

    @property
    def stranger(self) -> dict[str, str]:
        """Environment of somebody who knows the address alone."""
        return PLAIN | {"HOME": str(self.home / "elsewhere"), "RAY_ADDRESS": self.dashboard}


@pytest.fixture(scope="module")
def running(tmp_path_factory) -> Iterator[Running]:
    home = tmp_path_factory.mktemp("home")
    command = [sys.executable, "cluster/local.py", "--nodes", "2", "--cpus", "1", "--object-store-mib", "80"]
    with subprocess.Popen(
        command, cwd=ROOT, env=PLAIN | {"HOME": str(home)}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout
        lines = []
        while lines[-1:] != [""] and "Ctrl-C" not in (lines or [""])[-1]:
            lines.append(process.stdout.readline())
        output = "".join(lines)
        try:
            (gcs,) = re.findall(r"2 nodes of 1 CPUs at (\S+);", output)
            (dashboard,) = re.findall(r"RAY_ADDRESS=(\S+)", output)
            (logs,) = re.findall(r"Logs are in (\S+)\.", output)
            yield Running(process, home, output, gcs, dashboard, Path(logs).resolve())
        finally:
            process.send_signal(signal.SIGTERM)
            process.communicate(timeout=60)


def status(url: str, token: str | None = None) -> int:
    """The HTTP status of a request, with a token or without."""
    headers = {} if token is None else {"Authorization": f"Bearer {token}"}
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=10) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code


def run(*command: str, env: dict[str, str], seconds: float = 60) -> subprocess.CompletedProcess:
    path = {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    return subprocess.run(command, cwd=ROOT, env=env | path, capture_output=True, text=True, timeout=seconds)


def test_a_client_without_the_token_is_refused(running):
    assert status(f"{running.dashboard}/api/jobs/", running.token) == 200
    assert status(f"{running.dashboard}/api/jobs/") == 401
    assert status(f"{running.dashboard}/api/jobs/", WRONG) == 403
    for env in (running.stranger, running.stranger | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": WRONG}):
        refused = run("ray", "job", "submit", "--", "touch", str(running.home / "intruder"), env=env)
        assert refused.returncode != 0
        assert "authentication" in (refused.stdout + refused.stderr).lower()
    assert not (running.home / "intruder").exists()


def test_a_driver_needs_the_token(running):
    code = f"import ray; ray.init('{running.gcs}', log_to_driver=False); print('nodes', len(ray.nodes()))"
    assert "nodes 2" in run(sys.executable, "-c", code, env=running.client | HERE).stdout
    preflight = [sys.executable, "cluster/preflight.py", "--storage", "/tmp/runs", "--address", running.gcs]
    # Ray refuses to try without any token, and tries without end with a wrong one.
    for mode in ({"RAY_AUTH_MODE": "token"}, {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": WRONG}):
        done = run(*preflight, "--timeout", "4", env=running.stranger | HERE | mode, seconds=30)
        assert done.returncode == 2, done.stdout + done.stderr
        assert done.stderr.splitlines()[-1].startswith("error: ") and "token" in done.stderr, done.stderr
        assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_preflight_as_a_job_finds_nothing_broken(running, tmp_path):
    """Also the storage: all nodes write and read there, and leave nothing behind."""
    preflight = ["python", "cluster/preflight.py", "--storage", str(tmp_path / "runs"), "--json", str(tmp_path / "out")]
    submit = ["ray", "job", "submit", "--working-dir", ".", "--", *preflight]
    end = time.monotonic() + 60
    while True:
        done = run(*submit, env=running.client, seconds=120)
        # The job agent comes up some seconds after the dashboard that takes the jobs.
        if "No available agent" not in done.stdout or time.monotonic() > end:
            break
        time.sleep(0.5)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "out").read_text())
    assert len(report["nodes"]) == 2
    verdicts = {finding["check"]: finding["verdict"] for finding in report["findings"]}
    assert "broken" not in verdicts.values() and verdicts["storage"] == verdicts["versions"] == "ok"
    assert list((tmp_path / "runs").iterdir()) == []


def test_the_token_is_the_users_alone_and_in_no_output_or_log(running):
    file = running.home / ".ray" / "auth_token"
    assert file.stat().st_mode & 0o777 == 0o600 and len(running.token) >= 32
    assert running.token not in running.output
    logs = [log for log in running.logs.rglob("*") if log.is_file()]
    assert any(log.name.startswith("raylet") for log in logs)
    for log in logs:
        assert running.token.encode() not in log.read_bytes(), log


def test_nothing_listens_beyond_this_machine(running):
    processes = [running.process, *psutil.Process(running.process.pid).children(recursive=True)]
    ports = {
        (connection.laddr.ip, connection.laddr.port)
        for process in processes
        for connection in psutil.Process(process.pid).net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN
    }
    assert int(running.dashboard.rpartition(":")[2]) in {port for _, port in ports}
    assert all(ipaddress.ip_address(ip.removeprefix("::ffff:")).is_loopback for ip, _ in ports), ports


def test_it_stops_what_it_has_started(running):
    """The last test of this module: the cluster is gone afterwards."""
    children = psutil.Process(running.process.pid).children(recursive=True)
    assert len(children) > 4
    running.process.send_signal(signal.SIGTERM)
    assert running.process.wait(60) == 0
    _, alive = psutil.wait_procs(children, timeout=10)
    assert alive == []
    assert not running.logs.exists()
