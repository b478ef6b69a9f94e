"""Starts W processes of this machine that form a gloo group, as a run's workers would."""

import multiprocessing
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

# Processes are forked from one that has imported what takes seconds and has started no thread.
multiprocessing.set_forkserver_preload(
    ["deepspeed", "functorch.compile", "muser_dist.train.checkpoint", "muser_dist.train.engine"]
)


def run_workers(function: Callable[..., None], world: int, *arguments: Any) -> None:
    """Calls function(rank, *arguments) in each of `world` new processes; raises what any of them raised."""
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder) / "store")
        mp.start_processes(_start, (world, store, function, arguments), nprocs=world, start_method="forkserver")


def _start(rank: int, world: int, store: str, function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    try:
        function(rank, *arguments)
        dist.barrier()
    finally:
        dist.destroy_process_group()
