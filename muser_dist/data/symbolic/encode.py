"""A row's members to patches."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from muser_dist.data.symbolic.abc import clean_abc
from muser_dist.data.symbolic.config import SymbolicConfig
from muser_dist.data.symbolic.members import EXTENSIONS, draw_members, kind_of
from muser_dist.data.symbolic.midi import clean_mtf, hide_programs, midi_to_mtf
from muser_dist.data.symbolic.musicxml import musicxml_to_abc
from muser_dist.data.symbolic.patches import split_abc, split_mtf, to_patches
from muser_dist.errors import DataError


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
    extension = draw_members(members, config, seed)[0]
    return encode_member(extension, members[extension], config, seed)


def encode_member(
    extension: str, data: bytes, config: SymbolicConfig, seed: int | None = None
) -> tuple[np.ndarray, int]:
    """The patches of a member; the rest as of `encode_symbolic`."""
    # Apart from that of the member: which others a row has must not change the window.
    rng = None if seed is None else np.random.default_rng((seed, 1))
    instruments = rng.random() >= config.drop_instruments if rng else config.drop_instruments < 1
    return to_patches(_pieces(extension, data, config, instruments), config.max_patches, rng)


def encode_windows(extension: str, data: bytes, config: SymbolicConfig) -> Iterator[tuple[np.ndarray, int, int]]:
    """All patches of a member, in windows of `config.max_patches` of which the last ends with the piece.

    Yields:
        (max_patches, 64) uint8, the number of patches before the padding, and how many of them no window before had.

    Raises:
        DataError: as of `encode_symbolic`.
    """
    most = config.max_patches
    patches, total = to_patches(_pieces(extension, data, config, config.drop_instruments < 1), None, None)
    for start in range(0, total, most):
        first = max(0, min(start, total - most))
        length = min(total, most)
        window = np.zeros((most, patches.shape[1]), np.uint8)
        window[:length] = patches[first : first + length]
        yield window, length, min(most, total - start)


def read_piece(piece: str | Path | bytes, config: SymbolicConfig) -> Iterator[tuple[np.ndarray, int, int]]:
    """`encode_windows` of a file by its path, or of its bytes; the error names it."""
    name = "a piece given as bytes" if isinstance(piece, bytes) else str(piece)
    try:
        data = piece if isinstance(piece, bytes) else Path(piece).read_bytes()
        yield from encode_windows(kind_of(data), data, config)
    except FileNotFoundError:
        raise DataError(f"{name}: there is no such file") from None
    except OSError as error:  # a folder, or what may not be read
        raise DataError(f"{name}: cannot be read: {error.strerror or error}") from None
    except DataError as error:
        raise DataError(f"{name}: {error}") from None


def _pieces(extension: str, data: bytes, config: SymbolicConfig, instruments: bool) -> list[str]:
    """The text of a member, in pieces that begin a patch each."""
    if len(data) > config.max_bytes:
        raise DataError(
            f"{len(data):,} bytes of .{extension}, more than {config.max_bytes:,} (data.symbolic.max_bytes)"
        )
    if extension in EXTENSIONS["midi"]:
        text = (clean_mtf if extension == "mtf" else midi_to_mtf)(data, config.max_events)
        return split_mtf(text if instruments else hide_programs(text))
    source = data if extension == "abc" else musicxml_to_abc(data, config.max_bytes, config.max_events)
    return split_abc(clean_abc(source, config.headers, instruments))
