"""Encoded audio to an int16 mono crop at the run's sample rate."""

import io
from collections.abc import Callable, Iterator
from typing import BinaryIO, TypeVar

import av
import av.container
import numpy as np
import soundfile
import soxr

from muser_dist.data.augment import augment
from muser_dist.data.config import DataConfig
from muser_dist.data.mp3 import count_samples
from muser_dist.errors import DataError

EXTENSIONS = ("flac", "wav", "ogg", "opus", "mp3", "m4a", "aac", "mp4", "aif", "aiff", "au")
"""Extensions of members that are taken for audio."""

MAX_SECONDS = 4 * 3600
"""Longest clip that is decoded from its head, where the format cannot seek or does not tell its length."""

_MAX_CHANNELS = 32

_EMPTY = "empty: no samples"

_CONTAINERS = (
    "mov,mp4,m4a,3gp,3g2,mj2,aac,matroska,webm,ogg,flac,wav,w64,mp3,aiff,au,caf,asf,ape,wv,tta,mpc,mpc8,ac3,eac3,amr"
)

# Bare frames, one after the other: FFmpeg guesses how long they are by the bit rate of the first ones.
_GUESSED = ("aac", "ac3", "eac3", "amr", "mp3")

# Seconds decoded before a crop after a seek: codecs lean on the frames before.
_RUN_UP = 0.25

# What libsndfile says of lengths that nobody knows is negative or beyond this.
_LONGEST_FRAMES = 1 << 62

# Frames of a block of a clip that is decoded from its head to its end.
_BLOCK_FRAMES = 1 << 16

_T = TypeVar("_T")


class Silence(DataError):
    """Every sample of a crop is zero."""


class _WrongLengthError(Exception):
    """libsndfile does not know how long a clip is, or is wrong about it."""


def decode(data: bytes, config: DataConfig, position: float, seed: int | None = None) -> tuple[np.ndarray, int]:
    """Decodes one crop of a clip.

    Args:
        data: the encoded file (flac, wav, ogg, opus, mp3 through libsndfile; others through FFmpeg).
        config: rate and length of the result, padding and augmentation.
        position: where the crop lies, in [0, 1]: 0 is the clip's head, 1 its tail. Ignored when
            the clip is shorter than the crop.
        seed: of the augmentation; None for none.

    Returns:
        waveform (samples,) int16, and the number of samples before the padding with zeros.

    Raises:
        DataError: the clip cannot be decoded, is empty, silent or not finite.
    """
    waveform, rate = _read_crop(data, config.crop_seconds, position)
    return to_int16(waveform, rate, config, seed)


def to_int16(waveform: np.ndarray, rate: int, config: DataConfig, seed: int | None = None) -> tuple[np.ndarray, int]:
    """Mixes down, resamples, augments and pads a waveform that is already decoded.

    Args:
        waveform: (frames,) or (frames, channels) float in [-1, 1].
        rate: its rate in Hz.
        config: rate and length of the result, padding and augmentation; what is longer is cut.
        seed: of the augmentation; None for none.

    Returns:
        waveform (samples,) int16 and the number of samples before the padding with zeros.

    Raises:
        DataError: the waveform is empty, silent or not finite.
    """
    samples = config.crop_samples
    if waveform.shape[0] == 0:
        raise DataError(_EMPTY)
    mono = _mono(waveform)
    if rate != config.sample_rate:
        mono = soxr.resample(mono, rate, config.sample_rate, quality="HQ")
    mono = mono[:samples]
    if config.pad == "repeat" and len(mono):
        mono = np.resize(mono, samples)
    if np.abs(mono).max(initial=0.0) * 32767.0 <= 0.5:
        raise Silence("silent: every sample of the crop is zero")
    if seed is not None and config.augment.any:
        mono = augment(mono, config.sample_rate, config.augment, np.random.default_rng(seed))
    result = np.zeros(samples, np.int16)
    result[: len(mono)] = _quantised(mono)
    return result, len(mono)


def decode_whole(data: bytes, rate: int) -> np.ndarray:
    """Decodes a whole clip, in blocks: memory holds its result alone.

    Args:
        data: the encoded file, as for `decode`.
        rate: of the result in Hz.

    Returns:
        waveform (samples,) int16, mono. What `to_int16` makes of a crop of it, divided by 32,767, is the crop that
        `decode` finds, up to where it begins between two samples, rounding, and the resampler's edges.

    Raises:
        DataError: the clip cannot be decoded, is empty, longer than MAX_SECONDS, or not finite anywhere.
    """
    parts: list[np.ndarray] = []
    stream: soxr.ResampleStream | None = None
    for block, own in read_blocks(data):
        if own != rate and stream is None:
            stream = soxr.ResampleStream(own, rate, 1, dtype="float32", quality="HQ")
        mono = _mono(block)
        parts.append(_quantised(stream.resample_chunk(mono) if stream else mono))
    if not parts:
        raise DataError(_EMPTY)
    if stream:
        parts.append(_quantised(stream.resample_chunk(np.zeros(0, np.float32), last=True)))
    return np.concatenate(parts)


def _mono(waveform: np.ndarray) -> np.ndarray:
    """(frames,) or (frames, channels) float mixed down.

    Raises:
        DataError: it is not finite.
    """
    # The mean of two channels as one product: numpy's mean over a short axis is slow.
    channels = waveform.shape[1] if waveform.ndim == 2 else 1
    mono = waveform @ np.full(channels, 1 / channels, waveform.dtype) if waveform.ndim == 2 else waveform
    if not np.isfinite(mono).all():
        raise DataError("has samples that are NaN or infinite")
    return mono


def _quantised(mono: np.ndarray) -> np.ndarray:
    return np.rint(np.clip(mono, -1.0, 1.0) * 32767.0).astype(np.int16)


def probe(data: bytes) -> tuple[int, int, float]:
    """What the headers of an encoded file say; nothing is decoded.

    Returns:
        rate in Hz, channels, and length in seconds, NaN where it is not known: a guess by the bit rate is none.

    Raises:
        DataError: neither library knows the format, or the headers cannot be true.
    """

    def with_libsndfile(file: soundfile.SoundFile, frames: int) -> tuple[int, int, float]:
        return file.samplerate, file.channels, frames / file.samplerate

    def with_ffmpeg(container: av.container.InputContainer) -> tuple[int, int, float]:
        stream = container.streams.audio[0]
        _check(stream.rate, stream.channels)
        seconds = 0.0 if container.format.name in _GUESSED else (container.duration or 0) / av.time_base
        return stream.rate, stream.channels, seconds or float("nan")

    return _open(data, with_libsndfile, with_ffmpeg)


def read_blocks(source: bytes | BinaryIO) -> Iterator[tuple[np.ndarray, int]]:
    """Decodes a clip from its head to its end, a block at a time: (frames,) or (frames, channels) float32 and the rate.

    Args:
        source: the encoded file, or its bytes.

    Raises:
        DataError: neither library can decode it, or it is longer than MAX_SECONDS.
    """

    def with_libsndfile(file: soundfile.SoundFile, frames: int) -> Iterator[tuple[np.ndarray, int]]:
        while len(block := file.read(_BLOCK_FRAMES, dtype="float32", always_2d=True)):
            yield block, file.samplerate

    def with_ffmpeg(container: av.container.InputContainer) -> Iterator[tuple[np.ndarray, int]]:
        stream = container.streams.audio[0]
        _check(stream.rate, stream.channels)
        mono = av.AudioResampler(format="flt", layout="mono", rate=stream.rate)
        waiting: list[np.ndarray] = []
        for frame in _decoded(container):
            waiting.extend(out.to_ndarray()[0] for out in mono.resample(frame))
            if sum(map(len, waiting)) >= _BLOCK_FRAMES:
                yield np.concatenate(waiting), stream.rate
                waiting = []
        if waiting:
            yield np.concatenate(waiting), stream.rate

    frames = 0
    for block, rate in _each(source, with_libsndfile, with_ffmpeg):
        frames += len(block)
        if frames > MAX_SECONDS * rate:
            raise DataError(f"is longer than {MAX_SECONDS / 3600:g} hours; cut it, or hear its middle alone")
        yield block, rate


def _read_crop(data: bytes, seconds: float, position: float) -> tuple[np.ndarray, int]:
    """Decodes the crop alone where the format can seek: (frames, channels) float32 and the rate."""

    def with_libsndfile(file: soundfile.SoundFile, frames: int) -> tuple[np.ndarray, int]:
        wanted = min(frames, round(seconds * file.samplerate))
        start = round(position * (frames - wanted))
        # Frames of an mp3 may have their bits in those before.
        lead = min(start, round(_RUN_UP * file.samplerate)) if file.format == "MP3" else 0
        file.seek(start - lead)
        crop = file.read(lead + wanted, dtype="float32", always_2d=True)[lead:]
        if len(crop) < wanted:  # the file is cut short
            raise _WrongLengthError
        return crop, file.samplerate

    return _open(data, with_libsndfile, lambda container: _decode_with_ffmpeg(container, seconds, position))


def _open(
    data: bytes,
    with_libsndfile: Callable[[soundfile.SoundFile, int], _T],
    with_ffmpeg: Callable[[av.container.InputContainer], _T],
) -> _T:
    """What is read from a file by libsndfile, or by FFmpeg where libsndfile cannot."""
    return next(_each(data, lambda *file: iter([with_libsndfile(*file)]), lambda file: iter([with_ffmpeg(file)])))


def _each(
    source: bytes | BinaryIO,
    with_libsndfile: Callable[[soundfile.SoundFile, int], Iterator[_T]],
    with_ffmpeg: Callable[[av.container.InputContainer], Iterator[_T]],
) -> Iterator[_T]:
    """What is read from a file bit by bit by libsndfile, or by FFmpeg where libsndfile cannot give the first bit.

    libsndfile is told how many frames the file has; it reads no file whose length it does not know, or takes for less.
    """
    stream = io.BytesIO(source) if isinstance(source, bytes) else source
    if stream.seek(0, io.SEEK_END) == 0:
        raise DataError("empty: the member has no bytes")
    stream.seek(0)
    begun = False
    try:
        with soundfile.SoundFile(stream) as file:
            _check(file.samplerate, file.channels)
            for part in with_libsndfile(file, _frames(file, stream)):
                begun = True
                yield part
        return
    except soundfile.LibsndfileError as error:
        reason = error.error_string
        if begun:
            raise DataError(f"cannot be decoded to its end ({reason})") from None
    except _WrongLengthError:
        reason = "Its length is not known."
    stream.seek(0)
    # Only containers of sound: a playlist would make FFmpeg open what it names.
    options = {"format_whitelist": _CONTAINERS, "protocol_whitelist": "none"}
    try:
        with av.open(stream, mode="r", container_options=options) as container:
            yield from with_ffmpeg(container)
    except (av.FFmpegError, ValueError, IndexError) as error:
        raise DataError(f"cannot be decoded ({reason} {getattr(error, 'strerror', error)}.)") from None


def _frames(file: soundfile.SoundFile, stream: BinaryIO) -> int:
    """How many frames a file has that libsndfile has opened.

    Raises:
        _WrongLengthError: it is not known, or libsndfile would stop before the end.
    """
    if not 0 <= file.frames < _LONGEST_FRAMES:
        raise _WrongLengthError
    if file.format != "MP3":
        return file.frames
    frames = count_samples(stream, file.frames)
    # A constant bit rate's guess may be short by a rounding.
    if frames is None or file.frames < 0.999 * frames - 2 * 1152:
        raise _WrongLengthError
    return min(frames, file.frames)


def _check(rate: int, channels: int) -> None:
    """Refuses headers that lie: what they promise is allocated before it is read."""
    if not 1_000 <= rate <= 768_000 or not 1 <= channels <= _MAX_CHANNELS:
        raise DataError(f"claims {rate:,} Hz and {channels:,} channels")


def _decoded(container: av.container.InputContainer) -> Iterator[av.AudioFrame]:
    """What FFmpeg decodes; between bare frames it skips what is none, as libmpg123 does."""
    for packet in container.demux(container.streams.audio[0]):
        try:
            yield from packet.decode()
        except av.InvalidDataError:
            if container.format.name not in _GUESSED:
                raise


def _decode_with_ffmpeg(
    container: av.container.InputContainer, seconds: float, position: float
) -> tuple[np.ndarray, int]:
    """The crop as (frames,) float32 and its rate, through PyAV."""
    stream = container.streams.audio[0]
    rate = stream.rate
    _check(rate, stream.channels)
    wanted = round(seconds * rate)
    ticks = 0 if container.format.name in _GUESSED else stream.duration or 0
    length = float(ticks * (stream.time_base or 0))
    begin = position * max(0.0, length - seconds)  # in seconds; where the length is unknown, see below
    origin = float((stream.start_time or 0) * (stream.time_base or 0))  # a part of a broadcast begins late
    if begin > _RUN_UP:
        container.seek(int((origin + begin - _RUN_UP) * av.time_base))
    mono = av.AudioResampler(format="flt", layout="mono", rate=rate)
    blocks: list[np.ndarray] = []
    frames, first = 0, None
    for frame in _decoded(container):
        if first is None:
            first = (frame.time or origin) - origin
        for out in mono.resample(frame):
            blocks.append(out.to_ndarray()[0])
            frames += len(blocks[-1])
        if length and frames >= wanted + round(max(0.0, begin - first) * rate):
            break
        if frames > MAX_SECONDS * rate:
            raise DataError(f"is longer than {MAX_SECONDS / 3600:g} hours, and its format cannot seek")
    waveform = np.concatenate(blocks or [np.zeros(0, np.float32)])
    if length:
        start = round(max(0.0, begin - (first or 0.0)) * rate)
        start = max(0, min(start, len(waveform) - wanted))  # the length in the header may be wrong
    else:
        start = round(position * max(0, len(waveform) - wanted))
    return waveform[start : start + wanted], rate
