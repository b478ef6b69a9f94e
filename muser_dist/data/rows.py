"""The compressed members of a row, found by the shard's headers and read when they are wanted."""

import os
import time
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np

from muser_dist.data.audio import EXTENSIONS
from muser_dist.data.shards import ShardIndex
from muser_dist.data.storage import Storage, local_path, redact
from muser_dist.data.symbolic import members
from muser_dist.data.tar import MAX_MEMBER_BYTES, Member, Sample, Stored, walk
from muser_dist.errors import DataError
from muser_dist.files import files_in

# Seconds after which a shard that storage did not give is tried again: the network may be back.
_FAILED_SECONDS = 60.0


@dataclass(frozen=True)
class Row:
    """A row of a shard, or why there is none.

    Attributes:
        shard: path or URL, without secrets.
        key: of the sample.
        offset: byte in the shard at which the sample begins.
        audio: extension of its audio member, if it has one.
        problem: why it cannot be used at all.
        unread: whether that is because storage does not give the shard, as it may later.
    """

    shard: str
    key: str = ""
    offset: int | None = None
    audio: str | None = None
    problem: str | None = None
    _members: dict[str, Member] | None = None
    _file: BinaryIO | None = None
    unread: bool = False

    @classmethod
    def of(cls, shard: str, sample: Sample, file: BinaryIO | None) -> "Row":
        """The row that a sample of an open shard is."""
        # The last extension decides, so that stems with dots ("01. Song.mp3") find their members.
        # Among several, the one that has no other extension before it.
        members = {extension.rpartition(".")[2]: member for extension, member in sample.members.items()}
        members |= sample.members
        sounds = [name for name in sample.members if name.rpartition(".")[2] in EXTENSIONS]
        problem = sample.problem
        if problem is None and len(sounds) > 1:
            problem = f"several audio members ({', '.join(sounds)}); a key ends at the first dot of the file name"
        audio = sounds[0].rpartition(".")[2] if sounds else None
        return cls(shard, sample.key, sample.offset, audio, problem, members, file)

    @property
    def extensions(self) -> list[str]:
        """Extensions of its members."""
        return list(self._members or {})

    def read(self, extension: str) -> bytes | None:
        """The bytes of a member; None where there is none.

        Raises:
            DataError: the shard ends inside it.
        """
        stored = self.member(extension)
        return stored.read() if stored else None

    def sound(self) -> Stored:
        """Its audio, good for as long as this row is.

        Raises:
            DataError: it has none.
        """
        stored = self.member(self.audio or "")
        if stored is None:
            raise DataError(f"no audio member ({', '.join(EXTENSIONS)})")
        return stored

    def member(self, extension: str) -> Stored | None:
        """Where a member lies, good for as long as this row is; None where there is none."""
        member = (self._members or {}).get(extension)
        return Stored(self._file.fileno(), member.offset, member.size) if member and self._file else None


@dataclass(frozen=True)
class _Shard:
    """An open shard, its samples, why there are no more, and whether storage is why."""

    file: BinaryIO | None
    samples: list[Sample]
    end: str
    unread: bool
    since: float


class RowReader:
    """Reads rows by number.

    Args:
        index: the shards.
        storage: where they are read from.
        kept: shards whose headers and open files this process keeps; consecutive tasks read the
            same windows, so it should be those of two.
    """

    def __init__(self, index: ShardIndex, storage: Storage, kept: int = 32) -> None:
        self.index = index
        self.storage = storage
        self.kept = kept

    def row(self, shard: int, number: int) -> Row:
        """A row of a shard, both by number; what is wrong with it is its `problem`."""
        url = self.index.url(shard)
        name = os.fsencode(redact(url)).decode(errors="replace")  # Arrow and JSON write no other
        opened = self._open(url)
        if number >= len(opened.samples):
            return Row(name, problem=opened.end, unread=opened.unread)
        return Row.of(name, opened.samples[number], opened.file)

    def _open(self, url: str) -> _Shard:
        key: object = url
        if (local := local_path(url)) is not None:
            try:  # another file under the same name is another shard
                stat = os.stat(local)
                key = (url, stat.st_ino, stat.st_size, stat.st_mtime_ns)
            except OSError:
                key = (url, "missing")
        shard = _opened.get(key)
        if shard is None or (shard.unread and time.monotonic() - shard.since > _FAILED_SECONDS):
            shard = _opened[key] = _walk(self.storage, url)
        _opened.move_to_end(key)
        while len(_opened) > self.kept:
            _opened.popitem(last=False)  # its file is closed when the last row of it is gone
        return shard

    def surplus(self, shard: int) -> int:
        """Samples of the shard beyond what the index counts; they are not used."""
        return max(0, len(self._open(self.index.url(shard)).samples) - int(self.index.rows[shard]))


class FileReader:
    """Reads files of a folder, of audio or notation, as rows: each is a shard of one row, keyed by its path in there.

    Args:
        index: the files; see `index_files`.
        root: the folder.
    """

    def __init__(self, index: ShardIndex, root: str) -> None:
        self.index = index
        self.root = root

    def row(self, shard: int, number: int) -> Row:
        """A file as a row; what is wrong with it is its `problem`."""
        path = self.index.url(shard)
        name = os.fsencode(path).decode(errors="replace")  # as of RowReader
        key = os.path.relpath(name, os.fsencode(self.root).decode(errors="replace"))
        extension = path.rpartition(".")[2].lower()
        try:
            file = open(path, "rb")  # noqa: SIM115 (closed when the row is gone)
            size = os.fstat(file.fileno()).st_size
        except OSError as error:
            return Row(name, key, problem=f"cannot be read: {error.strerror or error}")
        if size > MAX_MEMBER_BYTES:
            return Row(name, key, problem=f"has {size:,} bytes, more than {MAX_MEMBER_BYTES:,}")
        audio = extension if extension in EXTENSIONS else None
        return Row(name, key, 0, audio, None, {extension: Member(key, 0, size)}, file)

    def surplus(self, shard: int) -> int:
        """As of RowReader."""
        return 0


def index_files(root: str, notation: bool = False) -> ShardIndex:
    """The files of audio, or of notation, in a folder and in the folders in it, by their extensions, sorted.

    Raises:
        DataError: there is none, or a folder cannot be listed.
    """
    of_notation = tuple(name for names in members.EXTENSIONS.values() for name in names)
    extensions = of_notation if notation else EXTENSIONS
    found = sorted(path for path in files_in(root) if path.rpartition(".")[2].lower() in extensions)
    if not found:
        kind = "file of notation" if notation else "audio file"
        raise DataError(f"{root}: there is no {kind} ({', '.join(extensions)})")
    return ShardIndex(found, np.ones(len(found), np.int64), {})


def samples_of(storage: Storage, url: str) -> Iterator[tuple[Sample, BinaryIO]]:
    """The samples of a shard up to where it is damaged, each with the open file.

    Raises:
        DataError: storage does not give the shard: what is found out at a run's start must not depend on an outage.
    """
    mend = "start again when it can be, or take the shard out"
    try:
        with storage.open(url) as file, suppress(DataError):  # who reads the rows says what is wrong with them
            for sample in walk(file):
                yield sample, file
    except DataError as error:
        raise DataError(f"{redact(url)} {error}; {mend}") from None
    except OSError as error:
        raise DataError(f"{redact(url)} cannot be read: {error.strerror or error}; {mend}") from None


_opened: OrderedDict[object, _Shard] = OrderedDict()
"""The shards that this process read last; of the process, because tasks come and go in it."""


def _walk(storage: Storage, url: str) -> _Shard:
    samples: list[Sample] = []
    file: BinaryIO | None = None
    unread = False
    end = "the shard holds fewer samples than its index says"
    try:
        file = storage.open(url)
        for sample in walk(file):  # one at a time: the samples before a damage count
            samples.append(sample)
    except DataError as error:
        end, unread = f"the shard {error}", file is None
    except OSError as error:
        end, unread = f"the shard cannot be read: {error}", True
    return _Shard(file, samples, end, unread, time.monotonic())
