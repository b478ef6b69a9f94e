"""The Ray on which a run trains: joined or started, and whether there is room on it."""

import logging
import math
import os
import socket
from collections.abc import Sequence
from typing import Any

import ray

from muser_dist.config import RunConfig, TrainConfig
from muser_dist.data.session import join
from muser_dist.errors import ClusterError


def connect(config: RunConfig, runs: int = 1, dashboard: bool = False, later: Sequence[RunConfig] = ()) -> None:
    """Joins the running cluster, or starts Ray on this machine; checks that workers and decoding fit.

    Args:
        config: a run.
        runs: like it that are to go on at a time, where Ray is started here.
        dashboard: whether it is started with its dashboard, which takes time that training could have.
        later: stages that follow on the same Ray.

    Raises:
        ClusterError: they do not fit; nothing was started in vain.
    """
    stages = (config, *later)
    os.environ |= {name: value for name, value in watchfulness(config.train).items() if name not in os.environ}
    if not ray.is_initialized():
        address = os.environ.get("RAY_ADDRESS", "auto")
        quiet: Any = {"logging_level": logging.ERROR, "log_to_driver": False}  # the live line says what matters
        try:
            if address == "local":
                raise ConnectionError
            join(address, **quiet)
            print(f"Joined the Ray cluster at {ray.get_runtime_context().gcs_address}", flush=True)
        except ConnectionError:
            if address not in ("auto", "local"):
                raise ClusterError(f"RAY_ADDRESS is {address}, but no Ray cluster answers there") from None
            # By its port, or Ray's processes would ask whichever cluster of this machine they find first.
            port = _free_port() if dashboard else None
            if port:
                os.environ["RAY_API_SERVER_ADDRESS"] = f"http://127.0.0.1:{port}"
            # As many logical CPUs as are asked for, however few there are: two workers on two
            # cores must leave a slot to decode, or the job would wait for itself.
            cpus, resources = needed(stages)
            ray.init(
                "local",
                num_cpus=math.ceil(runs * cpus),
                resources={name: runs * number for name, number in resources.items()},
                include_dashboard=dashboard,
                dashboard_port=port,
                **quiet,
            )
            most, slots = (max(s.train.worker_range[1] for s in stages), max(s.data.decode_slots for s in stages))
            print(f"Started Ray on this machine: {runs * most} workers, {runs * slots} decoding slots", flush=True)
    for stage in stages:
        _check_room(stage.train, stage.data.decode_slots)


def _check_room(t: TrainConfig, slots: int) -> None:
    """Raises ClusterError where workers and a decoding slot do not fit into the cluster."""
    least, _ = t.worker_range
    have = ray.cluster_resources()
    cpus, gpus = have.get("CPU", 0.0), int(have.get("GPU", 0))
    needed = least * t.cpus_per_worker
    if t.gpu and gpus < least * t.gpu_share:
        raise ClusterError(
            f"train.workers is {t.workers}, but the cluster has {gpus} GPUs; lower it, or drop --train.gpu"
        )
    if t.resource and (there := int(have.get(t.resource, 0))) < least:
        raise ClusterError(
            f"train.workers is {t.workers}, but the cluster has {there} of the resource {t.resource!r} "
            f"(train.resource); start nodes with --resources '{{\"{t.resource}\": N}}'"
        )
    if needed > cpus:
        raise ClusterError(
            f"{least} workers reserve {needed:g} CPUs, but the cluster has {cpus:g}; give fewer --train.workers, a "
            f"smaller --train.cpus-per-worker, or more nodes (ray start --num-cpus N declares logical CPUs)"
        )
    nodes = [node["Resources"].get("CPU", 0.0) for node in ray.nodes() if node["Alive"]]
    if t.cpus_per_worker and sum(int(node // t.cpus_per_worker) for node in nodes) < least:
        raise ClusterError(
            f"{least} workers of {t.cpus_per_worker:g} CPUs do not fit on nodes of "
            f"{', '.join(f'{node:g}' for node in nodes)} CPUs; lower --train.cpus-per-worker or --train.workers"
        )
    if needed + 1 > cpus:
        raise ClusterError(
            f"{least} workers reserve {needed:g} of the cluster's {cpus:g} CPUs, which leaves no slot to decode; "
            f"start Ray with --num-cpus {int(needed) + slots} or more, or lower --train.cpus-per-worker"
        )


def needed(stages: Sequence[RunConfig]) -> tuple[float, dict[str, int]]:
    """CPUs and own resources with which each of the stages has all the workers and decoding slots that it asks for."""
    cpus, resources = 0.0, dict[str, int]()
    for stage in stages:
        t, (_, most) = stage.train, stage.train.worker_range
        cpus = max(cpus, most * t.cpus_per_worker + stage.data.decode_slots)
        if t.resource:
            resources[t.resource] = max(most, resources.get(t.resource, 0))
    return cpus, resources


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def watchfulness(train: TrainConfig) -> dict[str, str]:
    """Ray Train's settings, as environment variables, by which it finds dead and hung workers and missing nodes."""
    return {
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "1",
        # Later than the other workers notice: they can say more.
        "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": f"{2 * train.hang_seconds + 30:g}",
        # Until then a node that has just died counts as there (Ray looks every 20 s), and workers wait for it.
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "30",
        # Shutting down waits so long for processes that do not answer; Ray Train does not hand this one on to a
        # cluster that runs already, where it is 30.
        "TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S": "5",
    }
