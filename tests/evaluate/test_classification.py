"""Scores of classifiers against scikit-learn's, with ties, missing labels and tags that nothing says anything about."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, f1_score, roc_auc_score

from muser_dist.errors import DataError
from muser_dist.evaluate.classification import multi_label, single_label


@settings(max_examples=80)
@given(st.integers(2, 40), st.integers(1, 5), st.integers(1, 8), st.integers(0, 2**32 - 1))
def test_areas_equal_scikit_learn(rows, tags, levels, seed):
    """Few levels make ties; few rows make tags that all have, or none."""
    rng = np.random.default_rng(seed)
    scores = rng.integers(0, levels, (rows, tags)) / 4
    labels = rng.random((rows, tags)) < rng.random(tags)
    names = [f"tag {i}" for i in range(tags)]
    result = multi_label(scores, labels, names, replicates=20)
    json.dumps(result, allow_nan=False)
    defined = [i for i in range(tags) if 0 < labels[:, i].sum() < rows]
    assert result["undefined"] == [names[i] for i in range(tags) if i not in defined]
    assert result["tags"] == len(defined)
    if not defined:
        assert result["roc_auc"] is result["pr_auc"] is result["roc_auc_interval"] is None
        return
    roc = [roc_auc_score(labels[:, i], scores[:, i]) for i in defined]
    ap = [average_precision_score(labels[:, i], scores[:, i]) for i in defined]
    assert result["roc_auc"] == pytest.approx(np.mean(roc))
    assert result["pr_auc"] == pytest.approx(np.mean(ap))
    assert result["chance_pr_auc"] == pytest.approx(labels[:, defined].mean())
    for i, r, a in zip(defined, roc, ap, strict=True):
        assert result["by_tag"][names[i]] == pytest.approx([r, a, labels[:, i].sum()])


def test_intervals_hold_what_resampling_by_hand_gives():
    rng = np.random.default_rng(0)
    labels = rng.random((200, 3)) < 0.3
    scores = labels + rng.normal(size=(200, 3))
    result = multi_label(scores, labels)
    drawn = []
    for _ in range(300):
        rows = rng.integers(0, 200, 200)
        drawn.append([roc_auc_score(labels[rows, i], scores[rows, i]) for i in range(3)])
    by_hand = np.quantile(np.mean(drawn, axis=1), (0.025, 0.975))
    np.testing.assert_allclose(result["roc_auc_interval"], by_hand, atol=0.012)

    truth = rng.integers(0, 4, 200)
    logits = rng.normal(size=(200, 4)) + 1.5 * np.eye(4)[truth]
    predicted = logits.argmax(axis=1)
    draws = [rng.integers(0, 200, 200) for _ in range(300)]
    by_hand = np.quantile([f1_score(truth[r], predicted[r], average="macro") for r in draws], (0.025, 0.975))
    np.testing.assert_allclose(single_label(logits, truth)["macro_f1_interval"], by_hand, atol=0.02)


def test_constant_scores_are_chance_whatever_the_order_of_the_rows():
    labels = np.zeros((40, 2), bool)
    labels[:10, 0] = labels[-5:, 1] = True  # the right ones first, and last
    result = multi_label(np.full((40, 2), 0.3, np.float32), labels)
    assert result["roc_auc"] == 0.5 and result["roc_auc_interval"] == [0.5, 0.5]
    assert result["pr_auc"] == result["chance_pr_auc"] == pytest.approx((10 + 5) / 80)
    for truth in (0, 3):  # neither the first class nor the last is right by default
        assert single_label(np.ones((5, 4)), np.full(5, truth))["accuracy"] == 0


def test_rows_without_label_are_left_out_and_trouble_is_named():
    scores = np.array([[2.0, 1.0], [np.nan, 0.0], [0.0, 1.0]])
    result = single_label(scores, np.array([0, -1, 0]), ["slow", "fast"])
    assert (result["accuracy"], result["rows"], result["without_label"]) == (0.5, 2, 1)
    assert result["majority_class"] == "slow" and result["confusion"] == [[1, 1], [0, 0]]
    with pytest.raises(DataError, match=r"1 of 3 rows are not finite \(the first is row 1\)"):
        single_label(scores, np.zeros(3, int))
    with pytest.raises(DataError, match="1 of 3 rows are not finite"):
        multi_label(scores, np.zeros((3, 2), bool))
    with pytest.raises(DataError, match="label 2 is none of the 2 classes"):
        single_label(np.eye(2), np.array([0, 2]))
    with pytest.raises(ValueError, match="labels of shape"):
        single_label(scores, np.zeros(2, int))
    with pytest.raises(ValueError, match="labels of shape"):
        multi_label(scores, np.zeros((3, 3), bool))
