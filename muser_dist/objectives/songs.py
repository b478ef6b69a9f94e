"""Pairs of songs that listeners like together: rows 2i and 2i + 1 of a batch as one row of another.

What is contrasted of such pairs (HTCL, Pan et al. 2025) then looks like any pair of modalities: of the first song as
anchor over the second songs of all rows, and the other way round.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from muser_dist.config import PairConfig
from muser_dist.objectives.batch import Batch

_FIRST, _SECOND = "1/", "2/"
"""What names of features of the first and of the second song begin with."""


@dataclass(frozen=True)
class Meeting:
    """Two features that are contrasted.

    Attributes:
        pair: number of the pair of the config.
        first, second: names of the features.
        share: of the pair's loss.
        of_views, of_one, of_songs: as in `PairConfig`.
    """

    pair: int
    first: str
    second: str
    share: float = 1.0
    of_views: bool = False
    of_one: bool = False
    of_songs: bool = False

    @classmethod
    def of(cls, number: int, pair: PairConfig) -> "Meeting":
        """A pair of the config."""
        return cls(number, pair.first, pair.second, 1.0, pair.of_views, pair.of_one, pair.of_songs)


def meetings_of_songs(meetings: Iterable[Meeting]) -> list[Meeting]:
    """The same of the two songs of a row: "partner" is one meeting, "fused" one with each song as the fused one."""
    found = []
    for of in meetings:
        if of.second == "partner":
            found.append(Meeting(of.pair, _FIRST + of.first, _SECOND + of.first))
        else:
            found.append(Meeting(of.pair, _FIRST + of.first, _SECOND + of.second, 0.5))
            found.append(Meeting(of.pair, _FIRST + of.second, _SECOND + of.first, 0.5))
    return found


def of_songs(features: dict[str, Tensor], batch: Batch, meetings: Iterable[Meeting]) -> tuple[dict[str, Tensor], Batch]:
    """The batch whose rows are pairs of songs.

    Args:
        features: by name (b, D); "fused" among them where a meeting names it.
        batch: of b rows, an even number; 2i and 2i + 1 are the songs of a pair.
        meetings: what is contrasted of them.

    Returns:
        features (b/2, D) and flags by the names of `meetings_of_songs`; a fusion is there where the song's audio (or
        spectrogram) and text are.
    """
    two: dict[str, Tensor] = {}
    valid: dict[str, Tensor] = {}
    for of in meetings:
        flags = {of.first: batch.valid[of.first]}
        if of.second == "fused":
            flags["fused"] = batch.valid[of.first] & batch.valid["text"]
        for name, flag in flags.items():
            for song, prefix in enumerate((_FIRST, _SECOND)):
                two[prefix + name], valid[prefix + name] = features[name][song::2], flag[song::2]
    row = batch.row.view(-1, 2)
    none = torch.full_like(row[:, 0], -1)
    liked = row.new_zeros(len(row), 2, 0) if batch.liked is None else batch.liked.unflatten(0, (-1, 2))
    return two, Batch(valid, row[:, 0], none, none, liked=liked, partner=row[:, 1])
