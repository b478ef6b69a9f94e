"""Zero-shot scores against scikit-learn's, and ties against the rule."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from sklearn.metrics import (
    accuracy_score,
    average_precision_score,
    confusion_matrix,
    f1_score,
    roc_auc_score,
)

from muser_dist.errors import DataError
from muser_dist.evaluate.classification import wilson
from muser_dist.evaluate.zero_shot import embed_prompts, robustness, zero_shot


@settings(max_examples=60)
@given(st.integers(2, 6), st.integers(1, 40), st.integers(0, 2**32 - 1), st.floats(0, 3))
def test_scores_equal_scikit_learn(n_classes, n, seed, signal):
    rng = np.random.default_rng(seed)
    classes = [f"class {i}" for i in range(n_classes)]
    texts = rng.normal(size=(n_classes, 16))
    truth = rng.integers(0, n_classes, n)
    clips = rng.normal(size=(n, 16)) + signal * texts[truth]
    cosine = clips @ (texts / np.linalg.norm(texts, axis=1, keepdims=True)).T
    predicted = cosine.argmax(axis=1)

    result = zero_shot(clips.astype(np.float32), texts.astype(np.float32), classes, truth)
    assert result["accuracy"] == pytest.approx(accuracy_score(truth, predicted))
    present = np.unique(truth)
    f1 = f1_score(truth, predicted, labels=present, average="macro", zero_division=0)
    assert result["macro_f1"] == pytest.approx(f1)
    expected = confusion_matrix(truth, predicted, labels=range(n_classes))
    np.testing.assert_array_equal(result["confusion"], expected)
    assert result["counts"] == np.bincount(truth, minlength=n_classes).tolist()

    most = np.bincount(truth).argmax()
    always = np.full(n, most)
    assert result["majority_class"] == classes[most]
    assert result["majority"] == pytest.approx(accuracy_score(truth, always))
    always_f1 = f1_score(truth, always, labels=present, average="macro", zero_division=0)
    assert result["majority_macro_f1"] == pytest.approx(always_f1)
    low, high = result["accuracy_interval"]
    assert 0 <= low <= result["accuracy"] <= high <= 1
    assert result["chance"] == 1 / n_classes and result["rows"] == n and result["without_label"] == 0
    json.dumps(result, allow_nan=False)


small = st.integers(-1, 1)


@settings(max_examples=100)
@given(hnp.arrays(np.int64, (5, 2), elements=small), hnp.arrays(np.int64, (3, 2), elements=small), st.data())
def test_ties_never_favour_the_true_class(clips, texts, data):
    truth = data.draw(st.lists(st.integers(0, 2), min_size=5, max_size=5))
    norms = np.linalg.norm(texts, axis=1, keepdims=True)
    cosine = clips @ np.divide(texts, norms, out=np.zeros((3, 2)), where=norms > 0).T
    wins = [all(row[t] > row[o] + 1e-3 for o in range(3) if o != t) for row, t in zip(cosine, truth, strict=True)]
    result = zero_shot(clips, texts, ["a", "b", "c"], truth)
    assert result["accuracy"] == pytest.approx(np.mean(wins))
    assert np.sum(result["confusion"]) == 5


def test_collapsed_embeddings_are_never_right():
    rng = np.random.default_rng(0)
    one = rng.normal(size=(1, 33)).astype(np.float32)
    labels = rng.integers(0, 4, 50)
    for texts in (np.repeat(one, 4, axis=0), one * (1 + 1e-8 * rng.normal(size=(4, 33))), np.zeros((4, 33))):
        result = zero_shot(np.repeat(one, 50, axis=0), texts, list("abcd"), labels)
        assert result["accuracy"] == result["macro_f1"] == 0


def test_rows_without_a_label_are_left_out_and_counted():
    clips = np.eye(3)
    clips[1] = np.nan  # no label: not looked at
    result = zero_shot(clips, np.eye(3), ["a", "b", "c"], [0, -1, 0])
    assert (result["rows"], result["without_label"]) == (2, 1)
    assert result["confusion"] == [[1, 0, 1], [0, 0, 0], [0, 0, 0]]
    assert result["majority"] == 1 and result["majority_class"] == "a" and result["majority_macro_f1"] == 1
    nothing = zero_shot(clips, np.eye(3), ["a", "b", "c"], [-1] * 3)
    assert nothing["accuracy"] is nothing["macro_f1"] is nothing["majority"] is None
    assert nothing["rows"] == 0 and nothing["without_label"] == 3 and nothing["chance"] == pytest.approx(1 / 3)


def test_wilson_interval():
    assert wilson(0, 10) == (0.0, pytest.approx(0.27753, abs=1e-5))
    assert wilson(10, 10) == (pytest.approx(0.72247, abs=1e-5), 1.0)
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)  # Newcombe's example


def test_errors_name_the_trouble():
    eye = np.eye(2)
    with pytest.raises(DataError, match="label 2 is none of the 2 classes"):
        zero_shot(eye, eye, ["a", "b"], [0, 2])
    with pytest.raises(DataError, match="1 of 2 class embeddings are not finite"):
        zero_shot(eye, eye * [[1], [np.nan]], ["a", "b"], [0, 1])
    with pytest.raises(DataError, match="1 of 2 clip embeddings are not finite"):
        zero_shot(eye * [[1], [np.nan]], eye, ["a", "b"], eye > 0)
    with pytest.raises(ValueError, match="1 of them different"):
        zero_shot(eye, eye, ["a", "a"], [0, 0])
    with pytest.raises(ValueError, match="2 embeddings have 1 labels"):
        zero_shot(eye, eye, ["a", "b"], [0])


@settings(max_examples=40)
@given(st.integers(2, 30), st.integers(1, 4), st.integers(0, 2**32 - 1))
def test_tags_are_ranked_by_cosine(n, tags, seed):
    rng = np.random.default_rng(seed)
    clips, texts = rng.integers(-2, 3, (n, 3)).astype(float), rng.normal(size=(tags, 3))
    labels = rng.random((n, tags)) < 0.4
    result = zero_shot(clips.astype(np.float32), texts, [f"tag {i}" for i in range(tags)], labels)
    norms = np.linalg.norm(clips, axis=1, keepdims=True)
    cosine = np.divide(clips, norms, out=np.zeros_like(clips), where=norms > 0) @ texts.T
    cosine = np.round(cosine / np.linalg.norm(texts, axis=1), 9)
    for i in range(tags):
        if 0 < labels[:, i].sum() < n:
            roc, ap, count = result["by_tag"][f"tag {i}"]
            assert roc == pytest.approx(roc_auc_score(labels[:, i], cosine[:, i]))
            assert ap == pytest.approx(average_precision_score(labels[:, i], cosine[:, i]))
            assert count == labels[:, i].sum()
        else:
            assert f"tag {i}" in result["undefined"]


def test_collapsed_embeddings_rank_tags_by_chance():
    rng = np.random.default_rng(0)
    one = rng.normal(size=(1, 33))
    labels = rng.random((50, 3)) < 0.3
    for noise in (0, 1e-8):
        clips = (one * (1 + noise * rng.normal(size=(50, 33)))).astype(np.float32)
        result = zero_shot(clips, rng.normal(size=(3, 33)), list("abc"), labels)
        assert result["roc_auc"] == pytest.approx(0.5, abs=0.02 if noise else 0)
    assert robustness(clips, np.repeat(one[None], 2, axis=0).repeat(3, axis=1), labels)["agreement"] == 0


def test_prompts_of_several_templates_are_averaged_as_unit_vectors():
    texts = {"it is slow": [9, 0, 0], "slow": [0, 1, 0], "it is fast": [0, 0, 1], "fast": [0, 0, 5]}
    templates = ("it is {pace}", "{pace}", "by {artist}", "{pace}")

    def encode(sentences):
        return np.array([texts[sentence] for sentence in sentences], float)

    prompts = embed_prompts(encode, templates, "pace", ["slow", "fast"])
    np.testing.assert_array_equal(prompts, [[[1, 0, 0], [0, 0, 1]], [[0, 1, 0], [0, 0, 1]]])
    np.testing.assert_array_equal(prompts.mean(axis=0), [[0.5, 0.5, 0], [0, 0, 1]])
    assert embed_prompts(encode, templates, "mood", ["dark"]).shape[0] == 0


def test_robustness_tells_how_far_wordings_agree():
    clips = np.array([[1, 0.1], [1, 0.2], [0.1, 1], [1, 1]])  # the last is as near to either class
    labels = np.array([0, 0, 1, 1])
    swapped = np.stack([np.eye(2), np.eye(2), np.eye(2)[::-1]])
    result = robustness(clips, swapped, labels)
    assert result["values"] == [0.75, 0.75, 0] and (result["lowest"], result["highest"]) == (0, 0.75)
    assert result["mean"] == 0.5 and result["deviation"] == pytest.approx(np.std([0.75, 0.75, 0], ddof=1))
    assert result["agreement"] == pytest.approx((0.75 + 0 + 0) / 3)
    assert robustness(clips, swapped[:1], labels) is None
    assert robustness(clips, swapped, np.eye(2, dtype=bool)[labels])["score"] == "roc_auc"
