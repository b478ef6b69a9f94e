"""What the child process of mining.py does: mine a log on Ray or alone, and write how long it took and what it needed.

`python benchmarks/mining_measure.py '{"log": PATTERN, "folder": PATH, "cores": 2, "alone": false, "out": PATH, ...}'`
"""

import json
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from muser_dist.data.config import DataConfig
from muser_dist.data.storage import Storage
from muser_dist.interactions.log import LAYOUTS
from muser_dist.interactions.mining import MiningConfig
from muser_dist.interactions.phases import PHASES, Job, Phases
from muser_dist.interactions.readers import partitions_for, pieces_of
from muser_dist.interactions.split import SplitConfig

STORE_BYTES = 512 << 20
"""Object store: what tasks return is a number each."""


class Watch:
    """Looks once a second at the memory of this process and all below it, and at the size of a folder.

    Memory is the sum of proportional set sizes: what processes share, such as pages of the object store and of mapped
    files, counts once. So it holds the object store as far as it is used.
    """

    def __init__(self, folder: Path) -> None:
        self.peak_bytes = self.peak_disk_bytes = 0
        self._folder = folder
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look_on, daemon=True)
        self._thread.start()

    def _look_on(self) -> None:
        while not self._ended.wait(1.0):
            self._look()

    def stop(self) -> None:
        """Ends with a last look."""
        self._ended.set()
        self._thread.join()
        self._look()

    def _look(self) -> None:
        memory = disk = 0
        root = psutil.Process()
        for process in (root, *root.children(recursive=True)):
            try:
                memory += process.memory_full_info().pss
            except psutil.Error:
                continue  # it has just ended
        for path in self._folder.rglob("*.arrow"):
            try:
                disk += path.stat().st_size
            except FileNotFoundError:
                continue
        self.peak_bytes = max(self.peak_bytes, memory)
        self.peak_disk_bytes = max(self.peak_disk_bytes, disk)


def measure(
    log: str, folder: str, cores: int, alone: bool, mining: dict[str, Any], split: dict[str, Any]
) -> dict[str, Any]:
    """Seconds by phase, peaks, and the summary of the job."""
    storage = Storage.of(DataConfig())
    layout = LAYOUTS["events"]
    pieces = pieces_of(storage, storage.expand([log], "log"), layout)
    job = Job(
        tuple(pieces), layout, MiningConfig(**mining), SplitConfig(**split), None, "", partitions_for(pieces, layout)
    )
    phases = Phases(job, storage, Path(folder))
    phases.claim({})
    watch = Watch(Path(folder))
    begins: dict[str, float] = {}
    started = time.monotonic()
    if alone:
        for phase in PHASES:
            begins[phase] = time.monotonic()
            for task in phases.missing(phase):
                phases.run(phase, task)
    else:
        import ray

        from muser_dist.interactions.job import run_phases

        ray.init(
            "local",
            num_cpus=cores,
            object_store_memory=STORE_BYTES,
            include_dashboard=False,
            log_to_driver=False,
        )

        def progress(phase: str) -> Callable[[int, int], None]:
            begins[phase] = time.monotonic()
            return lambda done, total: None

        run_phases(phases, progress)  # type: ignore[arg-type]
    ended = time.monotonic()
    watch.stop()
    marks = [*begins.values(), ended]
    summary = phases.finish({})
    return {
        "seconds": round(ended - started, 2),
        "startup_seconds": round(marks[0] - started, 2),
        "phase_seconds": {s: round(b - a, 2) for s, a, b in zip(PHASES, marks, marks[1:], strict=False)},
        "peak_gib": round(watch.peak_bytes / 2**30, 3),
        "spilled_gib": round(watch.peak_disk_bytes / 2**30, 3),
        "partitions": job.partitions,
        "summary": {name: summary[name] for name in ("rows", "used", "users", "items", "pairs")},
    }


if __name__ == "__main__":
    arguments = json.loads(sys.argv[1])
    out = Path(arguments.pop("out"))
    out.write_text(json.dumps(measure(**arguments)))
