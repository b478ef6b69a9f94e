import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from muser_dist.data.shards import SIDECAR, Plan, ShardIndex, expand, index_shards
from muser_dist.errors import DataError
from tests.shardmaker import write_shards

SHARD_ROWS = st.lists(st.integers(0, 9), min_size=1, max_size=8).filter(sum)


@given(SHARD_ROWS, st.integers(0, 5), st.integers(1, 4))
def test_each_epoch_holds_each_row_once(rows, seed, window):
    plan = Plan(np.array(rows), seed, window, shuffle=True)
    for epoch in range(3):
        part = plan.rows(epoch * plan.total, (epoch + 1) * plan.total)
        assert sorted(part.index.tolist()) == list(range(plan.total))
        assert (part.epoch == epoch).all()
        np.testing.assert_array_equal(plan.first[part.shard] + part.row, part.index)
        assert (part.row < np.array(rows)[part.shard]).all()


@given(SHARD_ROWS, st.data())
def test_any_stretch_is_found_without_the_ones_before(rows, data):
    plan = Plan(np.array(rows), 7, 2, shuffle=True)
    whole = plan.rows(0, 3 * plan.total)
    start = data.draw(st.integers(0, 3 * plan.total))
    stop = data.draw(st.integers(start, 3 * plan.total))
    fresh = Plan(np.array(rows), 7, 2, shuffle=True)
    if start < stop:
        np.testing.assert_array_equal(fresh.rows(start, stop).index, whole.index[start:stop])


def test_epochs_windows_and_seeds_differ():
    rows = np.full(10, 20)
    plan = Plan(rows, 0, 2, shuffle=True)
    first, second = plan.rows(0, 200).index, plan.rows(200, 400).index
    assert (first != second).any()
    assert (first != Plan(rows, 1, 2, shuffle=True).rows(0, 200).index).any()
    # Rows mix inside a window of two shards, and only there.
    assert len(set((first[:40] // 20).tolist())) == 2
    assert len(set((first[:20] // 20).tolist())) == 2


def test_one_pass_in_order_ends_in_padding():
    part = Plan(np.array([2, 3]), 0, 4, shuffle=False).rows(3, 8)
    assert part.index.tolist() == [3, 4, -1, -1, -1]
    assert part.shard.tolist() == [1, 1, -1, -1, -1]
    assert part.row.tolist() == [1, 2, -1, -1, -1]


@given(st.integers(0, 2**31), st.integers(0, 10), st.integers(0, 10))
@settings(max_examples=20)
def test_random_choices_of_a_row_are_its_own(seed, epoch, row):
    plan = Plan(np.array([20]), seed, 1, shuffle=True)
    assert plan.rng(epoch, row).random() == plan.rng(epoch, row).random()
    assert plan.rng(epoch, row).random() != plan.rng(epoch + 1, row).random()
    assert plan.rng(epoch, row).random() != plan.rng(epoch, row + 1).random()


def test_patterns(tmp_path):
    write_shards(tmp_path, [1, 1, 1])
    names = [f"{tmp_path}/train-{i:05d}.tar" for i in range(3)]
    assert expand([f"{tmp_path}/train-*.tar"], "data.train") == names
    assert expand([f"{tmp_path}/train-{{00002..00000}}.tar", names[1]], "data.train") == names
    assert expand([f"file://{tmp_path}/train-*.tar"], "data.train") == [f"file://{name}" for name in names]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("FOLDER/nothing-*.tar", "no shard matches; check the pattern"),
        ("FOLDER/train-{00000..00003}.tar", "train-00003.tar: the shard is missing"),
        ("FOLDER/absent/train-*.tar", "there is no folder .*absent"),
        ("FOLDER/train-{00000..0002.tar", "braces .* are not balanced"),
        ("file://FOLDER/nothing-*.tar", "no shard matches"),
        ("file://FOLDER/nothing.tar", "the shard is missing"),
        ("nosuch://FOLDER/a.tar", "cannot be listed: .*nosuch"),
    ],
)
def test_patterns_that_match_nothing_say_so(tmp_path, pattern, message):
    write_shards(tmp_path, [1, 1, 1])
    with pytest.raises(DataError, match=f"data.train: .*{message}"):
        expand([pattern.replace("FOLDER", str(tmp_path))], "data.train")


def test_rows_are_counted_in_parallel_with_progress(tmp_path):
    urls = expand([write_shards(tmp_path, [3, 1, 4])], "data.train")
    seen = []
    index = index_shards(urls, "data.train", lambda done, of: seen.append((done, of)))
    assert index.rows.tolist() == [3, 1, 4]
    assert seen == [(1, 3), (2, 3), (3, 3)]
    index.save(tmp_path / "index.json")
    again = ShardIndex.load(tmp_path / "index.json")
    assert again.urls == index.urls
    assert again.rows.tolist() == index.rows.tolist()


def test_relative_patterns_become_absolute(tmp_path, monkeypatch):
    write_shards(tmp_path / "here", [1])
    monkeypatch.chdir(tmp_path)
    assert expand(["here/*.tar"], "data.train") == [f"{tmp_path}/here/train-00000.tar"]


def test_a_shard_that_cannot_be_opened(tmp_path):
    urls = expand([write_shards(tmp_path, [1])], "data.train")
    (tmp_path / "train-00000.tar").unlink()
    with pytest.raises(DataError, match=r"data\.train: .*train-00000\.tar cannot be read: .*No such file"):
        index_shards(urls, "data.train")


def test_the_sidecar_is_believed(tmp_path):
    urls = expand([write_shards(tmp_path, [3, 1])], "data.train")
    (tmp_path / SIDECAR).write_text(json.dumps({"format": 1, "rows": {"train-00000.tar": 5}}))
    assert index_shards(urls, "data.train").rows.tolist() == [5, 1]


@pytest.mark.parametrize("content", ["{", "[]", '{"format": 2, "rows": {}}', '{"format": 1, "rows": {"a": "3"}}'])
def test_a_broken_sidecar_says_what_to_do(tmp_path, content):
    urls = expand([write_shards(tmp_path, [1])], "data.train")
    (tmp_path / SIDECAR).write_text(content)
    with pytest.raises(DataError, match=f"{SIDECAR}.*delete it"):
        index_shards(urls, "data.train")


def test_a_shard_that_is_no_tar_stops_the_run_before_it_starts(tmp_path):
    write_shards(tmp_path, [1])
    (tmp_path / "train-00001.tar").write_bytes(b"<html>not found</html>" * 50)
    with pytest.raises(DataError, match=r"data\.train: .*train-00001\.tar is no tar archive"):
        index_shards(expand([f"{tmp_path}/*.tar"], "data.train"), "data.train")


def test_a_truncated_shard_is_counted_as_far_as_it_goes_and_named(tmp_path):
    urls = expand([write_shards(tmp_path, [4])], "data.train")
    whole = (tmp_path / "train-00000.tar").read_bytes()
    (tmp_path / "train-00000.tar").write_bytes(whole[: len(whole) // 2])
    index = index_shards(urls, "data.train")
    assert 1 <= index.total < 4
    assert "cut short" in index.problems[urls[0]]
