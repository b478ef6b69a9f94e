"""Audio that kills its decoder, for want of a file that does so with every version of every codec."""

from pathlib import Path

FATAL = b"fLaC" + b"die of this" * 10
STALLING = b"fLaC" + b"never end" * 10

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
        original(self, file, *arguments, **options)
    soundfile.SoundFile.__init__ = fatal
"""


def install(folder: Path) -> Path:
    """Makes a folder that, on the path of new decoders, lets them die of FATAL and stall at STALLING."""
    path = folder / "fatal"
    path.mkdir(exist_ok=True)
    (path / "sitecustomize.py").write_text(_CUSTOMIZE)
    return path
