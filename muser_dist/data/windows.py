"""A whole clip as windows of the crop's length."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal

import numpy as np

from muser_dist.data.audio import Silence, decode, read_blocks, to_int16
from muser_dist.data.config import DataConfig
from muser_dist.errors import DataError

Windows = Literal["all", "middle"]
"""What is heard of a clip that is longer than the crop: all of it, or the crop in its middle, as evaluation does."""


Clip = str | Path | bytes | np.ndarray
"""A file's path, its bytes, or a waveform: (samples,) or (samples, channels) float in [-1, 1]."""


def cut_windows(
    blocks: Iterable[tuple[np.ndarray, int]], config: DataConfig, hop_seconds: float
) -> Iterator[tuple[np.ndarray, int]]:
    """Cuts a clip into crops, holding little more than one of them at a time.

    A window begins every hop; one more ends where the clip ends, unless another does already, so that all of it is
    heard and no window but that of a clip shorter than the crop is padded. Each is cut before it is resampled, like
    the crops of training. Silent windows say nothing and are left out.

    Args:
        blocks: what `audio.read_blocks` yields, or a waveform as the only block.
        config: rate and length of the windows, and padding.
        hop_seconds: from a window's begin to the next one's.

    Yields:
        waveform (samples,) int16 and the number of samples before the padding with zeros.

    Raises:
        DataError: the clip is empty, all of it is silent, or a sample is not finite.
    """
    silence = None
    heard = False
    for window, rate in _cut(blocks, config.crop_seconds, hop_seconds):
        try:
            crop = to_int16(window, rate, config)
        except Silence as error:
            silence = error
            continue
        heard = True
        yield crop
    if not heard:
        raise silence or DataError("empty: no samples")


def _cut(
    blocks: Iterable[tuple[np.ndarray, int]], seconds: float, hop_seconds: float
) -> Iterator[tuple[np.ndarray, int]]:
    held = np.zeros(0, np.float32)
    first = 0  # number of the first frame in `held`
    begin = end = 0  # of the next window; of the last one
    rate = 1
    for block, rate in blocks:
        wanted, hop = round(seconds * rate), max(1, round(hop_seconds * rate))
        held = np.concatenate([held, block]) if len(held) else block
        while begin + wanted <= first + len(held):
            yield held[begin - first : begin - first + wanted], rate
            end = begin + wanted
            begin += hop
        # What the next window needs, and what the last one may.
        needed = max(first, min(begin, first + len(held) - wanted))
        held, first = held[needed - first :], needed
    if first + len(held) > end:
        yield held[-wanted:], rate


def cut_consecutive(blocks: Iterable[tuple[np.ndarray, int]], config: DataConfig) -> Iterator[tuple[np.ndarray, int]]:
    """Cuts a clip into crops that follow each other, holding little more than one of them at a time.

    The n-th lies n crops from the clip's head, so silent ones are kept. A rest of less than half a crop is left out,
    unless there is nothing else.

    Args:
        blocks: what `audio.read_blocks` yields.
        config: rate and length of the windows, and padding.

    Yields:
        waveform (samples,) int16 and the number of samples before the padding.

    Raises:
        DataError: as `cut_windows`; windows may have been given before.
    """
    silence, heard, held = None, False, np.zeros(0, np.float32)
    windows, wanted, rate = 0, 1, 1

    def crop(window: np.ndarray) -> tuple[np.ndarray, int]:
        nonlocal silence, heard, windows
        windows += 1
        try:
            made = to_int16(window, rate, config)
        except Silence as error:
            silence = error
            length = min(config.crop_samples, round(len(window) / rate * config.sample_rate))
            return np.zeros(config.crop_samples, np.int16), max(1, length)
        heard = True
        return made

    for block, rate in blocks:
        wanted = round(config.crop_seconds * rate)
        held = np.concatenate([held, block]) if len(held) else block
        while len(held) >= wanted:
            yield crop(held[:wanted])
            held = held[wanted:]
    if 2 * len(held) >= wanted or (len(held) and not windows):
        yield crop(held)
    if not heard:
        raise silence or DataError("empty: no samples")


def hear(
    clip: Clip, data: DataConfig, sample_rate: int | None, windows: Windows, hop_seconds: float
) -> Iterator[tuple[np.ndarray, int]]:
    """The windows of a clip that are heard.

    Args:
        clip: what is heard.
        data: rate and length of the windows, and padding.
        sample_rate: Hz of a clip given as a waveform; that of `data` by default.
        windows: all of the clip, or its middle.
        hop_seconds: from a window's begin to the next one's.

    Yields:
        as `cut_windows`.

    Raises:
        DataError: as `cut_windows`, or there is no such file or it cannot be decoded; the message says which.
    """
    try:
        if isinstance(clip, np.ndarray):
            rate = sample_rate or data.sample_rate
            waveform = clip.astype(np.float32, copy=False)
            if windows == "all":
                yield from cut_windows([(waveform, rate)], data, hop_seconds)
            else:
                wanted = round(data.crop_seconds * rate)
                start = max(0, len(clip) - wanted) // 2
                yield to_int16(waveform[start : start + wanted], rate, data)
        elif windows == "middle":
            yield decode(clip if isinstance(clip, bytes) else Path(clip).read_bytes(), data, position=0.5)
        elif isinstance(clip, bytes):
            yield from cut_windows(read_blocks(clip), data, hop_seconds)
        else:
            with Path(clip).open("rb") as file:
                yield from cut_windows(read_blocks(file), data, hop_seconds)
    except FileNotFoundError:
        raise DataError(f"{clip!s}: there is no such file") from None
    except OSError as error:  # a folder, or what may not be read
        raise DataError(f"{clip!s}: cannot be read: {error.strerror or error}") from None
    except DataError as error:
        name = str(clip) if isinstance(clip, (str, Path)) else f"a clip given as {type(clip).__name__}"
        raise DataError(f"{name}: {error}") from None
