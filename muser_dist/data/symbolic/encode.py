"""A row's members to patches."""

from collections.abc import Mapping

import numpy as np

from muser_dist.data.symbolic.abc import clean_abc
from muser_dist.data.symbolic.config import Notation, SymbolicConfig
from muser_dist.data.symbolic.midi import hide_programs, midi_to_mtf
from muser_dist.data.symbolic.musicxml import musicxml_to_abc
from muser_dist.data.symbolic.patches import split_abc, split_mtf, to_patches
from muser_dist.errors import DataError

EXTENSIONS: dict[Notation, tuple[str, ...]] = {
    "abc": ("abc", "musicxml", "xml", "mxl"),
    "midi": ("mid", "midi"),
}
"""Extensions of members by what becomes of them; the first that a row has counts."""


def members_of(extensions: Mapping[str, object], config: SymbolicConfig) -> dict[Notation, str]:
    """The members of a row that `encode_symbolic` may read: the extension by notation, in the config's order.

    Raises:
        DataError: there is none.
    """
    found: dict[Notation, str] = {}
    for notation in config.notations:
        for extension in EXTENSIONS[notation]:
            if extension in extensions:
                found.setdefault(notation, extension)
    if not found:
        wanted = ", ".join(extension for notation in config.notations for extension in EXTENSIONS[notation])
        raise DataError(f"no notation member ({wanted})")
    return found


def encode_symbolic(
    members: Mapping[str, bytes], config: SymbolicConfig, seed: int | None = None
) -> tuple[np.ndarray, int]:
    """The patches of a row.

    Args:
        members: bytes by extension; those of other kinds are ignored.
        config: what is read, what is left out, and how much.
        seed: of what is drawn in training: the notation, whether instruments are hidden, and the window. None in
            evaluation.

    Returns:
        (max_patches, 64) uint8, and the number of patches before the padding.

    Raises:
        DataError: there is no member for it, or the one that is drawn is broken, has no notes or is too large.
    """
    found = list(members_of(members, config).items())
    rng = None if seed is None else np.random.default_rng(seed)
    # Always drawn: which notations a row has, and the probability, must not change the window.
    chosen, hidden = rng.random(2) if rng else (0.0, 0.0)
    notation, extension = found[int(chosen * len(found))]
    instruments = hidden >= config.drop_instruments if rng else config.drop_instruments < 1
    data = members[extension]
    if len(data) > config.max_bytes:
        raise DataError(
            f"{len(data):,} bytes of .{extension}, more than {config.max_bytes:,} (data.symbolic.max_bytes)"
        )
    if notation == "midi":
        text = midi_to_mtf(data, config.max_events)
        pieces = split_mtf(text if instruments else hide_programs(text))
    else:
        source = data if extension == "abc" else musicxml_to_abc(data, config.max_bytes, config.max_events)
        pieces = split_abc(clean_abc(source, config.headers, instruments))
    return to_patches(pieces, config.max_patches, rng)
