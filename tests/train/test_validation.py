"""What scores a model during training takes nothing from those that train."""

import pytest
import ray
import torch
import torch.distributed as dist

from muser_dist.models.model import MultimodalModel
from muser_dist.train.validation import Validation
from tests.shardmaker import write_shards
from tests.small import index_of, small_config


class Task:
    """A task of the cluster that says what it was given, and runs in place."""

    def __init__(self, function) -> None:
        self.function = function

    def options(self, **resources) -> "Task":
        self.resources = resources
        return self

    def remote(self, *arguments) -> "Task":
        self.arguments = arguments
        return self


@pytest.fixture
def cluster(monkeypatch):
    """A cluster whose tasks see all GPUs of their machine, as Ray's that have none do; its free resources."""
    free: dict[str, float] = {}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    monkeypatch.setattr(ray, "available_resources", lambda: free)
    monkeypatch.setattr(ray, "remote", Task)
    monkeypatch.setattr(ray, "wait", lambda tasks, timeout: (tasks, []))
    monkeypatch.setattr(ray, "get", lambda task: task.function(*task.arguments))
    return free


def started(tmp_path, gpu: bool) -> tuple[Validation, Task]:
    index = index_of(write_shards(tmp_path / "data", [12]))
    config = small_config(train={"gpu": gpu}, storage=str(tmp_path), name="run")
    config.folder.mkdir()
    index.save(config.folder / "val-index.json")
    validation = Validation(config)
    validation.start(4, MultimodalModel(config).state_dict())
    return validation, validation._task[1]


@pytest.mark.parametrize(("gpu", "free"), [(True, 0.0), (True, 0.5), (False, 1.0)])
def test_without_a_gpu_of_its_own_it_computes_on_cpus(tmp_path, cluster, gpu, free):
    cluster["GPU"] = free
    validation, task = started(tmp_path, gpu)
    assert task.resources["num_gpus"] == 0
    step, scores = validation.poll()
    assert step == 4 and 0 < scores["val_MRR"] <= 1 and "error" not in scores


def test_it_computes_on_the_gpu_that_it_was_given(tmp_path, cluster):
    cluster["GPU"] = 1.0
    _, task = started(tmp_path, gpu=True)
    assert task.resources["num_gpus"] == 1 and task.arguments[-1] == "cuda"
