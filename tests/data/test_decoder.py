"""What kills, stalls or bloats a decoder costs one row."""

import os
import sys

import numpy as np
import pytest

from muser_dist.data import decoder as decoder_module
from muser_dist.data.audio import decode
from muser_dist.data.config import DataConfig
from muser_dist.data.decoder import Crop, Decoder
from muser_dist.data.pipeline import evaluation_chunks
from muser_dist.data.tar import Stored
from muser_dist.errors import DataError, UnreadError
from tests.fatal import FATAL, HUNGRY, STALLING, install
from tests.shardmaker import encode, sample, tone, write_shard
from tests.small import LOCAL, index_of, small_config

CONFIG = DataConfig(sample_rate=8_000, crop_seconds=0.5)


def stored(data):
    """The data as a member in the middle of a file, which stays open until the tests end."""
    file = os.memfd_create("shard")
    os.write(file, b"before" + data + b"after")
    return Stored(file, len(b"before"), len(data))


def crop(decoder, sound, position, seed):
    """One crop's waveform and length, or its error raised."""
    into = np.zeros((1, CONFIG.crop_samples), np.int16)
    (decoded,) = decoder.decode({0: Crop(sound, position, seed)}, into).values()
    if isinstance(decoded, DataError):
        raise decoded
    return into[0], decoded.length


@pytest.fixture
def decoder(tmp_path, monkeypatch):
    """A decoder that dies of FATAL, stalls at STALLING and runs out of memory at HUNGRY."""
    monkeypatch.setattr(sys, "path", [str(install(tmp_path)), *sys.path])
    decoder = Decoder(CONFIG)
    yield decoder
    decoder.close()


def test_it_decodes_as_this_process_would(decoder):
    for index, seed in ((1, None), (2, 5)):
        data = encode(tone(index))
        waveform, length = crop(decoder, stored(data), 0.3, seed)
        expected, expected_length = decode(data, CONFIG, 0.3, seed)
        np.testing.assert_array_equal(waveform, expected)
        assert length == expected_length


def test_bad_audio_is_an_error_and_no_death(decoder):
    crop(decoder, stored(encode(tone(1))), 0.5, None)
    process = decoder._process
    for data, reason in ((b"", "empty"), (b"no audio", "cannot be decoded"), (encode(np.zeros(99)), "silent")):
        with pytest.raises(DataError, match=reason):
            crop(decoder, stored(data), 0.5, None)
    assert decoder._process is process


def test_a_crash_is_tried_once_more_and_named(decoder):
    with pytest.raises(DataError, match=r"its decoder died twice \(SIGSEGV\)"):
        crop(decoder, stored(FATAL), 0.5, None)
    assert crop(decoder, stored(encode(tone(1))), 0.5, None)[0].any()


def test_a_stall_is_given_up(decoder, monkeypatch):
    crop(decoder, stored(encode(tone(1))), 0.5, None)
    monkeypatch.setattr(decoder_module, "SECONDS", 0.2)
    with pytest.raises(DataError, match=r"decoding takes more than 0\.2 s"):
        crop(decoder, stored(STALLING), 0.5, None)
    monkeypatch.undo()
    assert crop(decoder, stored(encode(tone(1))), 0.5, None)[0].any()


def test_a_member_that_takes_all_memory_is_an_error(decoder):
    with pytest.raises(DataError, match=r"MemoryError|died twice"):
        crop(decoder, stored(HUNGRY), 0.5, None)
    assert crop(decoder, stored(encode(tone(1))), 0.5, None)[0].any()


def test_a_fatal_member_costs_one_row(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [str(install(tmp_path)), *sys.path])
    decoder_module._decoder.cache_clear()  # the children of other tests would survive it
    samples = [(f"piece{i}", sample(i) | ({"flac": FATAL} if i == 2 else {})) for i in range(6)]
    write_shard(tmp_path / "train-00000.tar", samples)
    chunks = list(evaluation_chunks(small_config(), index_of(f"{tmp_path}/*.tar"), LOCAL))
    decoder_module._decoder.cache_clear()
    assert [ok for chunk in chunks for ok in chunk["valid_audio"]] == [True, True, False, True, True, True]
    (problem,) = (problem for chunk in chunks for problem in chunk["problems"])
    assert "piece2" in problem and "SIGSEGV" in problem


def test_an_interrupt_does_not_shift_the_answers(decoder, monkeypatch):
    first, second = encode(tone(1)), encode(tone(2))
    crop(decoder, stored(first), 0.5, None)

    def interrupted():
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(decoder, "_finished", interrupted)
        crop(decoder, stored(first), 0.5, None)
    np.testing.assert_array_equal(crop(decoder, stored(second), 0.3, None)[0], decode(second, CONFIG, 0.3)[0])


def test_members_of_any_size_come_one_after_the_other(decoder):
    small, long = encode(tone(1)), encode(np.tile(tone(2), 400), kind="wav")  # 25 MB
    for data in (small, long, small):
        np.testing.assert_array_equal(crop(decoder, stored(data), 0.4, None)[0], decode(data, CONFIG, 0.4)[0])


def test_a_shard_that_ends_inside_a_member_is_no_death(decoder):
    whole = stored(encode(tone(1)))
    with pytest.raises(DataError, match=r"cut short: 26,427 of 99,999 bytes are there"):
        crop(decoder, Stored(whole.file, whole.offset, 99_999), 0.5, None)
    assert crop(decoder, whole, 0.5, None)[0].any()


def test_a_member_that_storage_does_not_give_is_told_from_a_bad_one(decoder, tmp_path):
    unread = Stored(os.open(tmp_path, os.O_RDONLY), 0, 99)  # a folder can be opened and not read
    with pytest.raises(UnreadError, match="IsADirectoryError"):
        crop(decoder, unread, 0.5, None)
    with pytest.raises(UnreadError, match="IsADirectoryError"):
        list(decoder.windows(unread, 0.5))
    with pytest.raises(DataError, match="cannot be decoded") as error:
        crop(decoder, stored(b"no audio"), 0.5, None)
    assert not isinstance(error.value, UnreadError)


def test_many_crops_each_get_their_own_answer(decoder):
    """More than one request, with rows that are not asked for, errors, deaths and crops among each other."""
    asked, expected = {}, {}
    for row in range(0, 100, 2):
        data = FATAL if row in (0, 34, 36, 98) else b"no audio" if row in (20, 38) else encode(tone(row % 7))
        asked[row] = Crop(stored(data), row / 100, row if row % 3 else None)
        expected[row] = "twice" if data is FATAL else "decoded" if data == b"no audio" else data
    waveforms = np.full((100, CONFIG.crop_samples), 7, np.int16)
    answers = decoder.decode(asked, waveforms)
    assert list(answers) == list(asked)
    for row in range(100):
        data = expected.get(row)
        if isinstance(data, bytes):
            waveform, length = decode(data, CONFIG, asked[row].position, asked[row].seed)
            np.testing.assert_array_equal(waveforms[row], waveform)
            assert answers[row] == (length, False)
        else:
            assert (waveforms[row] == 7).all()
            assert data is None or data in str(answers[row])
