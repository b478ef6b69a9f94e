"""Where the workers' time goes: waiting for data, for copies to the device, for other ranks; the rest is work.

All ranks leave a step together, for its last collective holds until every rank has come to it. So
what a rank does from there to the first collective of the next step is its own, and one that takes
longer keeps the others waiting by as much. A rank that waits for its data is not said to wait for
others meanwhile: the shares add up, to one with the work.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch

from muser_dist.objectives.collectives import gather

Wait = Literal["decode", "transfer"]

STRAGGLES = 1.5
"""A rank is named as the straggler when its own part of the steps takes that many times the median rank's."""

_Mark = float | torch.cuda.Event


class Stopwatch:
    """Times of the steps since the last lap; every rank has one.

    Call `arrive` before a step's first collective and `leave` after its last. With GPUs both are
    marked in the stream of kernels, and neither waits for the device. At ZeRO stage 3 the
    encoders' forward passes already exchange parameters: what ranks wait for each other in there
    counts as work.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._restart()

    @contextmanager
    def waiting(self, what: Wait = "decode") -> Iterator[None]:
        """Counts the block as time in which this rank waits for its data, or for copies to the device."""
        start = time.perf_counter()
        yield
        self._waits[what] += time.perf_counter() - start

    def arrive(self) -> None:
        """This rank's own part of a step is done; its first collective follows."""
        self._own.append((self._left, self._mark()))

    def leave(self) -> None:
        """A step's last collective is done."""
        self._left = self._mark()

    def lap(self, samples: int) -> dict[str, float]:
        """Ends a lap; a collective. Every rank must have taken as many steps since the last one.

        Args:
            samples: of all ranks, in the steps since the last lap.

        Returns:
            "seconds"; "samples_per_second"; "wait_share", of this rank's time, waiting for data;
            "decode_wait_share", "transfer_share" and "rank_wait_share", of all ranks' time, waiting
            for data, for copies, and for the slowest rank at the first collective of each step;
            "straggler", the slowest rank, where it is much slower than the median one.
        """
        own = [_seconds(left, arrived) for left, arrived in self._own]
        seconds = time.perf_counter() - self._start
        mine = torch.tensor([seconds, *self._waits.values(), *own], dtype=torch.float64)
        everyone = gather(mine[None])
        total, decode, transfer = everyone[:, :3].sum(0).tolist()
        own_of_ranks = everyone[:, 3:]  # (ranks, steps)
        behind = (own_of_ranks.amax(0) - own_of_ranks).sum().item()
        times = {
            "seconds": round(seconds, 3),
            "samples_per_second": round(samples / seconds, 2),
            "wait_share": round(self._waits["decode"] / seconds, 4),
            "decode_wait_share": round(decode / total, 4),
            "transfer_share": round(transfer / total, 4),
            "rank_wait_share": round(behind / total, 4),
        }
        of_ranks = own_of_ranks.sum(1)
        if of_ranks.max() > STRAGGLES * of_ranks.median():  # of two ranks, the faster one is the median
            times["straggler"] = int(of_ranks.argmax())
        self._restart()
        return times

    def _restart(self) -> None:
        self._start = time.perf_counter()
        self._waits: dict[Wait, float] = {"decode": 0.0, "transfer": 0.0}
        self._own: list[tuple[_Mark, _Mark]] = []
        self.leave()  # a lap is a collective too

    def _mark(self) -> _Mark:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event


def _seconds(start: _Mark, end: _Mark) -> float:
    if isinstance(start, float) or isinstance(end, float):
        return float(end) - float(start)  # type: ignore[arg-type]
    end.synchronize()
    return start.elapsed_time(end) / 1000
