"""The runs of a table: a process of one thread each, some at a time; what is done is kept.

A run that was kept may be of an earlier commit, and of a config that is no longer asked for: so it says both.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from record import commit, say

from muser_dist.config import RunConfig, differences, from_dict, to_dict

Job = tuple[str, int]
"""Variant and seed."""

UNKNOWN = "unknown commit"


def start(
    script: str,
    given: list[str],
    folders: Mapping[Job, Path],
    configs: Mapping[Job, RunConfig],
    processes: int,
    after: Mapping[Job, Job] | None = None,
) -> None:
    """Starts `script`, with what it was given and --run VARIANT SEED, for each folder that lacks its scores.json.

    Args:
        configs: that they are asked to train; a folder with another one is not used.
        after: jobs that go on from another one, which comes before them in `folders`.

    Raises:
        SystemExit: one fails, and its log.txt says why; or what is in a folder is of another config.
    """
    for job, folder in folders.items():
        _check_kept(folder, configs[job])

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


def origin(config: RunConfig) -> dict[str, Any]:
    """What a run says of itself in its files: the commit that makes it, and all of the config that was asked for."""
    return {"commit": commit(), "config": to_dict(config)}


def write_scores(folder: Path, scores: dict[str, Any]) -> None:
    """Writes scores.json: training.json and these, with the commit that scores where another one trained."""
    about = json.loads((folder / "training.json").read_text())
    trained, scored = about.get("commit", UNKNOWN), commit()
    made = trained if trained == scored else f"{trained}, scored at {scored}"
    (folder / "scores.json").write_text(json.dumps(about | {"commit": made} | scores))


def commits(rows: Iterable[dict[str, Any]]) -> list[str]:
    """The commits that made these scores, each once."""
    return list(dict.fromkeys(row.get("commit", UNKNOWN) for row in rows))


def scores_of(folder: Path) -> dict[str, Any]:
    """A run's scores.json without its config, which is that of the recipe at its commit."""
    scores: dict[str, Any] = json.loads((folder / "scores.json").read_text())
    scores.pop("config", None)
    return scores


def _check_kept(folder: Path, config: RunConfig) -> None:
    for name in ("training.json", "scores.json"):
        there = json.loads((folder / name).read_text()).get("config") if (folder / name).exists() else None
        if there and (changed := differences(from_dict(there, str(folder / name)), config)):
            raise SystemExit(
                f"{folder} holds a run of another config ({'; '.join(changed[:4])}{' ...' if changed[4:] else ''}); "
                "delete it to run it again, or give another --work"
            )


_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    # glibc keeps what a step frees for the next one: given back to the kernel, its pages cost up to half of the time.
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "8000000000",
}
