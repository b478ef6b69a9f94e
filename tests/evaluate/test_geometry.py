"""Figures of the joint space against their definitions, written out."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from muser_dist.errors import DataError
from muser_dist.evaluate.geometry import (
    alignment,
    effective_rank,
    geometry,
    modality_gap,
    separability,
    uniformity,
)


def units(rng: np.random.Generator, n: int, d: int) -> np.ndarray:
    rows = rng.normal(size=(n, d))
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@settings(max_examples=30)
@given(st.integers(2, 12), st.integers(1, 6), st.integers(0, 2**32 - 1))
def test_figures_equal_their_definitions(n, d, seed):
    rng = np.random.default_rng(seed)
    first, second = units(rng, n, d), units(rng, n, d)
    scaled = (first * rng.uniform(0.1, 9, (n, 1))).astype(np.float32)  # lengths do not matter
    pairs = [np.exp(-2 * np.sum((first[i] - first[j]) ** 2)) for i in range(n) for j in range(i)]
    assert uniformity(scaled) == pytest.approx(np.log(np.mean(pairs)), abs=1e-5)
    assert alignment(scaled, second) == pytest.approx(np.mean([np.sum((first[i] - second[i]) ** 2) for i in range(n)]))
    assert modality_gap(scaled, second) == pytest.approx(np.linalg.norm(first.mean(axis=0) - second.mean(axis=0)))
    values = np.sqrt(np.maximum(np.linalg.eigvalsh(first @ first.T), 0))
    shares = values[values > 1e-12] / values.sum()
    assert effective_rank(scaled) == pytest.approx(np.exp(-np.sum(shares * np.log(shares))), rel=1e-4)


def test_extremes():
    same = np.repeat(units(np.random.default_rng(0), 1, 8), 20, axis=0)
    assert (effective_rank(same), uniformity(same)) == (pytest.approx(1), pytest.approx(0, abs=1e-9))
    assert effective_rank(np.eye(8)) == pytest.approx(8)
    assert effective_rank(np.zeros((3, 4))) is None and uniformity(np.ones((1, 4))) is None
    assert (alignment(same, same), modality_gap(same, -same)) == (0, pytest.approx(2))


def test_separability_is_chance_without_a_gap_and_full_with_one():
    rng = np.random.default_rng(1)
    first, second = units(rng, 400, 8), units(rng, 300, 8)
    assert separability(first, second) == pytest.approx(0.5, abs=0.06)
    assert separability(first + [0.1] * 8, second) > 0.6  # a small gap
    assert separability(first + [9.0] * 8, second - [9.0] * 8) == 1
    assert separability(np.ones((30, 4)), np.ones((20, 4))) == 0.5  # collapse is no gap
    assert separability(np.ones((1, 4)), np.ones((20, 4))) is None


def test_a_set_of_rows_takes_texts_once_and_only_valid_rows():
    rng = np.random.default_rng(2)
    arrays = {"audio": rng.normal(size=(12, 4)), "text": rng.normal(size=(12, 4))}
    text_ids = np.arange(12) // 2
    arrays["text"] = arrays["text"][text_ids]
    valid = {"audio": np.arange(12) < 10, "text": np.arange(12) > 1}
    arrays["audio"][11] = np.nan
    result = geometry(arrays, valid, text_ids)
    json.dumps(result, allow_nan=False)
    assert result["modalities"]["audio"]["rows"] == 10 and result["modalities"]["text"]["rows"] == 5
    assert result["pairs"]["audio-text"]["rows"] == 8
    assert result["pairs"]["audio-text"]["alignment"] == alignment(arrays["audio"][2:10], arrays["text"][2:10])
    valid["audio"][11] = True
    with pytest.raises(DataError, match="not finite"):
        geometry(arrays, valid, text_ids)
