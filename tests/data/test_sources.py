"""Several corpora in one run, and rows that validation holds too."""

import json
from dataclasses import replace

import numpy as np
import pytest

from muser_dist.cli import parse_runs
from muser_dist.config import differences
from muser_dist.data.config import DataConfig, SourceConfig
from muser_dist.data.pipeline import known_ids, training_reader
from muser_dist.errors import ConfigError
from muser_dist.train.accounting import Accounting
from tests.shardmaker import sample, write_shard, write_shards
from tests.small import LOCAL, index_of, small_config


def mixed_config(folder):
    write_shards(folder / "one", [8, 4])
    tags = [(f"tagged{i}", sample(i, tags=["slow", "sad"])) for i in range(6)]
    write_shard(folder / "two" / "train-00000.tar", tags)
    sources = (
        SourceConfig("captions", (f"{folder}/one/*.tar",), weight=3, templates=("{caption}",)),
        SourceConfig("tagged", (f"{folder}/two/*.tar",), weight=1, templates=("{tags}",)),
    )
    return small_config(data={"sources": sources})


def test_each_source_has_its_share_its_templates_and_its_accounts(tmp_path):
    config = mixed_config(tmp_path)
    indices = [index_of(source.shards[0]) for source in config.data.sources]
    reader = training_reader(config, indices, LOCAL)
    accounting = Accounting(config.taking_part)
    for chunk in reader.read(range(3 * config.train.chunks_per_step)):  # 3 batches of 8 rows
        accounting.add(chunk)
        for source, text, shard in zip(chunk["source"], chunk["text"], chunk["shard"], strict=True):
            assert text == "slow, sad" if source == "tagged" else text.startswith("Piece")
            assert ("/two/" in shard) == (source == "tagged")
    assert accounting.flush() == []
    lines = accounting.accounts()
    assert all(line["read"] == line["used"] + line["quarantined"] for line in lines)

    def read(source: str, epoch: int) -> int:
        return sum(line["read"] for line in lines if (line["source"], line["pass"]) == (source, epoch))

    assert (read("captions", 0), read("captions", 1)) == (12, 6)  # 18 rows: its second pass has begun
    assert (read("tagged", 0), read("tagged", 1)) == (6, 0)


def test_sources_come_from_a_file(tmp_path):
    path = tmp_path / "mix.json"
    path.write_text(json.dumps([{"name": "a", "shards": ["x.tar"], "weight": 2}, {"name": "b", "shards": ["y.tar"]}]))
    (config,) = parse_runs(["tiny", "--data.sources", str(path)], "test")
    assert config.data.training_sources() == (SourceConfig("a", ("x.tar",), 2.0), SourceConfig("b", ("y.tar",)))
    assert parse_runs(["tiny", "--data.train", "x.tar"], "test")[0].data.training_sources()[0].name == "train"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot read .*mix.json"),
        ("{", "is no JSON"),
        ('{"name": "a"}', r"the file is a list of"),
        ('[{"name": "a", "shards": ["x"], "wait": 1}]', r"0\.wait: Unexpected keyword"),
        ('[{"name": "a", "shards": []}]', "a names no shards"),
        ('[{"name": "a", "shards": ["x"], "weight": 0}]', "weight of a must be positive"),
        ('[{"name": "a/b", "shards": ["x"]}]', "must be of letters"),
        ('[{"name": "a", "shards": ["x"]}, {"name": "a", "shards": ["y"]}]', "names must differ"),
    ],
)
def test_files_of_sources_that_cannot_work(tmp_path, content, message):
    path = tmp_path / "mix.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError, match=rf"data\.sources: .*{message}"):
        parse_runs(["tiny", "--data.sources", str(path)], "test")


def test_train_and_sources_exclude_each_other():
    with pytest.raises(ConfigError, match="not both"):
        DataConfig(train=("x",), sources=(SourceConfig("a", ("y",)),))


def test_rows_that_validation_holds_too_are_marked(tmp_path):
    val = [("a", sample(1)), ("b", sample(2, title="Same  Title", artist="ann"))]
    write_shard(tmp_path / "val-00000.tar", val)
    train = [
        ("copy", sample(1, caption="the same file under another name")),
        ("title", sample(7, title="same title", artist="Ann")),
        ("other artist", sample(8, title="same title", artist="Bob")),
        ("fresh", sample(9)),
    ]
    pattern = str(write_shard(tmp_path / "train-00000.tar", train))
    known = known_ids(index_of(f"{tmp_path}/val-*.tar"), LOCAL, rows=100)
    config = small_config(train={"global_batch": 4, "chunk": 4}, data={"train": (pattern,)})
    (chunk,) = training_reader(config, [index_of(pattern)], LOCAL, known).read([0])
    assert {key for key, marked in zip(chunk["key"], chunk["in_val"], strict=True) if marked} == {"copy", "title"}
    assert len(known_ids(index_of(f"{tmp_path}/val-*.tar"), LOCAL, rows=1)) == 1
    assert np.all(np.diff(known) > 0)


def test_settings_that_change_no_result_change_no_name():
    config = small_config()
    slower = replace(config, data=replace(config.data, buffer_mib=7, cache_folder="/x", max_bad_share=0.9), storage="y")
    assert slower.named("r").name == config.named("r").name
    assert differences(config, slower) == []
    other = replace(config, data=replace(config.data, pad="repeat"))
    assert other.named("r").name != config.named("r").name
    assert differences(config, other) == ["data.pad: 'zero' there, 'repeat' here"]
