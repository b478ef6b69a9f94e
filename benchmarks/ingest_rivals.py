"""The contestants of ingest.py: functions that yield the number of rows of each batch they deliver.

All read JSON and audio of every row from the same shards and deliver 5 s at a random place of each
clip, 16 kHz mono, in batches of 128, without end. Only ours also makes sentences, token ids and
everything else that a training chunk holds. Imports are local: a contestant pays for its own alone.
"""

import glob
import io
import json
import logging
import math
import multiprocessing
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any

import numpy as np

BATCH = 128
SAMPLE_RATE = 16_000
CROP_SECONDS = 5.0
SAMPLES = round(CROP_SECONDS * SAMPLE_RATE)

# Datasets that are not endless are made long enough for this speed on each core, far above any.
_ROWS_PER_SECOND = 800


@dataclass(frozen=True)
class Setting:
    """What every contestant is given.

    Attributes:
        folder: holds the shards, *.tar.
        extension: of their audio members.
        cores: processes or logical CPUs that may decode.
        seconds: rows must last so long.
        store_mb: size of Ray's object store, of which half is our buffer; 0 stands for the defaults of Ray
            (30 % of the memory) and of the library.
    """

    folder: str
    extension: str
    cores: int
    seconds: float
    store_mb: int = 0

    @property
    def shards(self) -> list[str]:
        """The shards' paths, sorted."""
        return sorted(glob.glob(f"{self.folder}/*.tar"))

    @property
    def rows(self) -> int:
        """Rows that nobody can decode in the time."""
        return math.ceil(self.seconds * self.cores * _ROWS_PER_SECOND)


def limit(setting: Setting) -> Iterator[int]:
    """Bare loops over our decoder, a process for each core; rows are counted where they are made."""
    done = multiprocessing.SimpleQueue()
    for number in range(setting.cores):
        multiprocessing.Process(target=_decode_forever, args=(setting, number, done), daemon=True).start()
    while True:
        yield done.get()


def _decode_forever(setting: Setting, number: int, done: Any) -> None:
    rng = np.random.default_rng(number)
    rows = []
    for shard in setting.shards:
        with tarfile.open(shard) as tar:
            members = {member.name: (member.offset_data, member.size) for member in tar}
        file = open(shard, "rb")  # noqa: SIM115 (kept for as long as the process lives)
        stems = [name.removesuffix(".json") for name in members if name.endswith(".json")]
        rows += [(file, members[f"{stem}.json"], members[f"{stem}.{setting.extension}"]) for stem in stems]
    while True:
        for _ in range(BATCH):
            file, *members = rows[rng.integers(len(rows))]
            values = []
            for offset, size in members:
                file.seek(offset)
                values.append(file.read(size))
            _our_decode(*values, rng, tuned=True)
        done.put(BATCH)


def _our_decode(metadata: bytes, sound: bytes, rng: np.random.Generator, tuned: bool) -> tuple[np.ndarray, str]:
    from muser_dist.data import audio

    if tuned:
        _keep_freed_memory()
    waveform, _ = audio.decode(sound, _data_config(), rng.random())
    return waveform, json.loads(metadata)["caption"]


@lru_cache
def _keep_freed_memory() -> None:
    from muser_dist.data.decoder_child import keep_freed_memory

    keep_freed_memory()


@lru_cache
def _data_config() -> Any:
    from muser_dist.config import DataConfig

    return DataConfig(sample_rate=SAMPLE_RATE, crop_seconds=CROP_SECONDS)


def ours(setting: Setting) -> Iterator[int]:
    """This library's chunks, consumed as one training worker does."""
    from muser_dist.data.pipeline import ray_dataset
    from muser_dist.data.shards import ShardIndex

    start_ray(setting, setting.cores)
    config = training_config(setting)
    index = ShardIndex(tuple(setting.shards), np.array([_count(shard) for shard in setting.shards]), {})
    for block in chunks(ray_dataset(reader_of(config, index), 0, config.train.steps, setting.cores), config):
        yield int(block["valid_audio"].sum())


def reader_of(config: Any, index: Any) -> Any:
    """What makes the chunks of a run."""
    from muser_dist.data.pipeline import training_reader
    from muser_dist.data.storage import Storage

    return training_reader(config, [index], Storage.of(config.data))


def training_config(setting: Setting) -> Any:
    """The tiny recipe for a run of so many rows at least: 5 s at 16 kHz, windows of 8 shards, chunks of BATCH."""
    from muser_dist.recipes.tiny import tiny

    config = tiny()
    data = replace(config.data, train=(f"{setting.folder}/*.tar",), decode_slots=setting.cores)
    if setting.store_mb:
        data = replace(data, buffer_mib=setting.store_mb // 2)
    train = replace(config.train, workers=1, chunk=BATCH, samples=setting.rows + config.train.global_batch)
    if (data.sample_rate, data.crop_samples) != (SAMPLE_RATE, SAMPLES):
        raise SystemExit("the tiny recipe has changed: set SAMPLE_RATE and SAMPLES to its values")
    return replace(config, data=data, train=train)


def start_ray(setting: Setting, slots: int) -> None:
    """As `muser_dist.train.launch` starts it, with so many decode slots alone: the consumer is this process."""
    import ray

    store = setting.store_mb * 1_000_000 or None
    quiet: Any = {"logging_level": logging.ERROR, "log_to_driver": False}
    ray.init("local", num_cpus=slots, include_dashboard=False, object_store_memory=store, **quiet)
    logging.getLogger("ray.data").setLevel(logging.ERROR)


def chunks(dataset: Any, config: Any) -> Iterator[dict[str, np.ndarray]]:
    """Blocks of a dataset as Ray Train deals them to a single worker; closing it ends the execution."""
    import ray

    from muser_dist.data.executor import execution_options

    block = BATCH * 2 * SAMPLES
    slots = int(ray.cluster_resources()["CPU"])
    dataset.context.execution_options = execution_options(config.data.buffer_mib, block, slots, 1)
    (shard,) = dataset.streaming_split(1, equal=True)
    try:
        yield from shard.iter_batches(batch_size=None, batch_format="numpy", prefetch_batches=2)
    finally:
        # As Ray Train does it: there is no public way, and a split that is only killed keeps its share of the CPUs.
        ray.get(shard._coord_actor.shutdown_executor.remote())
        ray.kill(shard._coord_actor)


def _count(shard: str) -> int:
    with tarfile.open(shard) as tar:
        return len(tar.getnames()) // 2


def usual_stack(setting: Setting) -> Iterator[int]:
    """WebDataset and DataLoader; decodes and resamples whole clips, crops, makes mels, as CLAP trainers do."""
    import soundfile
    import torch
    import torchaudio

    rng = np.random.default_rng()

    @lru_cache
    def resampler(rate: int) -> torchaudio.transforms.Resample:
        return torchaudio.transforms.Resample(rate, SAMPLE_RATE)

    mel = torchaudio.transforms.MelSpectrogram(SAMPLE_RATE, n_fft=1024, hop_length=320, n_mels=64)

    def decode(metadata: bytes, sound: bytes) -> tuple[torch.Tensor, str]:
        waveform, rate = soundfile.read(io.BytesIO(sound), dtype="float32", always_2d=True)
        mono = resampler(rate)(torch.from_numpy(waveform.mean(axis=1)))
        start = rng.integers(max(1, len(mono) - SAMPLES + 1))
        crop = torch.nn.functional.pad(mono[start : start + SAMPLES], (0, max(0, start + SAMPLES - len(mono))))
        return mel(crop), json.loads(metadata)["caption"]

    return _webdataset(setting, decode)


def webdataset_same_decode(setting: Setting, tuned: bool = False) -> Iterator[int]:
    """WebDataset and DataLoader with our decoder."""
    rng = np.random.default_rng()
    return _webdataset(setting, lambda metadata, sound: _our_decode(metadata, sound, rng, tuned))


def _webdataset(setting: Setting, decode: Callable[[bytes, bytes], tuple[Any, str]]) -> Iterator[int]:
    import torch
    import webdataset

    torch.set_num_threads(1)
    dataset = (
        webdataset.WebDataset(setting.shards, resampled=True, shardshuffle=False)
        .shuffle(256, initial=BATCH)
        .to_tuple("json", setting.extension)
        .map(lambda members: decode(*members))
        .batched(BATCH, partial=False)
    )
    for audio, _ in torch.utils.data.DataLoader(dataset, batch_size=None, num_workers=setting.cores):
        yield len(audio)


def ray_webdataset(setting: Setting, tuned: bool = False) -> Iterator[int]:
    """Ray Data's own reader of such shards with our decoder, in Ray's default settings, a slot more than cores."""
    import ray.data

    start_ray(setting, setting.cores + 1)  # with as many slots as cores it makes a third less
    ray.data.DataContext.get_current().enable_progress_bars = False
    extension = setting.extension

    def decode(batch: dict[str, np.ndarray]) -> dict[str, Any]:
        rng = np.random.default_rng()
        rows = [_our_decode(*members, rng, tuned) for members in zip(batch["json"], batch[extension], strict=True)]
        return {"audio": np.stack([audio for audio, _ in rows]), "caption": [caption for _, caption in rows]}

    repeats = -(-setting.rows // sum(_count(shard) for shard in setting.shards))
    dataset = ray.data.read_webdataset(setting.shards * repeats, decoder=None).map_batches(decode, batch_size=BATCH)
    for batch in dataset.iter_batches(batch_size=BATCH, batch_format="numpy"):
        yield len(batch["audio"])


CONTESTANTS: dict[str, Callable[[Setting], Iterator[int]]] = {
    "limit": limit,
    "ours": ours,
    "usual_stack": usual_stack,
    "webdataset_same_decode": webdataset_same_decode,
    "ray_webdataset": ray_webdataset,
    # Their users would have to know of the allocator setting that our decoding processes make for themselves.
    "webdataset_same_decode_tuned": partial(webdataset_same_decode, tuned=True),
    "ray_webdataset_tuned": partial(ray_webdataset, tuned=True),
}
"""By the name that results use."""
