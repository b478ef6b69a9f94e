"""Where the modalities lie in the joint space, and how they fill it. All of unit vectors."""

from collections.abc import Mapping
from itertools import combinations
from typing import Any

import numpy as np

from muser_dist.evaluate.retrieval import unit_rows

ROWS = 4096
"""Most rows that are looked at, drawn once: more do not change a figure by what matters."""


def alignment(first: np.ndarray, second: np.ndarray) -> float:
    """Mean squared distance of the two halves of a pair, (n, D) each: 0 is perfect, 2 unrelated (Wang & Isola 2020)."""
    return float(((unit_rows(first, "first") - unit_rows(second, "second")) ** 2).sum(axis=1).mean())


def uniformity(embeddings: np.ndarray) -> float | None:
    """log of the mean of exp(-2 |x - y|²) over all pairs of rows (Wang & Isola 2020): 0 is collapse, less is more even.

    None for fewer than two rows.
    """
    rows = unit_rows(embeddings, "geometry's")
    if len(rows) < 2:
        return None
    squares = (rows**2).sum(axis=1)
    total = 0.0
    for start in range(0, len(rows), 512):
        block = slice(start, start + 512)
        distances = squares[block, None] + squares - 2 * rows[block] @ rows.T
        total += float(np.exp(-2 * np.maximum(distances, 0)).sum())
    return float(np.log((total - len(rows)) / (len(rows) * (len(rows) - 1))))


def effective_rank(embeddings: np.ndarray) -> float | None:
    """exp of the entropy of the singular values, as shares of their sum (Roy & Vetterli 2007, definition 1).

    1 where all rows point the same way, D where they spread evenly over all dimensions. None without a row that is
    not zero.
    """
    singular = np.linalg.svd(unit_rows(embeddings, "geometry's"), compute_uv=False)
    if not singular.sum() > 0:
        return None
    shares = singular / singular.sum()
    shares = shares[shares > 0]
    return float(np.exp(-(shares * np.log(shares)).sum()))


def modality_gap(first: np.ndarray, second: np.ndarray) -> float:
    """Distance of the modalities' centroids (Liang et al. 2022), 0 to 2."""
    return float(np.linalg.norm(unit_rows(first, "first").mean(axis=0) - unit_rows(second, "second").mean(axis=0)))


def separability(first: np.ndarray, second: np.ndarray, seed: int = 0) -> float | None:
    """How well a plane tells two modalities apart: balanced accuracy of logistic regression on rows it has not seen.

    0.5 is no gap, 1 a clean one. Each half of the rows is predicted from the other half.

    Args:
        first: (n, D).
        second: (m, D).
        seed: of the halves.

    Returns:
        None where either modality has fewer than two rows.
    """
    from sklearn.linear_model import LogisticRegression

    if min(len(first), len(second)) < 2:
        return None
    rows = np.concatenate([unit_rows(first, "first"), unit_rows(second, "second")])
    side = np.arange(len(rows)) >= len(first)
    rng = np.random.default_rng(seed)
    half = np.concatenate([rng.permutation(n) % 2 for n in (len(first), len(second))]).astype(bool)
    right = np.zeros(len(rows))
    for seen in (half, ~half):
        # Strong regularisation would hide a gap that is small beside the spread; unit vectors need a large C.
        model = LogisticRegression(C=100.0, class_weight="balanced", max_iter=500).fit(rows[seen], side[seen])
        right[~seen] = model.predict(rows[~seen]) == side[~seen]
    return float((right[side].mean() + right[~side].mean()) / 2)


def geometry(
    embeddings: Mapping[str, np.ndarray], valid: Mapping[str, np.ndarray], text_ids: np.ndarray
) -> dict[str, Any]:
    """Every figure of this module, of the joint space that a set of rows spans.

    Args:
        embeddings: (n, D) by modality.
        valid: (n,) bool by modality; other rows may hold anything.
        text_ids: (n,) int64, equal where texts state the same. What describes texts alone takes each once.

    Returns:
        JSON values. "modalities": by name, `effective_rank`, `uniformity`, `rows`, `dimensions`. "pairs": by
        f"{first}-{second}", `alignment`, `modality_gap`, `separability` and `rows`. Names without rows are left out.
    """
    rng = np.random.default_rng(0)

    def some(rows: np.ndarray) -> np.ndarray:
        return rows if len(rows) <= ROWS else np.sort(rng.choice(rows, ROWS, replace=False))

    alone, together = {}, {}
    for name, values in embeddings.items():
        rows = np.flatnonzero(valid[name])
        if name == "text":
            rows = rows[np.unique(text_ids[rows], return_index=True)[1]]
        if len(rows):
            chosen = values[some(rows)]
            alone[name] = {
                "effective_rank": effective_rank(chosen),
                "uniformity": uniformity(chosen),
                "rows": len(chosen),
                "dimensions": values.shape[1],
            }
    for first, second in combinations(embeddings, 2):
        both = np.flatnonzero(valid[first] & valid[second])
        if not len(both):
            continue
        both = some(both)
        once = both[np.unique(text_ids[both], return_index=True)[1]]  # a text met in both halves would be known
        left, right = (embeddings[name][once if name == "text" else both] for name in (first, second))
        together[f"{first}-{second}"] = {
            "alignment": alignment(embeddings[first][both], embeddings[second][both]),
            "modality_gap": modality_gap(embeddings[first][both], embeddings[second][both]),
            "separability": separability(left, right),
            "rows": len(both),
        }
    return {"modalities": alone, "pairs": together}
