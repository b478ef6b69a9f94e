"""The cache of decoded clips: what comes from it is what was put there, whatever happened to it since."""

import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from muser_dist.data.audio import decode, decode_whole, to_int16
from muser_dist.data.chunks import Chunk
from muser_dist.data.clips import ClipCache
from muser_dist.data.config import AugmentConfig, DataConfig
from muser_dist.data.pipeline import evaluation_chunks
from muser_dist.errors import DataError
from tests.data.test_audio import through_ffmpeg
from tests.data.test_views import views_config
from tests.shardmaker import bad_samples, encode, sample, tone, write_shard, write_shards
from tests.small import LOCAL, index_of, reader_of, small_config

RATE = 8_000


def config_of(folder: Path, gib: float = 1.0, **fields) -> DataConfig:
    return DataConfig(sample_rate=RATE, keep_clips=True, clip_cache_gib=gib, cache_folder=str(folder), **fields)


def entries(folder: Path) -> list[Path]:
    return sorted(folder.glob("clips/*.clip"))


def never(data: bytes, rate: int) -> np.ndarray:
    raise AssertionError("it was decoded again")


@pytest.fixture(scope="module")
def pattern(tmp_path_factory) -> str:
    """Clips of several formats and rates, shorter and longer than a crop, and what cannot be used."""
    folder = tmp_path_factory.mktemp("shards")
    good = [
        ("flac", sample(0)),
        ("mp3", {"mp3": encode(tone(1, 2.0, 44_100), 44_100, "mp3"), "json": sample(1)["json"]}),
        ("ogg", {"ogg": encode(tone(2, 1.5, 22_050), 22_050, "ogg"), "json": sample(2)["json"]}),
        ("m4a", {"m4a": through_ffmpeg(tone(3, 1.5, 44_100), 44_100, "mp4", "aac"), "json": sample(3)["json"]}),
        ("short", {"flac": encode(tone(4, 0.2)), "json": sample(4)["json"]}),
        ("same", {"flac": encode(tone(5, 1.0, RATE), RATE), "json": sample(5)["json"]}),
    ]
    write_shard(folder / "train-00000.tar", good)
    write_shard(folder / "train-00001.tar", [(key, members) for key, members, _ in bad_samples()])
    return f"{folder}/train-*.tar"


def chunks(pattern: str, data: DataConfig) -> list[Chunk]:
    """Three passes."""
    small = small_config(train={"global_batch": 20, "chunk": 10})
    config = replace(small, data=replace(data, templates=small.data.templates, vocabulary=64, max_tokens=12))
    return list(reader_of(config, pattern).read(range(6)))


@pytest.mark.parametrize(
    "fields",
    [{}, {"pad": "repeat"}, {"augment": AugmentConfig(shift=0.5, gain=0.5, low_pass=0.5, noise=0.5)}],
    ids=["plain", "repeat", "augment"],
)
def test_a_crop_is_the_same_from_the_cache_and_without_it(pattern, tmp_path, fields):
    data = config_of(tmp_path, crop_seconds=0.5, **fields)
    unkept = chunks(pattern, replace(data, clip_cache_gib=0.0))
    first, second = chunks(pattern, data), chunks(pattern, data)
    assert not any(chunk["cached"].any() for chunk in unkept)
    assert first[-1]["cached"].any()
    assert all((chunk["cached"] == chunk["heard"]).all() for chunk in second)
    for one, *others in zip(unkept, first, second, strict=True):
        for other in others:
            np.testing.assert_array_equal(one["audio"], other["audio"])
            assert one["problems"] == other["problems"]


def test_it_is_the_crop_that_decoding_it_alone_would_give(pattern, tmp_path):
    """Exactly where nothing is lost and nothing resampled; else up to rounding, where it begins, and the edges."""
    lossless = encode(tone(5, 1.0, RATE), RATE)
    data = config_of(tmp_path, crop_seconds=0.5)
    for position in (0.0, 0.31, 1.0):
        crop, _ = ClipCache(data).crop(lossless, data.crop_samples, position, decode_whole)
        np.testing.assert_array_equal(crop, decode(lossless, data, position)[0])
    resampled = encode(tone(6, 1.0, 44_100), 44_100)
    crop, _ = ClipCache(data).crop(resampled, data.crop_samples, 0.0, decode_whole)
    alone, _ = decode(resampled, data, 0.0)
    inner = slice(0, data.crop_samples - 100)  # the crop's end is where the resampler of the crop alone runs out
    assert np.abs(crop[inner].astype(int) - alone[inner]).max() <= 1


def test_rows_that_cannot_be_used_say_the_same(tmp_path):
    for key, members, reason in bad_samples():
        data = config_of(tmp_path / key, crop_seconds=0.5)
        if not any(word in reason for word in ("decoded", "empty", "silent", "NaN")):
            continue
        sound = members.get("flac", members.get("wav"))
        with pytest.raises(DataError, match=reason):
            crop, _ = ClipCache(data).crop(sound, data.crop_samples, 0.5, decode_whole)
            to_int16(crop.astype(np.float32) / 32767, RATE, data)
        assert key == "silent" or not entries(tmp_path / key)


CLIP = np.random.default_rng(0).integers(-30_000, 30_000, 150_000).astype(np.int16)  # three blocks


@given(at=st.floats(0, 1, exclude_max=True), flip=st.integers(1, 255), position=st.floats(0, 1))
def test_a_damaged_entry_is_made_again(tmp_path_factory, at, flip, position):
    folder = tmp_path_factory.mktemp("cache", numbered=True)
    cache = ClipCache(config_of(folder))
    cache.crop(b"clip", 100, 0.5, lambda data, rate: CLIP)
    (entry,) = entries(folder)
    content = bytearray(entry.read_bytes())
    content[int(at * len(content))] ^= flip
    entry.write_bytes(content)
    start = round(position * (len(CLIP) - 60_000))
    for _ in range(2):
        crop, cached = cache.crop(b"clip", 60_000, position, lambda data, rate: CLIP)
        np.testing.assert_array_equal(crop, CLIP[start : start + 60_000])
    assert cached
    entry.write_bytes(content[: int(at * len(content))])  # cut short
    assert cache.crop(b"clip", 60_000, position, lambda data, rate: CLIP)[1] is False


def test_the_least_used_make_room(tmp_path):
    cache = ClipCache(config_of(tmp_path, gib=3.5 * CLIP.nbytes / (1 << 30)))
    for number in (0, 1, 2):
        cache.crop(b"%d" % number, 9, 0.5, lambda data, rate: CLIP)
        time.sleep(0.01)  # the clock of files is coarse
    assert cache.crop(b"0", 9, 0.5, never)[1]  # used now: 1 is the one not used for longest
    cache.crop(b"3", 9, 0.5, lambda data, rate: CLIP)
    assert len(entries(tmp_path)) == 3
    for number in (0, 2, 3):
        assert cache.crop(b"%d" % number, 9, 0.5, never)[1]


def test_processes_that_want_the_same_clip_decode_it_once(tmp_path):
    made, crops = [], []
    begun = threading.Event()

    def slow(data: bytes, rate: int) -> np.ndarray:
        made.append(data)
        begun.wait(5)
        return CLIP

    def want() -> None:
        crops.append(ClipCache(config_of(tmp_path)).crop(b"clip", 9, 0.5, slow)[1])

    threads = [threading.Thread(target=want) for _ in range(3)]
    for thread in threads:
        thread.start()
    while not made:
        time.sleep(0.001)
    begun.set()
    for thread in threads:
        thread.join()
    assert len(made) == 1 and sorted(crops) == [False, True, True]


def test_a_folder_that_cannot_be_written_costs_time_alone(tmp_path):
    (tmp_path / "clips").write_text("a file in its place")
    crop, cached = ClipCache(config_of(tmp_path)).crop(b"clip", 9, 0.0, lambda data, rate: CLIP)
    np.testing.assert_array_equal(crop, CLIP[:9])
    assert not cached


def test_evaluation_finds_clips_there_too(pattern, tmp_path):
    config = small_config()
    config = replace(config, data=replace(config.data, keep_clips=True, cache_folder=str(tmp_path)))
    index = index_of(pattern)
    first, second = (list(evaluation_chunks(config, index, LOCAL)) for _ in range(2))
    assert not all(chunk["cached"].any() for chunk in first)
    assert all((chunk["cached"] == chunk["heard"]).all() for chunk in second)


def test_a_second_view_comes_from_the_kept_clip(tmp_path):
    config = views_config()
    data = replace(config.data, augment=AugmentConfig(), keep_clips=True, cache_folder=str(tmp_path / "cache"))
    reader = reader_of(replace(config, data=data), write_shards(tmp_path, [8, 8]))
    first, second = (next(reader.read([0])) for _ in range(2))
    assert not first["cached"].any() and second["cached"].all()
    np.testing.assert_array_equal(first["view"], second["view"])
    for key, position, view in zip(first["key"], first["crop"][:, 1], first["view"], strict=True):
        sound = sample(int(key.removeprefix("piece")))["flac"]
        crop, _ = ClipCache(data).crop(sound, data.crop_samples, position, never)
        np.testing.assert_array_equal(view, crop)


def test_whether_clips_are_kept_is_part_of_a_runs_identity_and_how_many_is_not():
    config = small_config()
    kept = replace(config, data=replace(config.data, keep_clips=True))
    fewer = replace(kept, data=replace(kept.data, clip_cache_gib=1.0, cache_folder="/elsewhere"))
    names = {run.named("tiny").name for run in (config, kept, fewer)}
    assert len(names) == 2 and kept.named("tiny") == replace(kept, name=fewer.named("tiny").name)
