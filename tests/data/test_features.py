"""Features of windows: what a member holds against NumPy's own reader, what is refused, and runs in chunks."""

import os
import pickle
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from muser_dist.config import ObjectiveConfig, PairConfig
from muser_dist.data.config import FeaturesConfig
from muser_dist.data.features import read_run, read_song
from muser_dist.data.pipeline import evaluation_chunks
from muser_dist.errors import ConfigError, DataError
from muser_dist.train.accounting import Accounting
from tests.data.test_decoder import stored
from tests.shardmaker import write_shard
from tests.small import LOCAL, index_of, reader_of, small_config
from tests.songs import FEATURES, MOST, SIZE, features_config, npy, piece, song, write_songs

COLUMNS = {"features", "features_length", "valid_features"}


def run_of(data: bytes, config: FeaturesConfig, position: float = 0.0) -> tuple[np.ndarray, int]:
    member = stored(data)
    try:
        return read_run(member.read, member.size, config, position)
    finally:
        os.close(member.file)


@given(
    windows=st.integers(1, 40),
    size=st.integers(1, 9),
    most=st.integers(1, 20),
    dtype=st.sampled_from(["<f2", "<f4", ">f2", ">f4"]),
    position=st.floats(0, 1, exclude_max=True),
    version=st.sampled_from([(1, 0), (2, 0)]),
    seed=st.integers(0, 99),
)
@settings(max_examples=150)
def test_a_run_is_a_part_of_what_numpy_reads(windows, size, most, dtype, position, version, seed):
    values = np.random.default_rng(seed).standard_normal((windows, size)).astype(dtype)
    buffer = os.fdopen(os.memfd_create("npy"), "w+b")
    np.lib.format.write_array(buffer, values, version=version, allow_pickle=False)
    buffer.seek(0)
    config = FeaturesConfig(size, most)
    run, length = run_of(buffer.read(), config, position)
    buffer.close()
    assert run.shape == (most, size) and run.dtype == np.float16 and length == min(windows, most)
    first = int(position * (windows - length + 1))
    np.testing.assert_array_equal(values[first : first + length].astype("f2"), run[:length])
    assert not run[length:].any()


@given(windows=st.integers(1, 40), most=st.integers(1, 12), kind=st.sampled_from(["array", "bytes", "path"]))
@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_song_is_read_whole_and_the_last_run_ends_with_it(tmp_path, windows, most, kind):
    values = song(3, windows, np.float32)
    (tmp_path / "song.npy").write_bytes(npy(values))
    given_as = {"array": values, "bytes": npy(values), "path": tmp_path / "song.npy"}[kind]
    runs = list(read_song(given_as, FeaturesConfig(SIZE, most)))
    assert [length for _, length, _ in runs] == [min(windows, most)] * -(-windows // most)
    together = np.concatenate([run[:length][length - new :] for run, length, new in runs])
    np.testing.assert_array_equal(together, values.astype(np.float16))
    np.testing.assert_array_equal(runs[-1][0][: runs[-1][1]], values.astype(np.float16)[-most:])


def header(text: str) -> bytes:
    """A file with this header, and nothing behind it."""
    body = (text + " " * (-(len(text) + 11) % 64) + "\n").encode("latin1")
    return b"\x93NUMPY\x01\x00" + len(body).to_bytes(2, "little") + body


def hostile() -> dict[str, tuple[bytes, str]]:
    """Members that cannot be used, by name, and what the reason says."""
    fine = npy(song(0, 4))
    objects = b"\x93NUMPY\x01\x00" + header("{'descr': '|O', 'fortran_order': False, 'shape': (4, 12), }")[8:]
    nan = song(0, 4)
    nan[2, 3] = np.nan
    claims = "{'descr': '<f2', 'fortran_order': False, 'shape': (%s), }"
    return {
        "nothing": (b"", "NumPy's format"),
        "text": (b"no array at all", "NumPy's format"),
        "pickled": (pickle.dumps([1.0]), "NumPy's format"),
        "objects": (objects + pickle.dumps([1.0]), "type object"),
        "nan": (npy(nan), "NaN or infinite"),
        "infinite": (npy(np.full((4, SIZE), np.inf, np.float32)), "NaN or infinite"),
        "beyond": (npy(np.full((4, SIZE), 1e5, np.float32)), "65,504"),
        "double": (npy(song(0, 4, np.float64)), "type float64"),
        "whole": (npy(np.ones((4, SIZE), np.int16)), "type int16"),
        "otherwidth": (npy(song(0, 4)[:, :5]), r"\(4, 5\).*data\.features\.size"),
        "flat": (npy(song(0, 4)[0]), r"\(12,\)"),
        "deep": (npy(song(0, 4)[None]), r"\(1, 4, 12\)"),
        "columns": (npy(np.asfortranarray(song(0, 4))), "ascontiguousarray"),
        "empty": (npy(song(0, 0)), "no windows"),
        "cut": (fine[:-1], "bytes of features"),
        "longer": (fine + b"x", "bytes of features"),
        "huge": (header(claims % "10**9, 12".replace("10**9", "1000000000")), "bytes of features"),
        "negative": (header(claims % "-4, 12"), "no windows"),
        "manydigits": (header(claims % ("9" * 4000 + ", 12")), "NumPy's format|bytes of features"),
        "nested": (header("(" * 3000), "NumPy's format"),
        "unary": (header("-" * 3000 + "1"), "NumPy's format"),
        "endless": (b"\x93NUMPY\x02\x00" + b"\xff" * 4 + fine, "NumPy's format"),
        "newer": (b"\x93NUMPY\x03\x00" + fine[8:], r"version 3\.0"),
        "archive": (b"PK\3\4" + bytes(100), "NumPy's format"),
    }


@pytest.mark.parametrize("name", hostile())
def test_what_cannot_be_used_says_why(name, tmp_path):
    data, reason = hostile()[name]
    with pytest.raises(DataError, match=reason):
        run_of(data, FeaturesConfig(SIZE, MOST))
    with pytest.raises(DataError, match=f"features given as bytes: .*({reason})"):
        list(read_song(data, FeaturesConfig(SIZE, MOST)))


@given(data=st.binary(max_size=300), version=st.sampled_from([1, 2]))
@settings(max_examples=200)
def test_any_bytes_are_features_or_an_error(data, version):
    for content in (data, b"\x93NUMPY" + bytes([version, 0]) + data):
        try:
            run, length = run_of(content, FeaturesConfig(2, 3))
        except DataError:
            continue
        assert run.shape == (3, 2) and 1 <= length <= 3


def test_no_more_is_read_than_is_wanted():
    """Whatever a member has: here 400 MB that no memory was ever given."""
    values = song(0, 4)
    start = header(f"{{'descr': '<f2', 'fortran_order': False, 'shape': ({400_000_000 // 2 // SIZE}, {SIZE}), }}")
    asked = []

    def read(first: int, stop: int) -> bytes:
        asked.append(stop - first)
        return start[first:stop] if first == 0 else np.resize(values, (MOST, SIZE)).tobytes()[: stop - first]

    total = len(start) + 400_000_000 // 2 // SIZE * SIZE * 2
    _, length = read_run(read, total, FeaturesConfig(SIZE, MOST), 0.999)
    assert length == MOST and sum(asked) <= 4096 + MOST * SIZE * 2


def test_files_that_are_not_there_and_objects_are_named(tmp_path):
    with pytest.raises(DataError, match=r"gone\.npy: there is no such file"):
        list(read_song(tmp_path / "gone.npy", FeaturesConfig(SIZE, MOST)))
    with pytest.raises(DataError, match=f"{tmp_path}: cannot be read: Is a directory"):
        list(read_song(tmp_path, FeaturesConfig(SIZE, MOST)))
    with pytest.raises(DataError, match="features given as ndarray"):
        list(read_song(np.array([[{}]]), FeaturesConfig(1, MOST)))
    with pytest.raises(ConfigError, match=r"data\.features\.size must be at least 1"):
        FeaturesConfig(size=0)


# --- In chunks ---


def read(config, pattern, steps=1):
    reader = reader_of(config, pattern)
    return list(reader.read(range(steps * reader.slots_per_step)))


def test_a_chunk_has_features_and_no_sound_where_no_tower_hears(tmp_path):
    config = features_config()
    pattern = write_songs(tmp_path, 8)
    chunk, *_ = read(config, pattern)
    c = config.train.chunk
    assert (chunk["features"].shape, chunk["features"].dtype) == ((c, MOST, SIZE), np.float16)
    assert (chunk["features_length"].shape, chunk["features_length"].dtype) == ((c,), np.int32)
    assert chunk["valid_features"].all() and chunk["valid_text"].all() and chunk["problems"] == []
    assert not chunk.keys() & {"audio", "patches", "valid_symbolic", "valid_audio"}
    assert reader_of(config, pattern).chunk_bytes == c * (2 * MOST * SIZE + 4 * config.data.max_tokens)


def test_runs_are_what_the_plan_draws_whatever_the_workers(tmp_path):
    pattern = write_songs(tmp_path, 16)
    seen, places = [], set()
    for train in ({}, {"workers": 3, "chunk": 4}, {"global_batch": 4}):
        config, of_rows = features_config(train=train), {}
        reader = reader_of(config, pattern)
        for chunk in reader.read(range(6 * reader.slots_per_step)):
            for i, (row, epoch) in enumerate(zip(chunk["row"].tolist(), chunk["epoch"].tolist(), strict=True)):
                if row < 0 or epoch > 1:
                    continue
                values, length = song(row), int(chunk["features_length"][i])
                place = int(reader.plan.features_rng(epoch, row).random() * (len(values) - length + 1))
                assert length == min(len(values), MOST)
                np.testing.assert_array_equal(chunk["features"][i, :length], values[place : place + length])
                assert not chunk["features"][i, length:].any()
                of_rows[epoch, row] = chunk["features"][i].tobytes()
                places.add(place)
        seen.append(of_rows)
    assert len(seen[0]) == 32 and seen[0] == seen[1] == {**seen[0], **seen[2]}
    assert len(places) > 3  # of songs of up to 11 windows
    for chunk in evaluation_chunks(features_config(), index_of(pattern), LOCAL):
        for i, row in enumerate(chunk["row"].tolist()):
            if row >= 0:
                length = int(chunk["features_length"][i])
                np.testing.assert_array_equal(chunk["features"][i, :length], song(row)[:MOST])  # the head


def test_reading_features_changes_nothing_else(tmp_path):
    pattern = write_songs(tmp_path, 16, "npy", "flac")
    small = small_config(data={"features": FeaturesConfig(SIZE, MOST)})
    pairs = (*small.objective.pairs, PairConfig("features", "text"))
    more = replace(small, model=replace(small.model, features=FEATURES), objective=ObjectiveConfig(pairs=pairs))
    small = replace(small, objective=ObjectiveConfig(pairs=small.objective.pairs))
    for one, two in zip(read(small, pattern), read(more, pattern), strict=True):
        assert two.keys() - one.keys() == COLUMNS
        for name in one.keys() - {"seconds"}:
            np.testing.assert_array_equal(one[name], two[name], err_msg=name)


def test_what_cannot_be_read_costs_its_row(tmp_path):
    bad = hostile()
    samples = [("fine", piece(0, "npy")), ("lacking", piece(1)), ("alright", piece(2, "npy"))]
    samples += [(name, piece(3) | {"npy": data}) for name, (data, _) in bad.items()]
    write_shard(tmp_path / "train-0.tar", samples)
    config = features_config(train={"chunk": (n := len(samples)), "global_batch": n, "samples": n})
    (chunk,) = read(config, f"{tmp_path}/*.tar")
    valid = dict(zip(chunk["key"], chunk["valid_features"].tolist(), strict=True))
    assert {key for key, flag in valid.items() if flag} == {"fine", "alright"}
    accounting = Accounting(config.taking_part)
    accounting.add(chunk)
    entries = {entry["key"]: entry for entry in accounting.flush()}
    assert entries.keys() == valid.keys() - {"fine", "alright"}
    assert (accounting.totals["rows_used"], accounting.totals["rows_quarantined"]) == (2, len(samples) - 2)
    assert "jobs/embed.py --features" in entries["lacking"]["reason"] and entries["nan"]["member"] == "npy"
    for i, key in enumerate(chunk["key"]):
        assert bool(chunk["features"][i].any()) == valid[key] == bool(chunk["features_length"][i])
