"""Which rows of the global batch count as a match for an anchor, and which take no part."""

from typing import Literal

import torch
from torch import Tensor


def match(
    row: Tensor,
    text_id: Tensor,
    all_rows: Tensor,
    all_text_ids: Tensor,
    position: Tensor,
    targets: Literal["instance", "same_text"],
) -> tuple[Tensor, Tensor]:
    """Positives and excluded candidates of each anchor.

    Two entries of the batch with the same row number are one clip that the batch holds twice (a
    global batch may span the end of an epoch); they are never negatives of each other.

    Args:
        row, text_id: (b,) int64, of the anchors. A text_id below zero means no text.
        all_rows, all_text_ids: (N,) int64, of the global batch.
        position: (b,) int64, where the anchors stand in the global batch.
        targets: "instance": the anchor itself; "same_text": every entry whose text states the
            same facts.

    Returns:
        positive and excluded, both (b, N) bool; validity is not looked at.
    """
    positive = position[:, None] == torch.arange(len(all_rows), device=position.device)
    if targets == "same_text":
        positive = positive | ((text_id[:, None] == all_text_ids) & (text_id[:, None] >= 0))
    return positive, (row[:, None] == all_rows) & ~positive
