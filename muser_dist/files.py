"""Files that are either whole or not there, for a run may die while it writes; and folders of one job at a time."""

import os
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


def files_in(root: str | Path) -> Iterator[str]:
    """Paths of the files in a folder and in the folders in it, in any order.

    Raises:
        DataError: a folder cannot be listed.
    """

    def refuse(error: OSError) -> None:
        raise DataError(f"{error.filename} cannot be listed: {error.strerror}")

    for folder, _, names in os.walk(root, onerror=refuse):
        yield from filter(os.path.isfile, (os.path.join(folder, name) for name in names))


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
