"""A run as a driver of its own, for tests that kill it or need a Ray of its own."""

import sys
from pathlib import Path

import numpy as np
import ray

from muser_dist.train.launch import pretrain


def main(corpus: str, storage: str, name: str, *options: str) -> None:
    from tests.cluster.test_faults import run_config

    config = run_config(Path(corpus), Path(storage), name)
    kept = []
    if "full-store" in options:
        ray.init("local", num_cpus=4, object_store_memory=100 << 20, log_to_driver=False)
        kept = [ray.put(np.zeros(5 << 20, np.uint8)) for _ in range(25)]  # more than fits: some is spilled already
    pretrain(config, ["test"])
    assert len(kept) in (0, 25)


if __name__ == "__main__":
    main(*sys.argv[1:])
