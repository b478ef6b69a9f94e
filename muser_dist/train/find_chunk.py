"""The largest chunk with which a step fits into a worker's memory, found by trying; and what to do when none does.

The trials run in a child process, which takes with it whatever they leave behind, such as the context of a
GPU. They lack the other workers: what these add is counted, or has room in what is left free.
"""

import multiprocessing
import resource
from contextlib import suppress
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch

from muser_dist.config import RunConfig, TrainConfig
from muser_dist.data.chunks import Chunk
from muser_dist.data.labels import Labels, with_stand_ins
from muser_dist.data.spectrogram import in_tasks
from muser_dist.data.symbolic.characters import CHARACTERS, PATCH_BYTES
from muser_dist.data.text import load_tokenizer
from muser_dist.errors import ConfigError, MuserError
from muser_dist.models.model import MultimodalModel
from muser_dist.objectives.registry import load_objective
from muser_dist.train.engine import PlainEngine
from muser_dist.train.step import to_device, train_step

_LEFT_FREE = 0.1  # of free memory: for buffers of collectives and of DeepSpeed, gathered embeddings, fragmentation
_OBJECT_STORE = 0.3  # of a node's memory: what Ray's object store takes by default
_STARTED = 0


def find_chunk(config: RunConfig, device: torch.device, memory: int | None = None) -> int:
    """The largest chunk (c) with which a training step fits; train.global_batch (N) stays as it is.

    Tries ever larger chunks, with the passes that train.cache_gradients asks for, until memory does not suffice.
    On a CPU the child's data segment is limited, so that memory runs out for the child and for nobody else
    (Linux). Optimizer state is counted as ZeRO shares it out, not made.

    Args:
        config: the run; its train.chunk does not matter.
        device: like a worker's, on this machine.
        memory: bytes for a worker. By default what is free on the device; of this machine's memory, its part of what
            Ray's object store leaves, as if all workers were here.

    Raises:
        ConfigError: not even the smallest chunk fits.
        MuserError: a step fails for another reason.
    """
    spawn = multiprocessing.get_context("spawn")
    config = replace(config, data=with_stand_ins(config.data))
    ours, theirs = spawn.Pipe(duplex=False)
    child = spawn.Process(target=_try_chunks, args=(theirs, config, str(device), memory))
    child.start()
    theirs.close()
    fits: int | None = None
    failure = ""
    with ours, suppress(EOFError):
        while not failure:
            match ours.recv():
                case int(size):
                    fits = size
                case str(reason):
                    failure = reason
    child.join()
    # A library that cannot allocate may abort: a signal, and a negative status.
    if failure or fits is None or (child.exitcode or 0) > 0:
        raise MuserError(f"train.find_chunk: a training step fails, and not for want of memory: {failure}")
    if fits == _STARTED:
        least = chunk_sizes(config)[0]
        raise ConfigError(out_of_memory_message(replace(config, train=replace(config.train, chunk=least))))
    return fits


def chunk_sizes(config: RunConfig) -> list[int]:
    """Sizes that divide global_batch and give each worker a chunk; where they can, as many chunks to each. Even
    ones where rows come in pairs of songs, which share a chunk."""
    train, least = config.train, 2 if any(pair.of_songs for pair in config.objective.pairs) else 1
    rows, rest = divmod(train.global_batch, train.worker_range[0])
    whole = rows if rest == 0 else train.global_batch
    return [size for size in range(least, rows + 1, least) if whole % size == 0] or [least]


def out_of_memory_message(config: RunConfig) -> str:
    """What to change when a worker runs out of memory."""
    train, mends = config.train, []
    least, most = train.worker_range
    if not train.cache_gradients:  # then memory holds the activations of all chunks, whatever their size
        mends.append(
            f"--train.cache-gradients (it holds those of {train.chunks_per_worker(least)} chunks now, then of one)"
        )
    elif smaller := [size for size in chunk_sizes(config) if size < train.chunk]:
        mends.append(
            f"a smaller --train.chunk, such as {max(smaller)} (--train.find-chunk looks for the largest that fits; "
            f"train.global_batch stays {train.global_batch}, with all its negatives)"
        )
    mends += [
        f"--model.{name}.checkpoint-activations"
        for name, tower in config.model.towers().items()
        if not (tower.checkpoint_activations or tower.freeze)
    ]
    if train.zero_stage < 3 and most > 1:
        mends.append("a higher --train.zero-stage")
    return (
        f"out of memory with chunks of {train.chunk} rows; give "
        f"{', or '.join(mends) or 'smaller towers, or workers with more memory'}"
    )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says so: torch has a class for it on GPUs, and on CPUs a RuntimeError like any other."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)


def state_bytes(parameters: int, trained: int, train: TrainConfig, workers: int) -> tuple[int, int, int]:
    """Bytes that each worker holds of weights, of gradients and of the optimizer's states, all float32.

    ZeRO shares out the optimizer's from stage 1 on, gradients from 2 and weights from 3; and it has a copy of the
    trained weights among what the optimizer updates, which at stage 3 is all there is. Of frozen parameters there are
    weights alone.
    """

    def of(numbers: int, stage: int) -> int:
        return 4 * numbers // (workers if train.zero_stage >= stage else 1)

    states = moments(train) + (0 < train.zero_stage < 3)
    return of(parameters, 3), of(trained, 2), of(states * trained, 1)


def moments(train: TrainConfig) -> int:
    """How many numbers the optimizer keeps of each that is trained."""
    return (1 if train.optimizer == "sgd" else 2) + bool(train.ema_samples)


# --- In the child ---


class _Trial(PlainEngine):
    """Everything of a step but the update, for which there would have to be optimizer state."""

    def step(self, lr_factor: float) -> None:
        self._optimizer.zero_grad()


def _try_chunks(results: Connection, config: RunConfig, device_name: str, memory: int | None) -> None:
    """Sends _STARTED, then each size that fits, and the reason if a step fails for another one than memory."""
    try:
        # Uncompiled: each size would be compiled anew, for a minute.
        towers: dict[str, Any] = {name: replace(tower, compile=False) for name, tower in config.model.towers().items()}
        config = replace(config, model=replace(config.model, **towers))
        device, train = torch.device(device_name), config.train
        with torch.device("meta"):
            numbers = [(p.numel(), p.requires_grad) for p in MultimodalModel(config).parameters()]
        parameters, trained = sum(n for n, _ in numbers), sum(n for n, learns in numbers if learns)
        workers = train.worker_range[0]  # with the fewest, each has most to hold
        if memory is None:
            memory = int((1 - _LEFT_FREE) * _free_memory(device, workers))
        _, _, states = state_bytes(parameters, trained, train, workers)
        _limit_memory(device, memory - states)
        results.send(_STARTED)
        engine = _Trial(MultimodalModel(config), config, device)
        objective = load_objective(config.objective)
        for size in chunk_sizes(config):
            chunks = -(-train.global_batch // (size * workers))
            if train.cache_gradients:
                chunks = min(chunks, 2)  # each further one needs what the second does
            mine = [to_device(_chunk(config, size, number), config.features, device) for number in range(chunks)]
            train_step(engine, objective, config, mine, 0.0)
            results.send(size)
    except Exception as error:
        if not is_out_of_memory(error):
            results.send(f"{type(error).__name__}: {error}")


def _chunk(config: RunConfig, size: int, number: int) -> Chunk:
    """A chunk as large as the real ones; what its clips and texts are costs no memory."""
    data, rng = config.data, np.random.default_rng(number)
    vocabulary = load_tokenizer(data.tokenizer, data.vocabulary, data.max_tokens).vocabulary
    rows = np.arange(number * size, (number + 1) * size)
    chunk = {
        "step": np.int64(0),
        "chunk": np.int64(number),
        "row": rows,
        "text_id": rows,
        "label_id": rows,
        "text_ids": rng.integers(0, vocabulary, (size, data.max_tokens), np.int32),
        "text_length": np.full(size, data.max_tokens, np.int32),
    }
    if "audio" in config.features or "spectrogram" in config.features:
        chunk["audio"] = rng.integers(-9_000, 9_000, (size, data.crop_samples), np.int16)
        chunk["audio_length"] = np.full(size, data.crop_samples, np.int32)
    if config.model.spectrogram is not None and data.spectrogram_on == "cpu":
        with torch.inference_mode():
            chunk["spectrogram"] = (
                in_tasks(data, config.model.spectrogram)(torch.from_numpy(chunk["audio"])).half().numpy()
            )
    if "symbolic" in config.features:
        patches = rng.integers(4, CHARACTERS, (size, data.symbolic.max_patches, PATCH_BYTES), np.uint8)
        length = np.full(size, data.symbolic.max_patches, np.int32)
        chunk |= {"patches": patches, "patches_length": length}
        if "notation" in config.features:
            chunk |= {"notation_patches": patches, "notation_length": length}
    if "features" in config.features:
        shape = size, data.features.max_windows, data.features.size
        length = np.full(size, data.features.max_windows, np.int32)
        chunk |= {"features": rng.standard_normal(shape, np.float32).astype(np.float16), "features_length": length}
    if "view" in config.features:
        chunk |= {"view": chunk["audio"], "view_length": chunk["audio_length"]}
    labels = {name: np.maximum(array, 0) for name, array in Labels(data).empty(size).items()}
    return chunk | labels | {f"valid_{name}": np.ones(size, bool) for name in config.features}


def _free_memory(device: torch.device, workers: int) -> float:
    """Bytes for one worker."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = _kilobytes("/proc/meminfo", "MemAvailable")
    group = Path("/sys/fs/cgroup")
    with suppress(OSError, ValueError):  # no cgroup of version 2, or one without a limit: "max"
        used = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())["anon"]
        free = min(free, int((group / "memory.max").read_text()) - int(used))
    return (1 - _OBJECT_STORE) * free / workers


def _limit_memory(device: torch.device, memory: int) -> None:
    """From now on this process gets no more than that many bytes, what it has already included."""
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, max(0.0, memory / total)), device)
    else:
        left = max(0, memory - _kilobytes("/proc/self/status", "VmRSS"))
        limit = _kilobytes("/proc/self/status", "VmData") + left
        resource.setrlimit(resource.RLIMIT_DATA, (limit, resource.getrlimit(resource.RLIMIT_DATA)[1]))


def _kilobytes(path: str, name: str) -> int:
    """A line of a file of /proc, "Name:   123 kB", in bytes."""
    lines = dict(line.split(":", 1) for line in Path(path).read_text().splitlines())
    return 1024 * int(lines[name].split()[0])
