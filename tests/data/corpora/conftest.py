"""One Ray for the tests of this folder: the one that other tests have left running, or a new one."""

from collections.abc import Iterator

import pytest
import ray


@pytest.fixture(scope="package")
def cluster() -> Iterator[None]:
    if ray.is_initialized():
        yield
        return
    ray.init("local", num_cpus=2, log_to_driver=False)
    yield
    ray.shutdown()
