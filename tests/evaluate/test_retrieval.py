"""Ranks against exact rational arithmetic, chance against enumeration."""

import json
from fractions import Fraction
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from muser_dist.errors import DataError
from muser_dist.evaluate.retrieval import chance, directions, first_rank_survival, ranks, retrieval

SCORES = ("R@1", "R@5", "R@10", "MRR", "mAP@10")


def exact_order(query: np.ndarray, candidates: np.ndarray, relevant: np.ndarray) -> list[bool]:
    """By definition, without floating point: sign(q.c) (q.c)^2 / c.c orders as the cosine does.

    Returns whether the candidate in each place is relevant; of equal ones the irrelevant come first.
    """
    scores = []
    for candidate in candidates:
        dot, norm = int(query @ candidate), int(candidate @ candidate)
        scores.append(Fraction(dot * abs(dot), norm) if norm else Fraction(0))
    places = sorted(zip(scores, relevant.tolist(), strict=True), key=lambda place: (-place[0], place[1]))
    return [right for _, right in places]


def both_ways(audio: np.ndarray, text: np.ndarray, text_ids: np.ndarray, valid: np.ndarray) -> dict:
    asked = directions({"text": text, "audio": audio}, {"text": valid, "audio": valid}, text_ids)
    return {name: retrieval(*arrays) for name, arrays in asked}


@st.composite
def cases(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Small integer embeddings, so that ties and zero rows are common, with few ids."""
    q, c, d = draw(st.integers(0, 6)), draw(st.integers(0, 16)), draw(st.integers(1, 3))
    entries, ids = st.integers(-2, 2), st.integers(-1, 3)
    arrays = [draw(hnp.arrays(np.int64, (n, d), elements=entries)) for n in (q, c)]
    return *arrays, *(draw(hnp.arrays(np.int64, n, elements=ids)) for n in (q, c))


@settings(max_examples=200)
@given(cases(), st.integers(1, 30))
def test_ranks_and_scores_equal_the_definition(case, block_scores):
    queries, candidates, query_ids, candidate_ids = case
    orders = [exact_order(q, candidates, candidate_ids == i) for q, i in zip(queries, query_ids, strict=True)]
    places = [[place for place, right in enumerate(order, 1) if right] for order in orders]
    expected = np.array([([*found, *[0] * 10])[:10] for found in places], np.int64).reshape(-1, 10)
    np.testing.assert_array_equal(ranks(*case, block_scores=block_scores), expected)

    result = retrieval(queries.astype(np.float32), candidates.astype(np.float32), query_ids, candidate_ids)
    json.dumps(result, allow_nan=False)
    scored = expected[expected[:, 0] > 0, 0]
    assert result["queries"] == len(scored) and result["candidates"] == len(candidates)
    assert result["queries_without_answer"] == len(queries) - len(scored)
    if len(scored):
        assert result["R@5"] == pytest.approx(np.mean(scored <= 5))
        assert result["MRR"] == pytest.approx(np.mean(1 / scored))
        assert result["median_rank"] == np.median(scored)
        precisions = [
            sum(sum(order[:k]) / k for k in range(1, min(len(order), 10) + 1) if order[k - 1]) / min(sum(order), 10)
            for order in orders
            if any(order)
        ]
        assert result["mAP@10"] == pytest.approx(np.mean(precisions))
    else:
        assert result["R@5"] is result["MRR"] is result["chance_R@5"] is result["chance_median_rank"] is None


@given(st.integers(1, 12), st.lists(st.integers(1, 12), min_size=1, max_size=4), st.integers(1, 10))
@settings(max_examples=100)
def test_chance_equals_the_enumeration_of_all_orders(n, relevant, k):
    """The places of r relevant candidates in a random order are any r of n, all equally likely."""
    relevant = [min(r, n) for r in relevant]
    probability = dict.fromkeys(range(1, n + 1), Fraction(0))  # of the first relevant place, queries pooled
    precision = Fraction(0)
    for r in relevant:
        places = list(combinations(range(1, n + 1), r))
        for place in places:
            share = Fraction(1, len(places) * len(relevant))
            probability[place[0]] += share
            precision += share * sum(Fraction(i, p) for i, p in enumerate(place, 1) if p <= 10) / min(r, 10)
    result = chance(n, np.array(relevant), ks=(k,))
    assert result[f"chance_R@{k}"] == pytest.approx(float(sum(p for rank, p in probability.items() if rank <= k)))
    assert result["chance_MRR"] == pytest.approx(float(sum(p / rank for rank, p in probability.items())))
    assert result["chance_mAP@10"] == pytest.approx(float(precision))
    cumulative = [sum(p for rank, p in probability.items() if rank <= m) for m in range(n + 1)]
    lower = next(m for m, share in enumerate(cumulative) if share >= Fraction(1, 2))
    upper = next(m for m, share in enumerate(cumulative) if share > Fraction(1, 2))
    assert result["chance_median_rank"] == (lower + upper) / 2


def test_chance_holds_for_many_candidates():
    n = 100_000
    one = chance(n, np.array([1]), ks=(1, 10, n, 2 * n))
    assert one["chance_R@1"] == pytest.approx(1 / n, rel=1e-9)
    assert one["chance_R@10"] == pytest.approx(10 / n, rel=1e-9)
    assert one[f"chance_R@{n}"] == one[f"chance_R@{2 * n}"] == 1
    assert one["chance_MRR"] == pytest.approx((1 / np.arange(1, n + 1)).sum() / n, rel=1e-9)
    assert one["chance_median_rank"] == (n + 1) / 2
    survival = first_rank_survival(n, 30_000)
    assert survival[0] == 1 and survival[-1] == 0 and (np.diff(survival) <= 0).all()
    assert chance(5, np.array([5]))["chance_R@1"] == 1


def test_random_embeddings_score_at_chance():
    rng = np.random.default_rng(0)
    candidate_ids, query_ids = rng.integers(0, 12, 60), np.repeat(np.arange(12), 500)
    result = retrieval(
        rng.normal(size=(len(query_ids), 48)), rng.normal(size=(60, 48)), query_ids, candidate_ids, ks=(1, 5, 10)
    )
    for name in SCORES:
        assert result[name] == pytest.approx(result[f"chance_{name}"], abs=0.04)
    assert result["median_rank"] == pytest.approx(result["chance_median_rank"], abs=1)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("noise", [0.0, 1e-7])
def test_collapsed_embeddings_are_at_the_bottom(dtype, noise):
    """However products round, and also where the towers' rounding differs between rows."""
    rng = np.random.default_rng(1)
    n, d = 333, 77
    collapsed = (rng.normal(size=(1, d)) * (1 + noise * rng.normal(size=(n, d)))).astype(dtype)
    ids = rng.integers(0, 40, n)
    for text in (collapsed, np.repeat(rng.normal(size=(1, d)), n, axis=0).astype(dtype), np.zeros((n, d), dtype)):
        for result in both_ways(collapsed, text, ids, np.ones(n, bool)).values():
            assert all(result[name] <= result[f"chance_{name}"] for name in SCORES)
            assert result["R@1"] == result["R@10"] == 0
            assert result["median_rank"] > result["chance_median_rank"]
    texts = len(np.unique(ids))
    assert both_ways(collapsed, collapsed, ids, np.ones(n, bool))["audio->text"]["median_rank"] == texts


def test_size_and_dtype_of_embeddings_do_not_matter():
    rng = np.random.default_rng(2)
    queries, candidates, ids = rng.normal(size=(50, 8)), rng.normal(size=(50, 8)), np.arange(50)
    expected = ranks(queries, candidates, ids, ids)
    for scale in (1e-300, 1e300):
        np.testing.assert_array_equal(ranks(queries * scale, candidates / scale, ids, ids), expected)


def test_texts_are_taken_once_and_rows_that_are_not_valid_do_not_count():
    axes = np.eye(4)
    text_ids = np.array([7, 3, 7, 3, 5])
    text = axes[[0, 1, 3, 3, 2]]  # the later texts of 7 and 3 point elsewhere and must not be taken
    audio = axes[[0, 1, 0, 2, 2]]
    valid = np.array([True, True, True, True, False])
    audio[4] = text[4] = np.nan  # not valid: not looked at
    result = both_ways(audio, text, text_ids, valid)
    assert list(result) == ["text->audio", "audio->text"]
    to_clips, to_texts = result.values()
    assert (to_clips["queries"], to_clips["candidates"]) == (2, 4)
    assert to_clips["R@1"] == 1 and to_clips["chance_R@1"] == 0.5
    assert (to_texts["queries"], to_texts["candidates"]) == (4, 2)
    assert to_texts["R@1"] == 0.75 and to_texts["chance_R@1"] == 0.5  # clip 3 has cosine 0 with both texts
    assert to_texts["median_rank"] == 1 and to_texts["MRR"] == 0.875

    assert both_ways(audio, text, text_ids, np.zeros(5, bool)) == {}
    unanswered = retrieval(text[:2], audio[:2], np.arange(2), np.arange(2) + 7)
    assert unanswered["R@1"] is None and unanswered["queries_without_answer"] == 2


def test_every_direction_between_the_modalities_is_asked():
    """Between two modalities of sound only the clip's own is right, whatever its text."""
    text_ids = np.array([4, 4, 9])
    arrays = {"audio": np.eye(3), "spectrogram": np.eye(3)[[1, 0, 2]], "text": np.eye(3)[[0, 0, 2]]}
    valid = dict.fromkeys(arrays, np.ones(3, bool)) | {"spectrogram": np.array([True, True, False])}
    found = {name: retrieval(*asked) for name, asked in directions(arrays, valid, text_ids)}
    assert sorted(found) == sorted(f"{a}->{b}" for a in arrays for b in arrays if a != b)
    assert found["audio->spectrogram"]["R@1"] == 0 and found["audio->spectrogram"]["queries"] == 2
    assert found["audio->spectrogram"]["median_rank"] == 2
    assert found["text->audio"]["candidates"] == 3 and found["text->audio"]["queries"] == 2


def test_errors_name_the_trouble():
    good, ids = np.ones((3, 2)), np.arange(3)
    bad = good.copy()
    bad[1, 0] = np.inf
    with pytest.raises(DataError, match=r"1 of 3 candidate embeddings are not finite .*row 1"):
        retrieval(good, bad, ids, ids)
    with pytest.raises(ValueError, match="dimensions"):
        retrieval(good, np.ones((3, 4)), ids, ids)
    with pytest.raises(ValueError, match="ids of shape"):
        retrieval(good, good, ids, ids[:2])
    with pytest.raises(ValueError, match="at least 1"):
        retrieval(good, good, ids, ids, ks=(0,))
    with pytest.raises(ValueError, match="rows differ"):
        both_ways(good, good, ids, np.ones(2, bool))
