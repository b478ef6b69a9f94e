"""One Ray cluster of this machine for all tests that need one, apart from any other that runs here."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from tests.cluster.plugins import ARMED
from tests.fatal import install
from tests.shardmaker import bad_samples, sample, write_shard

CPUS = 4


@pytest.fixture(scope="session")
def cluster(tmp_path_factory) -> Iterator[Path]:
    """Starts Ray; gives the folder in which tests arm objectives of plugins.py."""
    os.environ["RAY_ADDRESS"] = "local"
    os.environ[ARMED] = str(tmp_path_factory.mktemp("armed"))
    fatal = install(tmp_path_factory.mktemp("fatal"))  # for the decoders of this cluster's tasks
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(fatal), os.environ.get("PYTHONPATH")]))
    ray.init("local", num_cpus=CPUS, log_to_driver=False)
    yield Path(os.environ[ARMED])
    ray.shutdown()


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    """Training shards with one sample of each kind that cannot be used, and validation shards."""
    folder = tmp_path_factory.mktemp("corpus")
    bad = [(key, members) for key, members, _ in bad_samples()]
    bad.append(("caf\udce9", {"json": b"{}"}))  # a name that is not UTF-8, as old systems wrote it
    for number in range(4):
        good = [(f"piece{i:03d}", sample(i)) for i in range(12 * number, 12 * number + 12)]
        write_shard(folder / f"train-{number:05d}.tar", [*good, *bad[number::4]])
    write_shard(folder / "val-00000.tar", [(f"val{i:03d}", sample(i)) for i in range(100, 130)])
    return folder
