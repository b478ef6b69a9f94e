"""Checks a Ray cluster before a run: `python cluster/preflight.py --storage /shared/runs`.

A process on each node looks around, writes to the storage and reads what the others wrote, decodes, and joins in an
all-reduce. It takes about a minute and no CPU or GPU slot; a node that does not answer is named. What is broken or will
hurt comes with what to change. The exit status is 0 when nothing is broken, 1 when something is, 2 when the cluster
cannot be joined. Sent along with `ray job submit --working-dir .`, it sees the code that a run would see.
"""

import contextlib
import hashlib
import json
import os
import platform
import re
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from muser_dist.cli import main
from muser_dist.config import TrainConfig
from muser_dist.data.config import DataConfig
from muser_dist.errors import ClusterError, ConfigError

GIGABIT = 0.125
"""GB/s of an Ethernet of a gigabit: a slower all-reduce holds up every step."""

BLOCK_BYTES = TrainConfig.chunk * DataConfig().crop_samples * 2
"""A decoded chunk at the default settings, int16."""


@dataclass(frozen=True)
class Preflight:
    """Checks a Ray cluster before a run; says what is broken, what will hurt, and what to change."""

    storage: Path
    """The run's --storage: an absolute path, under which every node must see the same folder."""
    address: str = "auto"
    """Address of the cluster; "auto" takes RAY_ADDRESS, or the cluster that runs on this machine."""
    buffer_mib: int = DataConfig.buffer_mib
    """The run's data.buffer_mib: decoded chunks that may lie in the object store."""
    clips_per_gpu: float = 256.0
    """Clips that a GPU trains on in a second; metrics.jsonl of a trial says it for your model."""
    timeout: float = 60.0
    """Seconds after which a node that has not answered counts as hanging, at each of the checks."""
    json: Annotated[Path | None, tyro.conf.arg(name="json")] = None
    """File to write the findings and all that nodes reported to."""


@dataclass(frozen=True)
class Finding:
    """The result of one check."""

    check: str
    verdict: Literal["ok", "will hurt", "broken"]
    what: str
    mend: str = ""

    def __str__(self) -> str:
        return f"{self.verdict:<10} {self.check:<16} {self.what}" + (f"\n{'':<27} -> {self.mend}" if self.mend else "")


def job(arguments: list[str]) -> None:
    options = tyro.cli(Preflight, args=arguments, prog="cluster/preflight.py", description=__doc__)
    if not options.storage.is_absolute():
        raise ConfigError(f"--storage: {options.storage} is a relative path; each node would look for it elsewhere")
    connect(options.address, options.timeout)
    nodes = Nodes(options.timeout)
    findings = []
    for check in CHECKS:
        findings.append(check(nodes, options))
        print(findings[-1], flush=True)
    if options.json:
        report = {"findings": [asdict(finding) for finding in findings], "nodes": nodes.reports}
        options.json.write_text(json.dumps(report, indent=2))
    sys.exit(any(finding.verdict == "broken" for finding in findings))


def connect(address: str, seconds: float) -> None:
    """Joins the cluster. Ray tries without end where a token is missing or wrong: after so long the process exits.

    Raises:
        ClusterError: there is no cluster, or Ray refuses to try.
    """
    import ray

    advice = "is it running, and is the token right (RAY_AUTH_MODE=token with RAY_AUTH_TOKEN or ~/.ray/auth_token)?"
    where = os.environ.get("RAY_ADDRESS", address) if address == "auto" else address

    def give_up() -> None:
        print(
            f"error: the Ray cluster ({where}) has let nobody in for {seconds:g} s; {advice}",
            file=sys.stderr,
            flush=True,
        )
        os._exit(2)

    timer = threading.Timer(seconds, give_up)
    timer.daemon = True
    timer.start()
    try:
        ray.init(address, logging_level="ERROR", log_to_driver=False)
    except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        reason = re.split(r"\.?\s*\n|\. ", str(error).strip(), maxsplit=1)[0]
        raise ClusterError(f"cannot join the Ray cluster ({where}): {reason}; {advice}") from None
    finally:
        timer.cancel()


# --- What runs on the nodes; sent along by value, since nodes need not have this file ---


class Probe:
    """An actor on one node. What it returns is plain data, errors too."""

    def look(self) -> dict[str, Any]:
        """Versions, and what the machine has."""
        versions = {"python": platform.python_version()}
        for package in ("ray", "torch", "deepspeed", "muser_dist"):
            versions[package] = version_of(package)
        shm = os.statvfs("/dev/shm")
        return {
            "host": socket.gethostname(),
            "versions": versions,
            "cpus": usable_cpus(),
            "memory": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
            "shm": shm.f_blocks * shm.f_frsize,
            "gpus": count_gpus(),
        }

    def write(self, path: str, size: int, seed: str) -> str | float:
        """Writes a file into a folder that is made when missing; MB/s or why it cannot be written."""
        start = time.perf_counter()
        try:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            with open(path, "wb") as file:
                file.write(content(size, seed))
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            return f"{type(error).__name__}: {error.strerror}"
        return size / 1e6 / (time.perf_counter() - start)

    def read(self, files: dict[str, str], size: int) -> dict[str, str]:
        """Reads files of given seeds; of those that are not what was written, what is wrong."""
        wrong = {}
        for path, seed in files.items():
            try:
                if Path(path).read_bytes() != content(size, seed):
                    wrong[path] = "has another content"
            except OSError as error:
                wrong[path] = f"{type(error).__name__}: {error.strerror}"
        return wrong

    def remove(self, path: str) -> None:
        """Removes a file, and its folder when that is empty then."""
        with contextlib.suppress(OSError):
            os.unlink(path)
        with contextlib.suppress(OSError):
            os.rmdir(os.path.dirname(path))

    def decode(self, seconds: float) -> float:
        """Clips a second that one core decodes: random crops of a piece of half a minute, as mp3."""
        import io
        import random

        import soundfile

        from muser_dist.data.audio import decode
        from muser_dist.data.config import DataConfig  # a node without it can still say so
        from muser_dist.data.corpora.demo import compose
        from muser_dist.data.decoder import keep_freed_memory

        keep_freed_memory()  # as decoding slots do
        config, encoded = DataConfig(), io.BytesIO()
        waveform, rate, _ = compose(seed=0, index=0, seconds=30.0)
        soundfile.write(encoded, waveform, rate, format="MP3")
        clips, start = 0, time.perf_counter()
        while (passed := time.perf_counter() - start) < seconds:
            decode(encoded.getvalue(), config, random.random())
            clips += 1
        return clips / passed

    def listen(self) -> int:
        """A port that nobody uses."""
        with socket.socket() as s:
            s.bind(("", 0))
            return s.getsockname()[1]

    def all_reduce(self, rank: int, world: int, address: str, backend: str, size: int, seconds: float) -> float:
        """Seconds of the fastest of four all-reduces of so many bytes."""
        from datetime import timedelta

        import torch
        import torch.distributed as dist

        dist.init_process_group(
            backend, f"tcp://{address}", rank=rank, world_size=world, timeout=timedelta(seconds=seconds)
        )
        device = "cuda:0" if backend == "nccl" else "cpu"
        values, times = torch.ones(size // 4, device=device), []
        for _ in range(4):
            dist.barrier()
            start = time.perf_counter()
            dist.all_reduce(values)
            values[0].item()  # waits for the device
            times.append(time.perf_counter() - start)
        dist.destroy_process_group()
        return min(times)


def version_of(package: str) -> str:
    """The version that an import would get, "missing" where there is none; of muser_dist, of its code too."""
    from importlib import import_module
    from importlib.metadata import PackageNotFoundError, version

    try:
        if package != "muser_dist":
            return version(package)
        module = import_module(package)
    except (PackageNotFoundError, ImportError):
        return "missing"
    folder, code = Path(str(module.__file__)).parent, hashlib.sha256()
    for file in sorted(folder.rglob("*.py")):
        code.update(str(file.relative_to(folder)).encode() + file.read_bytes())
    return f"{module.__version__} (code {code.hexdigest()[:8]})"


def usable_cpus() -> float:
    """CPUs that this process may use: the machine's, or what a container is given of them."""
    cpus = float(len(os.sched_getaffinity(0)))
    with contextlib.suppress(OSError, ValueError):
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        cpus = min(cpus, int(quota) / int(period))  # quota may be "max"
    return cpus


def count_gpus() -> int:
    """GPUs that torch sees."""
    try:
        import torch
    except ImportError:
        return 0
    return torch.cuda.device_count()


def content(size: int, seed: str) -> bytes:
    """Bytes that only their seed tells."""
    return hashlib.shake_256(seed.encode()).digest(size)


# --- Asking them ---


class Nodes:
    """The cluster's nodes that are alive, with a probe on each.

    Attributes:
        reports: what is known of each node, by its name: Ray's resources, and what its probe has said.
    """

    def __init__(self, timeout: float) -> None:
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        self.timeout = timeout
        self.reports: dict[str, dict[str, Any]] = {}
        self._probes = {}
        for node in ray.nodes():
            if not node["Alive"]:
                continue
            name = f"{node['NodeName']} ({node['NodeID'][:6]})"
            resources = node["Resources"]
            self.reports[name] = {
                "ip": node["NodeManagerAddress"],
                "slots": resources.get("CPU", 0.0),
                "ray_gpus": int(resources.get("GPU", 0)),
                "object_store": int(resources.get("object_store_memory", 0)),
            }
            here = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            probe = ray.remote(Probe).options(num_cpus=0, scheduling_strategy=here, max_restarts=0)
            self._probes[name] = probe.remote()

    def ask(
        self,
        method: str,
        arguments: Callable[[str], Iterable[Any]] = lambda name: (),
        among: Iterable[str] | None = None,
    ) -> tuple[dict[str, Any], dict[str, str]]:
        """Calls a method of all probes at once, with arguments that depend on the node's name.

        Returns:
            answers by node; and why there is none from the others, which are not asked again: they may hang.
        """
        import ray

        names = [name for name in (self._probes if among is None else among) if name in self._probes]
        calls = {getattr(self._probes[name], method).remote(*arguments(name)): name for name in names}
        done, hanging = ray.wait(list(calls), num_returns=len(calls), timeout=self.timeout) if calls else ([], [])
        answers, failures = {}, {calls[call]: f"no answer in {self.timeout:g} s" for call in hanging}
        for call in done:
            try:
                answers[calls[call]] = ray.get(call)
            except ray.exceptions.RayError as error:
                failures[calls[call]] = str(error).strip().splitlines()[-1]
        for name in failures:
            del self._probes[name]
        return answers, failures

    @property
    def answering(self) -> dict[str, dict[str, Any]]:
        """Reports of the nodes whose probe has answered so far."""
        return {name: report for name, report in self.reports.items() if name in self._probes}


# --- The checks, in the order in which they are made ---


def check_nodes(nodes: Nodes, options: Preflight) -> Finding:
    answers, failures = nodes.ask("look")
    hosts = Counter(answer["host"] for answer in answers.values())
    for name, answer in answers.items():
        for shared in ("cpus", "memory", "shm"):  # nodes of one host have them together
            answer[shared] /= hosts[answer["host"]]
        nodes.reports[name] |= answer
    if failures:
        return Finding("nodes", "broken", listed(failures), "restart Ray there, or take the node out of the cluster")
    sizes = {
        name: f"{report['slots']:g} CPUs, {report['ray_gpus']} GPUs, {gib(report['memory'])}"
        for name, report in nodes.answering.items()
    }
    return Finding("nodes", "ok", listed(sizes))


def check_versions(nodes: Nodes, options: Preflight) -> Finding:
    versions = {name: report["versions"] for name, report in nodes.answering.items()}
    packages = sorted({package for found in versions.values() for package in found})
    differing = []
    for package in packages:
        holders: dict[str, list[str]] = {}
        for name, found in versions.items():
            holders.setdefault(found[package], []).append(name)
        if len(holders) > 1 or "missing" in holders:
            differing.append(f"{package} " + ", ".join(f"{v} on {' and '.join(held)}" for v, held in holders.items()))
    if differing:
        mend = "start all nodes from one image (cluster/Dockerfile) or environment (make .venv)"
        return Finding("versions", "broken", "; ".join(differing), mend)
    same = next(iter(versions.values()), {})
    return Finding("versions", "ok", ", ".join(f"{package} {same[package]}" for package in packages))


def check_storage(nodes: Nodes, options: Preflight) -> Finding:
    """Every node writes a file and reads those of all others: so it is one folder, not many of one name."""
    size, run = 8 << 20, f"preflight-{os.getpid()}-{time.time_ns()}"
    paths = {name: str(options.storage / run / f"{number}.bin") for number, name in enumerate(nodes.answering)}
    written, failures = nodes.ask("write", lambda name: (paths[name], size, name))
    speeds = {name: answer for name, answer in written.items() if not isinstance(answer, str)}
    problems = failures | {name: f"cannot write: {answer}" for name, answer in written.items() if name not in speeds}
    wrong, failures = nodes.ask("read", lambda name: ({paths[other]: other for other in speeds}, size))
    writer = {path: name for name, path in paths.items()}
    for name, files in wrong.items():
        for path, reason in files.items():
            problems.setdefault(name, f"does not see what {writer[path]} has written ({reason})")
    nodes.ask("remove", lambda name: (paths[name],), among=speeds)
    problems |= failures
    if problems:
        mend = (
            "give a --storage that is mounted and writable on every node under this path (NFS, a cloud's file system)"
        )
        return Finding("storage", "broken", f"{options.storage}: {listed(problems)}", mend)
    slowest = min(speeds, key=speeds.__getitem__)
    what = f"{options.storage} is one folder on all nodes; slowest write {speeds[slowest]:.0f} MB/s, of {slowest}"
    return Finding("storage", "ok", what)


def check_gpus(nodes: Nodes, options: Preflight) -> Finding:
    counts = {name: (report["ray_gpus"], report["gpus"]) for name, report in nodes.answering.items()}
    differing = {name: f"Ray has {ray}, torch sees {torch}" for name, (ray, torch) in counts.items() if ray != torch}
    if not differing:
        total = sum(torch for _, torch in counts.values())
        return Finding("GPUs", "ok", f"{total} on {sum(torch > 0 for _, torch in counts.values())} nodes")
    if any(torch < ray for ray, torch in counts.values()):
        mend = "mend driver and container runtime there (nvidia-smi must work in the container), or declare fewer GPUs"
        return Finding("GPUs", "broken", listed(differing), mend)
    return Finding(
        "GPUs", "will hurt", listed(differing), "start Ray with all GPUs (ray start --num-gpus N): they lie idle"
    )


def check_cpus(nodes: Nodes, options: Preflight) -> Finding:
    crowded = {
        name: f"{report['slots']:g} logical CPUs on {report['cpus']:g}"
        for name, report in nodes.answering.items()
        if report["slots"] > 1.5 * report["cpus"]
    }
    if crowded:
        mend = "declare as many as there are (ray start --num-cpus N): slots and workers take turns"
        return Finding("CPUs", "will hurt", listed(crowded), mend)
    return Finding("CPUs", "ok", "no node has far more logical CPUs than it can use")


def check_decoding(nodes: Nodes, options: Preflight) -> Finding:
    """A GPU's worker takes one CPU; all others decode, as far as there are cores for them."""
    decoders = {name: report["slots"] - report["ray_gpus"] for name, report in nodes.answering.items()}
    decoders = {name: min(slots, nodes.reports[name]["cpus"]) for name, slots in decoders.items() if slots > 0}
    rates, failures = nodes.ask("decode", lambda name: (2.0,), among=decoders)
    if failures:
        return Finding("decoding", "broken", listed(failures), "mend the environment there (make .venv)")
    if not rates:
        mend = "add nodes, or declare more logical CPUs (ray start --num-cpus N)"
        return Finding("decoding", "broken", "no logical CPU is left to decode", mend)
    for name, rate in rates.items():
        nodes.reports[name]["clips_per_core"] = rate
    supply = sum(rate * decoders[name] for name, rate in rates.items())
    demand = options.clips_per_gpu * sum(report["ray_gpus"] for report in nodes.answering.values())
    slowest = min(rates, key=rates.__getitem__)
    what = (
        f"{supply:.0f} clips/s on {sum(decoders.values()):.1f} cores; slowest {rates[slowest]:.0f} a core, of {slowest}"
    )
    if supply < demand:
        missing = (demand - supply) / (supply / sum(decoders.values()))
        what += f"; GPUs take {demand:.0f} (--clips-per-gpu {options.clips_per_gpu:g})"
        return Finding("decoding", "will hurt", what, f"add {missing:.0f} CPUs that decode, or GPUs will wait for data")
    return Finding("decoding", "ok", what)


def check_object_store(nodes: Nodes, options: Preflight) -> Finding:
    """Each node that decodes may get to hold the run's whole buffer, and three blocks for each of its slots."""
    small = {}
    for name, report in nodes.answering.items():
        needed = (options.buffer_mib << 20) + 3 * int(report["slots"]) * BLOCK_BYTES
        if report["slots"] and report["object_store"] < needed:
            small[name] = f"{gib(report['object_store'])} of the {gib(needed)} that data.buffer_mib and blocks may take"
    if small:
        mend = (
            "start Ray with a larger one (--object-store-memory BYTES), or lower --data.buffer-mib: it spills to disk"
        )
        return Finding("object store", "will hurt", listed(small), mend)
    return Finding("object store", "ok", f"holds data.buffer_mib ({options.buffer_mib} MiB) and blocks on each node")


def check_shared_memory(nodes: Nodes, options: Preflight) -> Finding:
    small = {
        name: f"{gib(report['shm'])} for an object store of {gib(report['object_store'])}"
        for name, report in nodes.answering.items()
        if report["shm"] < report["object_store"]
    }
    if small:
        mend = (
            "enlarge /dev/shm (emptyDir of medium Memory, docker --shm-size); Ray puts the store on the disk otherwise"
        )
        return Finding("/dev/shm", "will hurt", listed(small), mend)
    return Finding("/dev/shm", "ok", "holds the object store on each node")


def check_collective(nodes: Nodes, options: Preflight) -> Finding:
    """One worker on each node with GPUs, or on each node where there are none: 64 MiB, as gradients travel."""
    with_gpus = [name for name, report in nodes.answering.items() if report["gpus"]]
    members = with_gpus or list(nodes.answering)
    backend, size, world = "nccl" if with_gpus else "gloo", 64 << 20, len(members)
    if world < 2:
        return Finding("collective", "ok", "one node: nothing travels between nodes")
    ports, failures = nodes.ask("listen", among=members[:1])
    if not failures:
        address = f"{nodes.reports[members[0]]['ip']}:{ports[members[0]]}"
        patience = options.timeout / 2  # so that those who wait for a silent one can still say so
        rank = {name: number for number, name in enumerate(members)}
        arguments = lambda name: (rank[name], world, address, backend, size, patience)  # noqa: E731
        times, failures = nodes.ask("all_reduce", arguments, among=members)
    if failures:
        mend = "open all ports between nodes; where they have several networks, name one (GLOO_, NCCL_SOCKET_IFNAME)"
        return Finding("collective", "broken", f"{backend}: {listed(failures)}", mend)
    rate = 2 * (world - 1) / world * size / max(times.values()) / 1e9
    what = f"{backend} all-reduce over {world} nodes moves {rate:.2f} GB/s"
    if rate < GIGABIT:
        mend = f"use a network faster than {GIGABIT} GB/s, or larger global batches: gradients travel in every step"
        return Finding("collective", "will hurt", what, mend)
    return Finding("collective", "ok", what)


CHECKS = (
    check_nodes,
    check_versions,
    check_storage,
    check_gpus,
    check_cpus,
    check_decoding,
    check_object_store,
    check_shared_memory,
    check_collective,
)


def listed(by_node: dict[str, str]) -> str:
    """What holds for several nodes, in one line."""
    return "; ".join(f"{name}: {what}" for name, what in by_node.items())


def gib(size: float) -> str:
    """Bytes in GiB."""
    return f"{size / (1 << 30):.2f} GiB"


if __name__ == "__main__":
    main(job)
