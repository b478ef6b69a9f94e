"""A driver with a Ray of its own: how large a run starts it, and where scores during training are computed."""

import json
import sys
import time
from pathlib import Path

import ray
import torch.distributed as dist

from muser_dist.models.model import MultimodalModel
from muser_dist.train.cluster import connect
from muser_dist.train.validation import Validation
from tests.shardmaker import write_shards
from tests.small import index_of, small_config


def sizes(folder: Path) -> dict[str, float]:
    """Resources of a Ray that is started for three stages, and for two such runs at a time."""
    stages = [
        small_config(train={"workers": workers, "resource": resource}, data={"decode_slots": slots})
        for workers, slots, resource in ((1, 6, ""), (4, 2, "trainer"))
    ]
    connect(stages[0], runs=2, later=stages[1:])
    return {name: ray.cluster_resources()[name] for name in ("CPU", "trainer")}


def scores(folder: Path) -> list[dict[str, object]]:
    """What a validation gives while another process has the only GPU, which there is by name alone, and after."""
    ray.init("local", num_cpus=2, num_gpus=1, log_to_driver=False)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'group'}", rank=0, world_size=1)
    config = small_config(train={"gpu": True}, storage=str(folder), name="run")
    config.folder.mkdir()
    index_of(write_shards(folder / "data", [12])).save(config.folder / "val-index.json")
    holder = ray.remote(num_gpus=1)(Holder).remote()
    ray.get(holder.here.remote())
    found = []
    for _ in range(2):
        validation = Validation(config)
        validation.start(4, MultimodalModel(config).state_dict())
        while (scored := validation.poll()) is None:
            time.sleep(0.1)
        found.append(scored[1])
        ray.kill(holder)
        while ray.available_resources().get("GPU", 0) < 1:
            time.sleep(0.1)
    return found


class Holder:
    def here(self) -> None:
        pass


if __name__ == "__main__":
    what, out = sys.argv[1:]
    found = {"sizes": sizes, "scores": scores}[what](Path(out))
    (Path(out) / "found.json").write_text(json.dumps(found))
    ray.shutdown()
