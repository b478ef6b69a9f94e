"""Classification and tagging by a model's own heads, scored next to chance."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from muser_dist.evaluate.zero_shot import of_confusion


def classification(probabilities: np.ndarray, truth: np.ndarray, classes: Sequence[str]) -> dict[str, Any]:
    """Scores of rows that have one class each.

    Args:
        probabilities: (n, C).
        truth: (n,) the right class; below zero for rows without label, which do not count.
        classes: C names.

    Returns:
        as `zero_shot`, and what `tagging` says of each class against the others: "roc_auc", "pr_auc", "chance_pr_auc".
        A tie counts as an error.
    """
    known = truth >= 0
    scores, truth = probabilities[known], truth[known]
    rows = np.arange(len(truth))
    rivals = scores.copy()
    rivals[rows, truth] = -np.inf
    rival = rivals.argmax(axis=1) if len(classes) > 1 else truth
    predicted = np.where(scores[rows, truth] > rivals.max(axis=1, initial=-np.inf), truth, rival)
    confusion = np.zeros((len(classes), len(classes)), np.int64)
    np.add.at(confusion, (truth, predicted), 1)
    ranking = tagging(scores, np.eye(len(classes), dtype=np.int8)[truth], classes)
    return {
        **of_confusion(confusion, classes),
        **{name: ranking[name] for name in ("roc_auc", "pr_auc", "chance_pr_auc")},
        "chance": 1 / len(classes),
        "rows": len(truth),
        "without_label": int((~known).sum()),
        "classes": list(classes),
        "counts": confusion.sum(axis=1).tolist(),
        "confusion": confusion.tolist(),
    }


def tagging(probabilities: np.ndarray, truth: np.ndarray, tags: Sequence[str]) -> dict[str, Any]:
    """Scores of rows that have any number of tags: how well each tag ranks the rows, mean over tags (macro).

    Args:
        probabilities: (n, T).
        truth: (n, T), 1 where a row has a tag and 0 where not; -1 in all of a row without label, which does not count.
        tags: T names.

    Returns:
        "roc_auc" (chance is 0.5) and "pr_auc" (average precision; "chance_pr_auc" is the mean share of rows that have
        a tag), None where no tag can be scored; "tags", "rows", "without_label"; "tags_left_out" names those that all
        rows have or none.
    """
    from sklearn.metrics import average_precision_score, roc_auc_score

    known = (truth >= 0).all(axis=1)
    scores, truth = probabilities[known], truth[known]
    having = truth.sum(axis=0)
    scored = (having > 0) & (having < len(truth))
    found: dict[str, float | None] = dict.fromkeys(("roc_auc", "pr_auc", "chance_pr_auc"))
    if scored.any():
        found = {
            "roc_auc": float(roc_auc_score(truth[:, scored], scores[:, scored], average="macro")),
            "pr_auc": float(average_precision_score(truth[:, scored], scores[:, scored], average="macro")),
            "chance_pr_auc": float(truth[:, scored].mean()),
        }
    return {
        **found,
        "tags": int(scored.sum()),
        "tags_left_out": [tag for tag, counts in zip(tags, scored, strict=True) if not counts],
        "rows": len(truth),
        "without_label": int((~known).sum()),
    }
