"""The runs of a table: a process of one thread each, some at a time; what is done is kept."""

import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from record import say


def start(script: str, given: list[str], folders: Mapping[tuple[str, int], Path], processes: int) -> None:
    """Starts `script`, with what it was given and --run VARIANT SEED, for each folder that lacks its scores.json.

    Raises:
        SystemExit: one fails; its log.txt says why.
    """

    def run(job: tuple[str, int]) -> None:
        folder, (variant, seed) = folders[job], job
        if (folder / "scores.json").exists():
            return
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "log.txt").open("w") as log:
            command = [sys.executable, script, *given, "--run", variant, str(seed)]
            done = subprocess.run(command, stdout=log, stderr=log)
        if done.returncode:
            raise SystemExit(f"{variant}, seed {seed}: failed; {folder / 'log.txt'} says why")
        say(f"{variant}, seed {seed}: done")

    with ThreadPoolExecutor(processes) as pool:
        list(pool.map(run, folders))
