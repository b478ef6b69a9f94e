"""Files that are either whole or not there, for a run may die while it writes; and folders of one job at a time."""

import errno
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile
from typing import BinaryIO

from filelock import FileLock, Timeout

from muser_dist.errors import ConfigError, DataError


def write_whole(path: Path, content: str | bytes) -> None:
    """Writes a file beside its place and moves it there; what was there before is replaced."""
    temporary = path.with_name(f".{path.name}.part")
    temporary.write_bytes(content.encode() if isinstance(content, str) else content)
    temporary.replace(path)


def check_file(path: Path | None, option: str) -> None:
    """Makes the folder of a file that is written when the work is done: what is wrong with it shows before the work.

    Args:
        path: where it will be; None where nobody asked for it.
        option: that names it, for errors.

    Raises:
        ConfigError: it cannot be written.
    """
    if path is None:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        with TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise ConfigError(f"{option}: cannot write {path} ({error.strerror}); give another file") from None


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
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A file that gets its name when it is complete and on the disk; what was there before is replaced.

    Several may write the same one at a time, each to a file of its own: a task whose node seemed to be dead may live.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())  # else a machine that goes down may leave a file of zeros under the name
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def remove_parts(folder: Path) -> None:
    """Removes what `whole_file` left behind where its process was killed. Who still writes to one of them, such as a
    task that a Ctrl-C did not reach, gets an error when it is done, and replaces nothing."""
    for part in folder.glob(".*.part"):
        part.unlink(missing_ok=True)


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
