import io

import av
import numpy as np
import pytest

from muser_dist.data.audio import decode, to_int16
from muser_dist.data.config import DataConfig
from muser_dist.errors import DataError
from tests.shardmaker import bad_samples, encode


def config(rate: int, samples: int, **fields) -> DataConfig:
    return DataConfig(sample_rate=rate, crop_seconds=samples / rate, **fields)


def sine(hertz: float, seconds: float, rate: int) -> np.ndarray:
    return (0.5 * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)).astype(np.float32)


def peak_hertz(waveform: np.ndarray, rate: int) -> float:
    spectrum = np.abs(np.fft.rfft(waveform * np.hanning(len(waveform))))
    return float(np.argmax(spectrum)) * rate / len(waveform)


@pytest.mark.parametrize("kind", ["flac", "ogg", "wav", "mp3"])
@pytest.mark.parametrize("rate", [8_000, 22_050, 44_100, 48_000])
def test_every_format_and_rate_keeps_the_pitch_and_level(kind, rate):
    stereo = np.stack([sine(440, 2.0, rate)] * 2, axis=1)
    waveform, length = decode(encode(stereo, rate, kind), config(16_000, 16_000), 0.5)
    assert waveform.dtype == np.int16
    assert waveform.shape == (16_000,)
    assert length == 16_000
    assert abs(peak_hertz(waveform, 16_000) - 440) < 3
    assert np.abs(waveform[2000:-2000]).max() / 32767 == pytest.approx(0.5, abs=0.05)


def test_what_libsndfile_lacks_is_read_by_ffmpeg():
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=44_100, layout="mono")
        frame = av.AudioFrame.from_ndarray(sine(440, 1.0, 44_100)[None], format="fltp", layout="mono")
        frame.sample_rate = 44_100
        for packet in [*stream.encode(frame), *stream.encode(None)]:
            container.mux(packet)
    waveform, length = decode(buffer.getvalue(), config(16_000, 8_000), 0.5)
    assert length == 8_000
    assert abs(peak_hertz(waveform, 16_000) - 440) < 4


def test_the_crop_is_where_the_position_says():
    ramp = np.linspace(0, 0.9, 16_000, dtype=np.float32)
    data = encode(ramp, 16_000, "flac")
    head, _ = decode(data, config(16_000, 1_000), 0.0)
    tail, _ = decode(data, config(16_000, 1_000), 1.0)
    middle, _ = decode(data, config(16_000, 1_000), 0.5)
    np.testing.assert_allclose(head / 32767, ramp[:1000], atol=1e-4)
    np.testing.assert_allclose(tail / 32767, ramp[-1000:], atol=1e-4)
    np.testing.assert_allclose(middle / 32767, ramp[7500:8500], atol=1e-4)


def test_a_short_clip_is_padded_with_silence():
    waveform, length = decode(encode(sine(440, 0.25, 16_000)), config(16_000, 16_000), 0.7)
    assert length == 4_000
    assert waveform[:4000].any()
    assert not waveform[4000:].any()


def test_channels_are_averaged_and_loud_samples_clipped():
    left = np.full(800, 1.5, np.float32)
    waveform, _ = to_int16(np.stack([left, left], axis=1), 8_000, config(8_000, 800))
    assert (waveform == 32767).all()
    opposite, _ = to_int16(np.stack([left, 0.0 * left], axis=1), 8_000, config(8_000, 800))
    np.testing.assert_allclose(opposite / 32767, 0.75, atol=1e-4)


@pytest.mark.parametrize(
    ("members", "reason"),
    [(m, reason) for _, m, reason in bad_samples() if any(w in reason for w in ("decoded", "empty", "silent", "NaN"))],
)
def test_bad_audio_says_what_is_wrong(members, reason):
    with pytest.raises(DataError, match=reason):
        decode(members.get("flac", members.get("wav")), config(16_000, 16_000), 0.5)
