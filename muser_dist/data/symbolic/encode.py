"""A row's members to patches."""

from collections.abc import Collection, Mapping

import numpy as np

from muser_dist.data.symbolic.abc import clean_abc
from muser_dist.data.symbolic.config import Notation, SymbolicConfig
from muser_dist.data.symbolic.midi import hide_programs, midi_to_mtf
from muser_dist.data.symbolic.musicxml import musicxml_to_abc
from muser_dist.data.symbolic.patches import split_abc, split_mtf, to_patches
from muser_dist.errors import DataError

EXTENSIONS: dict[Notation, tuple[str, ...]] = {
    "abc": ("abc", "musicxml", "mxl", "xml"),
    "midi": ("mid", "midi"),
}
"""Extensions of members by what becomes of them; the first that a row has counts."""


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
    extension = draw_member(members, config, seed)
    return encode_member(extension, members[extension], config, seed)


def draw_member(extensions: Collection[str], config: SymbolicConfig, seed: int | None = None) -> str:
    """Of the members that a row has, the extension of the one that `encode_symbolic` reads; errors as there."""
    of_notations = ([name for name in EXTENSIONS[notation] if name in extensions] for notation in config.notations)
    found = [names[0] for names in of_notations if names]
    if not found:
        wanted = ", ".join(name for notation in config.notations for name in EXTENSIONS[notation])
        raise DataError(f"no member with notation ({wanted})")
    return found[0] if seed is None else found[int(np.random.default_rng((seed, 0)).integers(len(found)))]


def encode_member(
    extension: str, data: bytes, config: SymbolicConfig, seed: int | None = None
) -> tuple[np.ndarray, int]:
    """The patches of a member; the rest as of `encode_symbolic`."""
    if len(data) > config.max_bytes:
        raise DataError(
            f"{len(data):,} bytes of .{extension}, more than {config.max_bytes:,} (data.symbolic.max_bytes)"
        )
    # Apart from that of the member: which others a row has must not change the window.
    rng = None if seed is None else np.random.default_rng((seed, 1))
    instruments = rng.random() >= config.drop_instruments if rng else config.drop_instruments < 1
    if extension in EXTENSIONS["midi"]:
        text = midi_to_mtf(data, config.max_events)
        pieces = split_mtf(text if instruments else hide_programs(text))
    else:
        source = data if extension == "abc" else musicxml_to_abc(data, config.max_bytes, config.max_events)
        pieces = split_abc(clean_abc(source, config.headers, instruments))
    return to_patches(pieces, config.max_patches, rng)
