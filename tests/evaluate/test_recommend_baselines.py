"""Baselines against dense arithmetic, and what they know of cold items: nothing."""

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from muser_dist.data.corpora.listeners import Population, simulate
from muser_dist.errors import DataError
from muser_dist.evaluate import recommend_baselines as baselines
from muser_dist.evaluate.recommend import Interactions, measure
from tests.data.corpora.test_listeners import made_clips
from tests.evaluate.recommending import interactions, log_of


def test_popularity_counts_users():
    data = interactions(0)
    takers = (data.history.toarray() > 0).sum(axis=0)
    scores = baselines.popularity(data)(np.array([3, 1]))
    np.testing.assert_allclose(np.expm1(scores), [takers, takers], atol=1e-9)
    assert not scores[:, data.cold].any()


@pytest.mark.parametrize("query", ["history", "last item"])
def test_co_occurrence_is_the_cosine_of_columns(query):
    data = interactions(1)
    taken = (data.history.toarray() > 0).astype(float)
    asked = data.queries(query).toarray()
    users = np.arange(len(data.users))
    scores = baselines.co_occurrence(data, data.queries(query))(users)
    for user in users:
        for item in range(len(data.items)):
            cosines = [
                taken[:, item] @ taken[:, other] / np.sqrt(taken[:, item].sum() * taken[:, other].sum())
                if taken[:, item].any()
                else 0
                for other in np.flatnonzero(asked[user])
            ]
            assert scores[user, item] == pytest.approx(np.mean(cosines) if cosines else 0)


def test_matrix_factorisation_finds_the_blocks_of_a_matrix():
    """Users take items of their own kind; it ranks those of it that they have not met above others."""
    rng = np.random.default_rng(0)
    users, items = 100, 60
    pairs = [(u, i) for u in range(users) for i in range(items) if u % 2 == i % 2 and rng.random() < 0.4]
    log = log_of([(f"u{u}", f"i{i}", 0, "play", False) for u, i in pairs])
    data = Interactions.of(*log, [*(f"i{i}" for i in range(items)), "new"], {"new"})
    scores = baselines.matrix_factorisation(data)(np.arange(users))
    assert not scores[:, items].any()  # of the cold item it knows nothing
    ordered = []
    for name, row, met in zip(data.users, scores[:, :items], data.seen.toarray()[:, :items], strict=True):
        own = np.arange(items) % 2 == int(name[1:]) % 2
        ordered.append(roc_auc_score(own[~met], row[~met]))
    assert np.mean(ordered) > 0.85
    np.testing.assert_array_equal(scores, baselines.matrix_factorisation(data)(np.arange(users)))


def test_what_knows_nothing_of_cold_items_is_at_chance_there():
    data = interactions(2, users=40, events=2000)
    constant = measure(data, lambda users: np.zeros((len(users), len(data.items))), (3,))["cold"]
    assert len(constant.users) > 20
    for scorer in (
        baselines.popularity(data),
        baselines.co_occurrence(data, data.queries("history")),
        baselines.matrix_factorisation(data),
    ):
        np.testing.assert_allclose(measure(data, scorer, (3,))["cold"].metrics, constant.metrics)


def test_a_random_order_is_another_for_each_user_and_the_same_again():
    data = interactions(3)
    scores = baselines.random(data)(np.array([4, 7]))
    assert (scores[0] != scores[1]).all()
    np.testing.assert_array_equal(baselines.random(data)(np.array([7])), scores[1:])
    assert (baselines.random(data, seed=1)(np.array([4, 7])) != scores).all()


def test_the_oracle_is_far_above_what_hears_no_music():
    population = Population(listeners=80, median_listens=60)
    log, truth = simulate(made_clips(150), population)
    late = log.column("time").to_numpy() >= population.test_start
    cold = {item for item, is_cold in zip(truth.items, truth.cold, strict=True) if is_cold}
    data = Interactions.of(log, late, truth.items[::-1], cold)  # the catalogue in another order than the truth
    knows = measure(data, baselines.oracle(data, truth), (10,))
    chance = measure(data, baselines.random(data), (10,))
    for which, measured in knows.items():
        assert measured.metrics[:, -1].mean() > chance[which].metrics[:, -1].mean() + 0.15
    other = simulate(made_clips(150), Population(listeners=10))[1]
    with pytest.raises(DataError, match=r"the truth lacks 80 of 80 users, the first is 'simulated-\d\d'"):
        baselines.oracle(data, other)
