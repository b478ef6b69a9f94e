"""Reads an epoch on a cluster of three raylets, one of which is killed in the middle; writes what came.

When it dies the buffer is full, as it is where training is slower than decoding.
"""

import json
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import ray
from ray.cluster_utils import Cluster

from muser_dist.data import pipeline
from muser_dist.data.chunks import Chunk, ChunkReader, chain_digest, chunk_digest
from muser_dist.data.executor import execution_options
from tests.small import reader_of, small_config

ROWS, CHUNK = 1024, 8


class Telling(ChunkReader):
    """A reader whose chunks tell, in place of their source, which node decoded them; a file grows with each."""

    decoded: Path

    def read(self, slots: Iterable[int]) -> Iterator[Chunk]:
        for chunk in super().read(slots):
            with self.decoded.open("a") as file:
                file.write("chunk\n")
            yield chunk | {"source": [ray.get_runtime_context().get_node_id()] * CHUNK}


def wait_until_full(decoded: Path) -> None:
    """Until nobody has decoded anything for a while."""
    before = -1
    while before != (now := decoded.stat().st_size):
        before = now
        time.sleep(3)


def main(pattern: str, result: str) -> None:
    # A raylet that is gone refuses the check at once. One that lives may be slow to answer on a busy machine: were it
    # taken for dead as well, nothing might be left to decode.
    fast = {"health_check_period_ms": 500, "health_check_timeout_ms": 10_000, "health_check_failure_threshold": 2}
    cluster = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 0, "_system_config": fast | {"health_check_initial_delay_ms": 0}},
    )
    victim, _ = cluster.add_node(num_cpus=1), cluster.add_node(num_cpus=1)
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    pipeline.ROWS_PER_TASK = 64  # many tasks, so that both nodes have some
    # Crops of 2 s: blocks that lie in the store of the node that made them.
    config = small_config(data={"crop_seconds": 2.0}, train={"global_batch": 64, "chunk": CHUNK, "samples": ROWS})
    reader = reader_of(config, pattern)
    planned = pipeline.plan_digest(reader, config.train.steps)
    reader.__class__ = Telling
    reader.decoded = Path(f"{result}.decoded")
    dataset = pipeline.ray_dataset(reader, 0, config.train.steps, slots=2)
    dataset.context.execution_options = execution_options(16, reader.chunk_bytes, 2, 1)
    (shard,) = dataset.streaming_split(1, equal=True)
    digest, decoded_by, died_after = "", [], None
    for block in shard.iter_batches(batch_size=None, batch_format="numpy", prefetch_batches=2):
        chunk = {name: column[0] for name, column in block.items()}
        moment = int(chunk["step"]), int(chunk["chunk"])
        digest = chain_digest(digest, chunk_digest(*moment, list(chunk["key"]), chunk["crop"]))
        decoded_by.append(chunk["source"][0])
        if died_after is None and victim.node_id in decoded_by:
            died_after = len(decoded_by)
            wait_until_full(reader.decoded)
            cluster.remove_node(victim, allow_graceful=False)
            # Nothing comes in its place: what it had in hand must be done by the other, which has work of its own.
    ray.shutdown()
    cluster.shutdown()  # it also takes back the address under which the next `ray.init("auto")` would look for it
    outcome = {"chunks": len(decoded_by), "died_after": died_after, "delivered": digest, "planned": planned}
    Path(result).write_text(json.dumps(outcome))  # not printed: Ray prints the log of a raylet that dies


if __name__ == "__main__":
    main(*sys.argv[1:])
