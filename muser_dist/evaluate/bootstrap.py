"""How sure a figure is: intervals from resampled rows, and the difference between two models on the same rows.

The bootstrap (Efron 1979) draws as many rows as there are, with replacement, again and again; the 2.5 and 97.5 %
quantiles of the figure over these draws are its interval (percentile method). Draws are the same for the same number
of rows and seed, so two models are resampled alike.
"""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

REPLICATES = 1000
"""Resamples behind an interval; its ends vary by some hundredths of its width with others."""

_BLOCK = 1 << 22  # counts held at a time


def resamples(rows: int, replicates: int = REPLICATES, seed: int = 0) -> Iterator[np.ndarray]:
    """Blocks of resamples: (replicates in the block, rows) int64, how often each row was drawn; rows sum to `rows`."""
    rng = np.random.default_rng(seed)
    step = max(1, _BLOCK // max(1, rows))
    for start in range(0, replicates, step):
        block = min(step, replicates - start)
        drawn = rng.integers(0, rows, (block, rows)) + rows * np.arange(block)[:, None]
        yield np.bincount(drawn.ravel(), minlength=block * rows).reshape(block, rows)


def quantiles(figures: np.ndarray) -> list[float] | None:
    """[low, high] of 95 % out of a figure's values over resamples; NaN where one was undefined, None where all were."""
    figures = figures[np.isfinite(figures)]
    return [float(end) for end in np.quantile(figures, (0.025, 0.975))] if len(figures) else None


def mean_intervals(values: np.ndarray, replicates: int = REPLICATES, seed: int = 0) -> list[list[float] | None]:
    """95 % interval [low, high] of each column's mean, of (rows, columns) values; None without rows."""
    values = np.asarray(values, np.float64)
    if not len(values):
        return [None] * values.shape[1]
    means = [counts @ values / len(values) for counts in resamples(len(values), replicates, seed)]
    return [quantiles(column) for column in np.concatenate(means).T]


def compare(
    first: np.ndarray,
    second: np.ndarray,
    figure: Callable[[np.ndarray], float] = lambda rows: float(np.mean(rows)),
    *,
    replicates: int = REPLICATES,
    seed: int = 0,
) -> dict[str, Any]:
    """Paired bootstrap of the difference between two models' figures on the same rows.

    Rows are drawn for both models at once, so what is hard for both does not widen the interval.

    Args:
        first: (rows, ...) results of the first model for each row, such as 1 where it was right.
        second: the second model's, of the same rows in the same order.
        figure: from (rows, ...) results to a number; their mean by default. NaN where it is undefined.
        replicates: resamples; those in which a figure is undefined do not count.
        seed: of the resamples.

    Returns:
        JSON values: `first` and `second` (the figures), `difference` (first - second), `interval` of the difference
        (95 %: [low, high]), `share_above` (share of resamples in which the first is better, ties counted half) and
        `rows`.

    Raises:
        ValueError: the models have different numbers of rows, or none.
    """
    first, second = np.asarray(first), np.asarray(second)
    if len(first) != len(second) or not len(first):
        raise ValueError(f"paired results need the same rows; there are {len(first)} and {len(second)}")
    differences = np.array(
        [
            figure(first[rows]) - figure(second[rows])
            for counts in resamples(len(first), replicates, seed)
            for rows in (np.repeat(np.arange(len(first)), count) for count in counts)
        ]
    )
    differences = differences[np.isfinite(differences)]
    whole = figure(first), figure(second)
    above = ((differences > 0).mean() + (differences >= 0).mean()) / 2 if len(differences) else None
    return {
        "first": float(whole[0]),
        "second": float(whole[1]),
        "difference": float(whole[0] - whole[1]),
        "interval": quantiles(differences),
        "share_above": None if above is None else float(above),
        "rows": len(first),
    }
