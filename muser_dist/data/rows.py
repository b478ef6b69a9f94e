"""The compressed members of a row, found by the shard's headers and read when they are wanted."""

from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from muser_dist.data.audio import EXTENSIONS
from muser_dist.data.shards import ShardIndex
from muser_dist.data.storage import Storage, redact
from muser_dist.data.tar import Member, Sample, read_member, walk
from muser_dist.errors import DataError

# Shards whose headers and open files a process keeps: consecutive tasks read the same windows.
_KEPT_SHARDS = 32


@dataclass(frozen=True)
class Row:
    """A row of a shard, or why there is none.

    Attributes:
        shard: path or URL, without secrets.
        key: of the sample.
        offset: byte in the shard at which the sample begins.
        audio: extension of its audio member, if it has one.
        problem: why it cannot be used at all.
    """

    shard: str
    key: str = ""
    offset: int | None = None
    audio: str | None = None
    problem: str | None = None
    _members: dict[str, Member] | None = None
    _file: BinaryIO | None = None

    @property
    def extensions(self) -> list[str]:
        """Extensions of its members."""
        return list(self._members or {})

    def read(self, extension: str | None) -> bytes | None:
        """The bytes of a member; None where there is none.

        Raises:
            DataError: the shard ends inside it.
        """
        member = (self._members or {}).get(extension or "")
        return read_member(self._file, member) if member and self._file else None


@dataclass(frozen=True)
class _Shard:
    """An open shard, its samples, and why there are no more."""

    file: BinaryIO | None
    samples: list[Sample]
    end: str


class RowReader:
    """Reads rows by number.

    Args:
        index: the shards.
        storage: where they are read from.
    """

    def __init__(self, index: ShardIndex, storage: Storage) -> None:
        self.index = index
        self.storage = storage

    def row(self, shard: int, number: int) -> Row:
        """A row of a shard, both by number; what is wrong with it is its `problem`."""
        url = self.index.url(shard)
        name = redact(url)
        opened = _open(self.storage, url)
        if number >= len(opened.samples):
            return Row(name, problem=opened.end)
        sample = opened.samples[number]
        # The last extension decides, so that stems with dots ("01. Song.mp3") find their members.
        members = {extension.rpartition(".")[2]: member for extension, member in sample.members.items()}
        sounds = [name for name in sample.members if name.rpartition(".")[2] in EXTENSIONS]
        problem = sample.problem
        if problem is None and len(sounds) > 1:
            problem = f"several audio members ({', '.join(sounds)}); a key ends at the first dot of the file name"
        audio = sounds[0].rpartition(".")[2] if sounds else None
        return Row(name, sample.key, sample.offset, audio, problem, members, opened.file)

    def surplus(self, shard: int) -> int:
        """Samples of the shard beyond what the index counts; they are not used."""
        return max(0, len(_open(self.storage, self.index.url(shard)).samples) - int(self.index.rows[shard]))


_opened: OrderedDict[object, _Shard] = OrderedDict()
"""The shards that this process read last; of the process, because tasks come and go in it."""


def _open(storage: Storage, url: str) -> _Shard:
    key: object = url
    if "://" not in url:
        try:  # another file under the same name is another shard
            stat = Path(url).stat()
            key = (url, stat.st_ino, stat.st_size, stat.st_mtime_ns)
        except OSError:
            key = (url, "missing")
    if key in _opened:
        _opened.move_to_end(key)
        return _opened[key]
    _opened[key] = _walk(storage, url)
    while len(_opened) > _KEPT_SHARDS:
        _, oldest = _opened.popitem(last=False)
        if oldest.file:
            oldest.file.close()
    return _opened[key]


def _walk(storage: Storage, url: str) -> _Shard:
    samples: list[Sample] = []
    file: BinaryIO | None = None
    end = "the shard holds fewer samples than its index says"
    try:
        file = storage.open(url)
        for sample in walk(file):  # one at a time: the samples before a damage count
            samples.append(sample)
    except DataError as error:
        end = f"the shard {error}"
    except OSError as error:
        end = f"the shard cannot be read: {error}"
    return _Shard(file, samples, end)
