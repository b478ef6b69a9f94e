"""Embedding without Ray: what a part holds, and which parts are made again."""

import json
import os
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from muser_dist import Muser
from muser_dist.data.decoder import decoder
from muser_dist.data.pipeline import evaluation_chunks
from muser_dist.data.rows import FileReader, Row, RowReader, index_files
from muser_dist.data.shards import ShardIndex
from muser_dist.data.tar import Stored
from muser_dist.embed import job
from muser_dist.embed.job import Collector
from muser_dist.embed.parts import Manifest, Parts
from muser_dist.embed.songs import SongReader, Wanted, encode_windows
from muser_dist.errors import ConfigError, DataError
from muser_dist.files import alone_in
from muser_dist.models.model import MultimodalModel
from muser_dist.muser import save_model
from muser_dist.search import Index
from tests.shardmaker import bad_samples, encode, sample, tone, write_shard
from tests.small import LOCAL, index_of, small_config


@pytest.fixture(scope="module")
def muser(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    save_model(folder, MultimodalModel(small_config()).state_dict(), small_config())
    yield Muser.from_pretrained(folder)
    decoder(small_config().data).close()


def song(i):
    return tone(i, 0.2 + 0.3 * (i % 4))


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    rows = [(f"piece{i:02d}", sample(i) | {"flac": encode(song(i))}) for i in range(14)]
    write_shard(folder / "a-0.tar", [*rows[:9], *((key, members) for key, members, _ in bad_samples())])
    write_shard(folder / "a-1.tar", rows[9:])
    return f"{folder}/a-*.tar"


def parts_of(muser, rows, folder, part_rows=8, **wanted):
    """A job's reader and parts."""
    defaults = {"modalities": ("audio",), "windows": "all", "hop_seconds": 0.5, "fields": ()}
    songs = SongReader(rows, muser.config.data, Wanted(**defaults | wanted), batch=4)
    parts = Parts(folder, Manifest.of(muser, songs.wanted, rows.index, LOCAL, part_rows), {"commit": "c0ffee"})
    parts.claim()
    return songs, parts


def embed(muser, songs, parts, seed=0):
    """What muser_dist/embed/job.py does, in this process; results come in a random order, as from Ray."""
    results = []
    for part in parts.missing():
        begin, end = parts.manifest.range(part)
        for first in range(begin, end, 3):
            batches = songs.read(first, min(first + 3, end))
            results += [encode_windows(muser, batch, songs.wanted) for batch in batches]
    collector = Collector(parts, songs.wanted)
    order = np.random.default_rng(seed).permutation(len(results))
    added = sum(collector.add(results[i]) for i in order)
    assert added == sum(r["stop"] - r["first"] for r in results if r["batch"] == 0)
    assert collector.complete
    return parts.finish()


def table_of(parts):
    return [row for part in range(parts.manifest.parts) for row in pq.read_table(parts.path(part)).to_pylist()]


def test_every_row_is_embedded_or_named(muser, shards, tmp_path):
    songs, parts = parts_of(
        muser, RowReader(index_of(shards), LOCAL), tmp_path, modalities=muser.modalities, fields=("instrument",)
    )
    rows, entries = embed(muser, songs, parts)
    table = table_of(parts)
    assert rows == len(table)
    problems = [json.loads(line) for line in parts.quarantine.read_text().splitlines()]
    assert entries == len(problems)
    assert [row["row"] for row in table] == sorted(row["row"] for row in table)
    # A row is there when one of its modalities can be used; what it lacks is named.
    lacking = Counter(row["row"] for row in table for name in ("audio", "text") if row[f"{name}_embedding"] is None)
    lacking += Counter(set(range(songs.rows.index.total)) - {row["row"] for row in table})
    assert {problem["row"] for problem in problems} == set(lacking)
    reasons = {problem["key"]: problem["reason"] for problem in problems}
    assert set(reasons) == {key for key, _, _ in bad_samples()}
    good = {row["key"]: row for row in table if row["key"].startswith("piece")}
    assert len(good) == 14
    for i in range(14):
        row = good[f"piece{i:02d}"]
        waveform = encode(song(i))
        np.testing.assert_allclose(row["audio_embedding"], muser.encode_audio([waveform])[0], atol=1e-5)
        np.testing.assert_allclose(row["spectrogram_embedding"], muser.encode_spectrogram([waveform])[0], atol=1e-5)
        np.testing.assert_allclose(row["text_embedding"], muser.encode_text([row["text"]])[0], atol=1e-5)
        assert row["instrument"] == json.loads(sample(i)["json"])["instrument"]
        assert row["windows"] == (1, 1, 2, 3)[i % 4]


def test_two_jobs_do_not_write_the_same_parts(muser, shards, tmp_path):
    songs, parts = parts_of(muser, RowReader(index_of(shards), LOCAL), tmp_path)
    with alone_in(tmp_path), pytest.raises(DataError, match="another job works in"):
        job.embed(tmp_path / "model", songs, parts, gpu=False, progress=lambda done, of: None)


def test_a_clip_is_found_first_by_its_own_sound(muser, shards, tmp_path):
    songs, parts = parts_of(muser, RowReader(index_of(shards), LOCAL), tmp_path)
    embed(muser, songs, parts)
    index = Index.open(tmp_path)
    for i in range(14):
        hits = muser.search(encode(song(i)), index, k=3)
        assert hits[0].key == f"piece{i:02d}" and hits[0].score > 0.9999
        assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)
    (tmp_path / "query.flac").write_bytes(encode(song(5)))
    by_path, by_text = muser.search(str(tmp_path / "query.flac"), index), muser.search("a piece for horn", index)
    assert by_path == muser.search(encode(song(5)), index)
    assert by_text == muser.search(muser.encode_text(["a piece for horn"])[0], index)
    other = Muser(MultimodalModel(small_config(seed=1)), small_config(seed=1))
    with pytest.raises(DataError, match="embedded with another model"):
        other.search("a waltz", index)


def test_the_middle_is_what_evaluation_hears(muser, shards, tmp_path):
    index = index_of(shards)
    songs, parts = parts_of(muser, RowReader(index, LOCAL), tmp_path, windows="middle")
    embed(muser, songs, parts)
    heard = {}
    for chunk in evaluation_chunks(small_config(), index, LOCAL):
        embeddings = muser.encode_chunks("audio", [chunk])
        heard |= {r: e for r, v, e in zip(chunk["row"], chunk["valid_audio"], embeddings, strict=True) if v}
    table = table_of(parts)
    assert {row["row"] for row in table} == set(heard)
    for row in table:
        np.testing.assert_allclose(row["audio_embedding"], heard[row["row"]], atol=1e-5)


def test_whole_parts_stay_and_torn_ones_are_made_again(muser, shards, tmp_path):
    songs, parts = parts_of(muser, RowReader(index_of(shards), LOCAL), tmp_path, part_rows=6)
    embed(muser, songs, parts)
    files = [parts.path(part) for part in range(parts.manifest.parts)]
    before = [file.read_bytes() for file in files]
    told = parts.quarantine.read_bytes()
    assert len(files) == 5 and parts.missing() == []
    files[0].unlink()
    files[2].write_bytes(before[2][: len(before[2]) // 2])
    files[3].write_bytes(b"")
    stamps = [file.stat().st_mtime_ns for file in (files[1], files[4])]
    songs, parts = parts_of(muser, RowReader(index_of(shards), LOCAL), tmp_path, part_rows=6)
    assert parts.missing() == [0, 2, 3]
    embed(muser, songs, parts, seed=1)
    assert [file.read_bytes() for file in files] == before
    assert [file.stat().st_mtime_ns for file in (files[1], files[4])] == stamps
    assert parts.quarantine.read_bytes() == told


def test_a_part_that_cannot_be_written_is_named(muser, shards, tmp_path):
    songs, parts = parts_of(muser, RowReader(index_of(shards), LOCAL), tmp_path)
    parts.path(1).mkdir()
    with pytest.raises(DataError, match=r"--out: cannot write .*part-00001\.parquet \(Is a directory\)"):
        embed(muser, songs, parts)


def copied(shards, folder):
    """The shards in another folder."""
    folder.mkdir()
    for url in index_of(shards).urls:
        shutil.copy(url, folder)
    return index_of(f"{folder}/*.tar")


def test_an_outage_of_storage_ends_the_job_and_no_row(muser, shards, tmp_path, monkeypatch):
    """What was written down as damage of rows would never be made again."""
    local = copied(shards, tmp_path / "local")
    Path(local.urls[1]).unlink()
    remote = ShardIndex(["memory://none/a-0.tar"], np.array([3]), {})
    for index, rows, message in (
        (local, (int(local.rows[0]), local.total), r"a-1\.tar cannot be read \(the shard .*No such file"),
        (remote, (0, 3), r"memory://none/a-0\.tar cannot be read \(the shard cannot be fetched"),
    ):
        songs = SongReader(RowReader(index, LOCAL), muser.config.data, Wanted(("audio",), "all", 0.5, ()), 4)
        with pytest.raises(DataError, match=f"--shards: .*{message}.*; the same command goes on when it can be"):
            list(songs.read(*rows))
    monkeypatch.setattr(Row, "sound", lambda row: Stored(os.open(tmp_path, os.O_RDONLY), 0, 9))  # a folder
    for windows in ("all", "middle"):
        songs, _ = parts_of(muser, RowReader(index_of(shards), LOCAL), tmp_path / windows, windows=windows)
        with pytest.raises(DataError, match=r"--shards: .*a-0\.tar cannot be read \(IsADirectoryError"):
            list(songs.read(0, 3))


def test_a_damaged_shard_costs_its_rows(muser, shards, tmp_path):
    index = copied(shards, tmp_path / "cut")
    os.truncate(index.urls[1], Path(index.urls[1]).stat().st_size // 2)
    songs, parts = parts_of(muser, RowReader(index, LOCAL), tmp_path / "out")
    rows, entries = embed(muser, songs, parts)
    assert rows + entries == index.total
    assert 0 < parts.quarantine.read_text().count("damaged or cut short") < 5


def test_another_job_is_refused_the_folder(muser, shards, tmp_path):
    rows = RowReader(index_of(shards), LOCAL)
    parts_of(muser, rows, tmp_path)
    other = Muser(MultimodalModel(small_config(seed=1)), small_config(seed=1))
    for model, changes, message in (
        (other, {}, "model: '[0-9a-f]{64}' there"),
        (muser, {"windows": "middle"}, "windows: 'all' there, 'middle' here"),
        (muser, {"part_rows": 9}, "part_rows: 8 there, 9 here"),
    ):
        with pytest.raises(DataError, match=message):
            parts_of(model, rows, tmp_path, **changes)
    with pytest.raises(ConfigError, match="has the name of a column"):
        parts_of(muser, rows, tmp_path / "new", fields=("key",))
    (tmp_path / "manifest.json").unlink()
    (tmp_path / "part-00000.parquet").touch()
    with pytest.raises(DataError, match=r"holds parts and no manifest\.json"):
        parts_of(muser, rows, tmp_path)


def test_shards_and_files_made_anew_under_their_names_are_refused_the_folder(muser, shards, tmp_path):
    index = copied(shards, tmp_path / "in")
    (tmp_path / "in" / "song.flac").write_bytes(encode(song(1)))
    files = FileReader(index_files(f"{tmp_path}/in"), f"{tmp_path}/in")
    for rows, path in ((RowReader(index, LOCAL), Path(index.urls[1])), (files, tmp_path / "in" / "song.flac")):
        out = tmp_path / path.name
        parts_of(muser, rows, out)
        parts_of(muser, rows, out)
        path.write_bytes(path.read_bytes())  # perhaps the same; only its time is known
        with pytest.raises(DataError, match=r"inputs: '[0-9a-f]{64}' there"):
            parts_of(muser, rows, out)
    Path(index.urls[1]).unlink()
    with pytest.raises(DataError, match=r"a-1\.tar cannot be opened: No such file"):
        parts_of(muser, RowReader(index, LOCAL), tmp_path / "new")


def test_a_folder_of_files(muser, tmp_path):
    root = tmp_path / "music"
    (root / "a").mkdir(parents=True)
    for name, i in (("a/1. Song.flac", 1), ("2.FLAC", 2)):
        (root / name).write_bytes(encode(song(i)))
    (root / "bad.mp3").write_bytes(b"nothing to hear")
    (root / "caf\udce9.flac").write_bytes(encode(song(3)))  # a name that is not UTF-8
    (root / "cover.jpg").write_bytes(b"")
    songs, parts = parts_of(muser, FileReader(index_files(str(root)), str(root)), tmp_path / "out")
    assert embed(muser, songs, parts) == (3, 1)
    rows = {row["key"]: row["audio_embedding"] for row in table_of(parts)}
    assert list(rows) == ["2.FLAC", "a/1. Song.flac", "caf�.flac"]
    np.testing.assert_allclose(rows["2.FLAC"], muser.encode_audio([song(2)], 16_000)[0], atol=1e-3)
    assert "bad.mp3" in parts.quarantine.read_text()
    with pytest.raises(DataError, match="there is no audio file"):
        index_files(str(tmp_path / "out"))
