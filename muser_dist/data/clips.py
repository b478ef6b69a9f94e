"""A cache of whole clips, decoded and resampled, on the local disk of each node.

Crops and augmentation come after it, so nothing of them is frozen. All processes of a node share it, and it outlives
them: later passes, trials of a sweep and later runs read a crop where the first one decoded the clip. An entry's name
is a hash of all that decides its samples: the encoded file, the rate, and the versions of what decodes it.

An entry is int16 samples, little-endian; a CRC-32 of each block of them, so that a crop of a long clip is checked
without reading all of it; and their number with a mark. What does not fit this, whatever has damaged it, counts as
missing, and is made again.
"""

import contextlib
import hashlib
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import soundfile
import soxr
from filelock import FileLock, Timeout

from muser_dist.data.cache_folder import LOCKS, cache_folder, make_room
from muser_dist.data.config import DataConfig

_VERSIONS = f"2 {soundfile.__libsndfile_version__} {av.__version__} {soxr.__version__} {soxr.__libsoxr_version__}"
"""Of the entries' form and how they are read, and of what decodes and resamples."""

_BLOCK = 1 << 16  # samples
_TRAILER = struct.Struct("<q8s")
_MARK = b"MUSERPCM"

# How long a process waits for another one that decodes the same clip. Less than a decoder may take for one: who waits
# must not be taken for hanging.
_PATIENCE = 10.0

_LOOKS = 64
"""The folder is looked through once for each such part of its bound that a process has written: looking takes as long
as decoding where there are a hundred thousand entries."""


class ClipCache:
    """Entries below `clips` in the folder of data.cache_folder.

    Args:
        config: says where, how much and at which rate. Up to a 64th more than data.clip_cache_gib for each process
            that writes may lie there; with 0 nothing is kept.
    """

    def __init__(self, config: DataConfig) -> None:
        self._folder = cache_folder(config) / "clips"
        self._most_bytes = round(config.clip_cache_gib * (1 << 30))
        self._rate = config.sample_rate
        self._unlooked = self._most_bytes  # bytes written since the last look; a process looks at its first

    def crop(
        self, data: bytes, samples: int, position: float, decode_whole: Callable[[bytes, int], np.ndarray]
    ) -> tuple[np.ndarray, bool]:
        """A crop of a clip.

        Args:
            data: the encoded file.
            samples: length of the crop.
            position: where it lies in the clip, in [0, 1]: 0 is the head, 1 the tail.
            decode_whole: makes the clip's samples (n,) int16 at a rate in Hz.

        Returns:
            the crop (samples,) int16, shorter where the clip is; and whether it came from the cache.

        Raises:
            DataError: by `decode_whole`; the cache's own troubles only cost time.
        """
        name = hashlib.sha256(f"{_VERSIONS} {self._rate} ".encode() + data).hexdigest()
        path = self._folder / f"{name}.clip"
        if (crop := _read(path, samples, position)) is not None:
            return crop, True
        lock = FileLock(self._folder / f"lock-{int(name[:8], 16) % LOCKS:03d}")
        with contextlib.ExitStack() as held:
            if self._most_bytes:
                with contextlib.suppress(Timeout, OSError):  # then both decode it
                    self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
                    held.enter_context(lock.acquire(timeout=_PATIENCE))
                if (crop := _read(path, samples, position)) is not None:
                    return crop, True
            clip = decode_whole(data, self._rate)
            with contextlib.suppress(OSError):  # a full disk
                self._write(path, clip)
        start = round(position * max(0, len(clip) - samples))
        return clip[start : start + samples], False

    def _write(self, path: Path, clip: np.ndarray) -> None:
        size = clip.nbytes
        if size > self._most_bytes:
            return
        clip = clip.astype("<i2", copy=False)
        checks = [zlib.crc32(clip[i : i + _BLOCK].data) for i in range(0, len(clip), _BLOCK)]
        part = path.with_name(f"{path.stem}-{os.getpid()}.part")
        try:
            with part.open("wb") as file:
                file.write(clip.data)
                file.write(struct.pack(f"<{len(checks)}I", *checks) + _TRAILER.pack(len(clip), _MARK))
            part.replace(path)
        except OSError:
            part.unlink(missing_ok=True)
            raise
        self._unlooked += size
        if self._unlooked > self._most_bytes // _LOOKS:
            make_room(self._folder, self._most_bytes, keep=path)
            self._unlooked = 0


def _read(path: Path, samples: int, position: float) -> np.ndarray | None:
    """The crop of an entry; None where there is no whole one. Marks it as used now."""
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            file.seek(max(0, size - _TRAILER.size))
            length, mark = _TRAILER.unpack(file.read())
            blocks = -(-length // _BLOCK)
            if mark != _MARK or length < 0 or size != 2 * length + 4 * blocks + _TRAILER.size:
                return None
            start = round(position * max(0, length - samples))
            stop = min(start + samples, length)
            first, last = start // _BLOCK, -(-stop // _BLOCK)
            file.seek(2 * _BLOCK * first)
            read = file.read(2 * (min(last * _BLOCK, length) - first * _BLOCK))
            file.seek(2 * length + 4 * first)
            checks = struct.unpack(f"<{last - first}I", file.read(4 * (last - first)))
        for i, check in enumerate(checks):
            if zlib.crc32(memoryview(read)[2 * _BLOCK * i : 2 * _BLOCK * (i + 1)]) != check:
                return None
        os.utime(path)  # the last to make room
    except (OSError, struct.error):
        return None
    crop = np.frombuffer(read, "<i2")[start - first * _BLOCK : stop - first * _BLOCK]
    return crop.astype(np.int16, copy=False)
