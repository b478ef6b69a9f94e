"""Retrieval by cosine similarity, scored next to the exact expectation of a random order.

Which candidates answer a query is given by ids: a candidate is relevant where its id equals
the query's. That takes Q + C numbers where a mask would take Q x C, and says all that is needed
here: one text may describe many clips.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from muser_dist.errors import DataError
from muser_dist.evaluate.classification import TIE

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
    """Rank of each query's best relevant candidate; ties never favour it.

    The rank is 1 + the number of irrelevant candidates whose cosine is at least the best
    relevant one's, less TIE. Equal embeddings for everything thus give the last rank.

    Args:
        queries: (Q, D).
        candidates: (C, D).
        query_ids: (Q,) integers.
        candidate_ids: (C,) integers; candidate j answers query i where candidate_ids[j] == query_ids[i].
        block_scores: most similarities held at a time (one query's at least); the result does not depend on it.

    Returns:
        (Q,) int64, counted from 1; 0 where the query has no relevant candidate.

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
    result = np.zeros(len(queries), dtype=np.int64)
    answered = np.flatnonzero(np.isin(query_ids, candidate_ids))
    step = max(1, block_scores // max(1, len(candidates)))
    for start in range(0, len(answered), step):
        block = answered[start : start + step]
        scores = queries[block] @ candidates.T
        relevant = query_ids[block, None] == candidate_ids[None, :]
        best = scores.max(axis=1, where=relevant, initial=-np.inf, keepdims=True)
        result[block] = 1 + ((scores >= best - TIE) & ~relevant).sum(axis=1)
    return result


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


def chance(candidates: int, relevant: np.ndarray, ks: Sequence[int] = (1, 5, 10)) -> dict[str, float]:
    """What ordering the candidates at random reaches: exact expectations, nothing is drawn.

    Args:
        candidates: number of candidates (n).
        relevant: (Q,) integers: how many candidates answer each query, 1 to n each; not empty.
        ks: the k of each R@k.

    Returns:
        `chance_R@k` for each k and `chance_MRR`, means over the queries, and `chance_median_rank`,
        the median of the ranks of all queries together.
    """
    reached = np.zeros(candidates + 1)  # [k]: expected share of queries answered among the first k
    mrr = 0.0
    # Queries differ only in r, and few values of r occur.
    for r, count in zip(*np.unique(np.asarray(relevant), return_counts=True), strict=True):
        survival = first_rank_survival(candidates, int(r))
        share = count / len(relevant)
        mrr += share * (-np.diff(survival) @ (1 / np.arange(1, len(survival))))
        reached += share
        reached[: len(survival)] -= share * survival
    result = {f"chance_R@{k}": min(1.0, max(0.0, float(reached[min(k, candidates)]))) for k in ks}
    # Half way between the lower and the upper median, as np.median does; the margin is for rounding.
    median = (np.argmax(reached > 0.5 - 1e-9) + np.argmax(reached > 0.5 + 1e-9)) / 2
    return result | {"chance_MRR": float(mrr), "chance_median_rank": float(median)}


def retrieval(
    queries: np.ndarray,
    candidates: np.ndarray,
    query_ids: np.ndarray,
    candidate_ids: np.ndarray,
    ks: Sequence[int] = (1, 5, 10),
) -> dict[str, Any]:
    """Scores of finding each query's answers among the candidates, next to chance.

    Args:
        queries: (Q, D).
        candidates: (C, D).
        query_ids: (Q,) integers.
        candidate_ids: (C,) integers; candidate j answers query i where candidate_ids[j] == query_ids[i].
            Several candidates may answer a query: its rank is that of the best of them (see `ranks`).
        ks: the k of each R@k.

    Returns:
        JSON values. `R@k`: share of queries with a relevant candidate among the first k. `MRR`: mean of
        1/rank. `median_rank`. `chance_R@k`, `chance_MRR`, `chance_median_rank`: see `chance`. All are None
        when no query has an answer. Counts: `queries` (scored), `candidates`, and `queries_without_answer`
        (left out of all scores).

    Raises:
        DataError: an embedding is not finite.
        ValueError: shapes do not fit together, or a k is less than 1.
    """
    if any(k < 1 for k in ks):
        raise ValueError(f"every k of R@k must be at least 1; got {list(ks)}")
    rank = ranks(queries, candidates, query_ids, candidate_ids)
    scored = rank > 0
    counts = {
        "queries": int(scored.sum()),
        "candidates": len(candidates),
        "queries_without_answer": int((~scored).sum()),
    }
    if not scored.any():
        names = [*(f"R@{k}" for k in ks), "MRR", "median_rank"]
        return dict.fromkeys([*names, *(f"chance_{name}" for name in names)]) | counts
    ids, size = np.unique(np.asarray(candidate_ids), return_counts=True)
    relevant = size[np.searchsorted(ids, np.asarray(query_ids)[scored])]
    rank = rank[scored]
    scores = {f"R@{k}": float((rank <= k).mean()) for k in ks}
    scores |= {"MRR": float((1 / rank).mean()), "median_rank": float(np.median(rank))}
    return scores | chance(len(candidates), relevant, ks) | counts


def text_audio_retrieval(
    audio: np.ndarray,
    text: np.ndarray,
    text_ids: np.ndarray,
    valid: np.ndarray,
    *,
    audio_name: str = "audio",
    text_name: str = "text",
    ks: Sequence[int] = (1, 5, 10),
) -> dict[str, dict[str, Any]]:
    """Both directions of retrieval between clips and the unique texts of a validation set.

    Many clips may have the same text. Texts are therefore taken once for each id: from text, all
    clips with the id are right answers; from a clip, its text is the only one.

    Args:
        audio: (n, D) embeddings of the clips.
        text: (n, D) embeddings of their texts; of several rows with the same id, the first valid one counts.
        text_ids: (n,) int64, equal where texts state the same.
        valid: (n,) bool; other rows are left out, and their embeddings may hold anything.
        audio_name: name of the clips' modality in the result's keys, such as "spectrogram".
        text_name: name of the other one.
        ks: the k of each R@k.

    Returns:
        What `retrieval` returns, under f"{text_name}->{audio_name}" and f"{audio_name}->{text_name}".

    Raises:
        DataError: a valid row's embedding is not finite.
        ValueError: shapes do not fit together.
    """
    audio, text, text_ids, valid = (np.asarray(array) for array in (audio, text, text_ids, valid))
    if not len(audio) == len(text) == len(text_ids) == len(valid):
        raise ValueError(
            f"rows differ: {len(audio)} {audio_name}, {len(text)} {text_name}, "
            f"{len(text_ids)} text ids, {len(valid)} valid"
        )
    keep = valid.astype(bool)
    clips, texts, clip_ids = audio[keep], text[keep], text_ids[keep]
    unique_ids, first = np.unique(clip_ids, return_index=True)
    texts = texts[first]
    return {
        f"{text_name}->{audio_name}": retrieval(texts, clips, unique_ids, clip_ids, ks),
        f"{audio_name}->{text_name}": retrieval(clips, texts, clip_ids, unique_ids, ks),
    }
