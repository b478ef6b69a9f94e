"""A Ray cluster of several nodes on this machine: `python cluster/local.py --nodes 3 --cpus 2`.

Each node is a raylet with an object store of its own, so a job runs as it would on as many machines. Everything listens
on the loopback interface only, and clients need Ray's token. It runs until Ctrl-C, and stops what it has started.
"""

import contextlib
import os
import secrets
import signal
import socket
import sys
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from muser_dist.cli import main
from muser_dist.errors import ClusterError, require

_LOOPBACK = "127.0.0.1"


@dataclass(frozen=True)
class Local:
    """Starts a cluster on this machine, with token authentication, and runs until it is interrupted."""

    nodes: int = 3
    """Raylets; the first one is the head."""
    cpus: int = 2
    """Logical CPUs of each node: as many as workers and decoding slots shall run there, whatever the machine has."""
    object_store_mib: int = 512
    """Object store of each node. All lie in /dev/shm, and take memory as they fill."""

    def __post_init__(self) -> None:
        require(self.nodes >= 1, "--nodes must be at least 1")
        require(self.cpus >= 0, "--cpus must not be negative")
        require(self.object_store_mib >= 75, "--object-store-mib must be at least 75, or Ray does not start")


def job(arguments: list[str]) -> None:
    options = tyro.cli(Local, args=arguments, prog="cluster/local.py", description=__doc__)
    token = provide_token()
    # Sockets lie in this folder, and their paths may have only 107 characters.
    with tempfile.TemporaryDirectory(prefix="muser-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        # Read by Ray when it is imported, and handed on to its processes.
        os.environ |= {
            "RAY_AUTH_MODE": "token",
            "RAY_TMPDIR": folder,  # not where a note tells the address of another cluster of this machine
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # all addresses are the loopback interface's, on Linux too
            "RAY_USAGE_STATS_ENABLED": "0",
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",  # the `python` of jobs
        }
        os.environ.pop("RAY_ADDRESS", None)
        run(options, folder, token)


def run(options: Local, folder: str, token: str) -> None:
    """Starts the nodes, says how to use them, and takes them down after a SIGINT or SIGTERM."""
    from ray.cluster_utils import Cluster

    node: dict[str, Any] = {
        "num_cpus": options.cpus,
        "object_store_memory": options.object_store_mib << 20,
        "node_ip_address": _LOOPBACK,
    }
    dashboard = free_port()
    cluster = Cluster()
    try:
        cluster.add_node(
            **node,
            node_name="head",
            include_dashboard=True,
            dashboard_host=_LOOPBACK,
            dashboard_port=dashboard,
            dashboard_agent_listen_port=free_port(),
        )
        for number in range(1, options.nodes):
            cluster.add_node(**node, node_name=f"node-{number}")
        stop = threading.Event()
        for number in (signal.SIGINT, signal.SIGTERM):  # each node has set Ray's own
            signal.signal(number, lambda *_: stop.set())
        print(
            f"{options.nodes} nodes of {options.cpus} CPUs at {cluster.address}; {token}\n\n"
            f"  export RAY_AUTH_MODE=token RAY_ADDRESS=http://{_LOOPBACK}:{dashboard}\n"
            "  ray job submit --working-dir . -- python cluster/preflight.py --storage /tmp/runs\n"
            "  ray job submit --working-dir . -- python jobs/pretrain.py tiny --help\n\n"
            f"Logs are in {folder}/ray/session_latest/logs. Ctrl-C stops the cluster.",
            flush=True,
        )
        stop.wait()
    finally:
        print("stopping", flush=True)
        cluster.shutdown()


def provide_token() -> str:
    """Sees to it that Ray finds a token, where it would look for one; says where, never which."""
    for variable in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        if os.environ.get(variable):
            return f"the token is that of {variable}"
    path = Path.home() / ".ray" / "auth_token"
    # `ray get-auth-token --generate` leaves the file readable for all users of the machine.
    path.parent.mkdir(mode=0o700, exist_ok=True)
    with contextlib.suppress(FileExistsError):
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(secrets.token_hex(32))
        return f"the token was made, in {path}"
    if path.stat().st_mode & 0o077:
        raise ClusterError(f"{path} can be read by other users of this machine; chmod 600 {path}")
    return f"the token is in {path}"


def free_port() -> int:
    """A port of the loopback interface that nobody listens on."""
    with socket.socket() as s:
        s.bind((_LOOPBACK, 0))
        return s.getsockname()[1]


if __name__ == "__main__":
    main(job)
