"""Ids that tell whether two rows are the same clip, for leaks from validation into training."""

import hashlib
from collections.abc import Mapping
from typing import Any

from muser_dist.data.tar import Stored
from muser_dist.data.text import joined, normal_form

# Enough of a file to tell it from others; hashing all of it would cost a tenth of decoding it.
_PROBE_BYTES = 4096


def file_id(sound: Stored) -> int:
    """An id in [0, 2^63) of an encoded file, equal for equal files.

    Raises:
        DataError: the shard ends inside it.
    """
    half, size = sound.size // 2, sound.size
    probes = sound.read(half, half + _PROBE_BYTES), sound.read(max(0, size - _PROBE_BYTES))
    return _id(b"audio", str(size).encode(), *probes)


def title_id(fields: Mapping[str, Any]) -> list[int]:
    """An id in [0, 2^63) of a work, equal for works of the same "title" by the same "artist".

    Without an artist, works of the same title count as the same; without a title there is none.
    """
    lines = joined({name: fields[name] for name in ("title", "artist") if name in fields})
    if "title" not in lines:
        return []
    return [_id(b"title", *(normal_form(lines.get(name, "")).encode() for name in ("title", "artist")))]


def _id(*parts: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(b"\n".join(parts), digest_size=8).digest(), "big") >> 1
