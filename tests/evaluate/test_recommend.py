"""Metrics of rankings against scikit-learn and the enumeration of all orders; interactions against plain loops."""

import json
from collections import Counter
from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import ndcg_score, roc_auc_score

from muser_dist.errors import DataError
from muser_dist.evaluate.classification import TIE
from muser_dist.evaluate.recommend import (
    CANDIDATES,
    LARGEST,
    Interactions,
    from_embeddings,
    gap_closed,
    measure,
    metric_names,
    on_grid,
    summarise,
    user_metrics,
)
from tests.evaluate.recommending import drawn, interactions, log_of

KS = (1, 3, 10)


@st.composite
def rankings(draw: st.DrawFn, most: int) -> tuple[np.ndarray, np.ndarray]:
    """Few different scores, so that ties are common, and several right answers."""
    n = draw(st.integers(2, most))
    scores = draw(st.lists(st.integers(-2, 2), min_size=n, max_size=n))
    right = draw(st.lists(st.booleans(), min_size=n, max_size=n).filter(lambda r: 0 < sum(r) < len(r)))
    return np.array(scores), np.array(right)


def of_order(right: list[bool], ks: tuple[int, ...]) -> list[float]:
    """The definitions, of one order without ties."""
    ranks = [rank for rank, is_right in enumerate(right, 1) if is_right]
    ideal = [sum(1 / np.log2(r + 1) for r in range(1, min(k, len(ranks)) + 1)) for k in ks]
    gains = [sum(1 / np.log2(r + 1) for r in ranks if r <= k) for k in ks]
    wins = sum(not other for place, is_right in enumerate(right) if is_right for other in right[place:])
    return [
        *(float(ranks[0] <= k) for k in ks),
        *(gain / most for gain, most in zip(gains, ideal, strict=True)),
        1 / ranks[0],
        wins / (len(ranks) * (len(right) - len(ranks))),
    ]


@given(rankings(6))
@settings(max_examples=60)
def test_figures_are_the_mean_over_all_orders_of_ties(case):
    scores, right = case
    orders = [
        of_order(right[list(order)].tolist(), KS)
        for order in permutations(range(len(scores)))
        if (np.diff(scores[list(order)]) <= 0).all()
    ]
    np.testing.assert_allclose(user_metrics(scores, right, KS), np.mean(orders, axis=0), atol=1e-12)


@given(rankings(40), st.integers(1, 45))
@settings(max_examples=150)
def test_figures_equal_those_of_scikit_learn(case, k):
    scores, right = case
    found = dict(zip(metric_names([k]), user_metrics(scores, right, [k]), strict=True))
    assert found[f"NDCG@{k}"] == pytest.approx(ndcg_score(right[None].astype(int), scores[None], k=k))
    assert found["AUC"] == pytest.approx(roc_auc_score(right, scores))


def test_scores_closer_than_a_tie_are_equal():
    right = np.array([True, *[False] * 9])
    noise = 1e-8 * np.arange(10)[::-1]  # the right answer is above by rounding errors
    found = dict(zip(metric_names(KS), user_metrics(on_grid(0.25 + noise, "x"), right, KS), strict=True))
    assert (found["HR@1"], found["HR@3"], found["AUC"]) == pytest.approx((0.1, 0.3, 0.5))
    assert found["MRR"] == pytest.approx((1 / np.arange(1, 11)).mean())
    apart = user_metrics(on_grid(0.25 + 10 * TIE * np.arange(10)[::-1], "x"), right, KS)
    np.testing.assert_allclose(apart, 1)
    for wrong in (np.nan, np.inf, 2 * LARGEST):
        with pytest.raises(DataError, match="mine: a score is not finite, or larger"):
            on_grid(np.array([0, wrong]), "mine")


@pytest.mark.parametrize("seed", range(4))
def test_interactions_by_plain_loops(seed):
    events, names, cold = drawn(seed)
    names = names[3:]  # the first, frequent ones are not in the catalogue
    data = Interactions.of(*log_of(events), names, cold)
    history: Counter = Counter()
    last, seen, targets = {}, set(), set()
    for user, item, _, signal, validation in sorted(events, key=lambda event: event[2]):
        if item not in names:
            continue
        if not validation:
            seen.add((user, item))
            if signal != "skip":
                history[user, item] += 1
                last[user] = item
        elif signal != "skip":
            targets.add((user, item))
    pairs = {(u, i): (data.users.index(u), names.index(i)) for u in data.users for i in names}
    for (user, item), place in pairs.items():
        assert data.history[place] == history[user, item]
        assert bool(data.seen[place]) == ((user, item) in seen)
        assert bool(data.targets[place]) == ((user, item) in targets - seen)
    assert [None if i < 0 else names[i] for i in data.last] == [last.get(user) for user in data.users]
    assert set(np.array(names)[data.cold]) == cold & set(names)
    assert data.counts["events"] == 900 and data.counts["targets"] == len(targets - seen)
    assert data.counts["targets_seen_before"] == len(targets & seen)
    assert (
        sum(data.counts[f"{name}"] for name in ("events_with_unknown_items", "training_events", "validation_events"))
        == 900
    )
    for which in CANDIDATES:
        inside = {name for name in names if which == "all" or (name in cold) == (which == "cold")}
        asked = []
        for user in data.users:
            right = {i for u, i in targets - seen if u == user} & inside
            others = inside - {i for u, i in seen if u == user} - right
            if user in last and right and others:
                asked.append(user)
        assert [data.users[i] for i in data.asked(which)] == asked


@pytest.mark.parametrize("seed", range(3))
def test_measure_by_plain_loops(seed):
    """Ties and all: with every user's scores, by the definitions."""
    data = interactions(seed)
    scores = np.random.default_rng(seed).integers(0, 6, (len(data.users), len(data.items))) / 5
    measured = measure(data, lambda users: scores[users], KS)
    seen, targets = data.seen.toarray(), data.targets.toarray()
    for which in CANDIDATES:
        chosen = data.candidates(which)
        assert measured[which].users.tolist() == data.asked(which).tolist() != []
        for user, metrics, first in zip(*vars(measured[which]).values(), strict=True):
            places = [i for i in range(len(data.items)) if chosen[i] and not seen[user, i]]
            right = targets[user, places]
            named = dict(zip(metric_names(KS), metrics, strict=True))
            assert named["AUC"] == pytest.approx(roc_auc_score(right, scores[user, places]))
            for k in KS:
                expected = ndcg_score(right[None].astype(int), scores[user, places][None], k=k)
                assert named[f"NDCG@{k}"] == pytest.approx(expected)
            offered = [i for i in first if i >= 0]
            assert len(offered) == min(max(KS), len(places)) == len(set(offered)) and set(offered) <= set(places)
            values = scores[user, offered]
            assert (np.diff(values) <= 0).all()
            assert sorted(values) == sorted(scores[user, places])[-len(values) :]


def test_blocks_of_users_do_not_matter(monkeypatch):
    data = interactions(5)
    scorer = from_embeddings(np.random.default_rng(0).normal(size=(40, 6)), data.queries("history"))
    whole = measure(data, scorer, KS)
    monkeypatch.setattr("muser_dist.evaluate.recommend._BLOCK_SCORES", 120)
    for which, measured in measure(data, scorer, KS).items():
        for name in ("users", "metrics", "first"):
            np.testing.assert_allclose(getattr(measured, name), getattr(whole[which], name))


def test_a_constant_score_is_at_chance_and_recommends_the_same_to_everybody():
    data = interactions(1, users=60, events=2500)
    rng = np.random.default_rng(2)
    constant = measure(data, lambda users: np.full((len(users), len(data.items)), 0.3), KS)
    draws = [measure(data, lambda users: rng.random((len(users), len(data.items))), KS) for _ in range(60)]
    for which in CANDIDATES:
        expected = np.mean([draw[which].metrics.mean(axis=0) for draw in draws], axis=0)
        np.testing.assert_allclose(constant[which].metrics.mean(axis=0), expected, atol=0.02)
        assert constant[which].metrics[:, -1] == pytest.approx(0.5)
    cold = constant["cold"].first[:, :3]
    assert (cold == cold[0]).all()  # nobody has met a cold item before
    assert cold[0].tolist() != np.flatnonzero(data.cold)[:3].tolist()  # names may go with popularity
    assert summarise(data, constant["cold"], "cold", KS)["coverage@3"] == 3 / data.cold.sum()


def test_embeddings_of_a_history_and_of_the_last_item():
    events = [
        ("ann", "a", 5, "play", False),
        ("ann", "b", 9, "play", False),
        ("ann", "b", 9, "like", False),
        ("ann", "c", 10, "skip", False),
        ("ann", "d", 20, "play", True),
        ("bob", "d", 7, "play", True),
    ]
    data = Interactions.of(*log_of(events), ["a", "b", "c", "d", "e"], {"d"})
    embeddings = np.array([[2.0, 0], [0, 0.1], [1, 1], [3, 4], [0, 0]])
    ann = np.array([data.users.index("ann")])
    half = 0.5**0.5  # a and b count once each, whatever their lengths and numbers of plays
    by_history = from_embeddings(embeddings, data.queries("history"))
    np.testing.assert_allclose(by_history(ann)[0], [half, half, 1, 1.4 * half, 0])
    by_last = from_embeddings(embeddings, data.queries("last item"))
    np.testing.assert_allclose(by_last(ann)[0], [0, 1, half, 0.8, 0])
    assert not by_last(np.array([data.users.index("bob")])).any()
    measured = measure(data, by_history, (1,))
    assert [data.users[i] for i in measured["all"].users] == ["ann"]  # of d and e, d is hers: c was met before
    assert measured["all"].metrics.tolist() == [[1, 1, 1, 1]]
    assert [data.items[i] for i in measured["all"].first[0]] == ["d"]
    assert len(measured["cold"].users) == 0  # with one candidate there is nothing to rank


def test_figures_of_lists():
    """By hand: a is taken by both users, b by one; c and d are new to them."""
    events = [
        *(("ann", item, 0, "play", False) for item in "ab"),
        ("bob", "a", 0, "play", False),
        ("eve", "d", 0, "play", False),
        ("eve", "a", 1, "play", True),
        ("ann", "c", 1, "play", True),
        ("bob", "c", 1, "play", True),
    ]
    data = Interactions.of(*log_of(events), list("abcd"), {"c"})
    popularity = {"a": 2 / 3, "b": 1 / 3, "c": 0, "d": 1 / 3}
    measured = measure(data, lambda users: np.tile([0.9, 0.8, 0.1, 0.5], (len(users), 1)), (1,))
    result = summarise(data, measured["all"], "all", (1,))
    firsts = {"ann": "d", "bob": "b", "eve": "a"}
    usual = {"ann": (2 / 3 + 1 / 3) / 2, "bob": 2 / 3, "eve": 1 / 3}
    lift = np.mean([popularity[i] for i in firsts.values()]) / np.mean(list(usual.values())) - 1
    assert result["popularity_lift@1"] == pytest.approx(lift)
    assert result["coverage@1"] == 3 / 4 and result["users"] == 3 and result["HR@1"] == pytest.approx(1 / 3)
    low, high = result["popularity_lift@1_interval"]
    assert low <= lift <= high
    cold = summarise(data, measured["cold"], "cold", (1,))
    assert cold["users"] == 0 and cold["NDCG@1"] is cold["NDCG@1_interval"] is cold["popularity_lift@1"] is None
    json.dumps([result, cold], allow_nan=False)
    assert result.keys() == cold.keys()


def test_the_way_to_the_oracle():
    rng = np.random.default_rng(0)
    base = rng.random(500) * 0.3
    oracle = base + 0.5 + 0.1 * rng.normal(size=500)
    result = gap_closed(0.6 * base + 0.4 * oracle, base, oracle)
    assert result["value"] == pytest.approx(0.4)
    assert result["interval"] == pytest.approx([0.4, 0.4])  # the users are drawn for all three at once
    noisy = gap_closed(0.6 * base + 0.4 * oracle + 0.2 * rng.normal(size=500), base, oracle)
    low, high = noisy["interval"]
    assert low < noisy["value"] < high and 0.01 < high - low < 0.2
    assert gap_closed(base, oracle, base) == {"value": None, "interval": None}


def test_errors_name_the_trouble():
    log, validation = log_of([("ann", "a", 0, "play", False), ("ann", "b", 1, "play", True)])
    with pytest.raises(DataError, match="1 training events are with cold items, the first with 'a'"):
        Interactions.of(log, validation, ["a", "b"], {"a"})
    with pytest.raises(DataError, match="none of 2 events is with one of the 1 items"):
        Interactions.of(log, validation, ["z"], ())
    with pytest.raises(DataError, match="no column 'signal'; it has user, item"):
        Interactions.of(log.drop_columns("signal"), validation, ["a", "b"], ())
    without = log_of([(None, "a", 0, "play", False), ("ann", "b", 1, "play", True)])
    with pytest.raises(DataError, match="1 events of the log have no user"):
        Interactions.of(*without, ["a", "b"], ())
    with pytest.raises(ValueError, match="the log has 2 events and validation the shape"):
        Interactions.of(log, validation[:1], ["a", "b"], ())
    with pytest.raises(ValueError, match="twice"):
        Interactions.of(log, validation, ["a", "a"], ())
    with pytest.raises(ValueError, match="every k"):
        measure(Interactions.of(log, validation, ["a", "b"], ()), lambda users: np.zeros((1, 2)), (0,))


def test_without_times_the_order_of_the_rows_is_that_of_time():
    events = [("ann", "b", None, "play", False), ("ann", "a", None, "play", False), ("ann", "c", None, "play", True)]
    data = Interactions.of(*log_of(events), ["a", "b", "c", "d"], ())
    assert data.items[data.last[0]] == "a"
