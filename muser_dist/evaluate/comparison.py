"""Two models on the same rows: what of the difference between their figures the choice of rows does not explain."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from muser_dist.errors import DataError
from muser_dist.evaluate.bootstrap import compare
from muser_dist.evaluate.classification import multi_label, single_label
from muser_dist.evaluate.formats import interval, share, table

_KEYS = "keys"  # names of the rows, under which no result is stored


def save_rows(path: Path, per_row: Mapping[str, np.ndarray], keys: list[str]) -> None:
    """Writes the results of each row, as `evaluate` gives them, and the rows' names as a NumPy archive."""
    arrays: dict[str, Any] = {_KEYS: np.array(keys, str), **per_row}
    with path.open("wb") as file:
        np.savez_compressed(file, **arrays)


def load_rows(path: Path) -> dict[str, np.ndarray]:
    """What `save_rows` wrote.

    Raises:
        DataError: the file cannot be read.
    """
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except (OSError, ValueError, EOFError, BadZipFile) as error:
        raise DataError(f"{path}: no results of an evaluation (--per-row writes them): {error}") from None


def compare_rows(first: Mapping[str, np.ndarray], second: Mapping[str, np.ndarray]) -> dict[str, dict[str, Any]]:
    """Paired bootstrap of every figure that two models both have.

    Args:
        first: what `load_rows` gives of one model.
        second: of the other, on the same rows.

    Returns:
        What `muser_dist.evaluate.bootstrap.compare` returns, under f"{what}: {figure}".

    Raises:
        DataError: the rows differ, or no figure is common.
    """
    if not np.array_equal(first[_KEYS], second[_KEYS]):
        raise DataError(
            f"the models were scored on different rows ({len(first[_KEYS])} and {len(second[_KEYS])}); "
            "give the same --val and --rows to both"
        )
    common = [name for name in first if name != _KEYS and name in second]
    if not common:
        raise DataError(f"no figure is common: {', '.join(first)} here, {', '.join(second)} there")
    result = {}
    for name in common:
        if first[name].shape != second[name].shape:
            raise DataError(f"{name}: {len(first[name])} rows here, {len(second[name])} there; the models hear others")
        for figure, of in _figures(name, first[name]).items():
            result[f"{name}: {figure}"] = compare(first[name], second[name], of)
    return result


def describe_comparison(comparison: Mapping[str, Mapping[str, Any]]) -> str:
    """The differences as a table."""
    columns = ["difference", "this", "other", "this - other", "95 % interval", "this better in"]
    rows = [
        [
            name,
            share(c["first"]),
            share(c["second"]),
            f"{c['difference']:+.3f}",
            interval(c["interval"]),
            share(c["share_above"]),
        ]
        for name, c in comparison.items()
    ]
    return "\n".join(table(columns, rows))


def _figures(name: str, rows: np.ndarray) -> dict[str, Callable[[np.ndarray], float]]:
    """What can be made of some rows' results: see evaluator.py for their columns."""
    if name.startswith("retrieval "):
        return {
            "R@10": lambda found: float((found[:, 0] <= 10).mean()),
            "MRR": lambda found: float((1 / found[:, 0]).mean()),
            "mAP@10": lambda found: float(found[:, 1].mean()),
        }
    if rows.ndim == 3:
        return {key: _of_tags(key) for key in ("roc_auc", "pr_auc")}
    classes = int(rows.max()) + 1 if len(rows) else 1
    return {"accuracy": lambda of: float((of[:, 0] == of[:, 1]).mean()), "macro F1": _macro_f1(classes)}


def _of_tags(key: str) -> Callable[[np.ndarray], float]:
    def figure(rows: np.ndarray) -> float:
        value = multi_label(rows[:, 1], rows[:, 0] > 0, replicates=0)[key]
        return float("nan") if value is None else value

    return figure


def _macro_f1(classes: int) -> Callable[[np.ndarray], float]:
    def figure(rows: np.ndarray) -> float:
        return single_label(np.eye(classes)[rows[:, 1]], rows[:, 0], replicates=0)["macro_f1"]

    return figure
