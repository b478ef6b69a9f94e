"""Mines on Ray: the tasks of one phase after the other, on whatever machines there are."""

import logging
import time
from collections.abc import Callable, Iterator

import numpy as np
import pyarrow as pa
import ray
import ray.data
import ray.exceptions

from muser_dist.data.executor import TaskNumbers, set_context
from muser_dist.data.session import DEATHS, connected, error_of_user
from muser_dist.errors import ClusterError
from muser_dist.interactions.phases import PHASES, Phase, Phases

SHOWN_SECONDS = 60.0
"""After which a network file system shows what other nodes have written, where it keeps a list of a folder's files."""


def run_phases(phases: Phases, progress: Callable[[Phase], Callable[[int, int], None]]) -> None:
    """Does the tasks that are missing, a phase after the other. What dies with a node is done again.

    Args:
        phases: of the job; its folder must be seen by every node.
        progress: for a phase, what is called with (tasks done, tasks).

    Raises:
        ClusterError: no cluster answers, it has no CPU, its nodes do not see the folder, or a task fails again and
            again.
        DataError: of a file of the log.
    """
    with connected():
        for phase in PHASES:
            show, total = progress(phase), phases.tasks(phase)
            missing = phases.missing(phase)
            show(total - len(missing), total)
            while missing:
                cpus = int(ray.cluster_resources().get("CPU", 0))
                if cpus < 1:
                    raise ClusterError("the cluster has no CPU for mining; start nodes with --num-cpus")
                try:
                    for done, _ in enumerate(_results(phases, phase, missing, cpus), start=1):
                        show(total - len(missing) + done, total)
                except ray.exceptions.RayError as error:
                    if (cause := error_of_user(error)) is not None:
                        raise cause from None
                    if not isinstance(error, DEATHS) or len(phases.missing(phase)) == len(missing):
                        raise ClusterError(f"mining ended: {str(error).strip().splitlines()[-1]}") from error
                waited = time.monotonic() + SHOWN_SECONDS
                while len(left := phases.missing(phase)) == len(missing) and time.monotonic() < waited:
                    time.sleep(1.0)
                if len(left) == len(missing):
                    raise ClusterError(
                        f"mining ended: {len(left)} tasks of {phase!r} are done, and nothing of them lies in "
                        f"{phases.folder}; every node must see that folder"
                    )
                missing = left


def _results(phases: Phases, phase: Phase, numbers: list[int], slots: int) -> Iterator[None]:
    """Yields once for each task that has ended."""
    table = np.array(numbers, np.int64)

    def run(batch: dict[str, np.ndarray]) -> Iterator[pa.Table]:
        for task in table[batch["id"]].tolist():
            phases.run(phase, task)
            yield pa.table({"task": [task]})

    set_context(slots)
    logging.getLogger("ray.data").setLevel(logging.ERROR)  # progress says what matters
    dataset = TaskNumbers(len(table), slots).dataset().map_batches(run, batch_size=None, num_cpus=1)
    for _ in dataset.iter_batches(batch_size=None, batch_format="numpy"):
        yield
