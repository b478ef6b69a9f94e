"""Which of a row's members are its notation; needs none of the libraries that read them."""

from collections.abc import Collection

import numpy as np

from muser_dist.data.symbolic.config import Notation, SymbolicConfig
from muser_dist.errors import DataError

EXTENSIONS: dict[Notation, tuple[str, ...]] = {
    "abc": ("abc", "musicxml", "mxl", "xml"),
    "midi": ("mid", "midi", "mtf"),
}
"""Extensions of members by what becomes of them; the first that a row has counts."""


def draw_members(extensions: Collection[str], config: SymbolicConfig, seed: int | None = None) -> list[str]:
    """Of the members that a row has, the extensions of those with its notations, of each notation one.

    Args:
        extensions: of all its members.
        config: which notations are read.
        seed: draws the notation that comes first; None leaves them in the order of `config.notations`.

    Raises:
        DataError: there is none.
    """
    of_notations = ([name for name in EXTENSIONS[notation] if name in extensions] for notation in config.notations)
    found = [names[0] for names in of_notations if names]
    if not found:
        wanted = ", ".join(name for notation in config.notations for name in EXTENSIONS[notation])
        raise DataError(f"no member with notation ({wanted})")
    first = 0 if seed is None else int(np.random.default_rng((seed, 0)).integers(len(found)))
    return [found[first], *found[:first], *found[first + 1 :]]


def is_notation(name: str) -> bool:
    """Whether a file holds notation, by the extension of its name."""
    extension = name.rpartition(".")[2].lower()
    return any(extension in names for names in EXTENSIONS.values())


def kind_of(data: bytes) -> str:
    """The extension of a file of notation by its first bytes: what is no MIDI and no MusicXML is ABC."""
    if data.startswith(b"MThd"):
        return "mid"
    if data.startswith(b"ticks_per_beat "):
        return "mtf"
    if data.startswith(b"PK"):
        return "mxl"
    return "musicxml" if data.lstrip(b"\xef\xbb\xbf\xff\xfe \t\r\n").startswith(b"<") else "abc"
