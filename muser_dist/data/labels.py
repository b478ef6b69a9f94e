"""Metadata fields as labels: which values there are in a corpus, and which of them a row has."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from itertools import islice
from typing import Any

import numpy as np

from muser_dist.data.config import LABEL, DataConfig
from muser_dist.data.rows import Row, samples_of
from muser_dist.data.shards import ShardIndex
from muser_dist.data.storage import Storage
from muser_dist.data.text import normal_form, one_line, read_fields
from muser_dist.errors import DataError, require

MOST_VALUES = 10_000
"""A field with more different values tells rows apart, not classes."""


class Labels:
    """The labels of rows.

    Args:
        data: its `classes` and `tags` with all their `label_values`. Letter case, Unicode form and spacing of a value
            do not matter.

    Raises:
        ConfigError: two values of a field are the same then.
    """

    def __init__(self, data: DataConfig) -> None:
        self._kinds = data.label_kinds()
        self._places = {
            name: {normal_form(value): i for i, value in enumerate(data.label_values.get(name, ()))}
            for name in self._kinds
        }
        for name, places in self._places.items():
            values = data.label_values.get(name, ())
            twice = [value for i, value in enumerate(values) if places[normal_form(value)] != i]
            require(not twice, f"data.label_values: {name} has {', '.join(twice)} in another spelling too; keep one")

    def empty(self, rows: int) -> dict[str, np.ndarray]:
        """Arrays for the labels of so many rows, which have none yet, by "label/<field>".

        Returns:
            of a field of classes int64 (rows,), the number of the value; of tags int8 (rows, values), 1 where the row
            has the value and 0 where not. All are -1 where a row lacks the field.
        """
        return {
            LABEL + name: np.full(rows, -1, np.int64)
            if self._kinds[name] == "class"
            else np.full((rows, len(places)), -1, np.int8)
            for name, places in self._places.items()
        }

    def put(self, arrays: dict[str, np.ndarray], row: int, values: Mapping[str, Any]) -> bool:
        """Writes what the fields of a row say into its place; returns whether it has a label at all."""
        labelled = False
        for name, places in self._places.items():
            found = [normal_form(value) for value in _values(values.get(name), self._kinds[name])]
            known = [places[value] for value in found if value in places]
            if self._kinds[name] == "tags" and found:
                arrays[LABEL + name][row] = 0
                arrays[LABEL + name][row, known] = 1
                labelled = True
            elif known:
                arrays[LABEL + name][row] = known[0]
                labelled = True
        return labelled


def _values(value: Any, kind: str) -> list[str]:
    """The values that a row has of a field, out of what `read_fields` gives of it."""
    values = [one_line(entry) for entry in ([value] if isinstance(value, str) else value or ()) if entry]
    if isinstance(value, dict) or (kind == "class" and len(values) > 1):
        return []  # what depends on the language, or is none of several, is no label
    return values


def find_label_values(
    data: DataConfig,
    indices: Sequence[ShardIndex],
    storage: Storage,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, tuple[str, ...]]:
    """The values of all fields of `classes` and `tags`: those given, and of other fields those in the metadata.

    Args:
        data: names the fields.
        indices: the shards of each training source; all their rows are looked at.
        storage: where they are read from.
        progress: called with (shards done, shards).

    Returns:
        by field, sorted; each value in its most frequent spelling.

    Raises:
        DataError: a field has too few values to tell apart, or too many, or a shard cannot be had.
    """
    kinds = data.label_kinds()
    wanted = {name: kind for name, kind in kinds.items() if name not in data.label_values}
    spellings: dict[str, dict[str, Counter[str]]] = {name: {} for name in wanted}
    names: Counter[str] = Counter()
    shards = [(index.url(i), int(index.rows[i])) for index in indices for i in range(len(index))] if wanted else []
    with ThreadPoolExecutor(8) as pool:
        of_shards = pool.map(lambda shard: _count(storage, shard[0], shard[1], wanted), shards)
        for done, (counts, there) in enumerate(of_shards, start=1):
            names.update(there)
            for name, of_field in counts.items():
                for value, count in of_field.items():
                    spellings[name].setdefault(normal_form(value), Counter())[value] += count
                if len(spellings[name]) > MOST_VALUES:
                    pool.shutdown(wait=False, cancel_futures=True)
                    raise DataError(
                        f"data.{'classes' if kinds[name] == 'class' else 'tags'}: {name} has more than "
                        f"{MOST_VALUES:,} different values; take a field that rows share, or list its values in a "
                        "file for --data.label-values"
                    )
            if progress is not None:
                progress(done, len(shards))
    found = dict(data.label_values)
    for name, forms in spellings.items():
        if len(forms) < (2 if kinds[name] == "class" else 1):
            fields = ", ".join(field for field, _ in names.most_common(20))
            raise DataError(
                f"data.{'classes' if kinds[name] == 'class' else 'tags'}: {name} has {len(forms)} different values in "
                f"the training metadata; its fields are {fields or 'none at all'}"
            )
        found[name] = tuple(min(forms[form], key=lambda s, of=forms[form]: (-of[s], s)) for form in sorted(forms))  # type: ignore[misc]
    return {name: found[name] for name in kinds}


def _count(
    storage: Storage, url: str, rows: int, kinds: Mapping[str, str]
) -> tuple[dict[str, Counter[str]], Counter[str]]:
    """How often each value of each field occurs in a shard, and each field; what is damaged is left out."""
    counts: dict[str, Counter[str]] = {name: Counter() for name in kinds}
    names: Counter[str] = Counter()
    for sample, file in islice(samples_of(storage, url), rows):
        row = Row.of(url, sample, file)
        if row.problem is not None:
            continue
        with suppress(DataError):
            values = read_fields(row.read("json"), row.read("txt"))
            names.update(values.keys())
            for name, kind in kinds.items():
                counts[name].update(_values(values.get(name), kind))
    return counts, names


def with_stand_ins(data: DataConfig) -> DataConfig:
    """The config with two values for each field whose values are not known yet: enough to try a model with."""
    unknown = dict.fromkeys(data.label_kinds(), ("a", "b"))
    return replace(data, label_values=unknown | dict(data.label_values))
