"""Runs jobs/embed.py on a cluster of two working raylets, one of which is killed when it has embedded something."""

import sys
import time
from collections.abc import Iterator
from pathlib import Path

import ray
from ray.cluster_utils import Cluster

from jobs.embed import job
from muser_dist.cli import Progress
from muser_dist.data.chunks import Chunk
from muser_dist.embed.songs import SongReader


class Telling(SongReader):
    """Leaves a file named like the node that reads; as slow as real music, so that the node dies with work to do."""

    folder: Path

    def read(self, first: int, stop: int) -> Iterator[Chunk]:
        (self.folder / ray.get_runtime_context().get_node_id()).touch()
        for batch in super().read(first, stop):
            time.sleep(0.1)
            yield batch


def main(folder: str, *arguments: str) -> None:
    fast = {"health_check_period_ms": 500, "health_check_timeout_ms": 500, "health_check_failure_threshold": 2}
    cluster = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 0, "_system_config": fast | {"health_check_initial_delay_ms": 0}},
    )
    nodes = [cluster.add_node(num_cpus=1), cluster.add_node(num_cpus=1)]
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    victim, progress = nodes[0], Progress.__call__

    def kill_when_it_has_worked(self: Progress, done: int, total: int) -> None:
        worked = (Path(folder) / victim.node_id).exists()
        if worked and 0 < done < total and victim in cluster.list_all_nodes():
            cluster.remove_node(victim, allow_graceful=False)
            (Path(folder) / "died").write_text(f"{done} of {total}")
        progress(self, done, total)

    Progress.__call__ = kill_when_it_has_worked  # type: ignore[method-assign]
    songs = SongReader.__init__

    def telling(self: SongReader, *given: object) -> None:
        songs(self, *given)  # type: ignore[arg-type]
        self.__class__ = Telling
        self.folder = Path(folder)  # type: ignore[attr-defined]

    SongReader.__init__ = telling  # type: ignore[method-assign]
    job(list(arguments))
    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])
