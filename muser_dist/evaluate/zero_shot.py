"""Zero-shot classification: the class whose text is nearest to the clip, scored next to chance."""

from collections.abc import Sequence
from math import sqrt
from typing import Any

import numpy as np

from muser_dist.errors import DataError
from muser_dist.evaluate.retrieval import TIE, unit_rows

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


def predict(embeddings: np.ndarray, class_embeddings: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Nearest class of each row by cosine; the true class must win by more than TIE, or another is predicted.

    Args:
        embeddings: (n, D).
        class_embeddings: (C, D).
        truth: (n,) indices of the true classes.

    Returns:
        (n,) int64 indices of classes.

    Raises:
        DataError: an embedding is not finite.
        ValueError: shapes do not fit together.
    """
    scores = unit_rows(embeddings, "clip") @ unit_rows(class_embeddings, "class").T
    if scores.shape[1] == 1:
        return np.zeros(len(scores), dtype=np.int64)
    rows = np.arange(len(scores))
    true_scores = scores[rows, truth]
    scores[rows, truth] = -np.inf
    rival = scores.argmax(axis=1)
    return np.where(true_scores > scores[rows, rival] + TIE, truth, rival)


def zero_shot(
    embeddings: np.ndarray,
    class_embeddings: np.ndarray,
    classes: Sequence[str],
    labels: Sequence[str | None],
) -> dict[str, Any]:
    """Scores of naming each clip's class by the nearest of the classes' texts.

    Args:
        embeddings: (n, D) of the clips.
        class_embeddings: (C, D), one text for each class.
        classes: C different names.
        labels: n true classes; None where the clip has none: it is left out and counted.

    Returns:
        JSON values. `accuracy`, `accuracy_interval` (Wilson, 95 %: [low, high]), `macro_f1` (mean over the
        classes that occur in the labels), `chance` (1/C). What always naming the most frequent label
        reaches: `majority` (accuracy), `majority_macro_f1`, `majority_class`. These are None when no row
        has a label, except `chance`. `rows` (scored), `without_label`, `classes`, `counts` (labels of each
        class) and `confusion` (C lists of C counts: rows are true classes, columns predicted ones).

    Raises:
        DataError: an embedding is not finite, or a label is none of the classes.
        ValueError: shapes do not fit together, there are no classes, or one has two texts.
    """
    embeddings, class_embeddings = np.asarray(embeddings), np.asarray(class_embeddings)
    index: dict[str | None, int] = {name: i for i, name in enumerate(classes)}
    if not classes or len(index) != len(classes) or len(class_embeddings) != len(classes):
        raise ValueError(f"{len(classes)} classes, {len(index)} of them different, have {len(class_embeddings)} texts")
    if len(labels) != len(embeddings):
        raise ValueError(f"{len(embeddings)} embeddings have {len(labels)} labels")
    labelled = [i for i, label in enumerate(labels) if label is not None]
    unknown = sorted({str(labels[i]) for i in labelled if labels[i] not in index})
    if unknown:
        raise DataError(f"labels {', '.join(map(repr, unknown[:5]))} are none of the {len(classes)} classes")

    truth = np.array([index[labels[i]] for i in labelled], dtype=np.int64)
    predicted = predict(embeddings[labelled], class_embeddings, truth)
    confusion = np.zeros((len(classes), len(classes)), dtype=np.int64)
    np.add.at(confusion, (truth, predicted), 1)
    counts = confusion.sum(axis=1)
    return {
        **of_confusion(confusion, classes),
        "chance": 1 / len(classes),
        "rows": len(labelled),
        "without_label": len(labels) - len(labelled),
        "classes": list(classes),
        "counts": counts.tolist(),
        "confusion": confusion.tolist(),
    }


def of_confusion(confusion: np.ndarray, classes: Sequence[str]) -> dict[str, Any]:
    """The scores of `zero_shot` that need a labelled row; None for each without one.

    Args:
        confusion: (C, C) counts; rows are true classes, columns predicted ones.
        classes: C names.
    """
    counts = confusion.sum(axis=1)
    rows = int(counts.sum())
    if not rows:
        names = ("accuracy", "accuracy_interval", "macro_f1", "majority", "majority_macro_f1", "majority_class")
        return dict.fromkeys(names)
    right = np.diagonal(confusion)
    present = counts > 0
    f1 = 2 * right[present] / (counts + confusion.sum(axis=0))[present]
    most = int(counts.argmax())
    majority = float(counts[most] / rows)
    return {
        "accuracy": float(right.sum() / rows),
        "accuracy_interval": list(wilson(int(right.sum()), rows)),
        "macro_f1": float(f1.mean()),
        "majority": majority,
        # The majority class has recall 1 and precision `majority`; every other class scores 0.
        "majority_macro_f1": float(2 * majority / (1 + majority) / present.sum()),
        "majority_class": classes[most],
    }
