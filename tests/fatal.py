"""Audio that kills its decoder, for want of a file that does so with every version of every codec."""

from pathlib import Path

FATAL = b"fLaC" + b"die of this" * 10
STALLING = b"fLaC" + b"never end" * 10
HUNGRY = b"fLaC" + b"more memory" * 10

# Python imports a module of this name by itself when it starts, if it is on the path.
_CUSTOMIZE = f"""
import os, signal, sys
if sys.argv[:1] == ["-m"]:
    import io, soundfile
    original = soundfile.SoundFile.__init__
    def fatal(self, file, *arguments, **options):
        data = file.getvalue() if isinstance(file, io.BytesIO) else b""
        if data == {FATAL!r}:
            os.kill(os.getpid(), signal.SIGSEGV)
        while data == {STALLING!r}:
            signal.pause()
        hoard = []
        while data == {HUNGRY!r}:
            hoard.append(bytearray(64 << 20))
        original(self, file, *arguments, **options)
    soundfile.SoundFile.__init__ = fatal
"""


def install(folder: Path) -> Path:
    """A folder that, on the path of new decoders, lets them die of FATAL, stall at STALLING and run out at HUNGRY."""
    path = folder / "fatal"
    path.mkdir(exist_ok=True)
    (path / "sitecustomize.py").write_text(_CUSTOMIZE)
    return path
