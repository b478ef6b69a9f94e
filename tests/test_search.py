"""Search over Parquet equals a sort of all cosines; what it refuses."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from muser_dist.embed.parts import Manifest, Parts
from muser_dist.errors import ConfigError, DataError
from muser_dist.search import Index

DIM = 3


def write_index(folder, keys, vectors, part_rows=4, model="a" * 64):
    """An index of these rows with an audio embedding each, but where the vector is NaN."""
    manifest = Manifest(
        model=model,
        dim=DIM,
        sample_rate=8_000,
        crop_seconds=0.5,
        pad="zero",
        modalities=("audio", "text"),
        windows="all",
        hop_seconds=0.5,
        fields=("genre",),
        templates=("{genre}",),
        rows=len(keys),
        part_rows=part_rows,
        inputs="",
    )
    parts = Parts(folder, manifest, {})
    parts.claim()
    for part in range(manifest.parts):
        rows = range(*manifest.range(part))
        told = [
            {"key": keys[i], "shard": "s", "row": i, "windows": 1, "text": None, "fields": {"genre": f"g{i}"}}
            for i in rows
        ]
        none = np.full((len(rows), DIM), np.nan, np.float32)
        parts.write(part, told, {"audio": vectors[list(rows)], "text": none}, [])
    return parts


@settings(max_examples=60)
@given(st.data())
def test_hits_are_those_of_a_sort_of_everything_ties_by_key(tmp_path_factory, data):
    rows = data.draw(st.integers(1, 30))
    # Few different directions: most scores are shared by several rows.
    directions = np.random.default_rng(rows).standard_normal((data.draw(st.integers(1, 6)), DIM))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    which = data.draw(st.lists(st.integers(-1, len(directions) - 1), min_size=rows, max_size=rows))
    vectors = np.array([directions[i] if i >= 0 else [np.nan] * DIM for i in which], np.float32)
    keys = data.draw(st.lists(st.text("abc", max_size=2), min_size=rows, max_size=rows))
    folder = tmp_path_factory.mktemp("index")
    write_index(folder, keys, vectors, data.draw(st.integers(1, 12)))
    queries = np.random.default_rng(rows + 1).standard_normal((2, DIM)) * 7
    k = data.draw(st.integers(1, 12))
    found = Index.open(folder, data.draw(st.integers(1, 9))).search(queries, k)
    for query, hits in zip(queries, found, strict=True):
        cosines = (vectors.astype(np.float64) @ (query / np.linalg.norm(query))).astype(np.float32)
        there = [i for i in range(rows) if which[i] >= 0]
        expected = sorted(there, key=lambda i: (-cosines[i], keys[i], i))[:k]
        assert [hit.metadata["row"] for hit in hits] == expected
        for hit, i in zip(hits, expected, strict=True):
            assert (hit.key, hit.score) == (keys[i], pytest.approx(cosines[i], abs=1e-6))
            assert hit.metadata == {"shard": "s", "row": i, "windows": 1, "text": None, "genre": f"g{i}"}


def test_plain_pyarrow_reads_what_is_written(tmp_path):
    parts = write_index(tmp_path, ["a", "b"], np.eye(DIM, dtype=np.float32)[:2])
    table = pq.read_table(parts.path(0))
    assert table.column_names == [
        "key",
        "shard",
        "row",
        "windows",
        "audio_embedding",
        "text_embedding",
        "text",
        "genre",
    ]
    assert table["audio_embedding"].to_pylist() == [[1, 0, 0], [0, 1, 0]]
    assert table["text_embedding"].to_pylist() == [None, None]
    about = json.loads(table.schema.metadata[b"muser_dist"])
    assert about["content"]["model"] == "a" * 64 and about["content"]["sample_rate"] == 8_000


def test_indices_that_cannot_be_searched_say_so(tmp_path):
    with pytest.raises(DataError, match=r"no manifest\.json"):
        Index.open(tmp_path / "absent")
    vectors = np.eye(DIM, dtype=np.float32)[[0, 1, 2, 0, 1, 2]]
    parts = write_index(tmp_path, list("abcdef"), vectors)
    index = Index.open(tmp_path)
    for queries, k, modality, error, message in (
        (np.ones((1, 4)), 1, None, DataError, r"queries are \(1, 4\)"),
        (np.full((1, DIM), np.nan), 1, None, DataError, "queries"),
        (np.ones((1, DIM)), 0, None, ConfigError, "k is 0"),
        (np.ones((1, DIM)), 1, "spectrogram", DataError, "no embeddings of spectrogram, only of audio, text"),
    ):
        with pytest.raises(error, match=message):
            index.search(queries, k, modality)
    with pytest.raises(DataError, match="embedded with another model"):
        index.check_model("b" * 64)
    assert index.search(np.ones((1, DIM)), 3, "text") == [[]]
    whole = parts.path(1).read_bytes()
    parts.path(1).write_bytes(whole[:-20])
    with pytest.raises(DataError, match=r"1 of 2 parts are missing or torn, the first is part-00001\.parquet"):
        Index.open(tmp_path)
    parts.path(1).write_bytes(whole)
    (tmp_path / "manifest.json").write_text('{"format": 4, "content": {}}')
    with pytest.raises(DataError, match="is broken"):
        Index.open(tmp_path)


def test_a_listener_is_the_mean_of_what_they_liked(tmp_path):
    vectors = np.array([[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0.1], [9, 0, 0.1], [np.nan] * 3], np.float32)
    write_index(tmp_path, [*"abcdef"], vectors / np.linalg.norm(vectors, axis=1, keepdims=True))
    index = Index.open(tmp_path)
    # The mean of a and b is (1, 1, 0), to which d is nearest; neither of the two comes back.
    assert [hit.key for hit in index.recommend(["a", "b", "a"], 2)] == ["d", "e"]
    assert [hit.key for hit in index.recommend(["a"], 9)] == ["e", "d", "b", "c"]
    with pytest.raises(DataError, match=r"has no audio embedding of f, x; keys are those"):
        index.recommend(["a", "x", "f"], 2)
    with pytest.raises(ConfigError, match="history is empty"):
        index.recommend([], 2)


def test_rows_that_share_a_liked_key_leave_room_for_others(tmp_path):
    vectors = np.array([[1, 0, 0], [1, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]], np.float32)
    write_index(tmp_path, [*"aaabc"], vectors)
    assert [hit.key for hit in Index.open(tmp_path).recommend(["a"], 2)] == ["b", "c"]
