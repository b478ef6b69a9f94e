"""Checkpoints of all ranks together: written while training goes on, checked when a run goes on from one.

Each rank writes what it holds of the model and optimizer, as pieces that do not depend on how they
are shared out: so any number of workers at any ZeRO stage goes on from them, with the same bits.
"""

import time
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from muser_dist.data.storage import redact
from muser_dist.errors import CheckpointError
from muser_dist.objectives.collectives import of_rank_0
from muser_dist.train.engine import DeepSpeedEngine
from muser_dist.train.runlog import RunLog
from muser_dist.train.store import CheckpointStore, problem_of

FORMAT = 3
_LONGEST_PAUSE = 30.0
_LONGEST_WAIT = 1.0
_READING_SECONDS = 120.0


@dataclass(frozen=True)
class Position:
    """Where a run stands.

    Attributes:
        step: optimizer steps done; with the chunks of a step it is the index of the next chunk.
        totals: the accounting of rows up to there; None at the start.
        seconds: of training up to there, without what was lost to restarts.
    """

    step: int
    totals: dict[str, Any] | None
    seconds: float


class Checkpoints:
    """Saves and loads; every rank has one, and calls its methods when the others do.

    Args:
        store: where checkpoints lie.
        keep: how many of the latest stay.
        patience: seconds for which a part is written again and again when the storage fails.
        log: tells what happened; None on ranks other than 0.
    """

    def __init__(self, store: CheckpointStore, keep: int, patience: float, log: RunLog | None) -> None:
        self._store, self._keep, self._patience, self._log = store, keep, patience, log
        self._pool = ThreadPoolExecutor(1)
        self._job: Future[Any] | None = None  # this rank's part of what is being written
        self._description: dict[str, Any] = {}
        self._started = 0.0

    # --- Saving ---

    def save(self, engine: DeepSpeedEngine, position: Position, loss: float | None) -> None:
        """Takes a copy of everything and begins to write it; one that is still being written is waited for.

        Args:
            engine: model and optimizer.
            position: where the run stands.
            loss: mean since the checkpoint before, by which the best is kept; None where it is not known.

        Raises:
            CheckpointError: as `poll`.
        """
        self.finish()
        self._started = time.monotonic()
        pieces = engine.snapshot()
        name = f"rank-{dist.get_rank():05d}.safetensors"
        self._description = {"format": FORMAT, "workers": dist.get_world_size(), "loss": loss} | asdict(position)
        self._description["versions"] = {package: version(package) for package in ("torch", "deepspeed", "ray")}
        self._job = self._pool.submit(
            self._patiently, lambda: self._store.write(position.step, name, save(pieces)), position.step
        )

    def poll(self) -> int | None:
        """Looks how far writing is; a collective while something is being written, and nothing otherwise.

        Returns:
            the step of a checkpoint that has just become complete.

        Raises:
            CheckpointError: a rank could not write its part for as long as patience lasts.
        """
        if self._job is None:
            return None
        failed = self._job.done() and self._job.exception() is not None
        state = torch.tensor(-1 if failed else int(self._job.done()))
        dist.all_reduce(state, dist.ReduceOp.MIN)
        if state == 0:
            return None
        if state < 0:
            self._raise_failures()
        step = self._description["step"]
        if "parts" not in self._description:  # all parts are there: now the file that makes them a checkpoint
            parts: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(parts, self._job.result())
            self._description |= {"parts": parts}
            self._job = self._pool.submit(self._complete if dist.get_rank() == 0 else int)
            return None
        self._job = None
        if self._log:
            self._log.event("checkpoint", step, seconds=round(time.monotonic() - self._started, 3))
        return step

    @property
    def writing(self) -> bool:
        """Whether a checkpoint is being written."""
        return self._job is not None

    def finish(self) -> int | None:
        """Waits until nothing is being written; as `poll`."""
        done = None
        while self._job is not None:
            # Not until it is done: ranks that are would wait in a collective, which takes an outage for a hang.
            wait([self._job], _LONGEST_WAIT)
            done = self.poll() or done
        return done

    def _complete(self) -> None:
        step = self._description["step"]
        self._patiently(lambda: self._store.complete(step, self._description), step)
        try:
            self._store.prune(self._keep)
        except Exception as error:  # they take room, and the next checkpoint's turn may remove them
            if self._log:
                self._log.event("old checkpoints stay", step, error=redact(str(error)))

    def _patiently(self, action: Callable[[], Any], step: int | None, reading: bool = False) -> Any:
        """The action's result; whatever error the storage raises is waited out for as long as patience lasts.

        Reading, the other ranks wait in a collective, so less long; and what is missing or no JSON is not waited for.
        """
        patience = min(self._patience, _READING_SECONDS) if reading else self._patience
        start, pause = time.monotonic(), 0.5
        while True:
            try:
                return action()
            except Exception as error:
                proven = reading and isinstance(error, (FileNotFoundError, ValueError))
                if proven or time.monotonic() + pause > start + patience:
                    raise
                if self._log and pause == 0.5:
                    self._log.event("storage", step, error=redact(str(error)), retrying=f"{patience:g} s")
                time.sleep(pause)
                pause = min(_LONGEST_PAUSE, 2 * pause)

    def _raise_failures(self) -> None:
        assert self._job is not None
        all_done = torch.tensor(0)
        while not all_done:
            wait([self._job], _LONGEST_WAIT)
            all_done.fill_(self._job.done())
            dist.all_reduce(all_done, dist.ReduceOp.MIN)
        error = self._job.exception()
        errors: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(errors, redact(str(error)) if error else None)
        rank, reason = next((rank, reason) for rank, reason in enumerate(errors) if reason)
        self._job = None
        there = self._store.steps() if dist.get_rank() == 0 else []
        raise CheckpointError(
            f"the checkpoint at step {self._description['step']:,} could not be written to {redact(self._store.url)} "
            f"for {self._patience:g} s (rank {rank}: {reason}). Make room there, or copy the checkpoints elsewhere and "
            f"give --train.checkpoint-storage; the same command goes on from step {max(there, default=0):,}"
        )

    # --- Loading ---

    def load(self, engine: DeepSpeedEngine) -> Position | None:
        """Restores the latest checkpoint that is intact, and says which were not; None where the run has none.

        Raises:
            CheckpointError: there are checkpoints, and none is intact; or they cannot be read for as long as patience
                lasts.
        """
        steps = self._of_rank_0(lambda: self._patiently(self._store.steps, None, reading=True)[::-1])
        broken: dict[int, str] = {}
        for step in steps:
            with TemporaryDirectory(prefix="muser-checkpoint-") as folder:
                description, problem = self._of_rank_0(partial(self._describe, step))
                problem = problem or self._check(step, description["parts"], folder)
                if problem is not None:
                    broken[step] = problem
                    continue
                self._set_aside(broken)  # now that the run has something to go on from
                with Pieces([self._store.fetch(step, part["name"], folder) for part in description["parts"]]) as read:
                    engine.restore(read, step)
                dist.barrier()
                return Position(step, description["totals"], description["seconds"])
        if broken:
            raise CheckpointError(
                f"none of the checkpoints at steps {', '.join(map(str, steps))} in {redact(self._store.url)} is intact "
                f"({broken[steps[-1]]}); bring one back, or start again under another --name"
            )
        return None

    def _of_rank_0(self, read: Callable[[], Any]) -> Any:
        """What `read` returns on rank 0, on all ranks; an error there is a CheckpointError on all."""

        def tried() -> tuple[Any, str | None]:
            try:
                return read(), None
            except CheckpointError as error:
                return None, str(error)
            except Exception as error:  # each kind of storage has its own
                return None, self._unreadable("the checkpoints", str(error))

        made, problem = of_rank_0(tried)
        if problem is not None:
            raise CheckpointError(problem)
        return made

    def _unreadable(self, what: str, reason: str) -> str:
        return (
            f"{what} in {redact(self._store.url)} cannot be read ({redact(reason).strip()}); the same command goes on "
            "when that is possible"
        )

    def _set_aside(self, broken: dict[int, str]) -> None:
        if self._log is None:
            return
        for step, problem in broken.items():
            self._log.event("broken checkpoint", step, error=problem)
            try:
                self._store.set_aside(step)
            except Exception as error:  # the next start looks at it again
                self._log.event("broken checkpoint stays", step, error=redact(str(error)))

    def _describe(self, step: int) -> tuple[dict[str, Any], str | None]:
        try:
            description = self._patiently(lambda: self._store.describe(step), step, reading=True)
        except (FileNotFoundError, ValueError) as error:
            return {}, f"its checkpoint.json cannot be read: {redact(str(error))}"
        if description.get("format") != FORMAT:
            return {}, f"it is of format {description.get('format')}, and this version reads {FORMAT}"
        return description, None

    def _check(self, step: int, parts: list[dict[str, Any]], folder: str) -> str | None:
        """What is wrong with the first broken part. Ranks share the work where they read the same files.

        Raises:
            CheckpointError: on all ranks, where one cannot fetch a part: that says nothing of the checkpoint.
        """
        rank, ranks = dist.get_rank(), dist.get_world_size()
        found = failed = None
        try:
            for part in parts if self._store.remote else parts[rank::ranks]:
                found = found or self._problem_of(step, part, folder)
        except Exception as error:  # each kind of storage has its own
            failed = str(error)
        of_ranks: list[Any] = [None] * ranks
        dist.all_gather_object(of_ranks, (found, failed))
        for other, (_, reason) in enumerate(of_ranks):
            if reason is not None:
                raise CheckpointError(self._unreadable(f"the checkpoint at step {step:,}", f"rank {other}: {reason}"))
        return next((problem for problem, _ in of_ranks if problem), None)

    def _problem_of(self, step: int, part: dict[str, Any], folder: str) -> str | None:
        try:
            path = self._patiently(lambda: self._store.fetch(step, part["name"], folder), step, reading=True)
            return self._patiently(lambda: problem_of(path, part), step, reading=True)
        except FileNotFoundError:
            return f"{part['name']} is missing"


class Pieces:
    """Reads any piece of any state of a parameter out of the parts of a checkpoint.

    Args:
        paths: all parts, as local files.

    Raises:
        CheckpointError: when called for something that they do not hold.
    """

    def __init__(self, paths: list[Path]) -> None:
        try:
            self._files = [safe_open(path, "pt") for path in paths]
        except SafetensorError as error:
            raise CheckpointError(f"{paths[0].parent}: a part is no safetensors file: {error}") from None
        self._places: dict[str, list[tuple[int, int, Any, str]]] = defaultdict(list)
        for file in self._files:
            for key in file.keys():  # noqa: SIM118
                name, _, start = key.rpartition("@")
                (length,) = file.get_slice(key).get_shape()
                self._places[name].append((int(start), int(start) + length, file, key))

    def __enter__(self) -> "Pieces":
        return self

    def __exit__(self, *_: object) -> None:
        self._files.clear()
        self._places.clear()

    def __call__(self, state: str, name: str, start: int, stop: int) -> Tensor:
        """The elements start <= e < stop of the flattened parameter's state."""
        found = []
        for first, last, file, key in sorted(self._places[f"{state}/{name}"], key=lambda place: place[:2]):
            a, b = max(start, first), min(stop, last)
            if a < b:
                found.append(file.get_slice(key)[a - first : b - first])
        if sum(map(len, found)) != stop - start:
            raise CheckpointError(
                f"the checkpoint lacks {state} of {name}; was the model changed under the same --name?"
            )
        return torch.cat(found) if found else torch.zeros(0)
