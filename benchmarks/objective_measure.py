"""What each child process of objective.py does: one setting on W ranks; prints the rows as JSON.

`python benchmarks/objective_measure.py '{"task": "time" | "memory" | "gpu", "world": W, ...}'`
"""

import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor

from muser_dist.config import ObjectiveConfig, PairConfig
from muser_dist.objectives.batch import Batch, Logits
from muser_dist.objectives.contrastive import contrastive
from muser_dist.objectives.reference import reference_loss

DIM = 512
PAIRS = (("audio", "text"), ("spectrogram", "text"))
SCALE = 1 / 0.07

Features = dict[str, Tensor]
Loss = Callable[[Features, Tensor, int], Tensor]
"""Takes this rank's features, the scale of each pair and the number of pairs; returns this rank's share."""


def ours(features: Features, scale: Tensor, pairs: int, **settings: Any) -> Tensor:
    """muser_dist's, features gathered."""
    batch, config = _batch(features), _config(pairs, **settings)
    return contrastive(features, Logits(scale), batch, config).share


def ours_ring(features: Features, scale: Tensor, pairs: int) -> Tensor:
    """muser_dist's, features in a ring."""
    return ours(features, scale, pairs, gather_mib=0)


def ours_bf16(features: Features, scale: Tensor, pairs: int) -> Tensor:
    """muser_dist's, features gathered and compared in bfloat16."""
    return ours(features, scale, pairs, bf16=True)


def open_clip_exact(features: Features, scale: Tensor, pairs: int) -> Tensor:
    """open_clip's ClipLoss with local_loss and gather_with_grad, its exact mode; a call for each pair."""
    return _open_clip(features, scale, pairs, local_loss=True, gather_with_grad=True)


def open_clip_default(features: Features, scale: Tensor, pairs: int) -> Tensor:
    """open_clip's ClipLoss as it comes: all similarities on every rank, gradients of own rows alone."""
    return _open_clip(features, scale, pairs, local_loss=False, gather_with_grad=False)


def reference(features: Features, scale: Tensor, pairs: int) -> Tensor:
    """The definition in objectives/reference.py, row by row."""
    return reference_loss(features, Logits(scale), _batch(features), _config(pairs))


CONTESTANTS: dict[str, Loss] = {
    "ours": ours,
    "ours_ring": ours_ring,
    "open_clip_exact": open_clip_exact,
    "open_clip_default": open_clip_default,
    "reference": reference,
}


def _config(pairs: int, **settings: Any) -> ObjectiveConfig:
    named = tuple(PairConfig(*pair) for pair in PAIRS[:pairs])  # type: ignore[arg-type]
    return ObjectiveConfig(pairs=named, targets="instance", **settings)


def _batch(features: Features) -> Batch:
    any_ = next(iter(features.values()))
    b, device = len(any_), any_.device
    row = torch.arange(b, device=device) + b * (dist.get_rank() if dist.is_initialized() else 0)
    nothing = torch.full((b,), -1, device=device)
    return Batch({name: torch.ones(b, dtype=torch.bool, device=device) for name in features}, row, nothing, nothing)


def _open_clip(features: Features, scale: Tensor, pairs: int, **mode: bool) -> Tensor:
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    loss = _clip_loss(rank=rank, world_size=world, **mode)
    unit = {name: F.normalize(x, dim=1) for name, x in features.items()}
    return sum(loss(unit[a], unit[b], scale[p]) for p, (a, b) in enumerate(PAIRS[:pairs])) / pairs  # type: ignore[return-value]


@cache
def _clip_loss(**arguments: Any) -> Any:
    from open_clip.loss import ClipLoss

    return ClipLoss(cache_labels=True, **arguments)


def make_features(n: int, pairs: int, device: str, rank: int) -> Features:
    """Random rows that get gradients; matching ones resemble each other."""
    g = torch.Generator(device).manual_seed(rank)
    shared = torch.randn(n, DIM, generator=g, device=device)
    names = dict.fromkeys(name for pair in PAIRS[:pairs] for name in pair)
    return {n_: (shared + 2 * torch.randn(n, DIM, generator=g, device=device)).requires_grad_() for n_ in names}


def step(loss: Loss, features: Features, scale: Tensor, pairs: int) -> None:
    """Forward and backward."""
    for x in (*features.values(), scale):
        x.grad = None
    loss(features, scale, pairs).backward()


# --- Tasks ---


def time_task(setting: dict[str, Any], rank: int) -> list[dict[str, Any]]:
    """Seconds of each contestant by round, and the bytes that a rank receives."""
    world, pairs, n = setting["world"], setting["pairs"], setting["n"]
    features = make_features(n // world, pairs, "cpu", rank)
    scale = torch.full((pairs,), SCALE, requires_grad=True)
    seconds: dict[str, list[float]] = {name: [] for name in setting["contestants"]}
    received: dict[str, int] = {}
    for round_ in range(setting["rounds"] + 1):  # the first warms up
        for name in setting["contestants"]:
            _meet()
            before, start = _loopback_bytes(), time.perf_counter()
            step(CONTESTANTS[name], features, scale, pairs)
            _meet()
            if round_:
                seconds[name].append(time.perf_counter() - start)
                received[name] = (_loopback_bytes() - before) // world
    return [
        {"contestant": name, "seconds": statistics.median(values), "each_seconds": values, "bytes": received[name]}
        for name, values in seconds.items()
    ]


def memory_task(setting: dict[str, Any], rank: int) -> list[dict[str, Any]]:
    """Peak resident bytes of one call above what was resident before."""
    (name,) = setting["contestants"]
    features = make_features(setting["n"], setting["pairs"], "cpu", rank)
    small = {modality: x.detach()[:64].clone().requires_grad_() for modality, x in features.items()}
    scale = torch.full((setting["pairs"],), SCALE, requires_grad=True)
    step(CONTESTANTS[name], small, scale, setting["pairs"])  # libraries are loaded
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
    before = _resident("VmRSS")
    step(CONTESTANTS[name], features, scale, setting["pairs"])
    return [{"contestant": name, "peak_bytes": _resident("VmHWM") - before}]


def gpu_task(setting: dict[str, Any], rank: int) -> list[dict[str, Any]]:
    """Seconds, peak bytes and the card's measured rate of bfloat16 products."""
    torch.cuda.init()
    pairs, n, device = setting["pairs"], setting["n"], torch.cuda.get_device_name()
    rate = _matrix_rate()
    results = []
    for name in setting["contestants"]:
        loss = ours_bf16 if name == "ours" else CONTESTANTS[name]
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        row: dict[str, Any] = {"contestant": name, "gpu": device, "matrix_rate": rate}
        try:
            features = make_features(n, pairs, "cuda", rank)
            scale = torch.full((pairs,), SCALE, device="cuda", requires_grad=True)
            seconds = []
            with torch.autocast("cuda", torch.bfloat16, enabled=name != "ours"):  # their products in bfloat16 too
                for round_ in range(setting["rounds"] + 1):
                    torch.cuda.synchronize()
                    start = time.perf_counter()
                    step(loss, features, scale, pairs)
                    torch.cuda.synchronize()
                    if round_:
                        seconds.append(time.perf_counter() - start)
            row |= {"seconds": statistics.median(seconds), "each_seconds": seconds}
        except torch.cuda.OutOfMemoryError:
            row["error"] = "out of memory"
        results.append(row | {"peak_bytes": torch.cuda.max_memory_allocated()})
    return results


def _matrix_rate() -> float:
    """Floating point operations a second of a large bfloat16 product."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    for rounds in (3, 20):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(rounds):
            a @ b
        torch.cuda.synchronize()
    return rounds * 2 * 8192**3 / (time.perf_counter() - start)


def _meet() -> None:
    if dist.is_initialized():
        dist.barrier()


def _loopback_bytes() -> int:
    return int(Path("/sys/class/net/lo/statistics/rx_bytes").read_text())


def _resident(what: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(what))
    return 1024 * int(line.split()[1])


TASKS = {"time": time_task, "memory": memory_task, "gpu": gpu_task}


def _rank(rank: int, setting: dict[str, Any], folder: str) -> None:
    torch.set_num_threads(1)
    world = setting["world"]
    if world > 1:
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    rows = TASKS[setting["task"]](setting, rank)
    if rank == 0:
        common = {name: setting[name] for name in ("task", "world", "pairs", "n")}
        Path(folder, "rows.json").write_text(json.dumps([common | row for row in rows]))
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    asked = json.loads(sys.argv[1])
    with tempfile.TemporaryDirectory() as folder:
        if asked["world"] == 1:
            _rank(0, asked, folder)
        else:
            mp.spawn(_rank, args=(asked, folder), nprocs=asked["world"])
        print(Path(folder, "rows.json").read_text())
