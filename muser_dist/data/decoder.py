"""Decodes in a child process, so that audio which kills its decoder costs one row.

Native decoders crash on input that nobody thought of, and Ray would run the whole task again to
the same end. The child reads members from the parent's open shards, and puts crops into shared
memory together with how many are done, so that the parent knows which one was fatal.
"""

import contextlib
import ctypes
import json
import mmap
import os
import resource
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from io import FileIO
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
from pydantic import TypeAdapter

from muser_dist.data import audio
from muser_dist.data.clips import ClipCache
from muser_dist.data.config import DataConfig
from muser_dist.data.tar import Stored
from muser_dist.data.windows import cut_windows
from muser_dist.errors import DataError

SECONDS = 60.0
"""Time after which decoding one member is given up; the slowest honest one takes a few."""

MEMORY_BYTES = 6 << 30
"""Address space of the child: room for the largest member and for what it decodes to."""


def keep_freed_memory() -> None:
    """Lets this process keep the memory that one clip freed for the next.

    By default glibc gives larger blocks back at once, and faulting them in again is a quarter of
    decoding an mp3. With another C library nothing is changed.
    """
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):
        mmap_threshold, trim_threshold = -3, -1  # malloc.h
        mallopt(mmap_threshold, 256 << 20)
        mallopt(trim_threshold, 512 << 20)


_TOGETHER = 16
"""Members that the child is asked for at a time. Woken after each, the parent finds its caches cold,
and its own work takes four times as long."""

_CACHED = "cached"
"""Words of an answer whose clip came from the cache."""

_Request = tuple[Stored, list[Any]]
"""A member, and position and seed of a crop; or the hop between the windows of the whole clip, which are then
answered `_TOGETHER` at a time; or nothing, and what its headers say is asked for."""


class _Died(Exception):
    """The child is dead: how it died."""


class Crop(NamedTuple):
    """What to decode: a member, and the position and the seed that `audio.decode` takes."""

    sound: Stored
    position: float
    seed: int | None


class Decoded(NamedTuple):
    """A crop that could be decoded: its samples before the padding, and whether its clip came from the cache."""

    length: int
    cached: bool


class Decoder:
    """A child process that decodes audio members.

    Args:
        config: says what becomes of a clip.
    """

    def __init__(self, config: DataConfig) -> None:
        self._config = config
        self._process: subprocess.Popen | None = None
        self._socket: socket.socket | None = None
        self._memory = FileIO(os.memfd_create("muser-decoder"), "r+")
        self._shared = _share(self._memory.fileno(), config)

    def decode(self, crops: Mapping[int, Crop], into: np.ndarray) -> dict[int, Decoded | DataError]:
        """`audio.decode` of several crops with this decoder's config.

        Args:
            crops: by their rows of `into`.
            into: (c, samples) int16, gets the waveforms of those that can be decoded.

        Returns:
            of each crop how it was decoded, or an error: as there; or the shard ends inside the
            member, or decoding takes too long or has killed its process twice.
        """
        rows = list(crops)
        answers = self._ask([(sound, [position, seed]) for sound, position, seed in crops.values()], into, rows)
        decoded = (
            answer if isinstance(answer, DataError) else Decoded(answer[0], answer[1] == _CACHED) for answer in answers
        )
        return dict(zip(rows, decoded, strict=True))

    def windows(self, sound: Stored, hop_seconds: float) -> Iterator[tuple[np.ndarray, int]]:
        """`windows.cut_windows` of a whole member with this decoder's config; some windows are held at a time.

        Args:
            sound: the member.
            hop_seconds: from a window's begin to the next one's.

        Raises:
            DataError: as there, or what `decode` returns; windows may have been given before.
        """
        given, death = 0, None
        for _ in range(2):  # once more: memory may have been short for another reason
            try:
                for window in islice(self._stream(sound, hop_seconds), given, None):
                    given += 1
                    yield window
                return
            except _Died as error:
                death = error
        raise DataError(f"its decoder died twice ({death})")

    def _stream(self, sound: Stored, hop_seconds: float) -> Iterator[tuple[np.ndarray, int]]:
        """Windows as the child makes them, which goes on when it is told so.

        Raises:
            _Died, DataError: as `_ask_together`, or the child's error.
        """
        self._ask_together([(sound, [hop_seconds])])
        while True:
            done = int(self._shared["done"][0])
            lengths, waveforms = self._shared["length"][:done].tolist(), self._shared["crop"][:done].copy()
            error = self._shared["text"][done - 1].decode(errors="replace") if -1 in lengths else None
            ended = error is not None or done < _TOGETHER
            try:
                yield from zip(waveforms[: done - (error is not None)], lengths, strict=False)
            except GeneratorExit:
                if not ended:  # the child waits to be told to go on
                    self.close()
                raise
            if error is not None:
                raise DataError(error)
            if ended:
                return
            self._exchange(b".", [])

    def probe(self, sound: Stored) -> tuple[int, int, float]:
        """`audio.probe`.

        Raises:
            DataError: as there, and what `decode` returns.
        """
        (answer,) = self._ask([(sound, [])])
        if isinstance(answer, DataError):
            raise answer
        rate, channels, seconds = json.loads(answer[1])
        return rate, channels, seconds

    def _ask(
        self, requests: list[_Request], into: np.ndarray | None = None, rows: Sequence[int] = ()
    ) -> list[tuple[int, str] | DataError]:
        """Length and text of each answer, or why there is none; their crops go to these rows of `into`."""
        answers: list[tuple[int, str] | DataError] = []
        fatal = None
        while (first := len(answers)) < len(requests):
            error = None
            try:
                self._ask_together(requests[first : first + _TOGETHER])
            except _Died as death:
                at = first + int(self._shared["done"][0])
                if fatal == at:  # once more: memory may have been short for another reason
                    error = DataError(f"its decoder died twice ({death})")
                fatal = at
            except DataError as stall:
                error = stall
            for i in range(self._shared["done"][0]):
                length, text = int(self._shared["length"][i]), self._shared["text"][i].decode(errors="replace")
                answers.append((length, text) if length >= 0 else DataError(text))
                if into is not None and length >= 0:
                    into[rows[first + i]] = self._shared["crop"][i]
            if error is not None:
                answers.append(error)
        return answers

    def _ask_together(self, requests: list[_Request]) -> None:
        """Answers lie in the shared memory afterwards.

        Raises:
            _Died: the child is dead; it has answered as many as it says.
            DataError: the next of those is not answered in time.
        """
        # Text, never pickles: the child has touched what comes from outside.
        text = json.dumps([(sound.offset, sound.size, *crop) for sound, crop in requests])
        self._exchange(text.encode(), [sound.file for sound, _ in requests])

    def _exchange(self, message: bytes, files: list[int]) -> None:
        """Sends a message and waits for the answers; errors as of `_ask_together`."""
        self._shared["done"][:] = 0
        if self._socket is None:
            self._start()
        assert self._socket is not None
        self._socket.settimeout(SECONDS)
        try:
            socket.send_fds(self._socket, [message], files)
            while not self._finished():
                pass
        except (EOFError, ConnectionError):
            raise _Died(self._bury()) from None
        except TimeoutError:
            self._bury()
            raise DataError(f"decoding takes more than {SECONDS:g} s") from None
        except BaseException:  # such as an interrupt: the answers to come must not be taken for the next ones
            self.close()
            raise

    def _finished(self) -> bool:
        """Waits for the end of a request; not finished where only some of it was done in the time for one member.

        Raises:
            EOFError, ConnectionError: the child is gone.
            TimeoutError: nothing was done in the time.
        """
        assert self._socket is not None
        before = int(self._shared["done"][0])
        try:
            if not self._socket.recv(1):
                raise EOFError
        except TimeoutError:
            if self._shared["done"][0] == before:
                raise
            return False
        return True

    def _start(self) -> None:
        here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        path = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
        shared = [there.fileno(), self._memory.fileno()]
        settings = json.dumps({name: getattr(self._config, name) for name in _OF_CLIPS}, default=vars)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "muser_dist.data.decoder", *map(str, shared), settings],
            pass_fds=shared,
            env=os.environ | path,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,  # libmpg123 complains of frames that a seek has cut; the samples are right
        )
        there.close()
        self._socket = here

    def _bury(self) -> str:
        """Ends the child; says how it died."""
        assert self._process is not None and self._socket is not None
        self._socket.close()
        self._socket = None
        try:
            status = self._process.wait(timeout=1)
        except subprocess.TimeoutExpired:
            self._process.kill()
            status = self._process.wait()
        return signal.Signals(-status).name if status < 0 else f"exit status {status}"

    def close(self) -> None:
        """Ends the child."""
        if self._socket is not None:
            self._bury()


def decoder(config: DataConfig) -> Decoder:
    """This process's decoder for such clips; it lives on from task to task."""
    return _decoder(DataConfig(**{name: getattr(config, name) for name in _OF_CLIPS}))


_OF_CLIPS = ("sample_rate", "crop_seconds", "pad", "augment", "keep_clips", "clip_cache_gib", "cache_folder")


@lru_cache(maxsize=2)
def _decoder(config: DataConfig) -> Decoder:
    return Decoder(config)


def _share(memory: int, config: DataConfig) -> dict[str, np.ndarray]:
    """Memory that parent and child both see.

    Args:
        memory: descriptor of the file that it is.
        config: says how long a crop is.

    Returns:
        done    int64 (1,)                   requests that are answered
        length  int64 (_TOGETHER,)           of each answer: samples before the padding; -1 is an error
        text    bytes (_TOGETHER,)           its words
        crop    int16 (_TOGETHER, samples)   its waveform
    """
    n = _TOGETHER
    layout = np.dtype(
        [("done", "i8", (1,)), ("length", "i8", n), ("text", "S1024", n), ("crop", "i2", (n, config.crop_samples))]
    )
    os.truncate(memory, layout.itemsize)
    record = np.frombuffer(mmap.mmap(memory, layout.itemsize), layout)
    return {name: record[name][0] for name in layout.names or ()}


def _serve(requests: socket.socket, shared: dict[str, np.ndarray], config: DataConfig) -> None:
    """The child: answers requests until the parent is gone."""
    _, most = resource.getrlimit(resource.RLIMIT_AS)
    limit = MEMORY_BYTES if most == resource.RLIM_INFINITY else min(MEMORY_BYTES, most)
    resource.setrlimit(resource.RLIMIT_AS, (limit, most))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    clips = ClipCache(config) if config.keep_clips else None
    while True:
        signal.alarm(0)
        text, files, *_ = socket.recv_fds(requests, _REQUEST_BYTES, _TOGETHER)
        if not text:
            return
        for i, (file, (offset, size, *crop)) in enumerate(zip(files, json.loads(text), strict=True)):
            signal.alarm(2 * round(SECONDS))  # should the parent be gone, nobody else ends what never ends
            length, words = 0, ""
            try:
                data = Stored(file, offset, size).read()
                if len(crop) == 1:
                    _serve_windows(requests, shared, data, config, *crop)
                    break
                if crop and clips:
                    position, seed = crop
                    clip, cached = clips.crop(data, config.crop_samples, position, audio.decode_whole)
                    waveform = clip.astype(np.float32) / np.float32(32767)
                    shared["crop"][i], length = audio.to_int16(waveform, config.sample_rate, config, seed)
                    words = _CACHED if cached else ""
                elif crop:
                    shared["crop"][i], length = audio.decode(data, config, *crop)
                else:
                    words = json.dumps(audio.probe(data))
            except ConnectionError:
                raise
            except Exception as error:  # whatever it is, one row must not end the run
                length, words = -1, _words(error)
            finally:
                os.close(file)
            shared["length"][i], shared["text"][i] = length, words.encode(errors="replace")
            shared["done"][0] = i + 1
        requests.send(b".")


def _serve_windows(
    requests: socket.socket, shared: dict[str, np.ndarray], data: bytes, config: DataConfig, hop_seconds: float
) -> None:
    """The child: answers with all windows of a clip; as many as fit are told at a time, and fewer are the last."""
    windows = cut_windows(audio.read_blocks(data), config, hop_seconds)
    while True:
        done = 0
        try:
            for done, (waveform, length) in enumerate(islice(windows, _TOGETHER), start=1):
                shared["crop"][done - 1], shared["length"][done - 1] = waveform, length
                shared["done"][0] = done
        except Exception as error:  # whatever it is, one row must not end the run
            shared["length"][done], shared["text"][done] = -1, _words(error).encode(errors="replace")
            shared["done"][0] = done + 1
            return
        if done < _TOGETHER:
            return
        signal.alarm(2 * round(SECONDS))
        requests.send(b".")
        if not requests.recv(1):
            raise ConnectionError("the parent is gone")


def _words(error: Exception) -> str:
    return str(error) if isinstance(error, DataError) else f"{type(error).__name__}: {error}"


_REQUEST_BYTES = 256 * _TOGETHER


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's
    keep_freed_memory()
    end, memory, settings = sys.argv[1:]
    clips = TypeAdapter(DataConfig).validate_json(settings)
    with contextlib.suppress(ConnectionError):
        _serve(socket.socket(fileno=int(end)), _share(int(memory), clips), clips)
