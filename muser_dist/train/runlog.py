"""What a run writes down: metrics, events, quarantine and accounts, and the live line.

Rank 0 writes; the driver follows and prints. Files are cut back to the step that a run goes on
from, so that no line is there twice; events stay: they tell what happened.
"""

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread
from typing import Any, TextIO

from muser_dist.config import RunConfig

METRICS = "metrics.jsonl"
EVENTS = "events.jsonl"
QUARANTINE = "quarantine.jsonl"
ACCOUNTS = "accounts.jsonl"

DIVERGED = "diverged"
"""The event after which training stopped because a step could not be applied."""

TIMES = (
    *("time", "seconds", "samples_per_second", "wait_share", "decode_wait_share", "transfer_share", "rank_wait_share"),
    *("straggler", "decode_ms_per_row", "decode_slots", "clips_cached", "clips_decoded"),
    *("checkpoint_seconds", "restarts"),
)
"""Fields of metrics.jsonl that differ between two runs of the same seed."""


class RunLog:
    """Appends to the files of a run's folder; only rank 0 makes one.

    Args:
        config: the run.
        workers: that train from here on.
    """

    def __init__(self, config: RunConfig, workers: int) -> None:
        self._config, self._workers = config, workers
        self._before = last_line(config.folder / METRICS)  # of an earlier start of this run
        self._restarts = sum(event["event"] == "start" for event in read_lines(config.folder / EVENTS))
        self._events = _reopen(config.folder / EVENTS, lambda entry: True)

    def go_on_from(self, step: int) -> None:
        """Opens the files of a run that stands at `step`; lines of later steps are dropped, and said to be repeated."""
        folder = self._config.folder
        self._metrics = _reopen(folder / METRICS, lambda entry: entry["step"] <= step)
        self._quarantine = _reopen(folder / QUARANTINE, lambda entry: entry["step"] < step)
        self._accounts = _reopen(folder / ACCOUNTS, lambda entry: entry["step"] <= step)
        repeated = max(0, self._before["step"] - step) if self._before else 0
        rows = repeated * self._config.train.global_batch
        self.event("start", step, workers=self._workers, steps_repeated=repeated, rows_repeated=rows)

    def event(self, kind: str, step: int | None, **fields: Any) -> None:
        """Writes an event: what happened, at which step, and when."""
        self._events.write(json.dumps({"time": time.time(), "event": kind, "step": step} | fields) + "\n")
        self._events.flush()

    def quarantine(self, problems: list[dict[str, Any]]) -> None:
        """Writes quarantine entries."""
        self._quarantine.writelines(json.dumps(problem) + "\n" for problem in problems)
        self._quarantine.flush()

    def accounts(self, step: int, lines: list[dict[str, Any]]) -> None:
        """Writes what was read since the last checkpoint: the sums over the file are the run's accounts."""
        self._accounts.writelines(json.dumps({"step": step} | line) + "\n" for line in lines)
        self._accounts.flush()

    def metrics(self, line: dict[str, Any]) -> None:
        """Writes a line of metrics; the first that is further than the run has been tells what the restart cost."""
        now = time.time()
        self._metrics.write(json.dumps(line | {"time": now, "restarts": self._restarts}) + "\n")
        self._metrics.flush()
        if self._before and line["step"] > self._before["step"]:
            new = (line["step"] - self._before["step"]) * self._config.train.global_batch
            lost = now - self._before["time"] - new / self._before["samples_per_second"]
            self.event("caught up", line["step"], workers=self._workers, seconds_lost=round(lost, 1))
            self._before = None

    def close(self) -> None:
        """Closes the files."""
        for file in (self._metrics, self._events, self._quarantine, self._accounts):
            file.close()


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The entries of a .jsonl file; a last line that was cut short is left out, a missing file is empty."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def last_line(path: Path) -> dict[str, Any] | None:
    """The last whole entry of a .jsonl file, without reading what is before; None where there is none."""
    if not path.exists():
        return None
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 65_536))
        lines = file.read().split(b"\n")[:-1]  # what follows the last line break is still being written
    return json.loads(lines[-1]) if lines else None


def _reopen(path: Path, keep: Callable[[dict[str, Any]], bool]) -> TextIO:
    """Opens a .jsonl file to append to, with these of its entries alone: also without a line that was cut short."""
    kept = [entry for entry in read_lines(path) if keep(entry)]
    temporary = path.with_suffix(".part")
    temporary.write_text("".join(json.dumps(entry) + "\n" for entry in kept))
    temporary.replace(path)
    return path.open("a")


@contextmanager
def live_line(config: RunConfig, out: TextIO | None = None) -> Iterator[None]:
    """Prints each new line of metrics.jsonl while the block runs; on a terminal, over the one before. Events too."""
    out = out or sys.stdout
    done = Event()
    # Of earlier starts of this run; read before the block can write.
    before = last_line(config.folder / METRICS)
    told = len(read_lines(config.folder / EVENTS))

    def follow() -> None:
        nonlocal told
        shown = before["step"] if before else None
        ended = False
        while not ended:
            ended = done.wait(0.5)  # one more look after the block has ended
            for event in read_lines(config.folder / EVENTS)[told:]:
                told += 1
                if text := describe_event(event):
                    print(("\r\033[K" if out.isatty() else "") + text, file=out, flush=True)
            entry = last_line(config.folder / METRICS)
            if entry and entry["step"] != shown:
                shown = entry["step"]
                print(describe(entry, config), file=out, flush=True, end="\r" if out.isatty() else "\n")
        if out.isatty() and shown is not None:
            print(file=out, flush=True)

    thread = Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def describe(metrics: dict[str, Any], config: RunConfig) -> str:
    """One line for the screen."""
    left = (config.train.steps * config.train.global_batch - metrics["samples"]) / metrics["samples_per_second"]
    temperatures = "/".join(f"{v:.3f}" for k, v in metrics.items() if k.startswith("temperature/"))
    of_pairs = f"temperature {temperatures}  " if temperatures else ""
    bad = f"  quarantined {metrics['rows_quarantined']:,}" if metrics["rows_quarantined"] else ""
    return (
        f"samples {metrics['samples']:>9,}/{config.train.steps * config.train.global_batch:,}  "
        f"loss {metrics['loss']:.4f}  {of_pairs}"
        f"{metrics['samples_per_second']:,.1f} samples/s  waiting for data {metrics['wait_share']:4.0%}  "
        f"ETA {int(left // 3600)}:{int(left % 3600 // 60):02d}:{int(left % 60):02d}{bad}"
    )


def describe_event(event: dict[str, Any]) -> str | None:
    """One line for the screen; None for what happens all the time, and for what the job ends with anyway."""
    if event["event"] in ("checkpoint", DIVERGED) or (event["event"] == "start" and event["step"] == 0):
        return None
    fields = "  ".join(f"{name} {value}" for name, value in event.items() if name not in ("time", "event", "step"))
    where = "" if event["step"] is None else f" at step {event['step']:,}"
    return f"-- {event['event']}{where}: {fields}"
