"""The runs of a table: a process of one thread each, some at a time; what is done is kept."""

import os
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from record import say

Job = tuple[str, int]
"""Variant and seed."""


def start(
    script: str,
    given: list[str],
    folders: Mapping[Job, Path],
    processes: int,
    after: Mapping[Job, Job] | None = None,
) -> None:
    """Starts `script`, with what it was given and --run VARIANT SEED, for each folder that lacks its scores.json.

    Args:
        after: jobs that go on from another one, which comes before them in `folders`.

    Raises:
        SystemExit: one fails; its log.txt says why.
    """

    def run(job: Job, first: Future[None] | None) -> None:
        if first:
            first.result()
        folder, (variant, seed) = folders[job], job
        if (folder / "scores.json").exists():
            return
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "log.txt").open("w") as log:
            command = [sys.executable, script, *given, "--run", variant, str(seed)]
            done = subprocess.run(command, stdout=log, stderr=log, env=os.environ | _ENVIRONMENT)
        if done.returncode:
            raise SystemExit(f"{variant}, seed {seed}: failed; {folder / 'log.txt'} says why")
        say(f"{variant}, seed {seed}: done")

    started: dict[Job, Future[None]] = {}
    with ThreadPoolExecutor(processes) as pool:
        # Taken up in this order, so that what a job waits for is always running or done.
        for job in folders:
            first = after.get(job) if after else None
            started[job] = pool.submit(run, job, started[first] if first else None)
        for future in started.values():
            future.result()


_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    # glibc keeps what a step frees for the next one: given back to the kernel, its pages cost up to half of the time.
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "8000000000",
}
