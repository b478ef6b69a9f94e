"""How large a Ray the job starts by itself, with a stand-in for Ray."""

import pytest
import ray

from muser_dist.config import RunConfig
from muser_dist.errors import ClusterError
from muser_dist.train.cluster import connect
from tests.small import small_config


@pytest.fixture
def started(monkeypatch) -> dict[str, float]:
    """Resources of the Ray that was started."""
    have: dict[str, float] = {}

    def init(address, num_cpus, resources, **_):
        have.update(CPU=float(num_cpus), **(resources or {}))

    monkeypatch.setenv("RAY_ADDRESS", "local")
    monkeypatch.setattr(ray, "is_initialized", lambda: bool(have))
    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "cluster_resources", lambda: have)
    monkeypatch.setattr(ray, "nodes", lambda: [{"Resources": have, "Alive": True}])
    return have


def asking(workers: int, slots: int, resource: str = "") -> RunConfig:
    return small_config(train={"workers": workers, "resource": resource}, data={"decode_slots": slots})


def test_a_ray_of_its_own_has_room_for_the_largest_stage(started):
    stages = (asking(1, 6), asking(4, 2, "trainer"), asking(2, 2, "other"))
    for number, stage in enumerate(stages, 1):
        connect(stage, later=stages[number:])
    assert started == {"CPU": 7.0, "trainer": 4, "other": 2}


def test_room_for_several_runs_at_a_time(started):
    connect(asking(2, 1, "trainer"), runs=3)
    assert started == {"CPU": 9.0, "trainer": 6}


def test_a_later_stage_that_does_not_fit_is_told_at_once(started):
    started["CPU"] = 3.0
    with pytest.raises(ClusterError, match=r"4 workers reserve 4 CPUs, but the cluster has 3"):
        connect(asking(1, 2), later=[asking(4, 2)])
