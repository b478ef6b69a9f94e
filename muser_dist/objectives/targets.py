"""Which rows of the global batch count as a match for an anchor, and which take no part."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from muser_dist.config import ObjectiveConfig
from muser_dist.objectives.batch import Batch
from muser_dist.objectives.collectives import gather


class Sides(Protocol):
    """What is contrasted: two of the names that rows have flags for."""

    @property
    def first(self) -> str: ...
    @property
    def second(self) -> str: ...
    @property
    def of_one(self) -> bool: ...


@dataclass(frozen=True)
class GlobalBatch:
    """Ids and flags of all N rows of the global batch; ranks with fewer rows are padded to the most that any has.

    Attributes:
        valid: by modality, (N,) bool.
        row, text_id, label_id: (N,) int64, as in `Batch`.
        rows_each: b, rows of each rank after the padding.
        partner: (N,) int64, and liked (N, 2, L) int64, as in `Batch`; None where rows do not stand for two songs.
    """

    valid: dict[str, Tensor]
    row: Tensor
    text_id: Tensor
    label_id: Tensor
    rows_each: int
    partner: Tensor | None = None
    liked: Tensor | None = None

    @classmethod
    def of(cls, batch: Batch) -> "GlobalBatch":
        """Gathers the batches of all ranks; two collectives on integers."""
        counts = gather(torch.tensor([len(batch.row)], device=batch.row.device))
        most = int(counts.max())
        flags = [flag.long() for flag in batch.valid.values()]
        known = [batch.row, batch.text_id, batch.label_id]
        if batch.partner is not None and batch.liked is not None:
            known += [batch.partner, *batch.liked.flatten(1).unbind(1)]
        columns = torch.stack([*flags, *(column + 1 for column in known)])  # padding becomes 0
        padded = F.pad(columns, (0, most - columns.shape[1]))
        columns = gather(padded.T).T
        ids = columns[len(flags) :] - 1
        row, text_id, label_id = ids[:3]
        valid = {name: flag.bool() for name, flag in zip(batch.valid, columns, strict=False)}
        if len(ids) == 3:
            return cls(valid, row, text_id, label_id, most)
        liked = ids[4:].T.reshape(len(row), 2, (len(ids) - 4) // 2).contiguous()
        return cls(valid, row, text_id, label_id, most, ids[3], liked)


@dataclass(frozen=True)
class Masks:
    """Of one tile of similarities, n anchors by m candidates.

    Attributes:
        valid_rows, valid_columns: (n,) and (m,), 1 or 0 in the dtype of the similarities.
        all_valid: whether they are all 1.
        positive: (n, m) bool; None where there is none.
        barred: (n, m) bool, what takes no part; None where there is none.
    """

    valid_rows: Tensor
    valid_columns: Tensor
    all_valid: bool
    positive: Tensor | None
    barred: Tensor | None


@dataclass(frozen=True)
class Matches:
    """Who is what for whom among the N rows of the global batch, for one pair of modalities.

    Rows j are candidates of an anchor i where both modalities of j are valid. Positives of i are
    those with its label, always itself among them. Candidates that share one of the barred ids with i
    and are no positives take no part for it.

    Attributes:
        valid: (N,) bool, rows that have both modalities.
        label: (N,) int32.
        repeated: whether two rows have one label: else only i itself is a positive of i.
        barred: (N,) int32 each; none where ids do not repeat.
        all_valid: whether every row has both.
        songs: where rows stand for two songs, the first as anchor and the second as candidate: what bars further
            candidates.
    """

    valid: Tensor
    label: Tensor
    repeated: bool
    barred: tuple[Tensor, ...]
    all_valid: bool
    songs: "Songs | None" = None

    @classmethod
    def of(cls, rows: GlobalBatch, config: ObjectiveConfig, pairs: Sequence[Sides]) -> "list[Matches]":
        """The matches of each pair under the config's targets; of two forms of one piece or two songs, only the row."""
        of_targets, of_one = _ids(_target_ids(rows, config.targets)), _ids(_target_ids(rows, "instance"))
        ids = [_ids(rows.row)]  # two copies of a clip, as at the end of a pass over the data
        if config.exclude_same_text:
            ids.append(_ids(rows.text_id))
        if rows.partner is not None:
            ids.append(_ids(rows.partner))
        barred = tuple(known for known, repeat in ids if repeat)
        songs = Songs.of(rows)
        found = []
        for pair in pairs:
            valid = rows.valid[pair.first] & rows.valid[pair.second]
            label, repeated = of_one if pair.of_one or rows.partner is not None else of_targets
            found.append(cls(valid, label, repeated, barred, bool(valid.all()), songs))
        return found

    def turned(self) -> "Matches":
        """The same with anchors and candidates exchanged."""
        return self if self.songs is None else replace(self, songs=self.songs.turned())

    def positives(self) -> Tensor:
        """(N,) int64: how many positives each row has, itself included; at least 1."""
        counts = torch.bincount(self.label[self.valid], minlength=len(self.label))
        return counts[self.label].clamp(min=1)

    def masks(self, rows: slice, columns: slice, dtype: torch.dtype) -> Masks:
        """The masks of the tile that these rows and columns of the global batch make."""
        valid_rows, valid_columns = self.valid[rows], self.valid[columns]
        positive, barred = None, None
        if self.repeated or max(rows.start, columns.start) < min(rows.stop, columns.stop):
            positive = self.label[rows, None] == self.label[columns]
        for ids in self.barred:
            same = ids[rows, None] == ids[columns]
            barred = same if barred is None else barred | same
        if self.songs is not None:
            liked = self.songs.together(rows, columns)
            barred = liked if barred is None else barred | liked
        if barred is not None:
            barred = barred & ~(self.label[rows, None] == self.label[columns])
        all_valid = self.all_valid or (bool(valid_rows.all()) and bool(valid_columns.all()))
        return Masks(valid_rows.to(dtype), valid_columns.to(dtype), all_valid, positive, barred)


@dataclass(frozen=True)
class Songs:
    """Which songs of anchors and of candidates are one, or are liked together.

    Attributes:
        ids: (N, 2) int32, the two songs of each row; equal for the same song.
        liked: (N, 2, L + 1) int32, each of them and those that are liked together with it; -1 where there are fewer.
    """

    ids: Tensor
    liked: Tensor

    @classmethod
    def of(cls, rows: GlobalBatch) -> "Songs | None":
        """Of a batch whose rows stand for two songs; None where no anchor's song bars another row's candidate."""
        if rows.partner is None or rows.liked is None:
            return None
        both = torch.stack([rows.row, rows.partner], 1)
        known, ids = torch.unique(both, return_inverse=True)
        at = torch.searchsorted(known, rows.liked).clamp(max=len(known) - 1)
        liked = torch.where(known[at] == rows.liked, at, -1)  # only those that are in the batch matter
        liked = torch.cat([ids[..., None], liked], 2).masked_fill(both[..., None] < 0, -1)
        liked = liked.sort(dim=2, descending=True).values.int()  # so that empty columns are last
        liked = liked[..., : int((liked >= 0).any(1).any(0).sum())].contiguous()
        ids = ids.int().masked_fill(both < 0, -2)
        songs = cls(ids, liked)
        return songs if liked.shape[2] > 1 or bool(torch.isin(ids[:, 0], ids[:, 1]).any()) else None

    def turned(self) -> "Songs":
        """The same with the second song as anchor and the first as candidate."""
        return Songs(self.ids.flip(1), self.liked.flip(1))

    def together(self, rows: slice, columns: slice) -> Tensor:
        """(n, m) bool: the row's first song is the column's second, or either of the two likes the other."""
        ids_n, ids_m = self.ids[rows, 0], self.ids[columns, 1]
        liked_n, liked_m = self.liked[rows, 0], self.liked[columns, 1]
        found = torch.zeros(len(ids_n), len(ids_m), dtype=torch.bool, device=ids_n.device)
        for k in range(self.liked.shape[2]):  # a column at a time: memory of one tile
            found |= (liked_n[:, k, None] == ids_m) | (ids_n[:, None] == liked_m[:, k])
        return found


def _target_ids(rows: GlobalBatch, targets: Literal["instance", "same_text", "same_label"]) -> Tensor:
    """(N,) int64 ids that positives share; below zero for rows that share theirs with nobody."""
    if targets == "instance":
        return torch.full_like(rows.row, -1)
    return rows.text_id if targets == "same_text" else rows.label_id


def _ids(ids: Tensor) -> tuple[Tensor, bool]:
    """Small numbers that are equal where ids are equal and not below zero; and whether any two are."""
    alone = torch.arange(len(ids), device=ids.device)
    if not bool((ids >= 0).any()):
        return alone.int(), False
    # Ids of rows that stand alone are made different from each other, and from all others.
    known, small = torch.unique(torch.where(ids >= 0, ids, -1 - alone), return_inverse=True)
    return small.int(), len(known) < len(ids)
