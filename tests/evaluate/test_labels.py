"""Scores of a model's own heads, against scikit-learn's and brute force."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, average_precision_score, f1_score, roc_auc_score

from muser_dist.evaluate.formats import percent
from muser_dist.evaluate.labels import classification, tagging
from muser_dist.evaluate.report import write_report


@given(st.integers(0, 10_000), st.integers(3, 40), st.integers(2, 5))
@settings(max_examples=40, deadline=None)
def test_classes_are_scored_as_scikit_learn_does(seed, n, c):
    rng = np.random.default_rng(seed)
    probabilities, truth = rng.random((n, c)), rng.integers(-1, c, n)
    scores = classification(probabilities, truth, [str(i) for i in range(c)])
    known = truth >= 0
    assert (scores["rows"], scores["without_label"]) == (known.sum(), (~known).sum())
    if known.any():
        predicted = probabilities.argmax(axis=1)[known]
        assert scores["accuracy"] == pytest.approx(accuracy_score(truth[known], predicted))
        present = np.unique(truth[known])
        f1 = f1_score(truth[known], predicted, labels=present, average="macro", zero_division=0)
        assert scores["macro_f1"] == pytest.approx(f1)
    else:
        assert scores["accuracy"] is None


@given(st.integers(0, 10_000), st.integers(2, 30), st.integers(1, 5))
@settings(max_examples=40, deadline=None)
def test_tags_are_ranked_as_by_comparing_all_pairs(seed, n, t):
    rng = np.random.default_rng(seed)
    probabilities = rng.integers(0, 4, (n, t)) / 4  # with ties
    truth = rng.integers(0, 2, (n, t)).astype(np.int8)
    truth[rng.random(n) < 0.2] = -1
    scores = tagging(probabilities, truth, [str(i) for i in range(t)])
    known = truth[:, 0] >= 0
    p, y = probabilities[known], truth[known]
    aucs, precisions = [], []
    for tag in range(t):
        of, others = p[y[:, tag] == 1, tag], p[y[:, tag] == 0, tag]
        if len(of) and len(others):
            aucs.append(np.mean((of[:, None] > others) + 0.5 * (of[:, None] == others)))
            precisions.append(average_precision_score(y[:, tag], p[:, tag]))
            assert aucs[-1] == pytest.approx(roc_auc_score(y[:, tag], p[:, tag]))
    assert scores["tags"] == len(aucs) and len(scores["tags_left_out"]) == t - len(aucs)
    if aucs:
        assert scores["roc_auc"] == pytest.approx(np.mean(aucs))
        assert scores["pr_auc"] == pytest.approx(np.mean(precisions))
    else:
        assert scores["roc_auc"] is None


def test_what_says_the_same_of_all_clips_scores_chance():
    truth = np.array([0, 1, 1, 2, 1])
    constant = classification(np.full((5, 3), 1 / 3), truth, "abc")
    assert constant["accuracy"] == 0.0  # ties are errors
    assert constant["roc_auc"] == 0.5 and constant["pr_auc"] == pytest.approx(constant["chance_pr_auc"])
    assert (constant["majority"], constant["majority_class"]) == (0.6, "b")


def test_the_page_shows_heads_beside_chance(tmp_path):
    rng = np.random.default_rng(0)
    labels = {
        "genre": classification(rng.random((30, 3)), rng.integers(0, 3, 30), ["folk", "<b>rock", "ska"]),
        "tags": tagging(rng.random((30, 2)), rng.integers(0, 2, (30, 2)), ["old", "slow"]),
    }
    evaluation = {"rows": 30, "retrieval": {}, "zero_shot": {}, "skipped_fields": {}, "labels": labels}
    (tmp_path / "evaluation.json").write_text(json.dumps(evaluation))
    page = write_report(tmp_path).read_text()
    assert "genre by head" in page and "&lt;b&gt;rock" in page and "<b>rock" not in page
    for score in (labels["genre"]["accuracy"], labels["tags"]["roc_auc"], labels["tags"]["chance_pr_auc"]):
        assert percent(score) in page
