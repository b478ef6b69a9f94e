"""Intervals against the normal theory where it holds, and paired differences."""

import json

import numpy as np
import pytest

from muser_dist.evaluate.bootstrap import compare, mean_intervals, resamples


def test_resamples_draw_as_many_rows_as_there_are_each_equally_often():
    counts = np.concatenate(list(resamples(50, 2_000)))
    assert counts.shape == (2_000, 50) and (counts.sum(axis=1) == 50).all()
    np.testing.assert_allclose(counts.mean(axis=0), 1, atol=0.12)
    assert counts.var() == pytest.approx(1 - 1 / 50, abs=0.02)  # of a binomial with 50 trials of 1/50
    np.testing.assert_array_equal(counts, np.concatenate(list(resamples(50, 2_000))))


def test_the_interval_of_a_mean_is_that_of_normal_theory():
    values = np.random.default_rng(0).normal(3, 2, 2_000)
    (low, high), constant = mean_intervals(np.stack([values, np.full(2_000, 0.5)], axis=1))
    assert constant == [0.5, 0.5]
    half = 1.96 * values.std() / np.sqrt(2_000)
    assert low == pytest.approx(values.mean() - half, abs=0.15 * half)
    assert high == pytest.approx(values.mean() + half, abs=0.15 * half)
    assert mean_intervals(np.zeros((0, 2))) == [None, None]


def test_pairing_narrows_the_interval_to_what_differs():
    rng = np.random.default_rng(1)
    hard = rng.normal(size=500)
    first, second = hard + 0.1 + 0.1 * rng.normal(size=500), hard
    result = compare(first, second)
    json.dumps(result, allow_nan=False)
    assert result["difference"] == pytest.approx(first.mean() - second.mean())
    low, high = result["interval"]
    assert high - low == pytest.approx(2 * 1.96 * 0.1 / np.sqrt(500), rel=0.2)  # not that of `hard`, ten times as wide
    assert result["share_above"] == 1
    same = compare(second, second)
    assert same["interval"] == [0, 0] and same["share_above"] == 0.5


def test_any_figure_of_rows_may_be_compared():
    truth = np.arange(40) % 2
    first, second = np.stack([truth, truth]), np.stack([truth, np.zeros(40, int)])

    def recall(rows):
        return rows[rows[:, 0] == 1, 1].mean() if (rows[:, 0] == 1).any() else np.nan

    result = compare(first.T, second.T, recall, replicates=50)
    assert (result["first"], result["second"], result["interval"]) == (1, 0, [1, 1])
    with pytest.raises(ValueError, match="there are 40 and 39"):
        compare(truth, truth[1:])
