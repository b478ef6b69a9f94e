"""What cluster/preflight.py runs on the nodes of a cluster, and how it asks them.

Probes are sent along by value: nodes need not have this file, nor muser_dist to say that they lack it.
"""

import contextlib
import hashlib
import os
import platform
import socket
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any


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
        from muser_dist.data.decoder_child import keep_freed_memory

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


class Nodes:
    """The cluster's nodes that are alive, with a probe on each.

    Attributes:
        reports: what is known of each node, by its name: Ray's resources, and what its probe has said.
    """

    def __init__(self, timeout: float) -> None:
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
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
