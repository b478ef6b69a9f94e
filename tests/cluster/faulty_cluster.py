"""A cluster of two raylets, one of them with another muser_dist and a tiny object store; stops when its input ends."""

import os
import sys

from ray.cluster_utils import Cluster

TINY = 80 << 20


def main(other_code: str) -> None:
    cluster = Cluster(
        initialize_head=True,
        head_node_args={"node_name": "sound", "num_cpus": 1, "object_store_memory": 512 << 20},
    )
    path = os.pathsep.join(filter(None, [other_code, os.environ.get("PYTHONPATH")]))
    cluster.add_node(node_name="faulty", num_cpus=1, object_store_memory=TINY, env_vars={"PYTHONPATH": path})
    print(cluster.address, flush=True)
    sys.stdin.read()
    cluster.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])
