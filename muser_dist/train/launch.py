"""From a config to a trained, scored model: preflight, Ray, the trainer, scores, the page."""

import json
import logging
import math
import os
import signal
import socket
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
import ray.data
import ray.exceptions
import ray.train
import ray.train.torch
import torch

from muser_dist.config import RunConfig, TrainConfig, to_dict
from muser_dist.data.chunks import ChunkReader
from muser_dist.data.pipeline import known_ids, plan_digest, training_reader
from muser_dist.data.session import join
from muser_dist.data.shards import ShardIndex, index_shards
from muser_dist.data.storage import Storage
from muser_dist.errors import ClusterError, DataError, MuserError, ScoringError
from muser_dist.evaluate.evaluator import evaluate
from muser_dist.evaluate.report import write_report
from muser_dist.evaluate.summary import describe
from muser_dist.files import write_whole
from muser_dist.models.weights import REPORT, as_json, report_weights
from muser_dist.muser import Muser
from muser_dist.train.dealer import NOTHING, Dealer
from muser_dist.train.export import example
from muser_dist.train.find_chunk import find_chunk
from muser_dist.train.loop import MODEL, STOPPED, train_worker
from muser_dist.train.preflight import (
    VAL,
    check_rows,
    check_settings,
    describe_plan,
    find_shards,
    load_index,
    load_label_values,
    load_partners,
    prepare_folder,
)
from muser_dist.train.runlog import EVENTS, METRICS, last_line, live_line
from muser_dist.train.store import CheckpointStore

EVALUATION = "evaluation.json"

_RESIZE_SECONDS = 10.0
"""How often a run with a range of workers looks whether there is room for more."""


def print_digest(config: RunConfig) -> None:
    """Prints the digest of the rows that a run of this config is dealt, without a step of it.

    Raises:
        MuserError: as `pretrain`.
    """
    check_settings(config)
    storage = Storage.of(config.data)
    shards = find_shards(config, storage)
    indices = [
        index_shards(storage, shards[source.name], f"data.{source.name}") for source in config.data.training_sources()
    ]
    with tempfile.TemporaryDirectory() as folder:
        partners = load_partners(config, indices, storage, Path(folder))
        reader = training_reader(config, indices, storage, partners=partners)
        _print_digests(config, reader)


def _print_digests(config: RunConfig, reader: ChunkReader) -> None:
    print(f"{plan_digest(reader, config.train.steps)} planned up to step {config.train.steps:,}")
    if (line := last_line(config.folder / METRICS)) is not None:
        print(f"{line['digest']} delivered up to step {line['step']:,} by {config.folder}")
        if line["step"] < config.train.steps:
            print(f"{plan_digest(reader, line['step'])} planned up to there")


def print_chunk(config: RunConfig) -> None:
    """Prints the largest chunk that fits into the memory of a worker, tried where a worker would be.

    Raises:
        MuserError: none fits, or a step fails for another reason.
    """
    check_settings(config)
    config = replace(config, data=config.data.with_absolute_paths())
    connect(config)
    train = config.train

    def tried() -> int:
        return find_chunk(config, torch.device("cuda" if train.gpu else "cpu"))

    resources = {train.resource: 1.0} if train.resource else {}
    task = ray.remote(
        num_cpus=train.cpus_per_worker, num_gpus=train.gpu_share * train.gpu, resources=resources, max_retries=0
    )
    try:
        chunk = ray.get(task(tried).remote())
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, MuserError):
            raise error.cause from None
        raise
    passes = -(-train.global_batch // (chunk * train.worker_range[0]))
    print(
        f"--train.chunk {chunk} is the largest that fits: {passes} passes of a worker in a step of "
        f"{train.global_batch} rows"
    )


def pretrain(config: RunConfig, command: list[str]) -> Path:
    """Runs a whole pretraining job: train (or go on), export, score, draw the page.

    Args:
        config: the run, with a name.
        command: the command line that asked for it, kept in run.json.

    Returns:
        the run's folder.

    Raises:
        ScoringError: the model is there, and cannot be scored.
        MuserError: something else is wrong that the user can mend; the message says what and how.
    """
    parameters = check_settings(config)
    storage = Storage.of(config.data)
    shards = find_shards(config, storage)
    config = replace(config, storage=str(Path(config.storage).resolve()))
    if (place := config.train.checkpoint_storage) and "://" not in place:
        config = replace(config, train=replace(config.train, checkpoint_storage=str(Path(place).resolve())))
    config = replace(config, data=config.data.with_absolute_paths(), model=config.model.with_absolute_paths())
    matches = report_weights(config)
    prepare_folder(config, command)
    if matches:
        print("\n".join(map(str, matches)), flush=True)
        write_whole(config.folder / REPORT, as_json(matches))

    indices = [load_index(config, source, storage, shards[source.name]) for source in config.data.training_sources()]
    val_index = load_index(config, VAL, storage, shards[VAL.name]) if config.data.val else None
    known = known_ids(val_index, storage, config.evaluate.rows) if val_index else None
    check_rows(config, indices)
    config = load_label_values(config, indices, storage)
    reader = training_reader(config, indices, storage, known, load_partners(config, indices, storage))
    print(f"Run {config.folder}: {describe_plan(config, indices, reader.plan, parameters)}", flush=True)

    if (config.folder / MODEL / "config.json").exists():
        print("Already trained; nothing is trained again.", flush=True)
    else:
        train(config, reader)
    score(config, val_index, storage)
    return config.folder


# --- Ray ---


def connect(config: RunConfig, runs: int = 1, dashboard: bool = False) -> None:
    """Joins the running cluster, or starts Ray on this machine; checks that workers and decoding fit.

    Args:
        config: a run.
        runs: like it that are to go on at a time, where Ray is started here.
        dashboard: whether it is started with its dashboard, which takes time that training could have.

    Raises:
        ClusterError: they do not fit; nothing was started in vain.
    """
    t, slots, (least, most) = config.train, config.data.decode_slots, config.train.worker_range
    os.environ |= {name: value for name, value in watchfulness(t).items() if name not in os.environ}
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
            ray.init(
                "local",
                num_cpus=math.ceil(runs * (most * t.cpus_per_worker + slots)),
                resources={t.resource: runs * most} if t.resource else None,
                include_dashboard=dashboard,
                dashboard_port=port,
                **quiet,
            )
            print(f"Started Ray on this machine: {runs * most} workers, {runs * slots} decoding slots", flush=True)
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


def train(config: RunConfig, reader: ChunkReader) -> None:
    """Trains from the run's last checkpoint, through worker deaths, to the exported model.

    Raises:
        MuserError: training stopped for good.
    """
    connect(config)
    stopped = config.folder / STOPPED
    stopped.unlink(missing_ok=True)
    store = CheckpointStore(config, Storage.of(config.data))
    if step := max(store.steps(), default=0):
        print(f"Going on from the checkpoint at step {step:,}", flush=True)
    least, most = config.train.worker_range
    trainer = ray.train.torch.TorchTrainer(
        train_worker,
        train_loop_config={"config": to_dict(config)},
        datasets=NOTHING,
        dataset_config=Dealer(config, reader),
        torch_config=ray.train.torch.TorchConfig(
            backend="cpu:gloo,cuda:nccl" if config.train.gpu else "gloo", timeout_s=math.ceil(config.train.hang_seconds)
        ),
        scaling_config=ray.train.ScalingConfig(  # type: ignore[call-arg]  # mypy sees the class of Ray Train V1
            num_workers=least if least == most else (least, most),  # type: ignore[arg-type]
            elastic_resize_monitor_interval_s=_RESIZE_SECONDS,
            use_gpu=config.train.gpu,
            resources_per_worker={"CPU": config.train.cpus_per_worker}
            | ({"GPU": config.train.gpu_share} if config.train.gpu else {})
            | ({config.train.resource: 1} if config.train.resource else {}),
        ),
        run_config=ray.train.RunConfig(
            name=config.name,
            storage_path=config.storage,
            failure_config=ray.train.FailureConfig(max_failures=config.train.max_failures),
        ),
    )
    try:
        with live_line(config):
            trainer.fit()
    except SystemExit:  # so Ray's own handler ends a fit() at Ctrl-C, with status 0
        raise KeyboardInterrupt from None
    except ray.train.TrainingFailedError as error:
        if stopped.exists():
            raise MuserError(stopped.read_text()) from None
        raise MuserError(
            f"training failed, after as many restarts as train.max_failures ({config.train.max_failures}) allows: "
            f"{_last_line(error)}\nThe same command goes on from step {max(store.steps(), default=0):,}."
        ) from error
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, signal.default_int_handler)  # fit() leaves its own behind
    if stopped.exists():
        raise MuserError(stopped.read_text())


def _last_line(error: Exception) -> str:
    failures = getattr(error, "worker_failures", {})
    text = str(next(iter(failures.values()), error)).strip()
    return text.splitlines()[-1] if text else type(error).__name__


# --- After training ---


def score(config: RunConfig, index: ShardIndex | None, storage: Storage) -> None:
    """Scores the exported model, draws the page, and prints where everything is.

    Raises:
        ScoringError: no row of data.val can be used.
    """
    folder = config.folder
    if index is not None:
        start = time.monotonic()
        try:
            evaluation = evaluate(Muser.from_pretrained(folder / MODEL), config, index, storage)
        except DataError as error:
            write_report(folder)  # the training is worth its page, whatever is wrong with the scoring
            with (folder / EVENTS).open("a") as file:
                event = {"time": time.time(), "event": "not scored", "step": config.train.steps, "error": str(error)}
                file.write(json.dumps(event) + "\n")
            raise ScoringError(
                f"{folder / MODEL} is trained, but data.val does not score it: {error}\nOther shards do: "
                f"python jobs/evaluate.py {folder} --val 'OTHER/val-*.tar'. The same command tries these again."
            ) from None
        seconds = time.monotonic() - start
        write_whole(folder / EVALUATION, json.dumps({"data": list(config.data.val)} | evaluation, indent=2))
        print(f"\nScored {evaluation['rows']} rows of data.val in {seconds:.0f} s\n{describe(evaluation)}")
    else:
        print("\nNot scored: no --data.val was given")
    page = write_report(folder)
    trial = f"print({example(config, 'm')})"
    print(
        f"\nModel   {folder / MODEL}\nPage    {page}\nNumbers {folder / 'metrics.jsonl'}\n\n"
        f"Next: open the page, or try the model:\n"
        f"  python -c \"from muser_dist import Muser; m = Muser.from_pretrained('{folder / MODEL}'); {trial}\"\n"
        f"  python jobs/evaluate.py {folder} --val 'OTHER/val-*.tar'",
        flush=True,
    )
