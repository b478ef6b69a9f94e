"""Two models on the same rows: what of the difference between their figures the choice of rows does not explain."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from muser_dist.errors import DataError
from muser_dist.evaluate.bootstrap import compare
from muser_dist.evaluate.classification import multi_label, single_label
from muser_dist.evaluate.formats import interval, percent, share, table

PerRow = dict[str, tuple[np.ndarray, np.ndarray]]
"""By what was asked: (n,) ids of the rows or texts that asked, and their (n, ...) results; see `_figures`."""

_IDS = "ids of "  # before a name, in a file


def save_rows(path: Path, per_row: PerRow) -> None:
    """Writes what `score` filled `per_row` with as a NumPy archive."""
    arrays: dict[str, Any] = {}
    for name, (ids, results) in per_row.items():
        arrays |= {_IDS + name: ids, name: results}
    with path.open("wb") as file:
        np.savez_compressed(file, **arrays)


def load_rows(path: Path) -> PerRow:
    """What `save_rows` wrote.

    Raises:
        DataError: the file cannot be read.
    """
    try:
        with np.load(path, allow_pickle=False) as archive:
            names = [name for name in archive.files if not name.startswith(_IDS)]
            return {name: (archive[_IDS + name], archive[name]) for name in names}
    except (OSError, ValueError, EOFError, KeyError, BadZipFile) as error:
        raise DataError(f"{path}: no results of an evaluation (--per-row writes them): {error}") from None


def compare_rows(first: PerRow, second: PerRow) -> dict[str, Any]:
    """Paired bootstrap of every figure that two models both have.

    Args:
        first: of one model.
        second: of the other.

    Returns:
        JSON values. "figures": what `muser_dist.evaluate.bootstrap.compare` returns, under f"{what}: {figure}".
        "left_out": what cannot be compared, with the reason.

    Raises:
        DataError: nothing can be compared.
    """
    figures: dict[str, Any] = {}
    left_out: dict[str, str] = {}
    for name in first | second:
        if name not in first or name not in second:
            left_out[name] = "only one model has it"
            continue
        (ids, ours), (other_ids, theirs) = first[name], second[name]
        if not np.array_equal(ids, other_ids) or ours.shape != theirs.shape:
            left_out[name] = f"the {len(ids)} rows (or their texts) are not the other's {len(other_ids)}"
            continue
        for figure, of in _figures(name, ours, theirs).items():
            figures[f"{name}: {figure}"] = compare(ours, theirs, of)
    if not figures:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in left_out.items())
        raise DataError(f"nothing can be compared; give the same --val, --rows and --fields to both ({reasons})")
    return {"figures": figures, "left_out": left_out}


def describe_comparison(comparison: Mapping[str, Any]) -> str:
    """The differences as a table."""
    columns = ["difference", "this", "other", "this - other", "95 % interval", "this better in"]
    rows = [
        [
            name,
            share(c["first"]),
            share(c["second"]),
            f"{c['difference']:+.3f}",
            interval(c["interval"]),
            percent(c["share_above"]),
        ]
        for name, c in comparison["figures"].items()
    ]
    lines = [f"not compared: {name} ({reason})" for name, reason in comparison["left_out"].items()]
    return "\n".join([*table(columns, rows), *lines])


def _figures(name: str, rows: np.ndarray, others: np.ndarray) -> dict[str, Callable[[np.ndarray], float]]:
    """What can be made of some rows' results, of either of two models.

    Their columns: of retrieval, the rank of the best answer and average precision; of classes, the true and the
    predicted one; of tags, (n, 2, tags), whether the row has them and their scores.
    """
    if name.startswith("retrieval "):
        return {
            "R@10": lambda found: float((found[:, 0] <= 10).mean()),
            "MRR": lambda found: float((1 / found[:, 0]).mean()),
            "mAP@10": lambda found: float(found[:, 1].mean()),
        }
    if rows.ndim == 3:
        return {key: _of_tags(key) for key in ("roc_auc", "pr_auc")}
    # The other model may predict a class that this one never does.
    classes = int(max(rows.max(), others.max())) + 1 if len(rows) else 1
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
