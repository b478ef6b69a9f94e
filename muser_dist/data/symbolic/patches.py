"""Text of notation to patches of 64 characters, and back.

A patch is a header line or a bar of ABC, or a group of MIDI messages of one type; what has more characters than a patch
holds goes on in the next. As in M3, the encoder of CLaMP 2 (arXiv 2410.13267, section 3), but for that: there the
rest is cut off.
"""

import re
from collections.abc import Sequence

import numpy as np
from anyascii import anyascii

from muser_dist.data.symbolic.characters import BOS, EOS, MASK, PAD, PATCH_BYTES

PATCH_CHARACTERS = PATCH_BYTES - 2

_CONTROL = re.compile(r"[\x00-\x1f\x7f]+")
_VOICE = re.compile(r"(?=\[V:\d+\])")

_FIRST = np.array([BOS] * (PATCH_BYTES - 1) + [EOS], np.uint8)
_LAST = np.array([BOS] + [EOS] * (PATCH_BYTES - 1), np.uint8)


def to_ascii(text: str) -> str:
    """The text on one line of printable ASCII; other scripts are transliterated."""
    return _CONTROL.sub(" ", anyascii(text))


def split_abc(text: str) -> list[str]:
    """The header lines and bars of what `abc.clean_abc` returns; joined they are the text."""
    return [piece for line in text.splitlines(keepends=True) for piece in _VOICE.split(line) if piece]


def split_mtf(text: str) -> list[str]:
    """The messages of what `midi.midi_to_mtf` returns, in groups.

    Messages of one type that follow each other share a patch as long as it holds them: the type stands once, a tab
    before each further message.
    """
    groups: list[str] = []
    group = name = ""
    for line in text.splitlines(keepends=True):
        message, _, values = line.partition(" ")
        if message == name and len(group) + len(values) <= PATCH_CHARACTERS:
            group = f"{group[:-1]}\t{values}"
        else:
            groups.append(group)
            group, name = line, message
    return [*groups[1:], group]


def to_patches(
    pieces: Sequence[str], max_patches: int | None, rng: np.random.Generator | None
) -> tuple[np.ndarray, int]:
    """Patches of pieces of text.

    Args:
        pieces: of ASCII without control characters, but for tabs and line ends.
        max_patches: most patches, with the special ones that mark begin and end; None is as many as there are.
        rng: draws head, tail or a window between when there are more; None takes the head. Always drawn from equally
            often.

    Returns:
        (max_patches, 64) uint8, and the number of patches before the padding.
    """
    parts = [piece[i : i + PATCH_CHARACTERS] for piece in pieces for i in range(0, len(piece), PATCH_CHARACTERS)]
    total = len(parts) + 2
    max_patches = total if max_patches is None else max_patches
    start = _window(total, max_patches, rng)
    patches = np.full((max_patches, PATCH_BYTES), PAD, np.uint8)
    length = min(total, max_patches)
    for row, number in enumerate(range(start, start + length)):
        if number == 0:
            patches[row] = _FIRST
        elif number == total - 1:
            patches[row] = _LAST
        else:
            characters = np.frombuffer(parts[number - 1].encode("ascii"), np.uint8)
            patches[row, 0] = BOS
            patches[row, 1 : len(characters) + 1] = characters
            patches[row, len(characters) + 1] = EOS
    return patches, length


def _window(total: int, most: int, rng: np.random.Generator | None) -> int:
    """The first of the patches that are taken."""
    if rng is None:
        return 0
    where, start = int(rng.integers(3)), rng.random()
    if total <= most or where == 0:
        return 0
    # Between head and tail there is no window when only one patch is too many.
    return total - most if where == 1 else min(1 + int(start * (total - most - 1)), total - most)


def to_text(patches: np.ndarray) -> str:
    """The text that patches hold: the ABC or, with its groups taken apart, the MIDI text.

    Args:
        patches: (patches, 64) uint8; padding, special and masked bytes say nothing.
    """
    text = patches[patches > MASK].astype(np.uint8).tobytes().decode("ascii", errors="replace")
    return "".join(_take_apart(line) for line in text.splitlines(keepends=True)) if "\t" in text else text


def _take_apart(line: str) -> str:
    name = line.partition(" ")[0]
    return line.replace("\t", f"\n{name} ")
