"""Reads WebDataset shards: walks the headers of a tar and groups members into samples.

The header parser is the standard library's; what a hostile or damaged archive may do to us is
decided here. Nothing is ever written to disk by a member's name, links are not followed, and
nothing is unpickled.
"""

import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any, BinaryIO

from muser_dist.errors import DataError

# A member larger than this is not read into memory: an hour of 48 kHz stereo wav is 0.7 GB.
MAX_MEMBER_BYTES = 1 << 30

# Nor a header: long names and attributes come in headers that say how long they are.
_MAX_HEADER_BYTES = 1 << 20

# What the header parser raises on malformed headers; thousands of long-name headers make it recurse.
_MALFORMED = (tarfile.TarError, ValueError, OverflowError, EOFError, RecursionError)

_END_OF_ARCHIVE = bytes(tarfile.BLOCKSIZE)


@dataclass(frozen=True)
class Member:
    """Where a file's bytes lie in the shard."""

    name: str
    offset: int
    size: int


@dataclass(frozen=True)
class Stored:
    """A member of an open shard.

    Attributes:
        file: descriptor of the shard.
        offset, size: bytes of the shard that are the member.
    """

    file: int
    offset: int
    size: int

    def read(self, start: int = 0, stop: int | None = None) -> bytes:
        """Its bytes from `start` to before `stop`, or to its end.

        Raises:
            DataError: the shard ends before them.
        """
        stop = self.size if stop is None else min(stop, self.size)
        data = os.pread(self.file, max(0, stop - start), self.offset + start)
        if len(data) < stop - start:
            raise DataError(f"cut short: {start + len(data):,} of {self.size:,} bytes are there")
        return data


@dataclass
class Sample:
    """Adjacent members with one key: everything before the first dot of the file name.

    Attributes:
        index: position among the samples of the shard, from 0.
        key: path and stem that the members share.
        offset: byte in the shard at which the first member's header begins.
        members: by extension in lower case, without the first dot ("json", "flac").
        problem: why the sample cannot be used, or None.
    """

    index: int
    key: str
    offset: int
    members: dict[str, Member] = field(default_factory=dict)
    problem: str | None = None


def split_name(name: str) -> tuple[str, str]:
    """Key and extension of a member, by WebDataset's convention.

    >>> split_name("a.b/song.0.FLAC")
    ('a.b/song', '0.flac')
    """
    folder, slash, file = name.rpartition("/")
    stem, _, extension = file.partition(".")
    return folder + slash + stem, extension.lower()


class _Headers:
    """The shard as the header parser sees it: it reads no more at a time than a header may be long."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int) -> bytes:
        if not 0 <= size <= _MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"a header of {size:,} bytes")
        return self._file.read(size)


def walk(file: BinaryIO) -> Iterator[Sample]:
    """Yields the samples of a shard in order, from its headers alone.

    Args:
        file: the shard, opened for reading and seekable.

    Raises:
        DataError: the file is no tar, or it breaks off or is damaged after the samples that
            were yielded; the message says at which byte.
        OSError: it cannot be read.
    """
    headers: Any = _Headers(file)
    try:
        tar = tarfile.open(fileobj=headers, mode="r:")  # noqa: SIM115 (the file is the caller's to close)
    except _MALFORMED as error:
        raise DataError(f"is no tar archive ({error})") from None
    sample: Sample | None = None
    count = 0
    damage = None
    while True:
        try:
            info = tar.next()
        except _MALFORMED as error:
            damage = f"is damaged or cut short near byte {tar.offset} ({error})"
            break
        if info is None:
            break
        if info.size < 0:  # it would lead back to an earlier header, for ever
            damage = f"is damaged at byte {info.offset}: a member of {info.size} bytes"
            break
        tar.members = []  # type: ignore[attr-defined]  # tarfile keeps every header otherwise
        if info.isdir():
            continue
        # Names that are not UTF-8 come with surrogates, which neither Arrow nor JSON can write.
        name = info.name.encode(errors="surrogateescape").decode(errors="replace")
        key, extension = split_name(name)
        if sample is None or sample.key != key:
            if sample is not None:
                yield sample
            sample = Sample(index=count, key=key, offset=info.offset)
            count += 1
        sample.problem = sample.problem or _refusal(info, name, extension, sample)
        sample.members[extension] = Member(name, info.offset_data, info.size)
    if sample is not None:
        yield sample
    if damage is None:
        # tarfile takes a corrupt header for the end; only two blocks of zeros really are.
        file.seek(tar.offset)
        if file.read(tarfile.BLOCKSIZE) != _END_OF_ARCHIVE:
            damage = f"is damaged or cut short at byte {tar.offset}: no end-of-archive mark"
    if damage is not None:
        raise DataError(damage)


def _refusal(info: tarfile.TarInfo, name: str, extension: str, sample: Sample) -> str | None:
    """Why a member is not accepted, or None."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts:
        return f"unsafe member name {name!r}"
    if not info.isreg() or info.issparse():
        return f"member {name!r} is a link, a device or a sparse file"
    if info.size > MAX_MEMBER_BYTES:
        return f"member {name!r} has {info.size:,} bytes, more than {MAX_MEMBER_BYTES:,}"
    if extension in sample.members:
        return f"two members named {name!r}"
    return None
