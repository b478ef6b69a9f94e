"""Metadata fields as labels: which values there are, and what a row's array says."""

import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from muser_dist.cli import parse_runs
from muser_dist.config import ModelConfig, ObjectiveConfig, RunConfig
from muser_dist.data import labels as module
from muser_dist.data.config import DataConfig, read_label_values
from muser_dist.data.labels import Labels, find_label_values
from muser_dist.data.text import normal_form, read_fields
from muser_dist.errors import ConfigError, DataError
from muser_dist.train.accounting import Accounting
from tests.shardmaker import bad_samples, sample, write_shard
from tests.small import LOCAL, index_of, reader_of, small_config

GENRES = ("folk", "rock", "ska")


def labelled_config(train: dict | None = None, **data) -> RunConfig:
    """The small config with its audio tower alone, which learns fields."""
    config = small_config(train=train)
    model = ModelConfig(audio=config.model.audio)
    objective = ObjectiveConfig("supervised", pairs=())
    return replace(config, data=replace(config.data, **data), model=model, objective=objective)


VALUES = st.sampled_from(
    ["Folk", "folk ", "FOLK", "ska", "Rock", ["rock"], ["ska", "folk"], [], "", None, 3, {"en": "ska"}]
)


@given(st.lists(VALUES, min_size=1, max_size=8))
@settings(max_examples=60)
def test_arrays_say_what_the_fields_say(values):
    data = DataConfig(classes=("genre",), tags=("tags",), label_values={"genre": GENRES, "tags": GENRES})
    labels = Labels(data)
    arrays = labels.empty(len(values))
    assert arrays["label/genre"].shape == (len(values),) and arrays["label/tags"].shape == (len(values), 3)
    for i, value in enumerate(values):
        fields = read_fields(json.dumps({"genre": value, "tags": value}).encode(), None)
        has = labels.put(arrays, i, fields)
        if isinstance(value, dict) or not value:
            entries = []
        else:
            entries = [normal_form(str(entry)) for entry in (value if isinstance(value, list) else [value])]
        of_class = [GENRES.index(entry) for entry in entries if entry in GENRES] if len(entries) == 1 else []
        assert arrays["label/genre"][i] == (of_class[0] if of_class else -1)
        # A row whose tags are all unknown has none of those that are told apart.
        expected = [int(genre in entries) for genre in GENRES] if entries else [-1, -1, -1]
        assert arrays["label/tags"][i].tolist() == expected
        assert has == bool(entries)


def shards(folder, rows: list[dict], per_shard: int = 5) -> str:
    samples = [(f"row{i}", {**sample(i), "json": json.dumps(row).encode()}) for i, row in enumerate(rows)]
    for first in range(0, len(samples), per_shard):
        write_shard(folder / f"train-{first:03d}.tar", samples[first : first + per_shard])
    return f"{folder}/train-*.tar"


def test_values_are_found_sorted_in_their_usual_spelling(tmp_path):
    rng = np.random.default_rng(0)
    rows = [{"genre": str(rng.choice(["Ska", "SKA", "folk", "Rock"])), "n": int(rng.integers(3))} for _ in range(40)]
    rows += [{"genre": ["Ska", "folk"], "tags": ["slow", "Old"]}, {"tags": "old"}, {"tags": ["old"]}, {}]
    pattern = shards(tmp_path, rows)
    write_shard(tmp_path / "train-999.tar", [(key, members) for key, members, _ in bad_samples()])
    told = []
    data = DataConfig(classes=("genre", "n"), tags=("tags",))
    index = index_of(pattern)
    found = find_label_values(data, [index], LOCAL, lambda done, of: told.append((done, of)))
    spellings = Counter(row["genre"] for row in rows if isinstance(row.get("genre"), str))
    ska = max(("SKA", "Ska"), key=lambda s: (spellings[s], s == "SKA"))
    assert found == {"genre": ("folk", "Rock", ska), "n": ("0", "1", "2"), "tags": ("old", "slow")}
    assert list(found) == ["genre", "n", "tags"]
    assert told[-1] == (len(index), len(index)) and len(told) == len(index)
    given = find_label_values(replace(data, label_values={"genre": ("ska", "polka")}), [index], LOCAL)
    assert given == {**found, "genre": ("ska", "polka")}


def test_fields_that_cannot_be_learned_are_named(tmp_path, monkeypatch):
    index = index_of(shards(tmp_path, [{"genre": "ska", "title": f"Song {i}"} for i in range(6)]))
    with pytest.raises(DataError, match=r"data\.classes: gender has 0 different values.*genre, title"):
        find_label_values(DataConfig(classes=("gender",)), [index], LOCAL)
    with pytest.raises(DataError, match=r"data\.classes: genre has 1 different values"):
        find_label_values(DataConfig(classes=("genre",)), [index], LOCAL)
    monkeypatch.setattr(module, "MOST_VALUES", 4)
    with pytest.raises(DataError, match=r"data\.tags: title has more than 4 different values"):
        find_label_values(DataConfig(tags=("title",)), [index], LOCAL)


def test_rows_without_a_label_are_quarantined_and_the_others_used(tmp_path):
    rows = [{"genre": "ska"}, {"genre": "polka"}, {"caption": "no label"}, {"tags": ["old"]}, {"genre": ["rock"]}]
    pattern = shards(tmp_path, rows)
    values = {"genre": GENRES, "tags": ("old", "slow")}
    train = {"global_batch": 5, "chunk": 5}
    config = labelled_config(train, classes=("genre",), tags=("tags",), label_values=values)
    (chunk,) = reader_of(config, pattern).read([0])
    by_row = {int(row): i for i, row in enumerate(chunk["row"])}
    order = [by_row[row] for row in range(5)]
    assert chunk["label/genre"][order].tolist() == [2, -1, -1, -1, 1]
    assert chunk["label/tags"][order].tolist() == [[-1, -1], [-1, -1], [-1, -1], [1, 0], [-1, -1]]
    assert chunk["valid_label"][order].tolist() == [True, False, False, True, True]
    assert "text_ids" not in chunk
    problems = [json.loads(problem) for problem in chunk["problems"]]
    assert {problem["key"] for problem in problems} == {"row1", "row2"}
    assert all(problem["reason"] == "no label: it has no known value of genre, tags" for problem in problems)
    accounting = Accounting(config.taking_part)
    accounting.add(chunk)
    accounting.flush()
    assert (accounting.totals["rows_used"], accounting.totals["rows_quarantined"]) == (3, 2)


def test_files_of_values(tmp_path):
    path = tmp_path / "labels.json"
    path.write_text('{"genre": ["folk", "ska"]}')
    assert read_label_values(str(path)) == {"genre": ("folk", "ska")}
    arguments = ["muser_audio_only", "--data.classes", "genre", "--data.label-values", str(path)]
    assert parse_runs(arguments, "test")[0].data.label_values == {"genre": ("folk", "ska")}
    assert parse_runs(arguments[:3], "test")[0].data.label_values == {}
    path.write_text('["folk"]')
    with pytest.raises(ConfigError, match=r"data\.label_values: .*labels\.json"):
        read_label_values(str(path))
    with pytest.raises(ConfigError, match="cannot read"):
        read_label_values(str(tmp_path / "absent.json"))


def test_values_do_not_depend_on_an_outage(tmp_path):
    for number, genre in enumerate(GENRES):
        write_shard(tmp_path / f"train-{number}.tar", [(f"k{number}", sample(number, genre=genre))])
    index = index_of(f"{tmp_path}/train-*.tar")
    data = DataConfig(classes=("genre",))
    assert find_label_values(data, [index], LOCAL) == {"genre": GENRES}
    (tmp_path / "train-1.tar").unlink()
    with pytest.raises(DataError, match=r"train-1\.tar cannot be read: No such file.*start again when it can be"):
        find_label_values(data, [index], LOCAL)
    (tmp_path / "train-1.tar").write_bytes((tmp_path / "train-0.tar").read_bytes()[:700])
    assert find_label_values(data, [index], LOCAL) == {"genre": ("folk", "ska")}  # what is damaged is left out


def test_a_value_in_two_spellings_is_refused():
    with pytest.raises(ConfigError, match=r"data\.label_values: tags has Rock in another spelling too; keep one"):
        Labels(DataConfig(tags=("tags",), label_values={"tags": ("Rock", "ska", "rock")}))
