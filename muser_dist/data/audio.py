"""Encoded audio to an int16 mono crop at the run's sample rate."""

import io

import av
import numpy as np
import soundfile
import soxr

from muser_dist.errors import DataError

EXTENSIONS = ("flac", "wav", "ogg", "opus", "mp3", "m4a", "aac", "mp4", "aif", "aiff")
"""Extensions of members that are taken for audio."""

# An mp3 frame leans on the ones before it, and after a seek libmpg123 prints an error about each
# that lacks them (the samples are right all the same). Near the head, decoding is as cheap as seeking.
_MP3_SEEK_SECONDS = 30


def decode(data: bytes, sample_rate: int, samples: int, position: float) -> tuple[np.ndarray, int]:
    """Decodes one crop of a clip.

    Args:
        data: the encoded file (flac, wav, ogg, opus, mp3 through libsndfile; others through FFmpeg).
        sample_rate: rate in Hz of the result.
        samples: length of the result.
        position: where the crop lies, in [0, 1]: 0 is the clip's head, 1 its tail. Ignored when
            the clip is shorter than the crop.

    Returns:
        waveform (samples,) int16, padded with zeros at the end, and the number of samples before
        the padding.

    Raises:
        DataError: the clip cannot be decoded, is empty, silent or not finite.
    """
    waveform, rate = _read_crop(data, samples / sample_rate, position)
    return to_int16(waveform, rate, sample_rate, samples)


def to_int16(waveform: np.ndarray, rate: int, sample_rate: int, samples: int) -> tuple[np.ndarray, int]:
    """Mixes down, resamples and pads a waveform that is already decoded.

    Args:
        waveform: (frames,) or (frames, channels) float in [-1, 1].
        rate: its rate in Hz.
        sample_rate: rate in Hz of the result.
        samples: length of the result; what is longer is cut.

    Returns:
        waveform (samples,) int16 and the number of samples before the padding.

    Raises:
        DataError: the waveform is empty, silent or not finite.
    """
    if waveform.shape[0] == 0:
        raise DataError("empty: no samples")
    if not np.isfinite(waveform).all():
        raise DataError("has samples that are NaN or infinite")
    mono = waveform.mean(axis=1) if waveform.ndim == 2 else waveform
    if rate != sample_rate:
        mono = soxr.resample(mono, rate, sample_rate, quality="HQ")
    mono = mono[:samples]
    quantised = np.round(np.clip(mono, -1.0, 1.0) * 32767.0).astype(np.int16)
    if not quantised.any():
        raise DataError("silent: every sample of the crop is zero")
    result = np.zeros(samples, np.int16)
    result[: len(quantised)] = quantised
    return result, len(quantised)


def _read_crop(data: bytes, seconds: float, position: float) -> tuple[np.ndarray, int]:
    """Decodes the crop alone where the format can seek: (frames, channels) float32 and the rate."""
    if not data:
        raise DataError("empty: the member has no bytes")
    try:
        with soundfile.SoundFile(io.BytesIO(data)) as file:
            wanted = round(seconds * file.samplerate)
            start = round(position * max(0, file.frames - wanted))
            skipped = start if file.format == "MP3" and start < _MP3_SEEK_SECONDS * file.samplerate else 0
            file.seek(start - skipped)
            return file.read(skipped + wanted, dtype="float32", always_2d=True)[skipped:], file.samplerate
    except soundfile.LibsndfileError as error:
        reason = error.error_string
    try:
        waveform, rate = _decode_with_ffmpeg(data)
    except (av.FFmpegError, ValueError, IndexError) as error:
        raise DataError(f"cannot be decoded ({reason} {getattr(error, 'strerror', error)}.)") from None
    wanted = round(seconds * rate)
    start = round(position * max(0, len(waveform) - wanted))
    return waveform[start : start + wanted], rate


def _decode_with_ffmpeg(data: bytes) -> tuple[np.ndarray, int]:
    """The whole clip as (frames, 1) float32 and its rate, through PyAV."""
    with av.open(io.BytesIO(data), mode="r") as container:
        stream = container.streams.audio[0]
        rate = stream.rate
        mono = av.AudioResampler(format="flt", layout="mono", rate=rate)
        blocks = [out.to_ndarray() for frame in container.decode(stream) for out in mono.resample(frame)]
    if not blocks:
        return np.zeros((0, 1), np.float32), rate
    return np.concatenate(blocks, axis=1).T.astype(np.float32), rate
