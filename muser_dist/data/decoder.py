"""Decodes in a child process, so that audio which kills its decoder costs one row.

Native decoders crash on input that nobody thought of, and Ray would run the whole task again to
the same end. The child (decoder_child.py) reads members from the parent's open shards, and puts crops and
patches into shared memory together with how many are done, so that the parent knows which one was
fatal.
"""

import json
import os
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

from muser_dist.data.config import DataConfig
from muser_dist.data.decoder_child import CACHED, SECONDS, TOGETHER, UNREAD, share
from muser_dist.data.tar import Stored
from muser_dist.errors import DataError, UnreadError

_Request = tuple[Stored, list[Any]]
"""A member, and what is wanted of it: as decoder_child.py says."""


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


class Piece(NamedTuple):
    """What to encode: a member with notation, its extension, and the seed that `encode_member` takes."""

    member: Stored
    extension: str
    seed: int | None


class Decoder:
    """A child process that decodes audio and notation.

    Args:
        config: says what becomes of a clip and of a piece.
    """

    def __init__(self, config: DataConfig) -> None:
        self._config = config
        self._process: subprocess.Popen | None = None
        self._socket: socket.socket | None = None
        self._memory = FileIO(os.memfd_create("muser-decoder"), "r+")
        self._shared = share(self._memory.fileno(), config)

    def decode(self, crops: Mapping[int, Crop], into: np.ndarray) -> dict[int, Decoded | DataError]:
        """`audio.decode` of several crops with this decoder's config.

        Args:
            crops: by their rows of `into`.
            into: (c, samples) int16, gets the waveforms of those that can be decoded.

        Returns:
            of each crop how it was decoded, or an error: as there; or the shard ends inside the
            member, or decoding takes too long or has killed its process twice. UnreadError where the shard
            cannot be read.
        """
        rows = list(crops)
        answers = self._ask(
            [(sound, ["crop", position, seed]) for sound, position, seed in crops.values()], "crop", into, rows
        )
        decoded = (
            answer if isinstance(answer, DataError) else Decoded(answer[0], answer[1] == CACHED) for answer in answers
        )
        return dict(zip(rows, decoded, strict=True))

    def encode(self, pieces: Mapping[int, Piece], into: np.ndarray) -> dict[int, int | DataError]:
        """`symbolic.encode.encode_member` of several pieces with this decoder's config.

        Args:
            pieces: by their rows of `into`.
            into: (c, patches, 64) uint8, gets the patches of those that can be encoded.

        Returns:
            of each piece its patches before the padding, or an error as of `decode`.
        """
        rows = list(pieces)
        requests: list[_Request] = [
            (piece.member, ["patches", piece.extension, piece.seed]) for piece in pieces.values()
        ]
        answers = self._ask(requests, "patches", into, rows)
        lengths = (answer if isinstance(answer, DataError) else answer[0] for answer in answers)
        return dict(zip(rows, lengths, strict=True))

    def windows(self, sound: Stored, hop_seconds: float | None) -> Iterator[tuple[np.ndarray, int]]:
        """`windows.cut_windows` of a whole member with this decoder's config; some windows are held at a time.

        Args:
            sound: the member.
            hop_seconds: from a window's begin to the next one's; None for those of `windows.cut_consecutive`.

        Raises:
            DataError: as there, or what `decode` returns; windows may have been given before.
        """
        for waveform, length, _ in self._windows((sound, ["windows", hop_seconds]), "crop"):
            yield waveform, length

    def pieces(self, member: Stored, extension: str) -> Iterator[tuple[np.ndarray, int, int]]:
        """`symbolic.encode.encode_windows` of a whole member with this decoder's config; as `windows`."""
        for patches, length, new in self._windows((member, ["pieces", extension]), "patches"):
            yield patches, length, int(new)

    def _windows(self, request: _Request, made: str) -> Iterator[tuple[np.ndarray, int, str]]:
        """The windows of a member that are shared as `made`, with their lengths and words."""
        given, death = 0, None
        for _ in range(2):  # once more: memory may have been short for another reason
            try:
                for window in islice(self._stream(request, made), given, None):
                    given += 1
                    yield window
                return
            except _Died as error:
                death = error
        raise DataError(f"its decoder died twice ({death})")

    def _stream(self, request: _Request, made: str) -> Iterator[tuple[np.ndarray, int, str]]:
        """Windows as the child makes them, which goes on when it is told so.

        Raises:
            _Died, DataError: as `_ask_together`, or the child's error.
        """
        self._ask_together([request])
        while True:
            done = int(self._shared["done"][0])
            lengths, windows = self._shared["length"][:done].tolist(), self._shared[made][:done].copy()
            words = [text.decode(errors="replace") for text in self._shared["text"][:done].tolist()]
            error = _error(lengths[-1], words[-1]) if done and lengths[-1] < 0 else None
            ended = error is not None or done < TOGETHER
            try:
                yield from zip(windows[: done - (error is not None)], lengths, words, strict=False)
            except GeneratorExit:
                if not ended:  # the child waits to be told to go on
                    self.close()
                raise
            if error is not None:
                raise error
            if ended:
                return
            self._exchange(b".", [])

    def probe(self, sound: Stored) -> tuple[int, int, float]:
        """`audio.probe`.

        Raises:
            DataError: as there, and what `decode` returns.
        """
        (answer,) = self._ask([(sound, ["probe"])])
        if isinstance(answer, DataError):
            raise answer
        rate, channels, seconds = json.loads(answer[1])
        return rate, channels, seconds

    def _ask(
        self, requests: list[_Request], made: str = "", into: np.ndarray | None = None, rows: Sequence[int] = ()
    ) -> list[tuple[int, str] | DataError]:
        """Length and text of each answer, or why there is none; what of them is shared as `made` goes to these rows of
        `into`."""
        answers: list[tuple[int, str] | DataError] = []
        fatal = None
        while (first := len(answers)) < len(requests):
            error = None
            try:
                self._ask_together(requests[first : first + TOGETHER])
            except _Died as death:
                at = first + int(self._shared["done"][0])
                if fatal == at:  # once more: memory may have been short for another reason
                    error = DataError(f"its decoder died twice ({death})")
                fatal = at
            except DataError as stall:
                error = stall
            for i in range(self._shared["done"][0]):
                length, text = int(self._shared["length"][i]), self._shared["text"][i].decode(errors="replace")
                answers.append((length, text) if length >= 0 else _error(length, text))
                if into is not None and length >= 0:
                    into[rows[first + i]] = self._shared[made][i]
            if error is not None:
                answers.append(error)
        return answers

    def _ask_together(self, requests: list[_Request]) -> None:
        """Answers lie in the shared memory afterwards.

        Raises:
            _Died: the child is dead; it has answered as many as it says.
            DataError: the next of those is not answered in time.
        """
        text = json.dumps([(member.offset, member.size, *wanted) for member, wanted in requests])
        self._exchange(text.encode(), [member.file for member, _ in requests])

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
        settings = json.dumps({name: getattr(self._config, name) for name in _SETTINGS}, default=vars)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "muser_dist.data.decoder_child", *map(str, shared), settings],
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


def _error(length: int, words: str) -> DataError:
    """The error that an answer of the child is."""
    return UnreadError(words) if length == UNREAD else DataError(words)


def decoder(config: DataConfig) -> Decoder:
    """This process's decoder for such clips and pieces; it lives on from task to task."""
    return _decoder(DataConfig(**{name: getattr(config, name) for name in _SETTINGS}))


_SETTINGS = (
    "sample_rate",
    "crop_seconds",
    "pad",
    "augment",
    "keep_clips",
    "clip_cache_gib",
    "cache_folder",
    "symbolic",
)


@lru_cache(maxsize=2)
def _decoder(config: DataConfig) -> Decoder:
    return Decoder(config)
