"""What a run would do and need, without doing it: `jobs/pretrain.py RECIPE --dry-run`."""

import tempfile
import time
from dataclasses import replace
from pathlib import Path

from muser_dist.config import RunConfig
from muser_dist.data.pipeline import training_reader
from muser_dist.data.shards import index_shards
from muser_dist.data.storage import Storage
from muser_dist.evaluate.report import SPARE
from muser_dist.models.weights import report_weights
from muser_dist.train.find_chunk import moments, state_bytes
from muser_dist.train.preflight import check_rows, check_settings, describe_plan, find_shards, load_partners


def dry_run(config: RunConfig, after: RunConfig | None = None) -> str:
    """Checks a config as `pretrain` does, decodes one chunk, and tells what the run would take. Writes nothing.

    Args:
        config: the run.
        after: the stage before it, whose model need not be there yet.

    Raises:
        MuserError: as `pretrain`.
    """
    parameters, trained = check_settings(config)
    storage = Storage.of(config.data)
    shards = find_shards(config, storage)
    sources = config.data.training_sources()
    indices = [index_shards(storage, shards[source.name], f"data.{source.name}") for source in sources]
    check_rows(config, indices)
    taken = [f"Starts from the model of {after.folder}"] if after else []
    matches = report_weights(config.apart_from(after) if after else config)
    unkept = replace(config, data=replace(config.data, clip_cache_gib=0.0))  # with data.keep_clips, of a first pass
    with tempfile.TemporaryDirectory() as folder:
        partners = load_partners(config, indices, storage, Path(folder))
        reader = training_reader(unkept, indices, storage, partners=partners)
        next(reader.read([0]))  # opens shards and starts the decoder
        start = time.perf_counter()
        next(reader.read([1 if reader.chunks_per_step > 1 else reader.slots_per_step]))
        rate = config.train.chunk / (time.perf_counter() - start)

    train, slots, gib = config.train, config.data.decode_slots, 1 << 30
    (least, most), chunk = train.worker_range, reader.chunk_bytes / gib
    lines = [describe_plan(config, indices, reader.plan, parameters), *taken, *map(str, matches), ""]
    for workers in dict.fromkeys((least, most)):
        weights, gradients, states = (size / gib for size in state_bytes(parameters, trained, train, workers))
        held = weights + gradients + states
        lines.append(
            f"Memory of each of {workers} workers: {held:.2f} GiB for weights ({weights:.2f}), gradients "
            f"({gradients:.2f}) and optimizer ({states:.2f}); {3 * chunk:.2f} GiB for chunks; and the activations of "
            f"{1 if train.cache_gradients else train.chunks_per_worker(workers)} chunks of {train.chunk} rows, which "
            "--train.find-chunk measures"
        )
    saved = 4 * (parameters + moments(train) * trained) / gib
    store = max(config.data.buffer_mib / 1024, 3 * (slots + most) * chunk)
    lines += [
        f"Steps: {train.steps:,} of {train.global_batch:,} rows in {train.chunks_per_step} chunks; "
        f"{train.steps * train.global_batch:,} samples; a checkpoint every {train.checkpoint_samples:,}",
        f"Decoding: {rate:,.0f} rows/s on one core of this machine. S samples/s need {SPARE} × S / {rate:,.0f} CPUs "
        f"(data.decode_slots: {slots}, for up to {slots * rate / SPARE:,.0f} samples/s)",
        f"Object store: {store:.2f} GiB of chunks that wait",
        f"Disk: {saved:.2f} GiB a checkpoint, {(train.keep_checkpoints + 2) * saved:.2f} GiB in all, in "
        f"{train.checkpoint_storage or config.folder}",
    ]
    return "\n".join(lines)
