"""Retrieval by cosine similarity, scored next to the exact expectation of a random order.

Which candidates answer a query is given by ids: a candidate is relevant where its id equals
the query's. That takes Q + C numbers where a mask would take Q x C, and says all that is needed
here: one text may describe many clips.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import permutations
from typing import Any

import numpy as np

from muser_dist.errors import DataError
from muser_dist.evaluate.bootstrap import mean_intervals
from muser_dist.evaluate.classification import TIE

KS = (1, 5, 10, 100)
"""The k of each R@k, Hit@k of others."""

DEPTH = 10
"""Places of a ranking that mean average precision looks at (mAP@10)."""

_BLOCK_SCORES = 1 << 21  # similarities held at a time: 16 MiB in float64, and as much again to compare them


def unit_rows(embeddings: np.ndarray, what: str) -> np.ndarray:
    """Rows scaled to unit length.

    Args:
        embeddings: (n, D), any real dtype; a row of zeros stays zero, its cosine with everything is 0.
        what: what the rows are, for the error.

    Returns:
        (n, D) float64, in which sums over D are exact far below TIE.

    Raises:
        DataError: a row has NaN or infinity.
        ValueError: the array does not have two axes.
    """
    rows = np.asarray(embeddings, dtype=np.float64)
    if rows.ndim != 2:
        raise ValueError(f"{what} embeddings have shape {rows.shape}; two axes are needed")
    broken = np.flatnonzero(~np.isfinite(rows).all(axis=1))
    if broken.size:
        raise DataError(
            f"{broken.size} of {len(rows)} {what} embeddings are not finite (the first is row {broken[0]}); "
            "the weights have diverged, or the input of these rows is not finite"
        )
    # First by the largest entry: the squares of very large or very small ones leave float64's range.
    largest = np.abs(rows).max(axis=1, initial=0.0, keepdims=True)
    rows = rows / np.where(largest > 0, largest, 1.0)
    norm = np.sqrt((rows * rows).sum(axis=1, keepdims=True))
    rows /= np.where(norm > 0, norm, 1.0)
    return rows


def ranks(
    queries: np.ndarray,
    candidates: np.ndarray,
    query_ids: np.ndarray,
    candidate_ids: np.ndarray,
    block_scores: int = _BLOCK_SCORES,
) -> np.ndarray:
    """Ranks of each query's best relevant candidates; ties never favour them.

    The rank of the i-th best is i + the number of irrelevant candidates whose cosine is at least its
    own, less TIE. Equal embeddings for everything thus give the last ranks.

    Args:
        queries: (Q, D).
        candidates: (C, D).
        query_ids: (Q,) integers.
        candidate_ids: (C,) integers; candidate j answers query i where candidate_ids[j] == query_ids[i].
        block_scores: most similarities held at a time (one query's at least); the result does not depend on it.

    Returns:
        (Q, DEPTH) int64, counted from 1; 0 where the query has no further relevant candidate.

    Raises:
        DataError: an embedding is not finite.
        ValueError: shapes do not fit together.
    """
    queries, candidates = unit_rows(queries, "query"), unit_rows(candidates, "candidate")
    query_ids, candidate_ids = np.asarray(query_ids), np.asarray(candidate_ids)
    if queries.shape[1] != candidates.shape[1]:
        raise ValueError(f"queries have {queries.shape[1]} dimensions and candidates {candidates.shape[1]}")
    if query_ids.shape != (len(queries),) or candidate_ids.shape != (len(candidates),):
        raise ValueError(
            f"{len(queries)} queries and {len(candidates)} candidates have ids of shape "
            f"{query_ids.shape} and {candidate_ids.shape}"
        )
    result = np.zeros((len(queries), DEPTH), dtype=np.int64)
    answered = np.flatnonzero(np.isin(query_ids, candidate_ids))
    step = max(1, block_scores // max(1, len(candidates)))
    for start in range(0, len(answered), step):
        block = answered[start : start + step]
        scores = queries[block] @ candidates.T
        relevant = query_ids[block, None] == candidate_ids[None, :]
        right = np.where(relevant, scores, -np.inf)
        scores[relevant] = -np.inf
        depth = min(DEPTH, int(relevant.sum(axis=1).max()))
        best = -np.sort(np.partition(-right, depth - 1, axis=1)[:, :depth], axis=1)
        for i in range(depth):
            above = (scores >= best[:, i, None] - TIE).sum(axis=1)
            result[block, i] = np.where(np.isfinite(best[:, i]), i + 1 + above, 0)
    return result


def answers(query_ids: np.ndarray, candidate_ids: np.ndarray) -> np.ndarray:
    """(Q,) int64: how many of the (C,) candidates answer each query."""
    ids, size = np.unique(np.asarray(candidate_ids), return_counts=True)
    place = np.minimum(np.searchsorted(ids, query_ids), len(ids) - 1)
    return np.where(ids[place] == query_ids, size[place], 0)


def average_precision(found: np.ndarray, relevant: np.ndarray, depth: int = DEPTH) -> np.ndarray:
    """AP@k: mean of the precisions at the ranks of relevant candidates up to k, out of min(relevant, k).

    Args:
        found: (Q, DEPTH): what `ranks` returns.
        relevant: (Q,) integers: candidates that answer each query, at least 1.
        depth: k, at most DEPTH.

    Returns:
        (Q,) float64.
    """
    precision = np.arange(1, DEPTH + 1) / np.maximum(found, 1)
    return precision.sum(axis=1, where=(found > 0) & (found <= depth)) / np.minimum(relevant, depth)


def first_rank_survival(candidates: int, relevant: int) -> np.ndarray:
    """Chance that a random order has none of the relevant candidates among its first k.

    Args:
        candidates: how many there are (n).
        relevant: how many of them are relevant (r), 1 to n.

    Returns:
        (n - r + 2,) float64: C(n - r, k) / C(n, k) for k = 0 .. n - r + 1. The first is 1, the last 0.
    """
    k = np.arange(candidates - relevant + 1)
    return np.concatenate([[1.0], np.cumprod((candidates - relevant - k) / (candidates - k))])


def chance(candidates: int, relevant: np.ndarray, ks: Sequence[int] = KS) -> dict[str, float]:
    """What ordering the candidates at random reaches: exact expectations, nothing is drawn.

    Args:
        candidates: number of candidates (n).
        relevant: (Q,) integers: how many candidates answer each query, 1 to n each; not empty.
        ks: the k of each R@k.

    Returns:
        `chance_R@k` for each k, `chance_MRR` and `chance_mAP@10`, means over the queries, and
        `chance_median_rank`, the median of the ranks of all queries together.
    """
    place = np.arange(1, min(DEPTH, candidates) + 1)
    reached = np.zeros(candidates + 1)  # [k]: expected share of queries answered among the first k
    mrr = mean_precision = 0.0
    # Queries differ only in r, and few values of r occur.
    for r, count in zip(*np.unique(np.asarray(relevant), return_counts=True), strict=True):
        survival = first_rank_survival(candidates, int(r))
        share = count / len(relevant)
        # At a relevant place every earlier one is relevant with chance (r - 1) / (n - 1).
        precision = (1 + (place - 1) * (r - 1) / max(1, candidates - 1)) / place
        mean_precision += share * precision.sum() * r / candidates / min(r, DEPTH)
        mrr += share * (-np.diff(survival) @ (1 / np.arange(1, len(survival))))
        reached += share
        reached[: len(survival)] -= share * survival
    result = {f"chance_R@{k}": min(1.0, max(0.0, float(reached[min(k, candidates)]))) for k in ks}
    # Half way between the lower and the upper median, as np.median does; the margin is for rounding.
    median = (np.argmax(reached > 0.5 - 1e-9) + np.argmax(reached > 0.5 + 1e-9)) / 2
    result |= {"chance_MRR": float(mrr), f"chance_mAP@{DEPTH}": float(mean_precision)}
    return result | {"chance_median_rank": float(median)}


def retrieval(
    queries: np.ndarray,
    candidates: np.ndarray,
    query_ids: np.ndarray,
    candidate_ids: np.ndarray,
    ks: Sequence[int] = KS,
) -> dict[str, Any]:
    """Scores of finding each query's answers among the candidates, next to chance.

    Args:
        queries: (Q, D).
        candidates: (C, D).
        query_ids: (Q,) integers.
        candidate_ids: (C,) integers; candidate j answers query i where candidate_ids[j] == query_ids[i].
            Several candidates may answer a query.
        ks: the k of each R@k.

    Returns:
        What `score_ranks` returns.

    Raises:
        DataError: an embedding is not finite.
        ValueError: shapes do not fit together, or a k is less than 1.
    """
    return score_ranks(ranks(queries, candidates, query_ids, candidate_ids), query_ids, candidate_ids, ks)


def score_ranks(
    found: np.ndarray, query_ids: np.ndarray, candidate_ids: np.ndarray, ks: Sequence[int] = KS
) -> dict[str, Any]:
    """The scores of rankings.

    Args:
        found: (Q, DEPTH): what `ranks` returns.
        query_ids: (Q,) integers.
        candidate_ids: (C,) integers.
        ks: the k of each R@k.

    Returns:
        JSON values. Of the rank of each query's best answer: `R@k`, share of queries with it among the first k,
        `MRR`, mean of 1/rank, and `median_rank`; of all answers, `mAP@10`: mean of `average_precision`. For all but
        the median, `<name>_interval`: [low, high] of 95 %, bootstrap over queries. For each score, `chance_<name>`:
        see `chance`. All are None when no query has an answer. Counts: `queries` (scored), `candidates`, and
        `queries_without_answer` (left out of all scores).

    Raises:
        ValueError: a k is less than 1.
    """
    if any(k < 1 for k in ks):
        raise ValueError(f"every k of R@k must be at least 1; got {list(ks)}")
    scored = found[:, 0] > 0
    counts = {
        "queries": int(scored.sum()),
        "candidates": len(candidate_ids),
        "queries_without_answer": int((~scored).sum()),
    }
    means = [*(f"R@{k}" for k in ks), "MRR", f"mAP@{DEPTH}"]
    if not scored.any():
        names = [*means, "median_rank"]
        return (
            dict.fromkeys([*names, *(f"{name}_interval" for name in means), *(f"chance_{n}" for n in names)]) | counts
        )
    relevant = answers(query_ids, candidate_ids)[scored]
    found = found[scored]
    first = found[:, 0]
    values = np.stack([*(first <= k for k in ks), 1 / first, average_precision(found, relevant)], axis=1)
    scores: dict[str, Any] = dict(zip(means, values.mean(axis=0).tolist(), strict=True))
    scores["median_rank"] = float(np.median(first))
    intervals = {f"{name}_interval": ends for name, ends in zip(means, mean_intervals(values), strict=True)}
    return scores | intervals | chance(len(candidate_ids), relevant, ks) | counts


def directions(
    embeddings: Mapping[str, np.ndarray], valid: Mapping[str, np.ndarray], text_ids: np.ndarray
) -> Iterator[tuple[str, tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]]]:
    """What is asked of a set of rows: every modality's queries for every other modality.

    Many clips may have the same text. Texts are therefore taken once for each id: from text, all clips with the id
    are right answers; from a clip, its text is the only one. Between two modalities of sound a clip's own is right.

    Args:
        embeddings: (n, D) by modality; of several texts with the same id, the first valid one counts.
        valid: (n,) bool by modality; a row counts where it is valid in both, others may hold anything.
        text_ids: (n,) int64, equal where texts state the same.

    Yields:
        f"{query}->{answer}" and the arguments of `retrieval`, for each direction that has a row.

    Raises:
        ValueError: numbers of rows differ.
    """
    text_ids = np.asarray(text_ids)
    rows = {len(text_ids), *map(len, embeddings.values()), *map(len, valid.values())}
    if len(rows) > 1:
        raise ValueError(f"rows differ: {sorted(rows)}")
    for query, answer in permutations(embeddings, 2):
        both = np.flatnonzero(np.asarray(valid[query]) & np.asarray(valid[answer]))
        if not len(both):
            continue
        ids = text_ids if "text" in (query, answer) else np.arange(len(text_ids))
        once = both[np.unique(ids[both], return_index=True)[1]]
        asked, offered = (once if name == "text" else both for name in (query, answer))
        arrays = embeddings[query][asked], embeddings[answer][offered], ids[asked], ids[offered]
        yield f"{query}->{answer}", arrays
