"""Runs a function on W ranks of this machine, started by Ray Train, by torchrun, or as one bare process.

The same function, environment and number of threads under each launcher; a fresh group of processes for each call, so
that nothing of one launcher is alive while another is measured.
"""

import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

LAUNCHERS = ("ray", "torchrun", "none")

ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "GLOO_SOCKET_IFNAME": "lo",  # so that the counters of the loopback device see what ranks exchange
    "RAY_ADDRESS": "local",
    "RAY_USAGE_STATS_ENABLED": "0",
}

_MOST_SECONDS = 1800


def run(launcher: str, world: int, function: str, setting: dict[str, Any], gpu: bool = False) -> Any:
    """What the function returned on rank 0.

    Args:
        launcher: one of LAUNCHERS; "none" is one process without a process group.
        world: number of ranks.
        function: "module:name" of this folder; called with `setting` and the rank's device, returns plain values.
        setting: plain values.
        gpu: one GPU for each rank.

    Raises:
        RuntimeError: it failed; the message ends with what it printed last.
    """
    if launcher == "none" and world != 1:
        raise ValueError(f"launcher none is one process, not {world}")
    here = Path(__file__)
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        out = Path(folder, "result.json")
        asked = {"launcher": launcher, "world": world, "function": function, "setting": setting, "gpu": gpu}
        command = [sys.executable, str(here), json.dumps(asked | {"out": str(out)})]
        if launcher == "torchrun":
            torchrun = ["-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
            command[1:1] = [*torchrun, "--nproc-per-node", str(world)]
        path = os.pathsep.join(filter(None, [str(here.parent), os.environ.get("PYTHONPATH")]))
        log = Path(folder, "log.txt")
        with log.open("w") as printed:
            process = subprocess.Popen(
                command,
                env=os.environ | ENVIRONMENT | {"PYTHONPATH": path},
                stdout=printed,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                process.wait(timeout=_MOST_SECONDS)
            except BaseException:  # also where the user interrupts: torchrun's ranks would live on
                os.killpg(process.pid, signal.SIGKILL)
                raise
        if process.returncode or not out.exists():
            raise RuntimeError(f"{function} under {launcher} with {world} ranks failed:\n{log.read_text()[-4000:]}")
        return json.loads(out.read_text())


def child(asked: dict[str, Any]) -> None:
    """The program of the process that `run` or torchrun starts: a rank, or Ray's driver."""
    if asked["launcher"] == "ray":
        _under_ray(asked)
    else:
        rank(asked)


def rank(asked: dict[str, Any]) -> None:
    """One rank: calls the function; rank 0 writes what it returns."""
    module, _, name = asked["function"].partition(":")
    function = getattr(importlib.import_module(module), name)

    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    device = torch.device("cpu")
    if asked["gpu"]:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
        torch.cuda.set_device(device)
    if asked["launcher"] == "torchrun":
        dist.init_process_group(_backend(asked["gpu"]))
    result = function(asked["setting"], device)
    if not dist.is_initialized() or dist.get_rank() == 0:
        Path(asked["out"]).write_text(json.dumps(result))
    if asked["launcher"] == "torchrun":
        dist.destroy_process_group()


def _under_ray(asked: dict[str, Any]) -> None:
    """Starts Ray and the trainer as muser_dist/train/launch.py does, on this machine and without datasets."""
    import logging

    import ray
    import ray.train
    import ray.train.torch

    world, gpu = asked["world"], asked["gpu"]
    # A slot more than the workers', as for decoding.
    ray.init("local", num_cpus=world + 1, include_dashboard=False, logging_level=logging.ERROR, log_to_driver=False)
    trainer = ray.train.torch.TorchTrainer(
        rank,
        train_loop_config=asked,
        torch_config=ray.train.torch.TorchConfig(backend=_backend(gpu)),
        scaling_config=ray.train.ScalingConfig(
            num_workers=world, use_gpu=gpu, resources_per_worker={"CPU": 1.0} | ({"GPU": 1} if gpu else {})
        ),
        run_config=ray.train.RunConfig(name="benchmark", storage_path=str(Path(asked["out"]).parent)),
    )
    trainer.fit()
    ray.shutdown()


def _backend(gpu: bool) -> str:
    return "cpu:gloo,cuda:nccl" if gpu else "gloo"


if __name__ == "__main__":
    # By its name: Ray's workers import the module of the function that they are given.
    importlib.import_module("launchers").child(json.loads(sys.argv[1]))
