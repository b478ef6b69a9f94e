"""From a config to a trained, scored model: preflight, Ray, the trainer, scores, the page."""

import json
import math
import signal
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import ray
import ray.data
import ray.exceptions
import ray.train
import ray.train.torch
import torch

from muser_dist.config import RunConfig, to_dict
from muser_dist.data.chunks import ChunkReader
from muser_dist.data.pipeline import known_ids, plan_digest, training_reader
from muser_dist.data.shards import ShardIndex, index_shards
from muser_dist.data.storage import Storage
from muser_dist.errors import DataError, MuserError, ScoringError
from muser_dist.evaluate.evaluator import evaluate
from muser_dist.evaluate.report import write_report
from muser_dist.evaluate.summary import describe
from muser_dist.files import write_whole
from muser_dist.models.weights import REPORT, Match, as_json, report_weights
from muser_dist.muser import Muser
from muser_dist.train.cluster import connect
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


def print_chunk(config: RunConfig, later: Sequence[RunConfig] = ()) -> None:
    """Prints the largest chunk that fits into the memory of a worker, tried where a worker would be.

    Args:
        config: the run.
        later: as of `connect`.

    Raises:
        MuserError: none fits, or a step fails for another reason.
    """
    check_settings(config)
    config = replace(config, data=config.data.with_absolute_paths())
    connect(config, later=later)
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
    return prepare(config, command).carry_out()


def prepare(config: RunConfig, command: list[str], before: RunConfig | None = None) -> "Prepared":
    """Checks a run and all that it reads, and makes its folder; starts nothing.

    Args:
        config, command: as of `pretrain`.
        before: the stage that the run starts from, which need not be trained yet; prepared already.

    Raises:
        MuserError: as `pretrain`.
    """
    parameters, _ = check_settings(config)
    storage = Storage.of(config.data)
    shards = find_shards(config, storage)
    own = (config.apart_from(before) if before else config).model.with_absolute_paths()
    config = replace(config, storage=str(Path(config.storage).resolve()))
    if (place := config.train.checkpoint_storage) and "://" not in place:
        config = replace(config, train=replace(config.train, checkpoint_storage=str(Path(place).resolve())))
    config = replace(config, data=config.data.with_absolute_paths(), model=config.model.with_absolute_paths())
    matches = report_weights(replace(config, model=own))
    prepare_folder(config, command)
    tell_weights(config, matches)

    indices = [load_index(config, source, storage, shards[source.name]) for source in config.data.training_sources()]
    val_index = load_index(config, VAL, storage, shards[VAL.name]) if config.data.val else None
    known = known_ids(val_index, storage, config.evaluate.rows) if val_index else None
    check_rows(config, indices)
    config = load_label_values(config, indices, storage)
    reader = training_reader(config, indices, storage, known, load_partners(config, indices, storage))
    print(f"Run {config.folder}: {describe_plan(config, indices, reader.plan, parameters)}", flush=True)

    return Prepared(config, reader, val_index)


@dataclass(frozen=True)
class Prepared:
    """A run that can start."""

    config: RunConfig
    """With absolute paths, and the values of fields that are learned."""
    reader: ChunkReader
    """Of its training rows."""
    val_index: ShardIndex | None
    """Of the rows that it is scored on."""

    def carry_out(self, later: Sequence[RunConfig] = ()) -> Path:
        """Trains (or goes on), exports, scores and draws the page.

        Args:
            later: as of `connect`.

        Returns:
            the run's folder.

        Raises:
            MuserError: as `pretrain`.
        """
        if (self.config.folder / MODEL / "config.json").exists():
            print("Already trained; nothing is trained again.", flush=True)
        else:
            train(self.config, self.reader, later)
        score(self.config, self.val_index, Storage.of(self.config.data))
        return self.config.folder


def tell_weights(config: RunConfig, matches: list[Match]) -> None:
    """Prints what a run starts from, and keeps it in its folder."""
    if matches:
        print("\n".join(map(str, matches)), flush=True)
        write_whole(config.folder / REPORT, as_json(matches))


# --- Training ---


def train(config: RunConfig, reader: ChunkReader, later: Sequence[RunConfig] = ()) -> None:
    """Trains from the run's last checkpoint, through worker deaths, to the exported model.

    Args:
        config: the run.
        reader: of its rows.
        later: as of `connect`.

    Raises:
        MuserError: training stopped for good.
    """
    connect(config, later=later)
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
            with (folder / EVENTS).open("a") as log:
                event = {"time": time.time(), "event": "not scored", "step": config.train.steps, "error": str(error)}
                log.write(json.dumps(event) + "\n")
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
