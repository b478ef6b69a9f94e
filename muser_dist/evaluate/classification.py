"""Scores of a classifier's output, whatever made it: zero-shot prompts, a probe, a supervised head.

Ties never favour the truth: of one label, the true class must win by more than a margin; of several, tags with equal
scores count as they do in any order, which is half for ROC-AUC and the share of right ones for PR-AUC.
"""

from collections.abc import Sequence
from math import sqrt
from typing import Any

import numpy as np

from muser_dist.errors import DataError
from muser_dist.evaluate.bootstrap import REPLICATES, quantiles, resamples

TIE = 1e-6
"""Scores closer than this count as equal. It is a little more than the rounding of float32
embeddings, so that a collapsed model is not scored by its rounding errors."""

_Z95 = 1.959963984540054  # 97.5 % quantile of the normal distribution


def wilson(successes: int, trials: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share, from independent trials; it holds near 0 and 1 and for few trials.

    Args:
        successes: 0 to trials.
        trials: at least 1.
    """
    share, z2 = successes / trials, _Z95**2
    centre = share + z2 / (2 * trials)
    half = _Z95 * sqrt(share * (1 - share) / trials + z2 / (4 * trials**2))
    # At the ends the bound is exactly 0 or 1; rounding would leave something like 1e-17.
    low = 0.0 if successes == 0 else (centre - half) / (1 + z2 / trials)
    high = 1.0 if successes == trials else (centre + half) / (1 + z2 / trials)
    return low, high


def predict(scores: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """The class with the highest score; the true one must win by more than TIE, or its best rival is predicted.

    Args:
        scores: (rows, classes).
        truth: (rows,) indices of the true classes.

    Returns:
        (rows,) int64.
    """
    if scores.shape[1] == 1:
        return np.zeros(len(scores), np.int64)
    rows, rivals = np.arange(len(scores)), np.array(scores, np.float64)
    rivals[rows, truth] = -np.inf
    rival = rivals.argmax(axis=1)
    return np.where(scores[rows, truth] > scores[rows, rival] + TIE, truth, rival)


def single_label(
    scores: np.ndarray,
    labels: np.ndarray,
    classes: Sequence[str] | None = None,
    *,
    replicates: int = REPLICATES,
) -> dict[str, Any]:
    """Scores of naming each row's class.

    Args:
        scores: (rows, classes), higher is likelier: cosines, logits or log-probabilities. See `predict` for ties.
        labels: (rows,) integer indices of the true classes; -1 where a row has none: it is left out and counted.
        classes: their names; "0", "1", ... when not given.
        replicates: resamples behind the interval of macro F1; 0 leaves it out.

    Returns:
        JSON values. `accuracy`, `accuracy_interval` (Wilson, 95 %: [low, high]), `macro_f1` (mean over the
        classes that occur in the labels), `macro_f1_interval` (bootstrap over rows, 95 %), `chance` (1/classes).
        What always naming the most frequent label reaches: `majority` (accuracy), `majority_macro_f1`,
        `majority_class`. These are None when no row has a label, except `chance`. `rows` (scored),
        `without_label`, `classes`, `counts` (labels of each class) and `confusion` (lists of counts: rows are
        true classes, columns predicted ones).

    Raises:
        DataError: a score of a row that has a label is not finite, or a label is no index of a class.
        ValueError: shapes do not fit together, or there are no classes.
    """
    scores, labels = np.asarray(scores), np.asarray(labels)
    names = [str(i) for i in range(scores.shape[-1])] if classes is None else list(classes)
    if scores.ndim != 2 or labels.shape != scores.shape[:1] or len(names) != scores.shape[1] or not names:
        raise ValueError(f"scores of shape {scores.shape} for labels of shape {labels.shape}, {len(names)} classes")
    scores, truth = scores[labels >= 0], labels[labels >= 0]
    if len(truth) and truth.max() >= len(names):
        raise DataError(f"label {truth.max()} is none of the {len(names)} classes")
    _check_finite(scores)
    confusion = np.zeros((len(names), len(names)), dtype=np.int64)
    np.add.at(confusion, (truth, predict(scores, truth)), 1)
    counts = confusion.sum(axis=1)
    return {
        **_of_confusion(confusion, names, replicates),
        "chance": 1 / len(names),
        "rows": len(truth),
        "without_label": int((labels < 0).sum()),
        "classes": names,
        "counts": counts.tolist(),
        "confusion": confusion.tolist(),
    }


def _of_confusion(confusion: np.ndarray, classes: Sequence[str], replicates: int) -> dict[str, Any]:
    """The scores that need a labelled row; None for each without one."""
    counts, rows = confusion.sum(axis=1), int(confusion.sum())
    if not rows:
        names = ("accuracy", "accuracy_interval", "macro_f1", "macro_f1_interval")
        return dict.fromkeys((*names, "majority", "majority_macro_f1", "majority_class"))
    right = int(np.trace(confusion))
    most = int(counts.argmax())
    majority = float(counts[most] / rows)
    return {
        "accuracy": right / rows,
        "accuracy_interval": list(wilson(right, rows)),
        "macro_f1": float(_macro_f1(np.diagonal(confusion), counts, confusion.sum(axis=0))),
        "macro_f1_interval": _macro_f1_interval(confusion, replicates),
        "majority": majority,
        # The majority class has recall 1 and precision `majority`; every other class scores 0.
        "majority_macro_f1": float(2 * majority / (1 + majority) / (counts > 0).sum()),
        "majority_class": classes[most],
    }


def _macro_f1(right: np.ndarray, true: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """Mean F1 over the classes that occur, from counts (..., classes)."""
    f1 = 2 * right / np.maximum(true + predicted, 1)
    return f1.sum(axis=-1, where=true > 0) / np.maximum((true > 0).sum(axis=-1), 1)


def _macro_f1_interval(confusion: np.ndarray, replicates: int) -> list[float] | None:
    """Rows of one cell of the matrix are alike, so drawing rows is drawing counts of cells."""
    true, predicted = np.nonzero(confusion)
    cells = confusion[true, predicted]
    drawn = np.random.default_rng(0).multinomial(cells.sum(), cells / cells.sum(), size=replicates)
    hits, of_true, of_predicted = (np.zeros((replicates, len(confusion)), np.int64) for _ in range(3))
    for i, (t, p) in enumerate(zip(true, predicted, strict=True)):
        of_true[:, t] += drawn[:, i]
        of_predicted[:, p] += drawn[:, i]
        if t == p:
            hits[:, t] += drawn[:, i]
    return quantiles(_macro_f1(hits, of_true, of_predicted)) if replicates else None


def multi_label(
    scores: np.ndarray,
    labels: np.ndarray,
    tags: Sequence[str] | None = None,
    *,
    replicates: int = REPLICATES,
) -> dict[str, Any]:
    """Scores of ranking rows by each tag, macro over tags; a tag that all rows have, or none, is undefined.

    Args:
        scores: (rows, tags), higher is likelier; only their order within a tag matters.
        labels: (rows, tags) bool.
        tags: their names; "0", "1", ... when not given.
        replicates: resamples of rows behind the intervals; 0 leaves them out.

    Returns:
        JSON values. `roc_auc` (chance is 0.5) and `pr_auc` (average precision), means over the defined tags, with
        `roc_auc_interval` and `pr_auc_interval` (bootstrap over rows, 95 %) and `chance_pr_auc` (mean share of rows
        that have the tag); None when no tag is defined. `by_tag`: [roc_auc, pr_auc, rows with the tag] of each
        defined one. `undefined`: the others' names. `rows`, `tags` (number of defined ones).

    Raises:
        DataError: a score is not finite.
        ValueError: shapes do not fit together.
    """
    scores, labels = np.asarray(scores), np.asarray(labels)
    names = [str(i) for i in range(scores.shape[-1])] if tags is None else list(tags)
    if scores.ndim != 2 or scores.shape != labels.shape or len(names) != scores.shape[1]:
        raise ValueError(f"scores of shape {scores.shape} for labels of shape {labels.shape}, {len(names)} tags")
    _check_finite(scores)
    labels = labels.astype(bool)
    having = labels.sum(axis=0)
    defined = np.flatnonzero((having > 0) & (having < len(labels)))
    result: dict[str, Any] = dict.fromkeys(
        ("roc_auc", "roc_auc_interval", "pr_auc", "pr_auc_interval", "chance_pr_auc")
    )
    by_tag = {}
    if len(defined):
        ranked = [_Ranked(scores[:, tag], labels[:, tag]) for tag in defined]
        once = np.ones((1, len(scores)))
        areas = np.stack([tag.areas(once)[:, 0] for tag in ranked])
        by_tag = {names[tag]: [*map(float, area), int(having[tag])] for tag, area in zip(defined, areas, strict=True)}
        result["roc_auc"], result["pr_auc"] = map(float, areas.mean(axis=0))
        result["chance_pr_auc"] = float(having[defined].mean() / len(labels))
        drawn = [
            _mean_of_defined(np.stack([tag.areas(counts) for tag in ranked]))
            for counts in resamples(len(scores), replicates)
        ]
        if drawn:
            roc, pr = np.concatenate(drawn, axis=1)
            result |= {"roc_auc_interval": quantiles(roc), "pr_auc_interval": quantiles(pr)}
    return result | {
        "by_tag": by_tag,
        "undefined": [names[tag] for tag in range(len(names)) if tag not in set(defined.tolist())],
        "rows": len(scores),
        "tags": len(defined),
    }


class _Ranked:
    """Rows in the order of a tag's scores, for areas under curves with any weights of the rows."""

    def __init__(self, scores: np.ndarray, labels: np.ndarray) -> None:
        self.order = np.argsort(-scores, kind="stable")
        ordered = scores[self.order]
        self.labels = labels[self.order]
        self.ends = np.append(np.flatnonzero(ordered[1:] != ordered[:-1]), len(scores) - 1)  # of equal scores

    def areas(self, weights: np.ndarray) -> np.ndarray:
        """(draws, rows) weights to (2, draws): ROC-AUC by trapezoids and average precision; NaN where undefined."""
        weights = weights[:, self.order]
        above = np.cumsum(weights, axis=1)[:, self.ends]
        hits = np.cumsum(weights * self.labels, axis=1)[:, self.ends]
        misses = above - hits
        new = np.diff(hits, prepend=0, axis=1)
        positives, negatives = hits[:, -1], misses[:, -1]
        with np.errstate(invalid="ignore"):
            roc = (np.diff(misses, prepend=0, axis=1) * (hits - new / 2)).sum(axis=1) / (positives * negatives)
            precision = (new * hits / np.maximum(above, 1)).sum(axis=1) / positives
        return np.stack([roc, np.where(np.isfinite(roc), precision, np.nan)])


def _mean_of_defined(areas: np.ndarray) -> np.ndarray:
    """(tags, ...) to (...): a resample may leave out all rows with a tag; NaN where it does so for all tags."""
    finite = np.isfinite(areas)
    with np.errstate(invalid="ignore"):
        return areas.sum(axis=0, where=finite) / finite.sum(axis=0)


def _check_finite(scores: np.ndarray) -> None:
    broken = np.flatnonzero(~np.isfinite(scores).all(axis=1))
    if broken.size:
        raise DataError(
            f"scores of {broken.size} of {len(scores)} rows are not finite (the first is row {broken[0]}); "
            "the weights have diverged, or the input of these rows is not finite"
        )
