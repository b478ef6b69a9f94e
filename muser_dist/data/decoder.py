"""Decodes in a child process, so that audio which kills its decoder costs one row.

Native decoders crash on input that nobody thought of, and Ray would run the whole task again to
the same end. The parent hands over one member at a time, so it knows which one was fatal.
"""

import os
import signal
import subprocess
import sys
from functools import lru_cache
from multiprocessing.connection import Connection, Pipe

import numpy as np

from muser_dist.data import audio
from muser_dist.data.config import DataConfig
from muser_dist.errors import DataError

SECONDS = 60.0
"""Time after which decoding one member is given up; the slowest honest one takes a few."""

MEMORY_BYTES = 6 << 30
"""Address space of the child: room for the largest member and for what it decodes to."""


class Decoder:
    """A child process that decodes audio members.

    Args:
        config: says what becomes of a clip.
    """

    def __init__(self, config: DataConfig) -> None:
        self._config = config
        self._process: subprocess.Popen | None = None
        self._connection: Connection | None = None

    def decode(self, data: bytes, position: float, seed: int | None) -> tuple[np.ndarray, int]:
        """`audio.decode` with this decoder's config.

        Raises:
            DataError: as there; or decoding takes too long, or has killed its process twice.
        """
        length, samples = self._ask(data, (position, seed))
        return np.frombuffer(samples, np.int16), int(length)

    def probe(self, data: bytes) -> tuple[int, int, float]:
        """`audio.probe`.

        Raises:
            DataError: as there, and as `decode` does.
        """
        rate, channels, seconds = self._ask(data, None)[0].split()
        return int(rate), int(channels), float(seconds)

    def _ask(self, data: bytes, crop: tuple[float, int | None] | None) -> tuple[bytes, bytes]:
        """Numbers in ASCII and samples: of the crop at a position with a seed, or of the headers when it is None."""
        how = ""
        for _ in range(2):  # once more: memory may have been short for another reason
            try:
                return self._ask_once(data, crop)
            except (EOFError, OSError):
                how = self._bury()
        raise DataError(f"its decoder died twice ({how})")

    def _ask_once(self, data: bytes, crop: tuple[float, int | None] | None) -> tuple[bytes, bytes]:
        if self._connection is None:
            self._start()
        assert self._connection is not None
        self._connection.send(crop)
        self._connection.send_bytes(data)
        if not self._connection.poll(SECONDS):
            self._bury()
            raise DataError(f"decoding takes more than {SECONDS:g} s")
        # Bytes, never pickles: the child has touched what comes from outside.
        answer = self._connection.recv_bytes()
        if answer[:1] == b"!":
            raise DataError(answer[1:].decode(errors="replace"))
        return answer, self._connection.recv_bytes()

    def _start(self) -> None:
        here, there = Pipe()
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "muser_dist.data.decoder", str(there.fileno())],
            pass_fds=[there.fileno()],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,  # libmpg123 complains of frames that a seek has cut; the samples are right
        )
        there.close()
        self._connection = here
        here.send(self._config)

    def _bury(self) -> str:
        """Ends the child; says how it died."""
        assert self._process is not None and self._connection is not None
        self._connection.close()
        self._connection = None
        try:
            status = self._process.wait(timeout=1)
        except subprocess.TimeoutExpired:
            self._process.kill()
            status = self._process.wait()
        return signal.Signals(-status).name if status < 0 else f"exit status {status}"

    def close(self) -> None:
        """Ends the child."""
        if self._connection is not None:
            self._bury()


def decoder(config: DataConfig) -> Decoder:
    """This process's decoder for such clips; it lives on from task to task."""
    return _decoder(DataConfig(**{name: getattr(config, name) for name in _OF_CLIPS}))


_OF_CLIPS = ("sample_rate", "crop_seconds", "pad", "augment")


@lru_cache(maxsize=2)
def _decoder(config: DataConfig) -> Decoder:
    return Decoder(config)


def _serve(connection: Connection) -> None:
    """The child: answers requests until the parent is gone."""
    import resource

    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    config = connection.recv()
    while True:
        crop = connection.recv()
        data = connection.recv_bytes()
        try:
            if crop is None:
                numbers, samples = " ".join(map(str, audio.probe(data))), memoryview(b"")
            else:
                waveform, length = audio.decode(data, config, *crop)
                numbers, samples = str(length), waveform.data
        except DataError as error:
            connection.send_bytes(f"!{error}".encode(errors="replace"))
        except Exception as error:  # whatever it is, one row must not end the run
            connection.send_bytes(f"!{type(error).__name__}: {error}".encode(errors="replace"))
        else:
            connection.send_bytes(numbers.encode())
            connection.send_bytes(samples)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's
    try:
        _serve(Connection(int(sys.argv[1])))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        sys.exit(0)
