from functools import cache

import numpy as np
import pytest
import soxr

from muser_dist.data.audio import decode
from muser_dist.data.config import DataConfig
from muser_dist.data.corpora.demo import compose, describe
from muser_dist.data.fingerprint import LONGEST, RATE, SECONDS, bit_errors, fingerprint, recordings
from tests.shardmaker import encode

EXCERPT = DataConfig(sample_rate=RATE, crop_seconds=SECONDS)


@cache
def piece(index: int) -> tuple[np.ndarray, int]:
    """20 s of music, mono, and its rate."""
    waveform, rate, _ = compose(3, index, 20.0)
    return (waveform if waveform.ndim == 1 else waveform.mean(axis=1)), rate


def heard(encoded: bytes) -> np.ndarray:
    waveform, length = decode(encoded, EXCERPT, 0.5)
    return fingerprint(waveform[:length])


def groups(*prints: np.ndarray) -> list[int]:
    return recordings(np.concatenate(prints), np.cumsum([len(words) for words in prints])).tolist()


CHANGES = {
    "mp3": lambda waveform, rate: encode(waveform, rate, "mp3"),
    "ogg": lambda waveform, rate: encode(waveform, rate, "ogg"),
    "half the rate": lambda waveform, rate: encode(soxr.resample(waveform, rate, rate // 2), rate // 2, "mp3"),
    "22,050 Hz": lambda waveform, rate: encode(soxr.resample(waveform, rate, 22_050), 22_050),
    "stereo": lambda waveform, rate: encode(np.stack([waveform, 0.5 * waveform], axis=1), rate, "mp3"),
    "upside down": lambda waveform, rate: encode(-waveform, rate),
    "30 dB softer": lambda waveform, rate: encode(0.03 * waveform, rate, "mp3"),
    "with noise": lambda waveform, rate: encode(
        waveform + 0.003 * np.random.default_rng(0).standard_normal(len(waveform)), rate
    ),
    "0.3 s cut off": lambda waveform, rate: encode(waveform[round(0.3 * rate) :], rate, "mp3"),
    "6.3 s cut off": lambda waveform, rate: encode(waveform[round(6.3 * rate) :], rate, "mp3"),
    "a second of silence before": lambda waveform, rate: encode(np.concatenate([np.zeros(rate), waveform]), rate),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_copy_is_found_and_nothing_else(change):
    originals = [heard(encode(*piece(index))) for index in range(4)]
    copies = [heard(CHANGES[change](*piece(index))) for index in range(4)]
    assert groups(*originals, *copies) == [*range(4), *range(4)]


def test_forty_pieces_are_forty_recordings():
    prints = [heard(encode(*piece(index))) for index in range(40)]
    assert all(len(words) == LONGEST for words in prints)
    assert groups(*prints) == list(range(40))


def test_pieces_of_one_type_key_and_tempo_are_different():
    facts = {index: describe(1, index) for index in range(400)}
    alike = [
        index for index, fact in facts.items() if (fact["type"], fact["mode"], fact["pace"]) == ("jig", "major", "fast")
    ]
    assert len(alike) >= 6
    pieces = [compose(1, index, 15.0) for index in alike[:6]]
    assert groups(*[heard(encode(waveform, rate)) for waveform, rate, _ in pieces]) == list(range(6))


def test_many_copies_are_one_group():
    """More than the neighbours that a row is compared with."""
    original, other = heard(encode(*piece(0))), heard(encode(*piece(1)))
    assert groups(*[original] * 50, other, *[original] * 50) == [*[0] * 50, 50, *[0] * 50]


def test_words_of_two_clips_at_any_shift():
    words = np.random.default_rng(0).integers(1, 1 << 32, 300, dtype=np.uint32)
    assert bit_errors(words, words, 0) == 0
    assert bit_errors(words[20:], words, -20) == bit_errors(words, words[20:], 20) == 0
    assert bit_errors(words, ~words, 0) == 1
    assert bit_errors(words, words ^ np.uint32(0xFF), 0) == 0.25
    assert 0.45 < bit_errors(words, words, 1) < 0.55
    assert bit_errors(words, words, 200) == 1  # too little in common to say


def test_silence_is_no_evidence():
    waveform, rate = piece(0)
    other, other_rate = piece(1)
    short, other_short = waveform[: 2 * rate], other[: 2 * other_rate]
    prints = [
        heard(encode(np.concatenate([sound, np.zeros(8 * hertz)]), hertz))
        for sound, hertz in ((short, rate), (other_short, other_rate))
    ]
    assert (prints[0] == 0).sum() > 300
    assert groups(*prints) == [0, 1]
    assert groups(np.zeros(500, np.uint32), np.zeros(500, np.uint32)) == [0, 1]


@pytest.mark.parametrize("seconds", [0, 0.01, 0.39])
def test_a_clip_may_be_too_short(seconds):
    assert fingerprint(np.ones(round(seconds * RATE), np.int16)).shape == (0,)
    none = np.zeros(0, np.uint32)
    assert groups(none, none) == [0, 1]


def test_no_rows():
    assert recordings(np.zeros(0, np.uint32), np.zeros(0, np.int64)).shape == (0,)


def test_an_index_in_parts_finds_the_same(monkeypatch):
    prints = [heard(encode(*piece(index), "mp3")) for index in range(4)] * 2
    whole = groups(*prints)
    monkeypatch.setattr("muser_dist.data.fingerprint._AT_ONCE", 700)
    assert groups(*prints) == whole == [0, 1, 2, 3, 0, 1, 2, 3]
