"""Notation in chunks: as the plan draws it, read by the child that may die of it, and none where nobody reads it."""

import json
import sys
from dataclasses import replace

import numpy as np
import pytest

from muser_dist.config import ModelConfig, ObjectiveConfig, PairConfig
from muser_dist.data import decoder as decoder_module
from muser_dist.data.decoder import Decoder, Piece
from muser_dist.data.pipeline import evaluation_chunks
from muser_dist.data.symbolic.encode import encode_member
from muser_dist.data.symbolic.members import draw_members
from muser_dist.data.symbolic.patches import to_text
from muser_dist.errors import DataError
from muser_dist.train.accounting import Accounting
from tests.data.symbolic.notation import melody
from tests.data.test_decoder import stored
from tests.fatal import FATAL, install
from tests.scores import M3, NOTATION, TEXT, abc, midi, piece, symbolic_config, write_scores
from tests.shardmaker import write_shard, write_shards
from tests.small import LOCAL, index_of, reader_of, small_config

COLUMNS = {"patches", "patches_length", "valid_symbolic"}
OTHER = {"notation_patches", "notation_length", "valid_notation"}


def read(config, pattern, steps=1):
    reader = reader_of(config, pattern)
    return list(reader.read(range(steps * reader.slots_per_step)))


def kinds(patches: np.ndarray) -> list[str]:
    """Of each row, which notation it is."""
    return ["midi" if to_text(row).startswith("ticks") else "abc" for row in patches]


def test_a_chunk_has_patches_and_no_sound_where_no_tower_hears(tmp_path):
    config = symbolic_config()
    chunk, *_ = read(config, write_scores(tmp_path, 8))
    c = config.train.chunk
    assert (chunk["patches"].shape, chunk["patches"].dtype) == ((c, 24, 64), np.uint8)
    assert (chunk["patches_length"].shape, chunk["patches_length"].dtype) == ((c,), np.int32)
    assert chunk["valid_symbolic"].all() and chunk["valid_text"].all() and chunk["problems"] == []
    assert not chunk.keys() & {"audio", "audio_length", "spectrogram", "valid_audio", *OTHER}
    reader = reader_of(config, f"{tmp_path}/train-*.tar")
    assert reader.chunk_bytes == c * (24 * 64 + 4 * config.data.max_tokens)
    both = reader_of(symbolic_config(TEXT, NOTATION), f"{tmp_path}/train-*.tar")
    assert both.chunk_bytes - reader.chunk_bytes == c * 24 * 64


def test_rows_are_what_the_plan_draws_whatever_the_workers(tmp_path):
    pattern = write_scores(tmp_path, 16)
    seen = []
    for train in ({}, {"workers": 3, "chunk": 4}, {"global_batch": 4}):
        config, of_rows = symbolic_config(NOTATION, train=train), {}
        reader = reader_of(config, pattern)
        for chunk in reader.read(range(4 * reader.slots_per_step)):
            for i, (row, epoch) in enumerate(zip(chunk["row"].tolist(), chunk["epoch"].tolist(), strict=True)):
                if row < 0 or epoch > 0:
                    continue
                of_rows[row] = chunk["patches"][i].tobytes(), chunk["notation_patches"][i].tobytes()
                seeds = reader.plan.notation_rng(epoch, row).integers(2**63, size=2).tolist()
                members = piece(row, "abc", "mid")
                drawn = draw_members(members, config.data.symbolic, seeds[0])
                for name, seed, patches in zip(drawn, seeds, of_rows[row], strict=True):
                    assert encode_member(name, members[name], config.data.symbolic, seed)[0].tobytes() == patches
        seen.append(of_rows)
    assert len(seen[0]) == 16 and seen[0] == seen[1] == {**seen[0], **seen[2]}


def test_the_other_notation_is_the_one_that_was_not_drawn(tmp_path):
    chunks = read(symbolic_config(TEXT, NOTATION), write_scores(tmp_path, 32), 4)
    pairs = [
        two for chunk in chunks for two in zip(kinds(chunk["patches"]), kinds(chunk["notation_patches"]), strict=True)
    ]
    assert {*pairs} == {("abc", "midi"), ("midi", "abc")}
    (chunk, *_) = evaluation_chunks(symbolic_config(), index_of(f"{tmp_path}/*.tar"), LOCAL)
    assert kinds(chunk["patches"]) == ["abc"] * 2 and kinds(chunk["notation_patches"]) == ["midi"] * 2
    (chunk, *_) = evaluation_chunks(symbolic_config(notations=("midi", "abc")), index_of(f"{tmp_path}/*.tar"), LOCAL)
    assert kinds(chunk["patches"]) == ["midi"] * 2 and kinds(chunk["notation_patches"]) == ["abc"] * 2
    (chunk, *_) = evaluation_chunks(symbolic_config(notations=("midi",)), index_of(f"{tmp_path}/*.tar"), LOCAL)
    assert kinds(chunk["patches"]) == ["midi"] * 2 and not chunk.keys() & OTHER


def test_reading_notation_changes_nothing_else(tmp_path):
    pattern = write_scores(tmp_path, 16, "abc", "mid", "flac")
    small = small_config(data={"symbolic": symbolic_config().data.symbolic})
    pairs = (*small.objective.pairs, PairConfig(*TEXT), PairConfig(*NOTATION))
    more = replace(small, model=replace(small.model, symbolic=M3), objective=replace(small.objective, pairs=pairs))
    for one, two in zip(read(small, pattern), read(more, pattern), strict=True):
        assert two.keys() - one.keys() == COLUMNS | OTHER
        for name in one.keys() - {"seconds"}:
            np.testing.assert_array_equal(one[name], two[name], err_msg=name)


def test_a_row_without_the_other_notation_is_used_where_it_can_be(tmp_path):
    write_shard(tmp_path / "train-0.tar", [("both", piece(0, "abc", "mid")), ("one", piece(1, "mid"))])
    train = {"global_batch": 2, "chunk": 2}
    for pairs, told, used in (((TEXT, NOTATION), 0, 2), ((NOTATION,), 1, 1)):
        config = symbolic_config(*pairs, train=train)
        (chunk,) = read(config, f"{tmp_path}/*.tar")
        assert dict(zip(chunk["key"], chunk["valid_notation"].tolist(), strict=True)) == {"both": True, "one": False}
        accounting = Accounting(config.taking_part)
        accounting.add(chunk)
        entries = accounting.flush()
        assert [entry["key"] for entry in entries] == ["one"] * told
        assert (accounting.totals["rows_used"], accounting.totals["rows_quarantined"]) == (used, 2 - used)
        assert all("no other notation beside .mid" in entry["reason"] for entry in entries)


def test_what_cannot_be_read_costs_its_row(tmp_path, monkeypatch):
    many = melody(*[60 + i % 12 for i in range(3000)])  # each has two events
    samples = [
        ("fine", piece(0, "abc", "mid")),
        ("nothing", {"json": piece(0)["json"]}),
        ("nonotes", piece(1) | {"abc": b"X:1\nK:C\n"}),
        ("broken", piece(2) | {"mid": b"MThd\0\0"}),
        ("many", piece(3) | {"mid": many}),
        ("large", piece(4) | {"abc": abc(4) * 800}),
        ("bomb", piece(5) | {"mxl": b"PK\3\4" + bytes(100)}),
        ("alright", piece(6, "mid")),
    ]
    write_shard(tmp_path / "train-0.tar", samples)
    config = symbolic_config(train={"chunk": 8, "global_batch": 8}, max_events=5000, max_bytes=40_000)
    (chunk,) = read(config, f"{tmp_path}/*.tar")
    entries = {entry["key"]: entry for entry in map(json.loads, chunk["problems"])}
    valid = dict(zip(chunk["key"], chunk["valid_symbolic"].tolist(), strict=True))
    assert {key for key, flag in valid.items() if flag} == {"fine", "alright"}
    assert entries.keys() == valid.keys() - {"fine", "alright"}
    assert "no member with notation" in entries["nothing"]["reason"] and entries["broken"]["member"] == "mid"
    assert "max_events" in entries["many"]["reason"] and "max_bytes" in entries["large"]["reason"]
    for i, key in enumerate(chunk["key"]):
        assert bool(chunk["patches"][i].any()) == valid[key] == bool(chunk["patches_length"][i])


def test_notation_that_kills_its_reader_costs_one_row(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [str(install(tmp_path)), *sys.path])
    config = replace(symbolic_config().data, sample_rate=8_000, crop_seconds=0.5)
    decoder = Decoder(config)
    try:
        into = np.full((4, 24, 64), 9, np.uint8)
        given = {
            1: Piece(stored(abc(1)), "abc", 5),
            2: Piece(stored(FATAL), "abc", 5),
            3: Piece(stored(midi(3)), "mid", None),
        }
        answers = decoder.encode(given, into)
    finally:
        decoder.close()
    assert isinstance(answers[2], DataError)
    assert (into[[0, 2]] == 9).all()
    for row, data, name, seed in ((1, abc(1), "abc", 5), (3, midi(3), "mid", None)):
        patches, length = encode_member(name, data, config.symbolic, seed)
        np.testing.assert_array_equal(into[row], patches)
        assert answers[row] == length
    decoder_module._decoder.cache_clear()


def test_a_tower_that_is_kept_and_not_named_is_not_fed(tmp_path):
    config = small_config()
    kept = replace(config.model.audio, freeze=True, freeze_head=True)
    config = replace(
        config,
        model=ModelConfig(audio=kept, symbolic=M3, text=config.model.text, projection_dim=8),
        objective=ObjectiveConfig(pairs=(PairConfig(*TEXT),)),
        data=replace(config.data, symbolic=symbolic_config().data.symbolic),
    )
    pattern = write_scores(tmp_path, 8)  # without any sound
    chunk, *_ = read(config, pattern)
    assert config.features == ("symbolic", "text") and chunk["problems"] == [] and "audio" not in chunk
    (chunk, *_) = evaluation_chunks(config, index_of(pattern), LOCAL)
    assert not chunk["valid_audio"].any() and "no audio member" in chunk["problems"][0]  # there it is embedded


@pytest.mark.parametrize("needs", ["text", "symbolic"])
def test_texts_alone_need_neither_sound_nor_notation(tmp_path, needs):
    small = small_config()
    config = replace(
        small,
        data=replace(small.data, classes=("instrument",), label_values={"instrument": ("flute", "horn")}),
        model=ModelConfig(**{needs: {**small.model.towers(), "symbolic": M3}[needs]}),
        objective=ObjectiveConfig("supervised", pairs=()),
    )
    pattern = write_scores(tmp_path / "a", 8) if needs == "symbolic" else write_shards(tmp_path / "b", [8])
    chunk, *_ = read(config, pattern)
    assert chunk["problems"] and "audio" not in chunk  # fiddles and bells have no label
    assert chunk[f"valid_{needs}"].all() and reader_of(config, pattern).chunk_bytes > 0
