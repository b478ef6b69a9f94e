"""Per-row results travel through files, and figures of two models are compared row by row."""

import json

import numpy as np
import pytest
from sklearn.metrics import f1_score, roc_auc_score

from muser_dist.errors import DataError
from muser_dist.evaluate.comparison import PerRow, compare_rows, describe_comparison, load_rows, save_rows


def results(seed: int, skill: float) -> PerRow:
    rng = np.random.default_rng(seed)
    truth = np.arange(30) % 3
    predicted = np.where(rng.random(30) < skill, truth, rng.integers(0, 3, 30))
    tags = np.stack([truth == 0, truth == 1], axis=1)
    places = rng.integers(1, 20, 30)
    found = {
        "zero-shot kind by audio": np.stack([truth, predicted], axis=1),
        "linear probe tags by audio": np.stack([tags, tags * skill + rng.random((30, 2))], axis=1).astype(np.float32),
        "retrieval text->audio": np.stack([places, 1 / places], axis=1),
    }
    return {name: (np.arange(30), rows) for name, rows in found.items()}


def test_figures_of_both_models_and_their_difference(tmp_path):
    for name, skill in (("a", 0.9), ("b", 0.2)):
        save_rows(tmp_path / f"{name}.npz", results(ord(name), skill))
    first, second = load_rows(tmp_path / "a.npz"), load_rows(tmp_path / "b.npz")
    comparison = compare_rows(first, second)
    json.dumps(comparison, allow_nan=False)
    found = comparison["figures"]
    (truth, predicted), tags = first["zero-shot kind by audio"][1].T, first["linear probe tags by audio"][1]
    assert found["zero-shot kind by audio: accuracy"]["first"] == (truth == predicted).mean()
    macro = f1_score(truth, predicted, average="macro")
    assert found["zero-shot kind by audio: macro F1"]["first"] == pytest.approx(macro)
    areas = [roc_auc_score(tags[:, 0, i], tags[:, 1, i]) for i in range(2)]
    assert found["linear probe tags by audio: roc_auc"]["first"] == pytest.approx(np.mean(areas))
    places = first["retrieval text->audio"][1][:, 0]
    assert found["retrieval text->audio: R@10"]["first"] == (places <= 10).mean()
    assert found["retrieval text->audio: MRR"]["first"] == pytest.approx((1 / places).mean())
    accuracy = found["zero-shot kind by audio: accuracy"]
    assert accuracy["interval"][0] > 0 and accuracy["share_above"] > 0.99
    assert "zero-shot kind by audio: accuracy" in describe_comparison(comparison)


def test_either_model_may_predict_a_class_that_the_other_never_does():
    truth = np.array([0, 0, 1, 1])
    guesses = {"few": np.array([0, 1, 1, 1]), "more": np.array([0, 2, 1, 3])}
    few, more = ({"zero-shot kind": (np.arange(4), np.stack([truth, of], axis=1))} for of in guesses.values())
    for first, second, names in ((few, more, ("few", "more")), (more, few, ("more", "few"))):
        found = compare_rows(first, second)["figures"]["zero-shot kind: macro F1"]
        for figure, name in (("first", names[0]), ("second", names[1])):
            expected = f1_score(truth, guesses[name], average="macro", labels=[0, 1], zero_division=0)
            assert found[figure] == pytest.approx(expected)


def test_only_the_same_rows_are_compared():
    rows = results(0, 0.5)
    kind, tags, places = rows
    others = {kind: (np.arange(30) + 1, rows[kind][1]), tags: rows[tags], "more": rows[places]}
    comparison = compare_rows(rows, others)
    assert list(comparison["figures"]) == [f"{tags}: roc_auc", f"{tags}: pr_auc"]
    assert comparison["left_out"] == {
        kind: "the 30 rows (or their texts) are not the other's 30",
        places: "only one model has it",
        "more": "only one model has it",
    }
    assert f"not compared: {kind}" in describe_comparison(comparison)
    with pytest.raises(DataError, match="nothing can be compared; give the same --val"):
        compare_rows(rows, {kind: others[kind]})
