"""One worker's whole program, from top to bottom."""

import json
import time
from collections import Counter
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import ray.train
import ray.train.torch
import torch.distributed as dist

from muser_dist.config import RunConfig, TrainConfig, from_dict
from muser_dist.data.chunks import Chunk
from muser_dist.data.storage import Storage
from muser_dist.errors import CheckpointError, DataError, MuserError
from muser_dist.models.model import MultimodalModel
from muser_dist.muser import save_model
from muser_dist.objectives.batch import global_metrics
from muser_dist.objectives.registry import load_objective
from muser_dist.train.checkpoint import Checkpoints, Position
from muser_dist.train.dealer import deal_from
from muser_dist.train.diagnosis import why_not_applied
from muser_dist.train.engine import DeepSpeedEngine
from muser_dist.train.metrics import Accounting, Stopwatch
from muser_dist.train.optimizer import lr_factor
from muser_dist.train.runlog import EVENTS, RunLog
from muser_dist.train.step import to_device, train_step
from muser_dist.train.store import CheckpointStore

MODEL = "model"
"""Folder in the run's folder that holds the exported model."""


STOPPED = "stopped.txt"
"""File in the run's folder that says why training ended before its last step."""


_JUDGED_ROWS, _KEPT_REASONS = 1_000, 100

_ANSWER_SECONDS = 10


class StopTraining(MuserError):
    """Going on makes no sense, and neither does trying again. Raised on all ranks at once."""


def train_worker(settings: dict[str, Any]) -> None:
    """Trains; what Ray Train runs on each worker.

    Args:
        settings: {"config": the RunConfig as plain values}.
    """
    config = from_dict(settings["config"], "the run's config")
    timeout = timedelta(seconds=config.train.hang_seconds)
    dist.distributed_c10d.default_pg_timeout = timeout  # for the groups that DeepSpeed makes
    survivors = dist.new_group(backend="gloo", timeout=timeout)  # nothing else uses it, so it works when others broke
    try:
        train(config)
    except (StopTraining, CheckpointError) as error:  # both on all ranks alike
        # Not raised further: Ray would restart the workers and come to the same end again.
        if dist.get_rank() == 0:
            (config.folder / STOPPED).write_text(str(error))
    except RuntimeError as error:
        if "timed out" in str(error).lower() or "timeout" in str(error).lower():
            name_the_hung(config, survivors)
        raise


def name_the_hung(config: RunConfig, survivors: dist.ProcessGroup) -> None:
    """After a collective has timed out: says which ranks do not answer any more.

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
    train, modalities = config.train, tuple(config.model.towers())
    rank, ranks = dist.get_rank(), dist.get_world_size()
    device = ray.train.torch.get_device()
    engine = DeepSpeedEngine(MultimodalModel(config), config, device)
    objective = load_objective(config.objective)
    log = RunLog(config, ranks) if rank == 0 else None
    store = CheckpointStore(config, Storage.of(config.data))
    checkpoints = Checkpoints(store, train.keep_checkpoints, train.checkpoint_patience, log)

    # --- Position ---
    position = checkpoints.load(engine)
    first_step = position.step if position else 0
    accounting = Accounting(config.objective.pairs, position.totals if position else None)
    if log:
        log.go_on_from(first_step)
        deal_from(config.folder, first_step)

    # --- Data ---
    shard = ray.train.get_dataset_shard("train")
    blocks = iter(shard.iter_batches(batch_size=None, batch_format="numpy", prefetch_batches=2))
    chunks = _own_chunks(blocks, train, first_step, rank, ranks)

    # --- Training ---
    stopwatch, logged_step, seen = Stopwatch(position.seconds if position else 0.0), first_step, Counter[str]()
    losses: list[float] = []  # since the last checkpoint
    preempted = False
    for step in range(first_step, train.steps):
        with stopwatch.waiting():
            mine = [next(chunks) for _ in range(train.chunks_per_worker(ranks))]
        on_device = [to_device(chunk, modalities, device) for chunk in mine]
        factor = lr_factor((step + 1) * train.global_batch, train)
        made = train_step(engine, objective, config, on_device, factor)
        if not made.applied:
            raise StopTraining(why_not_applied(made, step + 1, mine, engine.grad_norm(), train))
        for chunk in mine:
            accounting.add(chunk)

        done = step + 1
        samples = done * train.global_batch
        last = done == train.steps
        save = last or samples // train.checkpoint_samples > (samples - train.global_batch) // train.checkpoint_samples
        if save or done % train.log_steps == 0:
            values = global_metrics(made.loss)
            problems = accounting.flush()
            if log:
                log.quarantine(problems)
            values["grad_norm"] = engine.grad_norm()
            losses.append(values["loss"])
            seen.update(problem["reason"] for problem in problems if problem["row"] is not None)
            seen = Counter(dict(seen.most_common(_KEPT_REASONS)))  # some name a file: there is no end of those
            check_share(accounting.totals, seen, config.data.max_bad_share)
            metrics: dict[str, Any] = {"step": done, "samples": samples, **values}
            for p, pair in enumerate(config.objective.pairs):
                metrics[f"temperature/{pair.first}-{pair.second}"] = 1.0 / made.logits.scale[p].item()
                if made.logits.bias is not None:
                    metrics[f"bias/{pair.first}-{pair.second}"] = made.logits.bias[p].item()
            metrics |= {"lr": train.lr * factor, **accounting.totals}
            metrics |= stopwatch.lap((done - logged_step) * train.global_batch)
            metrics["decode_ms_per_row"] = accounting.decode_ms_per_row()
            logged_step = done
            if log:
                log.metrics(metrics)
            # A node that is about to go: from now on a checkpoint whenever the last one is written.
            if preempted := _preempted(preempted, log, done):
                save = save or not checkpoints.writing
        if save:
            accounts = accounting.accounts()
            if log:
                log.accounts(done, accounts)
            now = Position(done, dict(accounting.totals), stopwatch.total)
            checkpoints.save(engine, now, sum(losses) / len(losses))
            losses = []
        if (saved := checkpoints.finish() if last else checkpoints.poll()) is not None:
            ray.train.report({"step": saved, "samples": saved * train.global_batch, "loss": values["loss"]})

    # --- Export ---
    weights = engine.state_dict()
    if log:
        save_model(config.folder / MODEL, weights, config)
        log.close()
    dist.barrier()


def _preempted(before: bool, log: RunLog | None, step: int) -> bool:
    """Whether a node of this run's workers is about to be taken away; a collective."""
    notice = ray.train.get_preemption_info()
    if log and notice and not before:
        log.event("preemption", step, ranks=notice.preempted_ranks, deadline_ms=notice.deadline_ms)
    return notice is not None


def check_share(totals: dict[str, Any], reasons: Counter[str], most: float) -> None:
    """Raises StopTraining when too many of the rows read so far are quarantined."""
    read, bad = totals["rows_read"], totals["rows_quarantined"]
    if bad == read or (read >= _JUDGED_ROWS and bad > most * read):
        reason, count = next(iter(reasons.most_common(1)), ("?", 0))
        what = "none" if bad == read else f"{read - bad:,}"
        raise StopTraining(
            f"{what} of the first {read:,} rows of training can be used; the most frequent reason ({count:,} times): "
            f"{reason}. quarantine.jsonl names them all. Mend the data, or raise --data.max-bad-share ({most:g})"
        )


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
