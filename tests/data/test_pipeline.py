import json
import os
import re
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from muser_dist.config import EvaluateConfig
from muser_dist.data import rows
from muser_dist.data.pipeline import evaluation_chunks, known_ids, to_block
from muser_dist.data.shards import SIDECAR
from muser_dist.errors import DataError
from tests.shardmaker import bad_samples, sample, write_shard, write_shards
from tests.small import LOCAL, index_of, reader_of, small_config


def test_a_chunk_has_the_shapes_that_the_contract_says(tmp_path):
    config = small_config()
    (chunk,) = reader_of(config, write_shards(tmp_path, [8, 8])).read([0])
    c, samples, tokens = config.train.chunk, config.data.crop_samples, config.data.max_tokens
    assert (chunk["step"], chunk["chunk"]) == (0, 0)
    assert (chunk["audio"].shape, chunk["audio"].dtype) == ((c, samples), np.int16)
    assert (chunk["text_ids"].shape, chunk["text_ids"].dtype) == ((c, tokens), np.int32)
    for name in ("row", "epoch", "text_id", "audio_length", "text_length"):
        assert chunk[name].shape == (c,)
    for modality in config.model.towers():
        assert chunk[f"valid_{modality}"].tolist() == [True] * c
    assert len(chunk["key"]) == len(chunk["text"]) == c
    assert chunk["problems"] == []


def test_labels_are_equal_where_the_field_says_the_same(tmp_path):
    pattern = write_shards(tmp_path, [8, 8])
    config = small_config(data={"label": "instrument", "templates": ("{instrument}", "{caption}")})
    chunks = list(reader_of(config, pattern).read(range(8)))
    fields = {
        int(row): json.loads(text)["instrument"]
        for chunk in evaluation_chunks(config, index_of(pattern), LOCAL)
        for row, text in zip(chunk["row"], chunk["fields"], strict=True)
        if row >= 0
    }
    labels: dict[str, set[int]] = {}
    for chunk in chunks:
        for row, label in zip(chunk["row"].tolist(), chunk["label_id"].tolist(), strict=True):
            labels.setdefault(fields[row], set()).add(label)
    assert len(labels) > 1
    assert all(len(ids) == 1 for ids in labels.values())
    assert len(set.union(*labels.values())) == len(labels)
    without = next(iter(reader_of(small_config(data={"label": "absent"}), pattern).read([0])))
    assert (without["label_id"] == -1).all()


@pytest.mark.parametrize("workers", [1, 2, 3, 4, 7])
def test_a_global_batch_is_the_same_for_any_number_of_workers(tmp_path, workers):
    pattern = write_shards(tmp_path, [8, 8, 5])
    config = small_config(train={"workers": workers})
    reader = reader_of(config, pattern)
    assert reader.slots_per_step % workers == 0
    chunks = list(reader.read(range(2 * reader.slots_per_step)))
    rows = [row for chunk in chunks for row in chunk["row"].tolist()]
    real = [row for row in rows if row >= 0]
    assert real == reader_of(small_config(), pattern).plan.rows(0, 16).index.tolist()
    assert len(rows) == 2 * reader.slots_per_step * config.train.chunk
    for chunk in chunks:
        if chunk["chunk"] >= config.train.chunks_per_step:
            assert (chunk["row"] == -1).all()
            assert not chunk["valid_audio"].any()
            assert not chunk["valid_text"].any()


def test_chunks_do_not_depend_on_what_is_read_with_them(tmp_path):
    reader = reader_of(small_config(), write_shards(tmp_path, [8, 8]))
    together = list(reader.read(range(6)))
    (alone,) = reader.read([4])
    del alone["seconds"]
    for name, value in alone.items():
        np.testing.assert_array_equal(value, together[4][name])


def test_another_epoch_means_other_crops_and_templates(tmp_path):
    reader = reader_of(small_config(), write_shards(tmp_path, [4]))
    chunks = list(reader.read(range(20)))  # ten epochs of four rows
    by_row: dict[int, set] = {}
    for chunk in chunks:
        for i, row in enumerate(chunk["row"].tolist()):
            by_row.setdefault(row, set()).add((chunk["audio"][i].tobytes(), chunk["text"][i]))
    assert all(len(versions) == 10 for versions in by_row.values())
    assert any(len({text for _, text in versions}) == 2 for versions in by_row.values())


@pytest.mark.parametrize(("key", "members", "reason"), bad_samples())
def test_each_bad_sample_keeps_its_place_with_a_flag_off_and_a_reason(tmp_path, key, members, reason):
    good = [(f"good{i}", sample(i)) for i in range(3)]
    write_shard(tmp_path / "train-00000.tar", [good[0], (key, members), *good[1:]])
    (first, second) = evaluation_chunks(small_config(), index_of(f"{tmp_path}/*.tar"), LOCAL)
    assert first["key"][1] == key
    assert not (first["valid_audio"][1] and first["valid_text"][1])
    assert first["valid_audio"][0]
    assert second["valid_text"].all()
    (entry,) = (json.loads(problem) for problem in first["problems"])
    assert re.search(reason, entry["reason"])
    assert (entry["key"], entry["row"], entry["shard"]) == (key, 1, f"{tmp_path}/train-00000.tar")
    assert isinstance(entry["offset"], int)


def test_stems_with_dots_find_their_members(tmp_path):
    good = sample(0)
    write_shard(tmp_path / "train-00000.tar", [("01. Artist - Song", good)])
    (chunk,) = evaluation_chunks(small_config(), index_of(f"{tmp_path}/*.tar"), LOCAL)
    assert chunk["problems"] == []
    assert chunk["key"][0] == "01"


def test_a_row_without_text_keeps_its_audio(tmp_path):
    write_shard(tmp_path / "train-00000.tar", [("a", {"flac": sample(0)["flac"]}), ("b", sample(1))])
    (chunk,) = evaluation_chunks(small_config(), index_of(f"{tmp_path}/*.tar"), LOCAL)
    assert chunk["valid_audio"].tolist() == [True, True]
    assert chunk["valid_text"].tolist() == [False, True]
    assert chunk["text_id"][0] == -1


def test_fewer_rows_than_the_index_says_are_quarantined_and_surplus_rows_unused(tmp_path):
    write_shards(tmp_path, [3, 5])
    (tmp_path / SIDECAR).write_text(json.dumps({"format": 1, "rows": {"train-00000.tar": 4, "train-00001.tar": 4}}))
    chunks = list(evaluation_chunks(small_config(), index_of(f"{tmp_path}/*.tar"), LOCAL))
    assert sum(chunk["valid_audio"].sum() for chunk in chunks) == 7
    missing, surplus = (json.loads(problem) for chunk in chunks for problem in chunk["problems"])
    assert (missing["row"], missing["reason"]) == (3, "the shard holds fewer samples than its index says")
    assert (surplus["row"], surplus["count"], surplus["shard"]) == (None, 1, f"{tmp_path}/train-00001.tar")


def test_surplus_rows_are_told_once_a_pass_whatever_the_pass_holds(tmp_path):
    """With a share of the rows a shard's first row is in few passes."""
    write_shards(tmp_path, [5] * 8)
    (tmp_path / SIDECAR).write_text(json.dumps({"format": 1, "rows": {f"train-{i:05d}.tar": 4 for i in range(8)}}))
    config = small_config(data={"train_share": 0.25}, train={"global_batch": 8, "chunk": 8})
    for step in range(2):
        (chunk,) = reader_of(config, f"{tmp_path}/*.tar").read([step])
        told = [json.loads(problem) for problem in chunk["problems"]]
        assert sorted(entry["shard"] for entry in told) == sorted(f"{tmp_path}/train-{i:05d}.tar" for i in range(8))
        assert [entry["count"] for entry in told] == [1] * 8


@pytest.mark.parametrize("chunk", [2, 3, 8])
def test_as_many_rows_are_scored_as_are_asked_for_in_chunks_of_any_size(tmp_path, chunk):
    index = index_of(write_shards(tmp_path, [3, 4, 3]))
    config = small_config(train={"chunk": chunk, "global_batch": 24}, evaluate=EvaluateConfig(rows=5))
    chunks = list(evaluation_chunks(config, index, LOCAL))
    assert [row for chunk in chunks for row in chunk["row"].tolist() if row >= 0] == [0, 1, 2, 3, 4]


def test_a_truncated_shard_yields_its_whole_rows_and_quarantines_the_rest(tmp_path):
    write_shards(tmp_path, [6])
    path = tmp_path / "train-00000.tar"
    (tmp_path / SIDECAR).write_text(json.dumps({"format": 1, "rows": {"train-00000.tar": 6}}))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    chunks = list(evaluation_chunks(small_config(), index_of(f"{tmp_path}/*.tar"), LOCAL))
    used = sum(int((chunk["valid_audio"] & chunk["valid_text"]).sum()) for chunk in chunks)
    entries = [json.loads(problem) for chunk in chunks for problem in chunk["problems"]]
    assert 1 <= used < 6
    assert len({entry["row"] for entry in entries}) == 6 - used
    assert any("cut short" in entry["reason"] for entry in entries)


def test_a_shard_that_vanished_quarantines_its_rows(tmp_path):
    index = index_of(write_shards(tmp_path, [2, 2]))
    (tmp_path / "train-00001.tar").unlink()
    chunks = list(evaluation_chunks(small_config(), index, LOCAL))
    entries = [json.loads(problem) for chunk in chunks for problem in chunk["problems"]]
    assert [entry["row"] for entry in entries] == [2, 3]
    assert "cannot be read" in entries[0]["reason"]


def test_a_shard_that_storage_did_not_give_once_is_read_again_later(tmp_path, monkeypatch):
    pattern = write_shards(tmp_path, [6])
    reader = reader_of(small_config(), pattern)
    walked = rows.walk

    def outage(file):
        yield from islice(walked(file), 2)
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(rows, "walk", outage)
    assert [reader.rows.row(0, number).unread for number in range(6)] == [False] * 2 + [True] * 4
    monkeypatch.setattr(rows, "walk", walked)
    assert reader.rows.row(0, 5).unread  # not at each row: waiting for a dead server takes long
    monkeypatch.setattr(rows, "_FAILED_SECONDS", 0.0)
    assert [reader.rows.row(0, number).problem for number in range(6)] == [None] * 6


def test_a_folder_whose_name_is_no_unicode_is_told_with_replacements(tmp_path):
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/Musik_\xfc"))
    pattern = write_shards(folder, [3])
    (chunk,) = reader_of(small_config(), pattern).read([0])
    assert to_block(chunk).num_rows == 1
    assert "Musik_\ufffd/train-00000.tar" in str(chunk["shard"])


def test_what_a_run_must_not_train_on_does_not_depend_on_an_outage(tmp_path):
    index = index_of(write_shards(tmp_path, [3, 3]))
    assert len(known_ids(index, LOCAL, 6)) == 6
    (tmp_path / "train-00001.tar").unlink()
    with pytest.raises(DataError, match=r"train-00001\.tar: .*cannot be read.*take the shard out"):
        known_ids(index, LOCAL, 6)
    assert len(known_ids(index, LOCAL, 3)) == 3


def test_a_finite_pass_pads_its_last_chunk(tmp_path):
    chunks = list(evaluation_chunks(small_config(), index_of(write_shards(tmp_path, [3])), LOCAL))
    assert [chunk["row"].tolist() for chunk in chunks] == [[0, 1], [2, -1]]


def test_a_chunk_may_come_from_more_shards_than_are_kept(tmp_path):
    config = small_config(train={"chunk": 40, "global_batch": 40, "samples": 40}, data={"window_shards": 4})
    reader = reader_of(config, write_shards(tmp_path, [1] * 40))
    (chunk,) = reader.read([0])
    assert chunk["problems"] == [] and chunk["valid_audio"].all()


def test_the_plain_extension_wins_over_a_dotted_one(tmp_path):
    good = sample(0)
    lyrics = {"lyrics.json": b'{"caption": "la la"}'}
    write_shard(tmp_path / "train-00000.tar", [("a", {**good, **lyrics}), ("b", {**lyrics, **good})])
    (chunk,) = evaluation_chunks(small_config(), index_of(f"{tmp_path}/*.tar"), LOCAL)
    assert chunk["text"][0] == chunk["text"][1] != "la la"
