import json

import pytest

from muser_dist.data.rows import RowReader
from muser_dist.data.shards import SIDECAR, ShardIndex, index_shards
from muser_dist.errors import DataError
from tests.shardmaker import sample, write_shard, write_shards
from tests.small import LOCAL


def test_patterns(tmp_path):
    write_shards(tmp_path, [1, 1, 1])
    names = [f"{tmp_path}/train-{i:05d}.tar" for i in range(3)]
    assert LOCAL.expand([f"{tmp_path}/train-*.tar"], "data.train") == names
    assert LOCAL.expand([f"{tmp_path}/train-{{00002..00000}}.tar", names[1]], "data.train") == names
    assert LOCAL.expand([f"file://{tmp_path}/train-*.tar"], "data.train") == [f"file://{name}" for name in names]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("FOLDER/nothing-*.tar", "no shard matches; check the pattern"),
        ("FOLDER/train-{00000..00003}.tar", "train-00003.tar: the shard is missing"),
        ("FOLDER/absent/train-*.tar", "there is no folder .*absent"),
        ("FOLDER/train-{00000..0002.tar", "braces .* are not balanced"),
        ("file://FOLDER/nothing-*.tar", "no shard matches"),
        ("file://FOLDER/nothing.tar", "the shard is missing"),
        ("nosuch://FOLDER/a.tar", "nosuch"),
    ],
)
def test_patterns_that_match_nothing_say_so(tmp_path, pattern, message):
    write_shards(tmp_path, [1, 1, 1])
    with pytest.raises(DataError, match=f"data.train: .*{message}"):
        LOCAL.expand([pattern.replace("FOLDER", str(tmp_path))], "data.train")


def test_rows_are_counted_in_parallel_with_progress(tmp_path):
    urls = LOCAL.expand([write_shards(tmp_path, [3, 1, 4])], "data.train")
    seen = []
    index = index_shards(LOCAL, urls, "data.train", lambda done, of: seen.append((done, of)))
    assert index.rows.tolist() == [3, 1, 4]
    assert seen == [(1, 3), (2, 3), (3, 3)]
    index.save(tmp_path / "index.json")
    again = ShardIndex.load(tmp_path / "index.json")
    assert again.urls == index.urls
    assert again.rows.tolist() == index.rows.tolist()


def test_relative_patterns_become_absolute(tmp_path, monkeypatch):
    write_shards(tmp_path / "here", [1])
    monkeypatch.chdir(tmp_path)
    assert LOCAL.expand(["here/*.tar"], "data.train") == [f"{tmp_path}/here/train-00000.tar"]


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_another_local_shard_of_the_same_name_is_read_anew(tmp_path, scheme):
    versions, keys = [], []
    for number in range(2):
        write_shard(tmp_path / "a.tar", [(f"piece{number}", sample(number))])
        index = index_shards(LOCAL, [f"{scheme}{tmp_path}/a.tar"], "data.train")
        versions.append(LOCAL.version(index.urls[0]))
        keys.append(RowReader(index, LOCAL).row(0, 0).key)
    stat = (tmp_path / "a.tar").stat()
    assert versions[1] == [str(stat.st_size), str(stat.st_mtime_ns)] != versions[0]
    assert keys == ["piece0", "piece1"]


def test_a_shard_that_cannot_be_opened(tmp_path):
    urls = LOCAL.expand([write_shards(tmp_path, [1])], "data.train")
    (tmp_path / "train-00000.tar").unlink()
    with pytest.raises(DataError, match=r"data\.train: .*train-00000\.tar cannot be read: .*No such file"):
        index_shards(LOCAL, urls, "data.train")


def test_the_sidecar_is_believed(tmp_path):
    urls = LOCAL.expand([write_shards(tmp_path, [3, 1])], "data.train")
    (tmp_path / SIDECAR).write_text(json.dumps({"format": 1, "rows": {"train-00000.tar": 5}}))
    assert index_shards(LOCAL, urls, "data.train").rows.tolist() == [5, 1]


@pytest.mark.parametrize("content", ["{", "[]", '{"format": 2, "rows": {}}', '{"format": 1, "rows": {"a": "3"}}'])
def test_a_broken_sidecar_says_what_to_do(tmp_path, content):
    urls = LOCAL.expand([write_shards(tmp_path, [1])], "data.train")
    (tmp_path / SIDECAR).write_text(content)
    with pytest.raises(DataError, match=f"{SIDECAR}.*delete it"):
        index_shards(LOCAL, urls, "data.train")


def test_a_shard_that_is_no_tar_stops_the_run_before_it_starts(tmp_path):
    write_shards(tmp_path, [1])
    (tmp_path / "train-00001.tar").write_bytes(b"<html>not found</html>" * 50)
    with pytest.raises(DataError, match=r"data\.train: .*train-00001\.tar is no tar archive"):
        index_shards(LOCAL, LOCAL.expand([f"{tmp_path}/*.tar"], "data.train"), "data.train")


def test_a_truncated_shard_is_counted_as_far_as_it_goes_and_named(tmp_path):
    urls = LOCAL.expand([write_shards(tmp_path, [4])], "data.train")
    whole = (tmp_path / "train-00000.tar").read_bytes()
    (tmp_path / "train-00000.tar").write_bytes(whole[: len(whole) // 2])
    index = index_shards(LOCAL, urls, "data.train")
    assert 1 <= index.total < 4
    assert "cut short" in index.problems[urls[0]]
