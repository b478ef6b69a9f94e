"""Decodes in a child process, so that audio which kills its decoder costs one row.

Native decoders crash on input that nobody thought of, and Ray would run the whole task again to
the same end. The parent hands over one member at a time, so it knows which one was fatal.
"""

import json
import mmap
import os
import resource
import signal
import socket
import subprocess
import sys
from functools import lru_cache
from io import FileIO

import numpy as np
from pydantic import TypeAdapter

from muser_dist.data import audio
from muser_dist.data.config import DataConfig
from muser_dist.errors import DataError

SECONDS = 60.0
"""Time after which decoding one member is given up; the slowest honest one takes a few."""

MEMORY_BYTES = 6 << 30
"""Address space of the child: room for the largest member and for what it decodes to."""


MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(256 << 20), "MALLOC_TRIM_THRESHOLD_": str(512 << 20)}
"""Environment in which glibc keeps the memory that one clip freed for the next. By default it gives
the larger blocks back at once, and faulting them in again is a quarter of decoding an mp3."""


class Decoder:
    """A child process that decodes audio members.

    Args:
        config: says what becomes of a clip.
    """

    def __init__(self, config: DataConfig) -> None:
        self._config = config
        self._process: subprocess.Popen | None = None
        self._socket: socket.socket | None = None
        self._memory = _SharedMemory()

    def memory(self, size: int) -> memoryview:
        """Where to put the next member to spare `decode` a copy: it is overwritten by the crop."""
        self._memory.fit(max(size, 2 * self._config.crop_samples))
        return self._memory.view(size)

    def decode(self, data: bytes | memoryview, position: float, seed: int | None) -> tuple[np.ndarray, int]:
        """`audio.decode` with this decoder's config.

        Args:
            data: the member, perhaps in `memory`.
            position, seed: as there.

        Raises:
            DataError: as there; or decoding takes too long, or has killed its process twice.
        """
        (length,) = self._ask(data, f"{position!r} {seed}")
        return np.frombuffer(self._memory.view(2 * self._config.crop_samples), np.int16), int(length)

    def probe(self, data: bytes | memoryview) -> tuple[int, int, float]:
        """`audio.probe`.

        Raises:
            DataError: as there, and as `decode` does.
        """
        rate, channels, seconds = self._ask(data, "")
        return int(rate), int(channels), seconds

    def _ask(self, data: bytes | memoryview, crop: str) -> list[float]:
        """Numbers: about the crop at a position with a seed, or about the headers when it is empty."""
        how = ""
        for _ in range(2):  # once more: memory may have been short for another reason
            try:
                return self._ask_once(data, crop)
            except (EOFError, ConnectionError):
                how = self._bury()
            except DataError:
                raise
            except BaseException:  # such as an interrupt: the answer to come must not be taken for the next one's
                self.close()
                raise
        raise DataError(f"its decoder died twice ({how})")

    def _ask_once(self, data: bytes | memoryview, crop: str) -> list[float]:
        if self._socket is None:
            self._start()
        assert self._socket is not None
        memory = self.memory(len(data))
        if not (isinstance(data, memoryview) and data.obj is memory.obj):
            memory[:] = data
        # Text, never pickles: the child has touched what comes from outside.
        self._socket.settimeout(SECONDS)
        try:
            _send(self._socket, f"{len(data)} {crop}")
            answer = _receive(self._socket)
        except TimeoutError:
            self._bury()
            raise DataError(f"decoding takes more than {SECONDS:g} s") from None
        if answer.startswith("!"):
            raise DataError(answer[1:])
        return [float(number) for number in answer.split()]

    def _start(self) -> None:
        here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        path = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
        shared = [there.fileno(), self._memory.file.fileno()]
        settings = json.dumps({name: getattr(self._config, name) for name in _OF_CLIPS}, default=vars)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "muser_dist.data.decoder", *map(str, shared), settings],
            pass_fds=shared,
            env=os.environ | path | MALLOC,
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


_ANSWER_BYTES = 2048


def _send(to: socket.socket, text: str) -> None:
    to.send(text.encode(errors="replace")[:_ANSWER_BYTES])


def _receive(of: socket.socket) -> str:
    """One message.

    Raises:
        EOFError: the other end is gone.
    """
    message = of.recv(_ANSWER_BYTES)
    if not message:
        raise EOFError
    return message.decode(errors="replace")


def decoder(config: DataConfig) -> Decoder:
    """This process's decoder for such clips; it lives on from task to task."""
    return _decoder(DataConfig(**{name: getattr(config, name) for name in _OF_CLIPS}))


_OF_CLIPS = ("sample_rate", "crop_seconds", "pad", "augment")


@lru_cache(maxsize=2)
def _decoder(config: DataConfig) -> Decoder:
    return Decoder(config)


class _SharedMemory:
    """Memory that parent and child both see: the member goes one way in it, the crop the other.

    Through a pipe, a member of half a megabyte would take several turns of both processes.

    Args:
        file: descriptor of the file that it is; a new one when not given.
    """

    def __init__(self, file: int | None = None) -> None:
        self.file = FileIO(os.memfd_create("muser-decoder") if file is None else file, "r+")
        self._map = memoryview(b"")

    def fit(self, size: int) -> None:
        """Makes it at least so long, and not much longer: one huge member is not kept for. The parent's part."""
        if len(self._map) < size or len(self._map) > _MOST_BYTES >= size:
            self.file.truncate(-(-size // _STEP_BYTES) * _STEP_BYTES)

    def view(self, size: int) -> memoryview:
        """The first `size` bytes; what is in them stays."""
        length = os.fstat(self.file.fileno()).st_size
        if len(self._map) != length:
            self._map = memoryview(mmap.mmap(self.file.fileno(), length))
        return self._map[:size]


_STEP_BYTES, _MOST_BYTES = 4 << 20, 64 << 20


def _serve(requests: socket.socket, memory: _SharedMemory, config: DataConfig) -> None:
    """The child: answers requests until the parent is gone."""
    _, most = resource.getrlimit(resource.RLIMIT_AS)
    limit = MEMORY_BYTES if most == resource.RLIM_INFINITY else min(MEMORY_BYTES, most)
    resource.setrlimit(resource.RLIMIT_AS, (limit, most))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    while True:
        signal.alarm(0)
        size, *crop = _receive(requests).split()
        signal.alarm(2 * round(SECONDS))  # should the parent be gone, nobody else ends what never ends
        try:
            data = memory.view(int(size)).tobytes()
            if crop:
                position, seed = crop
                waveform, length = audio.decode(data, config, float(position), None if seed == "None" else int(seed))
                memory.view(waveform.nbytes)[:] = waveform.view(np.uint8).data
                answer = str(length)
            else:
                answer = " ".join(map(str, audio.probe(data)))
        except DataError as error:
            answer = f"!{error}"
        except Exception as error:  # whatever it is, one row must not end the run
            answer = f"!{type(error).__name__}: {error}"
        _send(requests, answer)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's
    end, shared, settings = sys.argv[1:]
    clips = TypeAdapter(DataConfig).validate_json(settings)
    try:
        _serve(socket.socket(fileno=int(end)), _SharedMemory(int(shared)), clips)
    except (EOFError, ConnectionError):
        sys.exit(0)
