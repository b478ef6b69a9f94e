"""A whole clip as windows: each is the crop that stands there."""

import io
import sys
import time
import tracemalloc

import av
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from muser_dist.data.audio import decode, read_blocks, to_int16
from muser_dist.data.config import DataConfig
from muser_dist.data.decoder import Decoder
from muser_dist.data.windows import cut_consecutive, cut_windows
from muser_dist.errors import DataError
from tests.data.test_decoder import stored
from tests.fatal import FATAL, install
from tests.shardmaker import encode, tone

CONFIG = DataConfig(sample_rate=8_000, crop_seconds=0.5)


def by_hand(waveform, rate, config, hop_seconds):
    """The same out of the whole clip, by the definition."""
    wanted, hop = round(config.crop_seconds * rate), round(hop_seconds * rate)
    last = max(0, len(waveform) - wanted)
    starts = sorted({*range(0, last + 1, hop), last})
    windows = [waveform[start : start + wanted] for start in starts]
    return [to_int16(window, rate, config) for window in windows if np.abs(window).max() > 0.5 / 32767]


def assert_equal(windows, expected):
    windows = list(windows)
    assert len(windows) == len(expected)
    for (mine, length), (theirs, wanted) in zip(windows, expected, strict=True):
        np.testing.assert_array_equal(mine, theirs)
        assert length == wanted


@settings(max_examples=60)
@given(
    frames=st.integers(1, 30_000),
    hop=st.floats(0.05, 1.5),
    rate=st.sampled_from([8_000, 11_025]),
    cuts=st.lists(st.integers(0, 30_000), max_size=6),
    silence=st.tuples(st.integers(0, 30_000), st.integers(0, 30_000)),
)
def test_windows_are_those_cut_by_hand_however_the_clip_comes_in_blocks(frames, hop, rate, cuts, silence):
    waveform = np.random.default_rng(frames).uniform(-1, 1, (frames, 2)).astype(np.float32)
    waveform[slice(*sorted(silence))] = 0
    blocks = [(block, rate) for block in np.split(waveform, sorted(min(cut, frames) for cut in cuts))]
    expected = by_hand(waveform, rate, CONFIG, hop)
    if expected:
        assert_equal(cut_windows(blocks, CONFIG, hop), expected)
    else:
        with pytest.raises(DataError, match="silent"):
            list(cut_windows(blocks, CONFIG, hop))


def aac(waveform, rate):
    """A format that libsndfile does not read."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=rate, layout="mono")
        frame = av.AudioFrame.from_ndarray(waveform[None], format="fltp", layout="mono")
        frame.rate = rate
        for packet in (*stream.encode(frame), *stream.encode(None)):
            container.mux(packet)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["flac", "mp3", "ogg", "m4a"])
def test_files_are_cut_as_what_they_decode_to(kind):
    data = aac(tone(3, 9.3), 16_000) if kind == "m4a" else encode(tone(3, 9.3), kind=kind)
    blocks = list(read_blocks(data))
    assert len(blocks) > 1
    waveform, rate = np.concatenate([block for block, _ in blocks]), blocks[0][1]
    assert_equal(cut_windows(read_blocks(io.BytesIO(data)), CONFIG, 0.4), by_hand(waveform, rate, CONFIG, 0.4))


def test_the_only_window_of_a_short_clip_is_its_crop():
    for seconds in (0.2, 0.5):
        data = encode(tone(1, seconds))
        assert_equal(cut_windows(read_blocks(data), CONFIG, 0.1), [decode(data, CONFIG, 0.5)])


def test_a_long_clip_is_held_a_window_at_a_time():
    data = encode(tone(0, 600.0, 8_000), 8_000, "wav")  # 19 MB
    tracemalloc.start()
    count = sum(1 for _ in cut_windows(read_blocks(data), CONFIG, 0.5))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert count == 1200
    assert peak < 3e6


@pytest.mark.parametrize(("waveform", "reason"), [(np.zeros(0, np.float32), "empty"), ([0.1, np.nan], "NaN")])
def test_clips_that_cannot_be_used(waveform, reason):
    with pytest.raises(DataError, match=reason):
        list(cut_windows([(np.array(waveform, np.float32), 8_000)], CONFIG, 0.5))


@pytest.mark.parametrize("seconds", [0.3, 7.9, 8.0, 8.1, 16.0, 20.0])  # about one and two times what the child sends
def test_the_decoders_child_cuts_as_this_process_would(decoder, seconds):
    data = encode(tone(2, seconds))
    expected = list(cut_windows(read_blocks(data), CONFIG, 0.5))
    assert_equal(decoder.windows(stored(data), 0.5), expected)


def test_what_goes_wrong_in_the_child_is_told_and_the_next_clip_is_cut(decoder):
    good = encode(tone(2, 12.0))
    bad = np.concatenate([tone(2, 10.0), [np.nan]]).astype(np.float32)
    with pytest.raises(DataError, match="died twice"):
        list(decoder.windows(stored(FATAL), 0.5))
    windows = decoder.windows(stored(encode(bad, kind="wav")), 0.5)
    for _ in range(20):
        next(windows)
    with pytest.raises(DataError, match="NaN"):
        next(windows)
    windows = decoder.windows(stored(good), 0.5)
    next(windows)
    windows.close()  # in the middle: the child must not go on with it
    assert len(list(decoder.windows(stored(good), 0.5))) == 24


def test_a_child_that_dies_in_the_middle_of_a_clip_repeats_no_window(decoder):
    data = encode(tone(2, 20.0))
    windows = decoder.windows(stored(data), 0.5)
    first = [next(windows) for _ in range(3)]
    decoder._process.kill()
    assert_equal([*first, *windows], list(cut_windows(read_blocks(data), CONFIG, 0.5)))


@pytest.fixture(scope="module")
def decoder(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(install(tmp_path_factory.mktemp("fatal"))))
        decoder = Decoder(CONFIG)
        yield decoder
        decoder.close()


# --- Windows that follow each other ---


@given(
    frames=st.integers(1, 3000), block=st.integers(1, 700), rate=st.sampled_from([1000, 2000]), seed=st.integers(0, 9)
)
@settings(max_examples=60)
def test_consecutive_windows_are_the_clip_but_for_a_short_rest(frames, block, rate, seed):
    config = DataConfig(sample_rate=1000, crop_seconds=0.25)
    rng = np.random.default_rng(seed)
    clip = rng.uniform(0.1, 0.9, frames).astype(np.float32)
    clip[: frames // 3] = 0  # silent windows keep their places
    blocks = ((clip[i : i + block], rate) for i in range(0, frames, block))
    if not clip.any() or round(clip.max() * 32767) < 1:
        return
    windows = list(cut_consecutive(blocks, config))
    wanted = rate // 4
    whole, rest = divmod(frames, wanted)
    assert len(windows) == whole + (2 * rest >= wanted or not whole)
    for i, (waveform, length) in enumerate(windows):
        window = clip[i * wanted : (i + 1) * wanted]
        assert waveform.shape == (250,) and not waveform[length:].any()
        assert abs(length - len(window) * 1000 / rate) <= 1
        if rate == 1000:
            np.testing.assert_array_equal(waveform[:length], np.round(window * 32767).astype(np.int16))


def test_a_clip_without_sound_has_no_consecutive_windows():
    config = DataConfig(sample_rate=1000, crop_seconds=0.25)
    with pytest.raises(DataError, match="silent"):
        list(cut_consecutive([(np.zeros(900, np.float32), 1000)], config))
    with pytest.raises(DataError, match="empty"):
        list(cut_consecutive([], config))


def test_the_decoder_cuts_them_as_this_process_would():
    """More than it is asked for at a time, and a clip that breaks off."""
    config = DataConfig(sample_rate=8_000, crop_seconds=0.1)
    data = encode(tone(4, 4.07, 8_000), 8_000)
    isolated = Decoder(config)
    try:
        windows = list(isolated.windows(stored(data), None))
        want = list(cut_consecutive(read_blocks(data), config))
        assert len(windows) == len(want) == 41
        for (waveform, length), (expected, expected_length) in zip(windows, want, strict=True):
            np.testing.assert_array_equal(waveform, expected)
            assert length == expected_length
        with pytest.raises(DataError, match="silent"):
            list(isolated.windows(stored(encode(np.zeros(8_000, np.float32), 8_000)), None))
        assert len(list(isolated.windows(stored(data), 0.1))) == 41
    finally:
        isolated.close()


def test_the_child_waits_for_its_parent_as_long_as_that_takes(tmp_path, monkeypatch):
    """Its alarm is for what it decodes. A minute of it is a second here."""
    hurried = "import signal\nsignal.alarm = lambda seconds: signal.setitimer(signal.ITIMER_REAL, seconds / 60)\n"
    (tmp_path / "sitecustomize.py").write_text(hurried)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    data = encode(tone(4, 4.0, 8_000), 8_000)
    isolated = Decoder(DataConfig(sample_rate=8_000, crop_seconds=0.1))
    try:
        windows = isolated.windows(stored(data), None)
        next(windows)
        process = isolated._process
        time.sleep(3)
        assert sum(1 for _ in windows) == 39
        assert isolated._process is process
    finally:
        isolated.close()
