"""Traces of chosen steps, for chrome://tracing or Perfetto.

Beside the operators a trace holds a range "optimizer step N" for each step, and whatever the training
loop names with torch.profiler.record_function: "data", "transfer", "encode", "objective",
"backward", "update". Those cost microseconds while nothing is recorded.
"""

import logging
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, record_function

FOLDER = "profile"
"""Folder in the run's folder that holds the traces."""

logger = logging.getLogger(__name__)


class Profiler:
    """Records a worker's steps `steps[0]` to `steps[1]`, both included, and writes them to a file.

    All ranks record: if only one did, it would be slower than the others, and the trace show them
    waiting. A run that goes on in the middle of the range records what is left of it.

    Args:
        steps: numbers of optimizer steps as in metrics.jsonl, from 1 on; None records nothing.
        folder: the run's folder.
        rank: this worker's number.
    """

    def __init__(self, steps: tuple[int, int] | None, folder: Path, rank: int) -> None:
        self._first, self._last = steps or (0, 0)
        self._folder = folder / FOLDER
        self._rank = rank
        self._trace: torch.profiler.profile | None = None
        self._step: record_function | None = None
        self._recorded: list[int] = []

    def before(self, step: int) -> None:
        """To be called before each optimizer step with its number."""
        self._end_step()
        if self._trace is not None and step > self._last:
            self._write()
        if not self._first <= step <= self._last:
            return
        if self._trace is None:
            activities = [ProfilerActivity.CPU]
            if torch.cuda.is_initialized():  # a worker on CPUs may see GPUs that others have
                activities.append(ProfilerActivity.CUDA)
            self._trace = torch.profiler.profile(activities=activities)
            self._trace.start()
        self._recorded.append(step)
        self._step = record_function(f"optimizer step {step}")
        self._step.__enter__()

    def close(self) -> None:
        """To be called after the last step: writes what was recorded up to there."""
        self._end_step()
        if self._trace is not None:
            self._write()

    def _end_step(self) -> None:
        if self._step is not None:
            self._step.__exit__(None, None, None)
            self._step = None

    def _write(self) -> None:
        assert self._trace is not None
        self._trace.stop()
        path = self._folder / f"rank{self._rank}-steps-{self._recorded[0]}-{self._recorded[-1]}.json.gz"
        temporary = path.with_name(f".part-{path.name}")
        try:
            self._folder.mkdir(exist_ok=True)
            self._trace.export_chrome_trace(str(temporary))
            temporary.replace(path)
        except OSError as error:  # a full disk, say: no reason to train again from the last checkpoint
            logger.warning("The trace of steps %s was not written: %s", self._recorded, error)
        self._trace = None
        self._recorded = []
