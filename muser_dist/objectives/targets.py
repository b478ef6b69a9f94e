"""Which rows of the global batch count as a match for an anchor, and which take no part."""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from muser_dist.config import ObjectiveConfig
from muser_dist.objectives.batch import Batch
from muser_dist.objectives.collectives import gather


@dataclass(frozen=True)
class GlobalBatch:
    """Ids and flags of all N rows of the global batch; ranks with fewer rows are padded to the most that any has.

    Attributes:
        valid: by modality, (N,) bool.
        row, text_id, label_id: (N,) int64, as in `Batch`.
        rows_each: b, rows of each rank after the padding.
    """

    valid: dict[str, Tensor]
    row: Tensor
    text_id: Tensor
    label_id: Tensor
    rows_each: int

    @classmethod
    def of(cls, batch: Batch) -> "GlobalBatch":
        """Gathers the batches of all ranks; two collectives on integers."""
        counts = gather(torch.tensor([len(batch.row)], device=batch.row.device))
        most = int(counts.max())
        flags = [flag.long() for flag in batch.valid.values()]
        columns = torch.stack([*flags, batch.row + 1, batch.text_id + 1, batch.label_id + 1])  # padding becomes 0
        padded = F.pad(columns, (0, most - columns.shape[1]))
        *valid, row, text_id, label_id = gather(padded.T).unbind(1)
        return cls(
            {name: flag.bool() for name, flag in zip(batch.valid, valid, strict=True)},
            row - 1,
            text_id - 1,
            label_id - 1,
            most,
        )


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
    """

    valid: Tensor
    label: Tensor
    repeated: bool
    barred: tuple[Tensor, ...]
    all_valid: bool

    @classmethod
    def of(cls, rows: GlobalBatch, config: ObjectiveConfig) -> "list[Matches]":
        """The matches of each pair of the config, under its targets; of two views, only the row itself."""
        of_targets, of_views = _ids(_target_ids(rows, config.targets)), _ids(_target_ids(rows, "instance"))
        ids = [_ids(rows.row)]  # two copies of a clip, as at the end of a pass over the data
        if config.exclude_same_text:
            ids.append(_ids(rows.text_id))
        barred = tuple(known for known, repeat in ids if repeat)
        found = []
        for pair in config.pairs:
            valid = rows.valid[pair.first] & rows.valid[pair.second]
            label, repeated = of_views if pair.of_views else of_targets
            found.append(cls(valid, label, repeated, barred, bool(valid.all())))
        return found

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
        if barred is not None:
            barred = barred & ~(self.label[rows, None] == self.label[columns])
        all_valid = self.all_valid or (bool(valid_rows.all()) and bool(valid_columns.all()))
        return Masks(valid_rows.to(dtype), valid_columns.to(dtype), all_valid, positive, barred)


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
