"""The split of the workers' time, with clocks that tests set: numbers are exact on however busy a machine."""

import json

import pytest
import torch
import torch.distributed as dist

from muser_dist.train import stopwatch
from muser_dist.train.stopwatch import Stopwatch
from tests.distributed.workers import run_workers


class Clock:
    """Stands for time.perf_counter in one process; `together` is a collective that ends when the last one is there."""

    def __init__(self, monkeypatch=None):
        self.now = 100.0
        if monkeypatch:
            monkeypatch.setattr(stopwatch.time, "perf_counter", lambda: self.now)
        else:
            stopwatch.time.perf_counter = lambda: self.now

    def together(self) -> None:
        now = torch.tensor(self.now, dtype=torch.float64)
        dist.all_reduce(now, dist.ReduceOp.MAX)
        self.now = now.item()


def lap(clock: Clock, watch: Stopwatch, steps: list[tuple[float, float, float]]) -> dict[str, float]:
    """Steps of (waiting for data, copying, own work) seconds, each with 0.5 s after its first collective."""
    for decode, transfer, work in steps:
        with watch.waiting():
            clock.now += decode
        with watch.waiting("transfer"):
            clock.now += transfer
        clock.now += work
        watch.arrive()
        clock.together()
        clock.now += 0.5
        watch.leave()
    return watch.lap(len(steps) * 30)


def worker(rank: int, folder: str) -> None:
    clock = Clock()
    watch = Stopwatch(torch.device("cpu"))
    laps = [
        # Rank 1 waits for its data, and the others for rank 1; then rank 0 copies for long.
        lap(clock, watch, [[(0, 0, 1), (0, 2, 1)], [(3, 0, 1), (0, 0, 1)], [(0, 0, 1), (0, 0, 1)]][rank]),
        # Ranks 0 and 1 are slow in one step each: they wait though they worked equally long.
        lap(clock, watch, [[(0, 0, 2), (0, 0, 1)], [(0, 0, 1), (0, 0, 2)], [(0, 0, 1), (0, 0, 1)]][rank]),
        lap(clock, watch, [(0, 0, 1.5)]),  # what was before does not count
        *(lap(clock, watch, [(0, 0, [1, 1.1, late][rank])] * 2) for late in (1.6, 1.7)),
    ]
    with open(f"{folder}/{rank}.json", "w") as file:
        json.dump(laps, file)


def test_what_ranks_wait_for(tmp_path):
    run_workers(worker, 3, str(tmp_path))
    of_ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(3)]
    # 8 seconds of each rank. Rank 0: 3 for rank 1, 2 for copies. Rank 1: 3 for data, 2 for rank 0. Rank 2: 5 for both.
    assert of_ranks[0][0] == {
        "seconds": 8.0,
        "samples_per_second": 7.5,
        "wait_share": 0.0,
        "decode_wait_share": round(3 / 24, 4),
        "transfer_share": round(2 / 24, 4),
        "rank_wait_share": round(10 / 24, 4),
    }
    assert of_ranks[1][0] == of_ranks[0][0] | {"wait_share": round(3 / 8, 4)}
    assert of_ranks[0][1:] == of_ranks[1][1:] == of_ranks[2][1:]
    _, changing, even, below, above = of_ranks[0]
    assert changing["rank_wait_share"] == round(4 / 15, 4)
    assert even["rank_wait_share"] == 0
    # The median rank takes 1.1 seconds of each step.
    assert [times.get("straggler") for times in (changing, even, below, above)] == [None, None, None, 2]


def test_one_process_waits_for_nobody(monkeypatch):
    clock = Clock(monkeypatch)
    watch = Stopwatch(torch.device("cpu"))
    with watch.waiting():
        clock.now += 1
    clock.now += 3
    watch.arrive()
    times = watch.lap(8)
    assert times["wait_share"] == times["decode_wait_share"] == 0.25
    assert times["rank_wait_share"] == 0 and "straggler" not in times
    assert times["samples_per_second"] == pytest.approx(2)
