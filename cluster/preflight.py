"""Checks a Ray cluster before a run: `python cluster/preflight.py --storage /shared/runs`.

A process on each node looks around, writes to the storage and reads what the others wrote, decodes, and joins in an
all-reduce. It takes about a minute and no CPU or GPU slot; a node that does not answer is named. What is broken or will
hurt comes with what to change. The exit status is 0 when nothing is broken, 1 when something is, 2 when the cluster
cannot be joined. Sent along with `ray job submit --working-dir .`, it sees the code that a run would see.
"""

import json
import logging
import os
import re
import sys
import threading
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from muser_dist.cli import main
from muser_dist.config import TrainConfig
from muser_dist.data.config import DataConfig
from muser_dist.errors import ClusterError, ConfigError
from muser_dist.files import check_file
from probe import Nodes

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
    check_file(options.json, "--json")
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
        ray.init(address, logging_level=logging.ERROR, log_to_driver=False)
    except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        reason = re.split(r"\.?\s*\n|\. ", str(error).strip(), maxsplit=1)[0]
        raise ClusterError(f"cannot join the Ray cluster ({where}): {reason}; {advice}") from None
    finally:
        timer.cancel()


def check_nodes(nodes: Nodes, options: Preflight) -> Finding:
    """Every node answers, and says what it is."""
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
    """All nodes have the same of everything that exchanges data or computes."""
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
    same: dict[str, str] = next(iter(versions.values()), {})
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
    if not (speeds or problems):
        return Finding("storage", "broken", "no node answers", "see what is said of the nodes")
    if problems:
        mend = (
            "give a --storage that is mounted and writable on every node under this path (NFS, a cloud's file system)"
        )
        return Finding("storage", "broken", f"{options.storage}: {listed(problems)}", mend)
    slowest = min(speeds, key=speeds.__getitem__)
    what = f"{options.storage} is one folder on all nodes; slowest write {speeds[slowest]:.0f} MB/s, of {slowest}"
    return Finding("storage", "ok", what)


def check_gpus(nodes: Nodes, options: Preflight) -> Finding:
    """Ray gives out the GPUs that torch finds."""
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
    """Logical CPUs are no promise that the machine cannot keep."""
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
    """The object store lies in memory."""
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
