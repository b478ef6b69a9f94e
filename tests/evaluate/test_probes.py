"""Probes against scikit-learn's own pipeline, few-shot curves against what they promise."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, average_precision_score, roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from muser_dist.errors import DataError
from muser_dist.evaluate.probes import STRENGTHS, choose_rows, few_shot, fit_probe, probe


def labelled(rng: np.random.Generator, rows: int, classes: int = 3, dims: int = 6) -> tuple[np.ndarray, np.ndarray]:
    """Classes that overlap, in features of very different scales and offsets."""
    labels = rng.permutation(np.arange(rows) % classes)
    clean = np.random.default_rng(99).normal(size=(classes, dims))[labels]
    features = (clean + rng.normal(size=(rows, dims))) * 10.0 ** np.arange(dims) + 1000
    return features.astype(np.float32), labels


@pytest.mark.parametrize("classes", [2, 3])
def test_the_linear_probe_is_logistic_regression_on_standardised_features(classes):
    rng = np.random.default_rng(0)
    (train, labels), (test, truth) = labelled(rng, 150, classes), labelled(rng, 90, classes)
    result, scores = probe("linear", train, labels, test, truth, [f"class {i}" for i in range(classes)])
    json.dumps(result, allow_nan=False)
    chosen = result["probe"]["C"]
    assert chosen in STRENGTHS and result["probe"]["train_rows"] == 150 and result["probe"]["held_out"] == 30
    by_hand = make_pipeline(StandardScaler(), LogisticRegression(C=chosen, max_iter=1000))
    by_hand.fit(train.astype(float), labels)
    assert result["accuracy"] == accuracy_score(truth, by_hand.predict(test.astype(float)))
    np.testing.assert_allclose(np.diff(scores), np.diff(np.log(by_hand.predict_proba(test.astype(float)))), atol=5e-3)


def test_tags_are_one_against_the_rest():
    rng = np.random.default_rng(1)
    train, test = rng.normal(size=(120, 5)), rng.normal(size=(80, 5))
    labels, truth = ((x[:, :3] + rng.normal(size=(len(x), 3))) > 0.5 for x in (train, test))
    labels[:, 2] = False  # a tag that training never has
    result, _ = probe("linear", train, labels, test, truth, ["slow", "loud", "odd"])
    by_hand = make_pipeline(StandardScaler(), LogisticRegression(C=result["probe"]["C"], max_iter=1000))
    for tag, name in enumerate(("slow", "loud")):
        found = by_hand.fit(train, labels[:, tag]).decision_function(test)
        expected = [roc_auc_score(truth[:, tag], found), average_precision_score(truth[:, tag], found)]
        np.testing.assert_allclose(result["by_tag"][name][:2], expected, atol=2e-3)
    assert result["by_tag"]["odd"][0] == 0.5
    mlp, _ = probe("mlp", train, labels, test, truth, ["slow", "loud", "odd"])
    assert mlp["roc_auc"] > 0.6
    one, _ = probe("mlp", train, labels[:, :1], test, truth[:, :1], ["slow"])
    assert one["roc_auc"] > 0.6


def test_an_mlp_finds_what_no_plane_separates():
    rng = np.random.default_rng(2)
    train, test = rng.normal(size=(2, 400, 2))
    labels, truth = ((x[:, 0] * x[:, 1] > 0).astype(int) for x in (train, test))
    linear, _ = probe("linear", train, labels, test, truth, ["a", "b"])
    mlp, _ = probe("mlp", train, labels, test, truth, ["a", "b"])
    assert linear["accuracy"] < 0.65 < 0.85 < mlp["accuracy"]
    assert probe("mlp", train, labels, test, truth, ["a", "b"])[0] == mlp


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_constant_features_score_no_more_than_the_majority(kind):
    labels = np.array([0] * 20 + [1] * 10)
    result, _ = probe(kind, np.ones((30, 4)), labels, np.ones((9, 4)), np.array([1] * 5 + [0] * 4), ["a", "b"])
    assert result["accuracy"] <= result["majority"]
    tags = np.stack([labels == 1, labels == 0], axis=1)
    result, _ = probe(kind, np.ones((30, 4)), tags, np.ones((30, 4)), tags, ["a", "b"])
    assert result["roc_auc"] == 0.5 and result["pr_auc"] == pytest.approx(0.5)


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_a_class_that_training_lacks_is_never_named(kind):
    train, labels = labelled(np.random.default_rng(3), 60)
    _, scores = probe(kind, train[labels != 1], labels[labels != 1], train, labels, ["a", "b", "c"])
    assert np.isfinite(scores).all() and (scores.argmax(axis=1) != 1).all()


@settings(max_examples=60)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=40), st.integers(0, 40), st.integers(0, 99))
def test_drawn_rows_hold_every_class_in_its_share(labels, rows, seed):
    labels = np.array(labels)
    rows = min(rows, len(labels))
    values, counts = np.unique(labels, return_counts=True)
    if rows < len(values):
        with pytest.raises(DataError, match=f"{rows} rows are too few: the classes need {len(values)}"):
            choose_rows(labels, rows, np.random.default_rng(seed))
        return
    chosen = choose_rows(labels, rows, np.random.default_rng(seed))
    assert len(set(chosen)) == rows
    drawn = np.bincount(labels[chosen], minlength=5)[values]
    assert (drawn >= 1).all()
    rest = len(labels) - len(values)
    share = (rows - len(values)) / rest if rest else 0
    np.testing.assert_array_less(np.abs(drawn - 1 - share * (counts - 1)), 2)


@settings(max_examples=40)
@given(st.integers(1, 30), st.integers(1, 5), st.integers(0, 999))
def test_drawn_rows_hold_every_tag(n, tags, seed):
    rng = np.random.default_rng(seed)
    labels = rng.random((n, tags)) < 0.3
    rows = min(n, tags)
    chosen = choose_rows(labels, rows, rng)  # a row for each tag always does
    assert len(set(chosen)) == rows
    np.testing.assert_array_equal(labels[chosen].any(axis=0), labels.any(axis=0))


def test_few_shot_curves_have_every_share_or_say_why_not():
    rng = np.random.default_rng(4)
    (train, labels), (test, truth) = labelled(rng, 200), labelled(rng, 100)
    result = few_shot(train, labels, test, truth, ["a", "b", "c"], shares=(0.01, 0.05, 1.0), seeds=4)
    json.dumps(result, allow_nan=False)
    none, few, whole = result["points"]
    assert none == {
        "share": 0.01,
        "rows": 2,
        "impossible": "2 rows are too few: the classes need 3 to have one each",
    }
    values = few["accuracy"]["values"]
    assert few["rows"] == 10 and len(values) == 4 and len(set(values)) > 1
    assert few["accuracy"]["mean"] == pytest.approx(np.mean(values))
    low, high = few["accuracy"]["interval"]  # Student's t with 3 degrees of freedom: 3.1824
    assert high - low == pytest.approx(2 * 3.1824 * np.std(values, ddof=1) / 2, rel=1e-4)
    alone, _ = probe("linear", train, labels, test, truth, ["a", "b", "c"])
    assert whole["accuracy"] == {"mean": alone["accuracy"], "interval": None, "values": [alone["accuracy"]]}
    assert whole["accuracy"]["mean"] >= few["accuracy"]["mean"]

    tags, of_test = np.eye(3, dtype=bool)[labels], np.eye(3, dtype=bool)[truth]
    curve = few_shot(train, tags, test, of_test, ["a", "b", "c"], shares=(0.1, 1.0), seeds=2)["points"]
    assert 0.6 < curve[0]["roc_auc"]["mean"] <= curve[1]["roc_auc"]["mean"] + 0.05


def test_features_that_are_not_finite_and_labels_that_are_all_alike():
    train, labels = labelled(np.random.default_rng(5), 30)
    broken = train.copy()
    broken[3, 1] = np.nan
    with pytest.raises(DataError, match="not finite"):
        fit_probe("linear", broken, labels, 3)
    with pytest.raises(DataError, match="rows to score are not finite"):
        probe("linear", train, labels, broken, labels, ["a", "b", "c"])
    with pytest.raises(DataError, match="differ in their label"):
        fit_probe("linear", train, np.zeros(30, int), 3)
