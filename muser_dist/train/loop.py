"""One worker's whole program, from top to bottom."""

import json
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import ray.train
import ray.train.torch
import torch.distributed as dist
from torch.profiler import record_function

from muser_dist.config import RunConfig, TrainConfig, from_dict
from muser_dist.data.chunks import Chunk
from muser_dist.data.storage import Storage
from muser_dist.errors import CheckpointError, ConfigError, DataError, MuserError, StopTraining
from muser_dist.models.model import MultimodalModel
from muser_dist.models.weights import load_weights
from muser_dist.muser import save_model
from muser_dist.objectives.collectives import of_rank_0
from muser_dist.objectives.registry import load_objective
from muser_dist.train.checkpoint import Checkpoints, Position
from muser_dist.train.dealer import deal_from
from muser_dist.train.diagnosis import why_not_applied
from muser_dist.train.engine import DeepSpeedEngine
from muser_dist.train.find_chunk import is_out_of_memory, out_of_memory_message
from muser_dist.train.optimizer import lr_factor
from muser_dist.train.profiler import Profiler
from muser_dist.train.runlog import DIVERGED, EVENTS, RunLog
from muser_dist.train.step import to_device, train_step
from muser_dist.train.store import CheckpointStore
from muser_dist.train.validation import Validation
from muser_dist.train.watch import Watch

MODEL = "model"
"""Folder in the run's folder that holds the exported model."""


STOPPED = "stopped.txt"
"""File in the run's folder that says why training ended before its last step."""


_ANSWER_SECONDS = 10


def train_worker(settings: dict[str, Any]) -> None:
    """Trains; what Ray Train runs on each worker.

    Args:
        settings: {"config": the RunConfig as plain values}.
    """
    config = from_dict(settings["config"], "the run's config")
    timeout = timedelta(seconds=config.train.hang_seconds)
    dist.distributed_c10d.default_pg_timeout = timeout  # for the groups that DeepSpeed makes
    survivors = dist.new_group(backend="gloo", timeout=timeout)  # nothing else uses it, so it works when others broke
    if of_rank_0((config.folder / STOPPED).exists):  # of a worker that could not go on, nor tell the others
        return
    try:
        train(config)
    except (StopTraining, CheckpointError) as error:  # both on all ranks alike
        # Not raised further: Ray would restart the workers and come to the same end again.
        if dist.get_rank() == 0:
            (config.folder / STOPPED).write_text(str(error))
    except Exception as error:
        if is_out_of_memory(error):
            (config.folder / STOPPED).write_text(f"rank {dist.get_rank()}: {out_of_memory_message(config)}")
        elif isinstance(error, ConfigError):  # what only a worker's machine shows, such as no compiler
            (config.folder / STOPPED).write_text(f"rank {dist.get_rank()}: {error}")
        elif "timed out" in str(error).lower() or "timeout" in str(error).lower():
            name_the_hung(config, survivors)
        raise


def name_the_hung(config: RunConfig, survivors: dist.ProcessGroup) -> None:
    """After a collective of gloo has timed out (NCCL's watchdog ends the process): says which ranks do not answer.

    Raises:
        MuserError: some do not.
    """
    try:
        dist.monitored_barrier(survivors, timedelta(seconds=_ANSWER_SECONDS), wait_all_ranks=True)
    except RuntimeError as error:
        message = f"a worker did nothing for {config.train.hang_seconds:g} s (train.hang_seconds): {error}"
        with (config.folder / EVENTS).open("a") as file:
            line = {"time": time.time(), "event": "hang", "step": None, "error": message, "told_by": dist.get_rank()}
            file.write(json.dumps(line) + "\n")
        raise MuserError(message) from None


def train(config: RunConfig) -> None:
    """Trains until the run's last step, from its last checkpoint where there is one, and exports.

    Raises:
        StopTraining: a step cannot be applied, or too few rows can be used.
        CheckpointError: no checkpoint can be written, or none that was written is intact.
    """
    # --- Set-up ---
    train = config.train
    rank, ranks = dist.get_rank(), dist.get_world_size()
    device = ray.train.torch.get_device()
    model = MultimodalModel(config)
    load_weights(model, config)
    engine = DeepSpeedEngine(model, config, device)
    objective = load_objective(config.objective)
    log = RunLog(config, ranks) if rank == 0 else None
    store = CheckpointStore(config, Storage.of(config.data))
    checkpoints = Checkpoints(store, train.keep_checkpoints, train.checkpoint_patience, log)

    # --- Position ---
    position = checkpoints.load(engine) or Position(0, None, 0.0)
    first_step = position.step
    if log:
        log.go_on_from(first_step)
        deal_from(config.folder, first_step)
    watch = Watch(config, device, log, first_step, position.totals, position.seconds)
    profiler = Profiler(train.profile, config.folder, rank)
    validation = Validation(config)

    # --- Data ---
    shard = ray.train.get_dataset_shard("train")
    blocks = iter(shard.iter_batches(batch_size=None, batch_format="numpy", prefetch_batches=2))
    chunks = _own_chunks(blocks, train, first_step, rank, ranks)

    # --- Training ---
    preempted = False
    for step in range(first_step, train.steps):
        done = step + 1
        samples = done * train.global_batch
        profiler.before(done)
        with watch.stopwatch.waiting("decode"), record_function("data"):
            mine = [next(chunks) for _ in range(train.chunks_per_worker(ranks))]
        with watch.stopwatch.waiting("transfer"), record_function("transfer"):
            on_device = [to_device(chunk, config.features, device) for chunk in mine]
        made = train_step(engine, watch.timed(objective), config, on_device, lr_factor(samples, train))
        if not made.applied:
            reason = why_not_applied(made, done, mine, engine.grad_norm(), train)
            if log:
                log.event(DIVERGED, done, reason=reason)
            raise StopTraining(reason)
        watch.trained_on(mine)

        last = done == train.steps
        save = last or _passes(train.checkpoint_samples, samples, train)
        if save or done % train.log_steps == 0:
            line = watch.line(done, made, engine)
            # A node that is about to go: from now on a checkpoint whenever the last one is written.
            if preempted := _preempted(preempted, log, done):
                save = save or not checkpoints.writing
            if scored := validation.poll():
                watch.scores(*scored)
        with watch.saving():
            if save:
                loss = watch.checkpoint(done)
                checkpoints.save(engine, Position(done, dict(watch.accounting.totals), watch.seconds), loss)
            saved = checkpoints.finish() if last else checkpoints.poll()
        if saved is not None:
            ray.train.report({"step": saved, "samples": saved * train.global_batch, "loss": line["loss"]})
        due = config.evaluate.every_samples and not last and _passes(config.evaluate.every_samples, samples, train)
        if due and of_rank_0(validation.idle):
            validation.start(done, engine.state_dict())

    # --- Export ---
    profiler.close()
    weights = engine.state_dict()
    if log:
        save_model(config.folder / MODEL, weights, config)
    validation.close()
    watch.close()
    dist.barrier()


def _passes(every: int, samples: int, train: TrainConfig) -> bool:
    """Whether the last step has come to a multiple of so many samples, or past one."""
    return samples // every > (samples - train.global_batch) // every


def _preempted(before: bool, log: RunLog | None, step: int) -> bool:
    """Whether a node of this run's workers is about to be taken away; a collective."""
    notice = ray.train.get_preemption_info()
    if log and notice and not before:
        log.event("preemption", step, ranks=notice.preempted_ranks, deadline_ms=notice.deadline_ms)
    return notice is not None


def _own_chunks(
    blocks: Iterator[dict[str, Any]], train: TrainConfig, first_step: int, rank: int, ranks: int
) -> Iterator[Chunk]:
    """This rank's chunks in order from `first_step` on, each block's one row unpacked.

    Raises:
        DataError: Ray dealt a chunk to a rank that does not own it, or the data ended early.
    """
    for step in range(first_step, train.steps):
        for number in range(rank, ranks * train.chunks_per_worker(ranks), ranks):
            block = next(blocks, None)
            if block is None:
                raise DataError(f"the data ended before chunk {number} of step {step} on rank {rank}")
            chunk = {name: column[0] for name, column in block.items()}
            if (chunk["step"], chunk["chunk"]) != (step, number):
                raise DataError(
                    f"rank {rank} was dealt chunk {chunk['chunk']} of step {chunk['step']} in place of chunk {number} "
                    f"of step {step}: Ray Data did not keep the order of blocks; is another version of Ray installed?"
                )
            yield chunk
