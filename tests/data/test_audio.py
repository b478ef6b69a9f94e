import io
import socket

import av
import numpy as np
import pytest
import soundfile

from muser_dist.data.audio import decode, decode_whole, probe, read_blocks, to_int16
from muser_dist.data.config import AugmentConfig, DataConfig
from muser_dist.data.mp3 import count_samples
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


def through_ffmpeg(waveform: np.ndarray, rate: int, container: str, codec: str) -> bytes:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container) as file:
        stream = file.add_stream(codec, rate=rate, layout="mono")
        for start in range(0, len(waveform), 1024):
            frame = av.AudioFrame.from_ndarray(waveform[None, start : start + 1024], format="fltp", layout="mono")
            frame.sample_rate, frame.pts = rate, start
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    return buffer.getvalue()


@pytest.mark.parametrize("container", ["mp4", "adts", "matroska"])
@pytest.mark.parametrize("position", [0.0, 0.02, 0.5, 1.0])
def test_what_libsndfile_lacks_is_read_by_ffmpeg_at_the_right_place(container, position):
    rate, seconds, crop = 44_100, 8.0, 1.0
    time = np.arange(round(seconds * rate)) / rate
    rising = 0.5 * np.sin(2 * np.pi * np.cumsum(300 + 200 * time) / rate)  # its pitch tells the time
    data = through_ffmpeg(rising.astype(np.float32), rate, container, "aac")
    waveform, length = decode(data, config(16_000, 16_000), position)
    assert length > 15_000
    middle = position * (seconds - crop) + crop / 2
    heard = (peak_hertz(waveform[4_000:12_000], 16_000) - 300) / 200
    assert heard == pytest.approx(middle, abs=0.05)


RATE, SECONDS = 22_050, 12.0


class Pipe(io.RawIOBase):
    """What is written cannot be mended later."""

    def __init__(self) -> None:
        self.written = bytearray()

    def writable(self) -> bool:
        return True

    def write(self, data) -> int:
        self.written += bytes(data)
        return len(data)


def encode_in_one_go(waveform: np.ndarray, container: str, codec: str, options: dict[str, str], **muxer: str) -> bytes:
    """The waveform (frames,) at RATE as what FFmpeg writes into a pipe."""
    pipe = Pipe()
    with av.open(pipe, "w", format=container, options=muxer) as file:
        stream = file.add_stream(codec, rate=RATE, options=options)
        stream.layout = "mono"
        if codec == "flac":
            stream.format = "s16"
        convert = av.AudioResampler(format=stream.format.name, layout="mono", rate=RATE)
        for start in range(0, len(waveform), 4096):
            frame = av.AudioFrame.from_ndarray(waveform[None, start : start + 4096], format="fltp", layout="mono")
            frame.sample_rate, frame.pts = RATE, start
            for converted in convert.resample(frame):
                file.mux(stream.encode(converted))
        file.mux(stream.encode(None))
    return bytes(pipe.written)


def rising(begin: str) -> np.ndarray:
    """A tone whose pitch tells the time; before and after two seconds it takes bits that differ widely."""
    time = np.arange(round(SECONDS * RATE)) / RATE
    noise = 0.15 * np.random.default_rng(0).standard_normal(len(time))
    waveform = 0.5 * np.sin(2 * np.pi * np.cumsum(300 + 200 * time) / RATE)
    waveform += np.where(time < 2, noise, 0) if begin == "complex" else noise
    return (waveform * (1 if begin == "complex" else time >= 2)).astype(np.float32)


VARIABLE = {"global_quality": str(2 * 118), "flags": "+qscale"}
UNTOLD = {
    "aac": ("adts", "aac", {"b": "128000"}),
    "mp3": ("mp3", "libmp3lame", VARIABLE),
    "flac": ("flac", "flac", {}),
}


@pytest.mark.parametrize("begin", ["complex", "silent"])
@pytest.mark.parametrize("kind", UNTOLD)
def test_a_length_that_the_file_does_not_tell_is_not_guessed(kind, begin):
    data = encode_in_one_go(rising(begin), *UNTOLD[kind], **({"write_xing": "0"} if kind == "mp3" else {}))
    assert len(decode_whole(data, 16_000)) / 16_000 == pytest.approx(SECONDS, abs=0.15)
    assert sum(len(block) for block, _ in read_blocks(io.BytesIO(data))) / RATE == pytest.approx(SECONDS, abs=0.15)
    seconds = probe(data)[2]
    assert np.isnan(seconds) or seconds == pytest.approx(SECONDS, abs=0.15)
    for position in (0.25, 0.5, 0.9, 1.0):
        waveform, length = decode(data, config(16_000, 16_000), position)
        assert length == 16_000
        heard = (peak_hertz(waveform[4_000:12_000], 16_000) - 300) / 200
        assert heard == pytest.approx(position * (SECONDS - 1) + 0.5, abs=0.1)


def constant_mp3() -> bytes:
    return encode_in_one_go(rising("complex"), "mp3", "libmp3lame", {"b": "64000"}, write_xing="0", id3v2_version="0")


PICTURE = b"ID3\4\0\0" + bytes([0, 12, 0, 0]) + bytes(12 << 14)  # as long as 25 s of sound


@pytest.mark.parametrize(
    ("before", "after"),
    [(b"", b""), (PICTURE, b""), (PICTURE + b"ID3\4\0\0\0\0\0\x14" + bytes(20), b""), (b"", b"TAG" + bytes(125))],
    ids=["plain", "picture", "two tags", "tag at the end"],
)
def test_a_constant_bit_rate_is_not_decoded_from_the_head(before, after, monkeypatch):
    data = before + constant_mp3() + after
    monkeypatch.setattr(av, "open", None)  # FFmpeg would do that
    assert probe(data)[2] == pytest.approx(SECONDS, abs=0.1)
    waveform, length = decode(data, config(16_000, 16_000), 1.0)
    assert length == 16_000
    assert (peak_hertz(waveform[4_000:12_000], 16_000) - 300) / 200 == pytest.approx(SECONDS - 0.5, abs=0.1)


def test_an_mp3_with_something_between_its_frames_is_heard_to_its_end():
    half = constant_mp3()
    data = half + b"what is no frame" * 20 + half
    assert len(decode_whole(data, 16_000)) / 16_000 == pytest.approx(2 * SECONDS, abs=0.2)
    _, length = decode(data, config(16_000, 16_000), 1.0)
    assert length == 16_000


def test_an_mp3_that_is_cut_short_has_crops_of_what_is_left():
    buffer = io.BytesIO()
    soundfile.write(buffer, rising("complex"), RATE, format="MP3", bitrate_mode="VARIABLE")
    data = buffer.getvalue()[: len(buffer.getvalue()) // 2]
    for position in (0.0, 0.7, 1.0):
        assert decode(data, config(16_000, 16_000), position)[1] == 16_000


@pytest.mark.parametrize("rate", [8_000, 11_025, 16_000, 24_000, 32_000, 44_100, 48_000])
@pytest.mark.parametrize("mode", ["CONSTANT", "VARIABLE"])
def test_frames_of_an_mp3_are_counted(rate, mode):
    noise = np.random.default_rng(0).standard_normal(8 * rate).astype(np.float32) * 0.2
    noise[: 4 * rate] *= 0.01
    buffer = io.BytesIO()
    soundfile.write(buffer, noise, rate, format="MP3", bitrate_mode=mode)
    data = buffer.getvalue()
    assert count_samples(io.BytesIO(data), 123) == 123  # the first frame tells
    untold = io.BytesIO(data.replace(b"Xing", b"....").replace(b"Info", b"...."))
    with av.open(untold) as file:
        frames = sum(packet.size > 0 for packet in file.demux())
    untold.seek(7)
    assert count_samples(untold, 123) == frames * (1152 if rate >= 32_000 else 576)
    assert untold.tell() == 7


@pytest.mark.parametrize(
    "data",
    [b"\xff\xe3\x18\x00" + bytes(20), b"ID3\4\0\0\0\0\0\0", b"ID3\4\0\0\x7f\x7f\x7f\x7f"],
    ids=["frames", "tags", "a tag"],
)
def test_counting_frames_takes_no_longer_than_reading_the_file(data):
    class Counted(io.BytesIO):
        calls = 0

        def read(self, size=-1):
            self.calls += 1
            return super().read(size)

    file = Counted(data * 100_000)
    count_samples(file, 1)
    assert file.calls < len(data) * 100_000 / 1000


def test_opus():
    buffer = io.BytesIO()
    soundfile.write(buffer, sine(440, 2.0, 48_000), 48_000, format="OGG", subtype="OPUS")
    waveform, _ = decode(buffer.getvalue(), config(16_000, 16_000), 0.5)
    assert abs(peak_hertz(waveform, 16_000) - 440) < 3


@pytest.mark.parametrize("rate", [22_050, 44_100, 48_000])
@pytest.mark.parametrize(("mode", "level"), [("CONSTANT", 0.0), ("CONSTANT", 0.9), ("VARIABLE", 0.0)])
def test_an_mp3_is_the_same_from_the_head_and_after_a_seek(rate, mode, level):
    noise = np.random.default_rng(0).standard_normal((6 * rate, 2)).astype(np.float32) * 0.2
    noise[: 3 * rate] *= np.linspace(0, 1, 3 * rate)[:, None]  # so that a variable rate varies
    buffer = io.BytesIO()
    soundfile.write(buffer, noise, rate, format="MP3", bitrate_mode=mode, compression_level=level)
    with soundfile.SoundFile(io.BytesIO(buffer.getvalue())) as file:
        whole = file.read(dtype="float32", always_2d=True)
    for position in (0.1, 0.5, 0.93, 1.0):
        waveform, _ = decode(buffer.getvalue(), config(rate, rate), position)
        start = round(position * (len(whole) - rate))
        np.testing.assert_allclose(waveform / 32767, whole[start : start + rate].mean(axis=1), atol=1e-4)


@pytest.mark.parametrize(
    "playlist",
    [b"#EXTM3U\n#EXTINF:9,\nhttp://127.0.0.1:PORT/x.ts\n", b"ffconcat version 1.0\nfile http://127.0.0.1:PORT/x\n"],
)
def test_a_playlist_opens_nothing(playlist):
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0)
        data = playlist.replace(b"PORT", str(server.getsockname()[1]).encode())
        with pytest.raises(DataError, match="cannot be decoded"):
            decode(data, config(16_000, 16_000), 0.5)
        with pytest.raises(BlockingIOError):  # nobody has called
            server.accept()


def test_headers_that_lie_are_refused():
    wav = bytearray(encode(sine(440, 0.1, 8_000), 8_000, "wav"))
    wav[24:28] = (2**31 - 1).to_bytes(4, "little")  # the sample rate
    with pytest.raises(DataError, match="claims 2,147,483,647 Hz"):
        decode(bytes(wav), config(16_000, 16_000), 0.5)


def test_a_short_clip_can_be_repeated():
    clip = sine(440, 0.25, 16_000)
    waveform, length = decode(encode(clip), config(16_000, 10_000, pad="repeat"), 0.7)
    assert length == 10_000
    np.testing.assert_array_equal(waveform[:4_000], waveform[4_000:8_000])
    np.testing.assert_array_equal(waveform[:2_000], waveform[8_000:])


def test_augmentation_is_seeded():
    data = encode(sine(440, 1.0, 16_000))
    settings = config(16_000, 8_000, augment=AugmentConfig(noise=1.0))
    plain, first, again, other = (decode(data, settings, 0.5, seed)[0] for seed in (None, 1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any() and (first != plain).any()


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
