"""Files that are either whole or not there, for a run may die while it writes; and folders of one job at a time."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from muser_dist.errors import ConfigError, DataError


def write_whole(path: Path, content: str | bytes) -> None:
    """Writes a file beside its place and moves it there; what was there before is replaced."""
    temporary = path.with_name(f".{path.name}.part")
    temporary.write_bytes(content.encode() if isinstance(content, str) else content)
    temporary.replace(path)


@contextmanager
def alone_in(folder: Path, option: str = "--out") -> Iterator[None]:
    """Keeps other jobs out of a folder, which is made when missing. The system lets them in when the process is gone.

    Args:
        folder: of the job.
        option: that names it, for errors.

    Raises:
        ConfigError: it cannot be written.
        DataError: another job works in it.
    """
    lock = FileLock(folder / ".lock", timeout=0)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        raise DataError(f"another job works in {folder}; wait for it, or end it") from None
    except OSError as error:
        raise ConfigError(f"{option}: cannot write to {folder} ({error.strerror}); give another") from None
    try:
        yield
    finally:
        lock.release()
