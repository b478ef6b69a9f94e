"""A run on 2, then 1, then 3 workers: raylets of a local cluster are killed and added while it trains.

With "preempt" the first is drained, as a cloud does that takes a machine back, before it is killed; none is added.
"""

import json
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import ray
from ray.cluster_utils import Cluster

from muser_dist.config import ObjectiveConfig, RunConfig
from muser_dist.train.launch import pretrain
from muser_dist.train.runlog import EVENTS, METRICS, last_line, read_lines
from tests.cluster.test_job import free_port
from tests.small import small_config

STEPS, BATCH = 450, 12
GRACE_SECONDS = 10
TRAINER = {"trainer": 1}
BIN = Path(sys.executable).parent


def run_config(corpus: str, storage: str, steps: int = STEPS) -> RunConfig:
    return small_config(
        train={
            "workers": "1:3",
            "resource": "trainer",
            "cpus_per_worker": 0,
            "global_batch": BATCH,
            "chunk": 4,
            "samples": steps * BATCH,
            "warmup_samples": 10 * BATCH,
            "lr": 1e-4,
            "checkpoint_samples": 20 * BATCH,
            "max_failures": 5,
        },
        data={"train": (f"{corpus}/train-*.tar",), "max_bad_share": 1.0},
        objective=ObjectiveConfig(name="tests.cluster.plugins:faulty"),
        name="elastic",
        storage=storage,
    )


def main(corpus: str, storage: str, mode: str = "kill") -> None:
    fast = {"health_check_period_ms": 1000, "health_check_timeout_ms": 1000, "health_check_failure_threshold": 3}
    cluster = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 2, "_system_config": fast | {"health_check_initial_delay_ms": 0}},
    )

    first, _ = (cluster.add_node(num_cpus=0, resources=TRAINER) for _ in range(2))
    joined: list[subprocess.Popen] = []
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    config = run_config(corpus, storage, STEPS if mode == "kill" else 250)
    ended = threading.Event()

    def wait_for(condition: Callable[[], bool]) -> None:
        while not condition() and not ended.wait(0.2):
            pass

    def reached(step: int, workers: int) -> bool:
        starts = [event for event in read_lines(config.folder / EVENTS) if event["event"] == "start"]
        line = last_line(config.folder / METRICS)
        return bool(starts and starts[-1]["workers"] == workers and line and line["step"] >= starts[-1]["step"] + step)

    def disturb() -> None:
        wait_for(lambda: reached(30, 2))
        if mode == "preempt":
            drain = [BIN / "ray", "drain-node", "--address", cluster.address, "--node-id", first.node_id]
            drain += ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "taken back"]
            drain += ["--deadline-remaining-seconds", str(GRACE_SECONDS)]
            subprocess.run(drain, check=True)
            ended.wait(GRACE_SECONDS)
        cluster.remove_node(first, allow_graceful=False)
        if mode == "kill":
            wait_for(lambda: reached(30, 1))
            for alive in (3, 4):  # the class above can start nodes in the main thread alone
                # One after the other, and with another port: nodes of one machine would choose the same ones.
                command = [BIN / "ray", "start", "--address", cluster.address, "--num-cpus", "0", "--block"]
                command += ["--resources", json.dumps(TRAINER), "--dashboard-agent-listen-port", str(free_port())]
                joined.append(subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
                wait_for(lambda alive=alive: sum(node["Alive"] for node in ray.nodes()) >= alive)

    try:
        with ThreadPoolExecutor(1) as pool:
            disturbed = pool.submit(disturb)
            try:
                pretrain(config, ["test"])
            finally:
                ended.set()
            disturbed.result()
    finally:
        for node in joined:
            node.terminate()  # it stops what it has started
            node.wait()
        ray.shutdown()
        cluster.shutdown()
    Path(storage, "outcome.json").write_text(json.dumps(read_lines(config.folder / EVENTS)))


if __name__ == "__main__":
    main(*sys.argv[1:])
