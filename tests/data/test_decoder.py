"""What kills, stalls or bloats a decoder costs one row."""

import sys

import numpy as np
import pytest

from muser_dist.data import decoder as decoder_module
from muser_dist.data.audio import decode
from muser_dist.data.config import DataConfig
from muser_dist.data.decoder import Decoder
from muser_dist.data.pipeline import evaluation_chunks
from muser_dist.errors import DataError
from tests.fatal import FATAL, STALLING, install
from tests.shardmaker import encode, sample, tone, write_shard
from tests.small import LOCAL, index_of, small_config

CONFIG = DataConfig(sample_rate=8_000, crop_seconds=0.5)


@pytest.fixture
def decoder(tmp_path, monkeypatch):
    """A decoder that dies of FATAL and stalls at STALLING."""
    monkeypatch.setattr(sys, "path", [str(install(tmp_path)), *sys.path])
    decoder = Decoder(CONFIG)
    yield decoder
    decoder.close()


def test_it_decodes_as_this_process_would(decoder):
    for index, seed in ((1, None), (2, 5)):
        data = encode(tone(index))
        waveform, length = decoder.decode(data, 0.3, seed)
        expected, expected_length = decode(data, CONFIG, 0.3, seed)
        np.testing.assert_array_equal(waveform, expected)
        assert length == expected_length


def test_bad_audio_is_an_error_and_no_death(decoder):
    decoder.decode(encode(tone(1)), 0.5, None)
    process = decoder._process
    for data, reason in ((b"", "empty"), (b"no audio", "cannot be decoded"), (encode(np.zeros(99)), "silent")):
        with pytest.raises(DataError, match=reason):
            decoder.decode(data, 0.5, None)
    assert decoder._process is process


def test_a_crash_is_tried_once_more_and_named(decoder):
    with pytest.raises(DataError, match=r"its decoder died twice \(SIGSEGV\)"):
        decoder.decode(FATAL, 0.5, None)
    assert decoder.decode(encode(tone(1)), 0.5, None)[0].any()


def test_a_stall_is_given_up(decoder, monkeypatch):
    decoder.decode(encode(tone(1)), 0.5, None)
    monkeypatch.setattr(decoder_module, "SECONDS", 0.2)
    with pytest.raises(DataError, match=r"decoding takes more than 0\.2 s"):
        decoder.decode(STALLING, 0.5, None)
    monkeypatch.undo()
    assert decoder.decode(encode(tone(1)), 0.5, None)[0].any()


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
    decoder.decode(first, 0.5, None)

    def interrupted(_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(decoder_module, "_receive", interrupted)
        decoder.decode(first, 0.5, None)
    np.testing.assert_array_equal(decoder.decode(second, 0.3, None)[0], decode(second, CONFIG, 0.3)[0])


def test_members_of_any_size_share_the_memory(decoder):
    small, long = encode(tone(1)), encode(np.tile(tone(2), 400), kind="wav")  # 25 MB
    huge = long + bytes(80 << 20)
    for data in (small, long, huge, small, long):
        np.testing.assert_array_equal(decoder.decode(data, 0.4, None)[0], decode(data, CONFIG, 0.4)[0])
    assert decoder._memory.file.seek(0, 2) < 64 << 20
