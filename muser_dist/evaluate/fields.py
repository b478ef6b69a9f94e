"""Metadata fields as labels: one class a row, or several tags."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from muser_dist.data.text import normal_form

TAGS = 50
"""Most tags of a field that are scored, the most frequent ones, as is usual for MagnaTagATune and MTG-Jamendo."""


@dataclass(frozen=True)
class FieldLabels:
    """A field of several sets of rows.

    `classes` are the names of classes or tags. `sets` hold for each set (rows,) int64 classes, -1 where the row has
    none; or of a field of tags (rows, tags) bool. `known` says which rows have the field. `left_out` counts the
    tags beyond the most frequent.
    """

    classes: list[str]
    sets: list[np.ndarray]
    known: list[np.ndarray]
    left_out: int = 0

    @property
    def tags(self) -> bool:
        """Whether a row has several."""
        return self.sets[0].ndim == 2


def read_labels(name: str, *sets: Sequence[dict[str, Any]]) -> FieldLabels:
    """A field's labels; it is one of tags where the value of any row is a list.

    Args:
        name: of the field.
        sets: the metadata of each set's rows; a value is a str or a list of them, and may be missing.
    """
    values = [[row.get(name) for row in rows] for rows in sets]
    entries = [[value if isinstance(value, list) else [value] for value in rows] for rows in values]
    usual = iter(same_spelling([entry for rows in entries for row in rows for entry in row]))
    spelled = [[[next(usual) for _ in row] for row in rows] for rows in entries]
    known = [np.array([value is not None for value in rows], bool) for rows in values]
    counts = Counter(entry for rows in spelled for row in rows for entry in set(row) if entry is not None)
    if not any(isinstance(value, list) for rows in values for value in rows):
        classes = sorted(counts)
        number = {None: -1} | {label: i for i, label in enumerate(classes)}
        return FieldLabels(classes, [np.array([number[row[0]] for row in rows], np.int64) for rows in spelled], known)
    classes = sorted(sorted(counts, key=lambda tag: (-counts[tag], tag))[:TAGS])
    having = [np.array([[tag in row for tag in classes] for row in rows], bool) for rows in spelled]
    return FieldLabels(classes, [rows.reshape(-1, len(classes)) for rows in having], known, len(counts) - len(classes))


def same_spelling(labels: Sequence[str | None]) -> list[str | None]:
    """The labels, each in the most frequent spelling of what means the same ("Rock" and "rock")."""
    spellings: dict[str, Counter[str]] = defaultdict(Counter)
    for label in labels:
        if label is not None:
            spellings[normal_form(label)][label] += 1
    usual = {form: min(counts, key=lambda s: (-counts[s], s)) for form, counts in spellings.items()}
    return [None if label is None else usual[normal_form(label)] for label in labels]
