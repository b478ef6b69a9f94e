"""The child process of decoder.py: answers requests until its parent is gone.

A request is JSON, a list of [offset, size, *what is wanted], with the descriptors of the members' files beside it in
the same order. What is wanted of a member:

    "probe"                         what its headers say
    "crop", position, seed          a crop of a clip
    "patches", extension, seed      notation
    "windows", hop                  all windows of a clip, `TOGETHER` at a time, those that follow each other where hop
                                    is null; it comes alone
    "pieces", extension             all windows of a piece of notation, as well; the words are how many patches are new

Answers lie in the shared memory, in order; a byte says that all are there. They are text and numbers, never pickles:
this process touches what comes from outside.
"""

import contextlib
import ctypes
import json
import mmap
import os
import resource
import signal
import socket
import sys
from collections.abc import Iterator
from itertools import islice

import numpy as np
from pydantic import TypeAdapter

from muser_dist.data import audio
from muser_dist.data.clips import ClipCache
from muser_dist.data.config import DataConfig
from muser_dist.data.symbolic.characters import PATCH_BYTES
from muser_dist.data.tar import Stored
from muser_dist.data.windows import cut_consecutive, cut_windows
from muser_dist.errors import DataError, UnreadError

SECONDS = 60.0
"""Time after which decoding one member is given up; the slowest honest one takes a few."""

MEMORY_BYTES = 6 << 30
"""Address space of the child: room for the largest member and for what it decodes to."""

TOGETHER = 16
"""Members that the child is asked for at a time. Woken after each, the parent finds its caches cold,
and its own work takes four times as long."""

CACHED = "cached"
"""Words of an answer whose clip came from the cache."""

FAILED, UNREAD = -1, -2
"""Lengths of answers that are errors: of any, and of UnreadError."""

_REQUEST_BYTES = 256 * TOGETHER


def keep_freed_memory() -> None:
    """Lets this process keep the memory that one clip freed for the next.

    By default glibc gives larger blocks back at once, and faulting them in again is a quarter of
    decoding an mp3. With another C library nothing is changed.
    """
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):
        mmap_threshold, trim_threshold = -3, -1  # malloc.h
        mallopt(mmap_threshold, 256 << 20)
        mallopt(trim_threshold, 512 << 20)


def share(memory: int, config: DataConfig) -> dict[str, np.ndarray]:
    """Memory that parent and child both see; pages that nobody writes to take none.

    Args:
        memory: descriptor of the file that it is.
        config: says how long a crop is, and how many patches a piece has.

    Returns:
        done    int64 (1,)                      requests that are answered
        length  int64 (TOGETHER,)               of each answer: samples or patches before the padding; or an error
        text    bytes (TOGETHER,)               its words
        crop    int16 (TOGETHER, samples)       its waveform
        patches uint8 (TOGETHER, patches, 64)   its notation
    """
    n = TOGETHER
    patches = (n, config.symbolic.max_patches, PATCH_BYTES)
    layout = np.dtype(
        [
            ("done", "i8", (1,)),
            ("length", "i8", n),
            ("text", "S1024", n),
            ("crop", "i2", (n, config.crop_samples)),
            ("patches", "u1", patches),
        ]
    )
    os.truncate(memory, layout.itemsize)
    record = np.frombuffer(mmap.mmap(memory, layout.itemsize), layout)
    return {name: record[name][0] for name in layout.names or ()}


def _serve(requests: socket.socket, shared: dict[str, np.ndarray], config: DataConfig) -> None:
    """Answers requests until the parent is gone."""
    _, most = resource.getrlimit(resource.RLIMIT_AS)
    limit = MEMORY_BYTES if most == resource.RLIM_INFINITY else min(MEMORY_BYTES, most)
    resource.setrlimit(resource.RLIMIT_AS, (limit, most))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    clips = ClipCache(config) if config.keep_clips else None
    while True:
        signal.alarm(0)
        text, files, *_ = socket.recv_fds(requests, _REQUEST_BYTES, TOGETHER)
        if not text:
            return
        for i, (file, (offset, size, wanted, *how)) in enumerate(zip(files, json.loads(text), strict=True)):
            signal.alarm(2 * round(SECONDS))  # should the parent be gone, nobody else ends what never ends
            length, words = 0, ""
            try:
                data = _read(Stored(file, offset, size))
                if wanted in ("windows", "pieces"):
                    _serve_windows(requests, shared, *_windows(data, config, wanted, *how))
                    break
                if wanted == "crop":
                    shared["crop"][i], length, cached = _crop(data, config, clips, *how)
                    words = CACHED if cached else ""
                elif wanted == "patches":
                    from muser_dist.data.symbolic.encode import encode_member  # libraries that only notation needs

                    extension, seed = how
                    shared["patches"][i], length = encode_member(extension, data, config.symbolic, seed)
                else:
                    words = json.dumps(audio.probe(data))
            except ConnectionError:
                raise
            except Exception as error:  # whatever it is, one row must not end the run
                length, words = _told(error)
            finally:
                os.close(file)
            shared["length"][i], shared["text"][i] = length, words.encode(errors="replace")
            shared["done"][0] = i + 1
        requests.send(b".")


def _crop(
    data: bytes, config: DataConfig, clips: ClipCache | None, position: float, seed: int | None
) -> tuple[np.ndarray, int, bool]:
    """A crop's waveform, its length, and whether its clip came from the cache."""
    if clips is None:
        return *audio.decode(data, config, position, seed), False
    clip, cached = clips.crop(data, config.crop_samples, position, audio.decode_whole)
    waveform = clip.astype(np.float32) / np.float32(32767)
    return *audio.to_int16(waveform, config.sample_rate, config, seed), cached


_Window = tuple[np.ndarray, int, str]
"""Samples or patches, how many before the padding, and words."""


def _windows(data: bytes, config: DataConfig, wanted: str, how: float | str | None) -> tuple[str, Iterator[_Window]]:
    """What windows are shared as, and all of them."""
    if wanted == "windows":
        blocks = audio.read_blocks(data)
        heard = cut_consecutive(blocks, config) if how is None else cut_windows(blocks, config, float(how))
        return "crop", ((waveform, length, "") for waveform, length in heard)
    from muser_dist.data.symbolic.encode import encode_windows  # libraries that only notation needs

    read = encode_windows(str(how), data, config.symbolic)
    return "patches", ((patches, length, str(new)) for patches, length, new in read)


def _serve_windows(
    requests: socket.socket, shared: dict[str, np.ndarray], made: str, windows: Iterator[_Window]
) -> None:
    """Answers with all windows of a member; as many as fit are told at a time, and fewer are the last."""
    while True:
        done = 0
        try:
            for done, (window, length, words) in enumerate(islice(windows, TOGETHER), start=1):
                shared[made][done - 1], shared["length"][done - 1] = window, length
                shared["text"][done - 1] = words.encode()
                shared["done"][0] = done
        except Exception as error:  # whatever it is, one row must not end the run
            length, words = _told(error)
            shared["length"][done], shared["text"][done] = length, words.encode(errors="replace")
            shared["done"][0] = done + 1
            return
        if done < TOGETHER:
            return
        signal.alarm(0)  # the parent may take its time with these
        requests.send(b".")
        if not requests.recv(1):
            raise ConnectionError("the parent is gone")
        signal.alarm(2 * round(SECONDS))


def _read(member: Stored) -> bytes:
    try:
        return member.read()
    except OSError as error:  # apart from those that decoders raise
        raise UnreadError(f"{type(error).__name__}: {error}") from None


def _told(error: Exception) -> tuple[int, str]:
    """Length and words of an answer that is an error."""
    words = str(error) if isinstance(error, DataError) else f"{type(error).__name__}: {error}"
    return UNREAD if isinstance(error, UnreadError) else FAILED, words


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's
    keep_freed_memory()
    end, memory, settings = sys.argv[1:]
    clips = TypeAdapter(DataConfig).validate_json(settings)
    with contextlib.suppress(ConnectionError):
        _serve(socket.socket(fileno=int(end)), share(int(memory), clips), clips)
