"""From a config to a trained, scored model: checks, the run's folder, Ray, the trainer, the page."""

import contextlib
import json
import logging
import os
import platform
import signal
import subprocess
import threading
import time
from dataclasses import replace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import ray
import ray.data
import ray.exceptions
import ray.train
import ray.train.torch
import torch

from muser_dist.config import RunConfig, differences, from_dict, to_dict
from muser_dist.data.executor import execution_options
from muser_dist.data.pipeline import ray_dataset, training_reader
from muser_dist.data.shards import ShardIndex, expand, index_shards
from muser_dist.data.text import check_templates, load_tokenizer
from muser_dist.errors import CheckpointError, ClusterError, ConfigError, DataError, MuserError
from muser_dist.evaluate.evaluator import describe, evaluate
from muser_dist.evaluate.report import write_report
from muser_dist.files import write_whole
from muser_dist.models.model import MultimodalModel
from muser_dist.muser import Muser
from muser_dist.objectives.contrastive import load_objective
from muser_dist.train.checkpoint import committed_step
from muser_dist.train.loop import MODEL, STOPPED, train_worker
from muser_dist.train.metrics import live_line

EVALUATION = "evaluation.json"

# Models of at most this size are tried on one row before anything starts; the machine that a job
# starts from may have little memory.
_TRIED_PARAMETERS = 300_000_000


def pretrain(config: RunConfig, command: list[str]) -> Path:
    """Runs a whole pretraining job: train (or go on), export, score, draw the page.

    Args:
        config: the run, with a name.
        command: the command line that asked for it, kept in run.json.

    Returns:
        the run's folder.

    Raises:
        MuserError: something is wrong that the user can mend; the message says what and how.
    """
    check_paths(config)
    check_templates(config.data.templates)
    load_objective(config.objective)
    parameters = check_model(config)
    if not config.data.train:
        raise ConfigError(
            "no training data: give --data.train 'FOLDER/train-*.tar' (`python jobs/make_shards.py demo` makes some)"
        )
    if config.data.val and "text" not in config.model.towers():
        raise ConfigError("data.val: scoring compares with text, and the model has no text tower; leave data.val empty")
    train_urls = expand(config.data.train, "data.train")
    val_urls = expand(config.data.val, "data.val")
    config = replace(config, storage=str(Path(config.storage).resolve()))
    prepare_folder(config, command)

    train_index = load_index(config, "train", train_urls)
    val_index = load_index(config, "val", val_urls) if val_urls else None
    check_rows(config, train_index)
    print(f"Run {config.folder}: {describe_plan(config, train_index, parameters)}", flush=True)

    if (config.folder / MODEL / "config.json").exists():
        print("Already trained; nothing is trained again.", flush=True)
    else:
        train(config, train_index)
    score(config, val_index)
    return config.folder


# --- Before anything starts ---


def check_paths(config: RunConfig) -> None:
    """Refuses relative local paths in a job: they would be looked up in a copy of the working directory."""
    if "RAY_JOB_CONFIG_JSON_ENV_VAR" not in os.environ:
        return
    paths = [("data.train", p) for p in config.data.train] + [("data.val", p) for p in config.data.val]
    for setting, path in [*paths, ("storage", config.storage)]:
        if "://" not in path and not Path(path).is_absolute():
            raise ConfigError(
                f"{setting}: {path!r} is a relative path, which in a submitted job means a temporary copy of your "
                f"working directory on the cluster; give an absolute path that every node sees: --{setting} /..."
            )


def check_model(config: RunConfig) -> int:
    """The number of parameters, after a look whether the towers can be built and take a row.

    Raises:
        ConfigError: they cannot.
    """
    with torch.device("meta"):  # costs no memory, however large the towers are
        parameters = sum(p.numel() for p in MultimodalModel(config).parameters())
    if parameters < _TRIED_PARAMETERS:
        data = config.data
        tokenizer = load_tokenizer(data.tokenizer, data.vocabulary, data.max_tokens)
        ids, lengths = tokenizer(["a song"])
        row = {
            "audio": torch.zeros(1, data.crop_samples, dtype=torch.int16),
            "audio_length": torch.tensor([data.crop_samples], dtype=torch.int32),
            "text_ids": torch.from_numpy(ids),
            "text_length": torch.from_numpy(lengths),
        }
        try:
            with torch.inference_mode():
                MultimodalModel(config)(row)
        except (RuntimeError, ValueError, IndexError) as error:
            raise ConfigError(
                f"the towers cannot take a row of {data.crop_seconds:g} s at {data.sample_rate} Hz ({error}); "
                "give a longer --data.crop-seconds, or towers with smaller windows and fewer stages"
            ) from None
    return parameters


def has_begun(config: RunConfig) -> bool:
    """Whether the run has results that its config and shards must not drift away from."""
    return committed_step(config) > 0 or (config.folder / MODEL / "config.json").exists()


def prepare_folder(config: RunConfig, command: list[str]) -> None:
    """Makes the run's folder with config.json and run.json, or checks that it is the same run's.

    Raises:
        CheckpointError: the folder holds a run with another config.
        ConfigError: the folder cannot be made.
    """
    if "://" in config.storage:
        raise ConfigError(f"storage: {config.storage!r} is a URL; give a folder that every node sees")
    path = config.folder / "config.json"
    if has_begun(config):
        try:
            there = from_dict(json.loads(path.read_text()), str(path))
        except ValueError as error:
            raise CheckpointError(
                f"{path} is broken ({error}); delete {config.folder}, or give another --name"
            ) from None
        changed = differences(there, config)
        if changed:
            raise CheckpointError(
                f"{config.folder} already holds a run with another config ({'; '.join(changed[:4])}"
                f"{' ...' if len(changed) > 4 else ''}); give another --name, or delete that folder"
            )
    try:
        config.folder.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(to_dict(config), indent=2))
        record = config.folder / "run.json"
        started = [datetime.now(UTC).isoformat(timespec="seconds")]
        with contextlib.suppress(FileNotFoundError, ValueError, KeyError):
            started = json.loads(record.read_text())["starts"] + started
        write_whole(record, json.dumps(provenance(command) | {"started": started[0], "starts": started}, indent=2))
    except OSError as error:
        raise ConfigError(
            f"storage: cannot write to {config.folder} ({error.strerror}); give another --storage"
        ) from None


def provenance(command: list[str]) -> dict[str, Any]:
    """The command, versions, git commit and machine that a result came from."""

    def commit() -> str | None:
        with contextlib.suppress(OSError, subprocess.CalledProcessError):
            root = Path(__file__).parents[1]
            head = subprocess.run(["git", "-C", root, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
            return head.stdout.strip()
        return None

    versions = {}
    for package in ("muser_dist", "torch", "torchaudio", "ray", "deepspeed", "transformers", "timm"):
        with contextlib.suppress(PackageNotFoundError):
            versions[package] = version(package)
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "command": " ".join(command),
        "commit": commit(),
        "versions": {"python": platform.python_version()} | versions,
        "machine": {"platform": platform.platform(), "cpus": os.cpu_count(), "gpu": gpu},
    }


def load_index(config: RunConfig, part: str, urls: list[str]) -> ShardIndex:
    """The shards' row counts, kept in the run's folder so that its order never changes."""
    kept = config.folder / f"{part}-index.json"
    if kept.exists():
        index = ShardIndex.load(kept)
        if list(index.urls) == urls:
            return index
        if has_begun(config):
            raise DataError(
                f"data.{part}: {len(urls)} shards match now, but the run began with {len(index.urls)} others; "
                "its order of rows would change. Bring the shards back, or start a run with another --name"
            )

    def progress(done: int, of: int) -> None:
        if done == of or done % max(1, of // 20) == 0:
            print(f"Counting rows of data.{part}: {done}/{of} shards", flush=True)

    index = index_shards(urls, f"data.{part}", progress)
    for url, problem in index.problems.items():
        print(f"Warning: {url} {problem}; rows that cannot be read will be quarantined", flush=True)
    index.save(kept)
    return index


def check_rows(config: RunConfig, index: ShardIndex) -> None:
    """Raises DataError when the shards cannot fill one global batch."""
    if index.total < config.train.global_batch:
        chunk = min(config.train.chunk, max(1, index.total // 2))
        raise DataError(
            f"data.train: {index.total} rows in {len(index.urls)} shards are fewer than one global batch "
            f"({config.train.global_batch}); give more data, or --train.chunk {chunk} --train.global-batch "
            f"{index.total // chunk * chunk}"
        )


def describe_plan(config: RunConfig, index: ShardIndex, parameters: int) -> str:
    """One line: what will be trained on what."""
    t = config.train
    return (
        f"{parameters / 1e6:.1f} M parameters, {index.total:,} rows in {len(index.urls)} shards, "
        f"{t.steps:,} steps of {t.global_batch} rows ({t.steps * t.global_batch / index.total:.1f} passes), "
        f"{t.workers} workers, ZeRO {t.zero_stage}, {t.precision}"
    )


# --- Ray ---


def connect(config: RunConfig) -> None:
    """Joins the running cluster, or starts Ray on this machine; checks that workers and decoding fit.

    Raises:
        ClusterError: they do not fit; nothing was started in vain.
    """
    t, slots = config.train, config.data.decode_slots
    if not ray.is_initialized():
        address = os.environ.get("RAY_ADDRESS", "auto")
        quiet: Any = {"logging_level": logging.ERROR, "log_to_driver": False}  # the live line says what matters
        try:
            if address == "local":
                raise ConnectionError
            ray.init(address, **quiet)
            print(f"Joined the Ray cluster at {ray.get_runtime_context().gcs_address}", flush=True)
        except ConnectionError:
            if address not in ("auto", "local"):
                raise ClusterError(f"RAY_ADDRESS is {address}, but no Ray cluster answers there") from None
            # As many logical CPUs as are asked for, however few there are: two workers on two
            # cores must leave a slot to decode, or the job would wait for itself.
            ray.init(
                "local",
                num_cpus=int(-(-t.workers * t.cpus_per_worker // 1)) + slots,
                **quiet,
            )
            print(f"Started Ray on this machine: {t.workers} workers, {slots} decoding slots", flush=True)
    have = ray.cluster_resources()
    cpus, gpus = have.get("CPU", 0.0), int(have.get("GPU", 0))
    needed = t.workers * t.cpus_per_worker
    if t.gpu and gpus < t.workers:
        raise ClusterError(
            f"train.workers is {t.workers}, but the cluster has {gpus} GPUs; lower it, or drop --train.gpu"
        )
    if needed > cpus:
        raise ClusterError(
            f"{t.workers} workers reserve {needed:g} CPUs, but the cluster has {cpus:g}; give fewer --train.workers, a "
            f"smaller --train.cpus-per-worker, or more nodes (ray start --num-cpus N declares logical CPUs)"
        )
    nodes = [node["Resources"].get("CPU", 0.0) for node in ray.nodes() if node["Alive"]]
    if sum(int(node // t.cpus_per_worker) for node in nodes) < t.workers:
        raise ClusterError(
            f"{t.workers} workers of {t.cpus_per_worker:g} CPUs do not fit on nodes of "
            f"{', '.join(f'{node:g}' for node in nodes)} CPUs; lower --train.cpus-per-worker or --train.workers"
        )
    if needed + 1 > cpus:
        raise ClusterError(
            f"{t.workers} workers reserve {needed:g} of the cluster's {cpus:g} CPUs, which leaves no slot to decode; "
            f"start Ray with --num-cpus {int(needed) + slots} or more, or lower --train.cpus-per-worker"
        )


def train(config: RunConfig, index: ShardIndex) -> None:
    """Trains from the run's last checkpoint, through worker deaths, to the exported model.

    Raises:
        MuserError: training stopped for good.
    """
    connect(config)
    stopped = config.folder / STOPPED
    stopped.unlink(missing_ok=True)
    if step := committed_step(config):
        print(f"Going on from the checkpoint at step {step:,}", flush=True)

    def remaining() -> ray.data.Dataset:
        """All chunks after the last checkpoint; called anew whenever workers start."""
        return ray_dataset(training_reader(config, index), committed_step(config), config.train.steps)

    trainer = ray.train.torch.TorchTrainer(
        train_worker,
        train_loop_config={"config": to_dict(config)},
        datasets={"train": remaining},
        dataset_config=ray.train.DataConfig(execution_options=execution_options()),
        torch_config=ray.train.torch.TorchConfig(backend="cpu:gloo,cuda:nccl" if config.train.gpu else "gloo"),
        scaling_config=ray.train.ScalingConfig(
            num_workers=config.train.workers,
            use_gpu=config.train.gpu,
            resources_per_worker={"CPU": config.train.cpus_per_worker} | ({"GPU": 1} if config.train.gpu else {}),
        ),
        run_config=ray.train.RunConfig(
            name=config.name,
            storage_path=config.storage,
            failure_config=ray.train.FailureConfig(max_failures=config.train.max_failures),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=config.train.keep_checkpoints),
        ),
    )
    try:
        with live_line(config):
            trainer.fit()
    except SystemExit:  # so Ray's own handler ends a fit() at Ctrl-C, with status 0
        raise KeyboardInterrupt from None
    except ray.train.TrainingFailedError as error:
        raise MuserError(
            f"training failed, after as many restarts as train.max_failures ({config.train.max_failures}) allows: "
            f"{_last_line(error)}\nThe same command goes on from step {committed_step(config)}."
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


def score(config: RunConfig, index: ShardIndex | None) -> None:
    """Scores the exported model, draws the page, and prints where everything is."""
    folder = config.folder
    if index is not None:
        start = time.monotonic()
        try:
            evaluation = evaluate(Muser.from_pretrained(folder / MODEL), config, index)
        except DataError:
            write_report(folder)  # the training is worth its page, whatever is wrong with the scoring
            raise
        seconds = time.monotonic() - start
        write_whole(folder / EVALUATION, json.dumps({"data": list(config.data.val)} | evaluation, indent=2))
        print(f"\nScored {evaluation['rows']} rows of data.val in {seconds:.0f} s\n{describe(evaluation)}")
    else:
        print("\nNot scored: no --data.val was given")
    page = write_report(folder)
    print(
        f"\nModel   {folder / MODEL}\nPage    {page}\nNumbers {folder / 'metrics.jsonl'}\n\n"
        f"Next: open the page, or try the model:\n"
        f"  python -c \"from muser_dist import Muser; m = Muser.from_pretrained('{folder / MODEL}'); "
        f"print(m.encode_text(['a slow waltz']) @ m.encode_audio(['YOUR_SONG.mp3']).T)\"\n"
        f"  python jobs/evaluate.py {folder} --val 'OTHER/val-*.tar'",
        flush=True,
    )
