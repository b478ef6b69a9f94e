"""Each corpus in its original layout: splits, fields, what is skipped, and mistakes in the files."""

import io
import json
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import soundfile

from muser_dist.data.corpora.fma import read_fma
from muser_dist.data.corpora.gtzan import read_gtzan
from muser_dist.data.corpora.jamendo import read_jamendo
from muser_dist.data.corpora.magnatagatune import read_magnatagatune
from muser_dist.data.corpora.writer import SKIPPED, write_tracks
from muser_dist.errors import DataError
from tests.data.corpora.layouts import LAYOUTS, lines_of, make_fma, make_gtzan, make_jamendo, make_magnatagatune


def metadata(folder: Path) -> dict[str, dict[str, Any]]:
    """The metadata in the shards of a folder, by key; every sample must have audio that decodes."""
    found = {}
    for path in folder.glob("*.tar"):
        with tarfile.open(path) as tar:
            files = {name: tar.extractfile(name).read() for name in tar.getnames()}
        for name, content in files.items():
            if name.endswith(".json"):
                found[name.removesuffix(".json")] = json.loads(content)
            else:
                assert soundfile.info(io.BytesIO(content)).duration > 0.9
                assert name.partition(".")[0] + ".json" in files
    return found


def reasons(folder: Path) -> dict[str, str]:
    return {line["key"]: line["reason"] for line in lines_of(folder / SKIPPED)}


@pytest.mark.parametrize("name", LAYOUTS)
def test_splits_and_counts(cluster, tmp_path, name):
    layout = LAYOUTS[name]
    layout.make(tmp_path)
    tracks = layout.read(tmp_path)
    written = write_tracks(tmp_path / "out", tracks, 4)
    rows: Counter[str] = Counter()
    for shard, count in written.rows.items():
        rows[shard.rpartition("-")[0]] += count
    assert (rows, written.skipped) == (layout.rows, layout.skipped)
    assert len(metadata(tmp_path / "out")) == sum(rows.values()) == len(tracks) - written.skipped
    assert len(lines_of(tmp_path / "out" / SKIPPED)) == written.skipped


def test_gtzan(cluster, tmp_path):
    make_gtzan(tmp_path)
    write_tracks(tmp_path / "out", read_gtzan(tmp_path, tmp_path), 4)
    found = metadata(tmp_path / "out")
    assert found["hiphop_00002"] == {"genre": "hiphop"}
    why = reasons(tmp_path / "out")
    assert why.pop("jazz_00004") == "cannot be read: No such file or directory"
    assert why == dict.fromkeys(
        ("blues_00005", "hiphop_00005", "jazz_00005"), "is in none of the lists of GTZAN's fault-filtered split"
    )


def test_gtzan_as_au_files(cluster, tmp_path):
    make_gtzan(tmp_path, "au")
    written = write_tracks(tmp_path / "out", read_gtzan(tmp_path, tmp_path), 4)
    assert sum(written.rows.values()) == 14 and written.skipped == 4
    assert metadata(tmp_path / "out")["blues_00000"] == {"genre": "blues"}


def test_gtzan_that_is_not_there(tmp_path):
    with pytest.raises(DataError, match="neither genres_original/ nor genres/"):
        read_gtzan(tmp_path, tmp_path)
    make_gtzan(tmp_path)
    (tmp_path / "valid_filtered.txt").unlink()
    with pytest.raises(DataError, match=r"valid_filtered.txt cannot be read.*fault-filtered split"):
        read_gtzan(tmp_path, tmp_path)


def test_fma(tmp_path):
    make_fma(tmp_path)
    tracks = {track.key: track for track in read_fma(tmp_path, "small")}
    assert len(tracks) == 10
    assert tracks["000002"].file == tmp_path / "fma_small" / "000" / "000002.mp3"
    assert tracks["000002"].metadata == {
        "title": "Food 0",
        "artist": "AWOL",
        "album": "AWOL - A Way Of Life",
        "genre": ["Loud-Punk", "Punk"],
        "parent_genre": ["Punk", "Rock"],
        "top_genre": ["Rock"],
    }
    second = tracks["000702"].metadata
    assert second["tags"] == ["live", "rock 'n' roll"] and second["language"] == "en"
    assert second["genre"] == second["top_genre"] == ["Rock"] and "parent_genre" not in second
    assert not {"genre", "parent_genre", "top_genre"} & set(tracks["001402"].metadata)
    assert [tracks[key].split for key in ("004902", "005602", "006302")] == ["train", "val", "test"]
    assert {subset: len(read_fma(tmp_path, subset)) for subset in ("medium", "large", "full")} == {
        "medium": 11,
        "large": 11,
        "full": 11,
    }
    assert read_fma(tmp_path, "full")[0].file == tmp_path / "fma_full" / "000" / "000002.mp3"


@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        ("tracks.csv", "track_id,", "id,", r"tracks.csv, line 1: the first three lines are not those of fma_metadata"),
        ("tracks.csv", "language_code", "lang", r"tracks.csv, line \d+: there is no column 'track.language_code'"),
        ("tracks.csv", "[12]", "__import__('os')", r"tracks.csv, line \d+: \"__import__\('os'\)\" is no list"),
        ("tracks.csv", "\n2,", "\ntwo,", "the track_id 'two' is no number"),
        ("genres.csv", "top_level", "top", r"genres.csv, line 2: there is no column 'top_level'"),
    ],
)
def test_fma_in_another_form(tmp_path, file, old, new, message):
    make_fma(tmp_path)
    path = tmp_path / "fma_metadata" / file
    path.write_text(path.read_text().replace(old, new, 1))
    with pytest.raises(DataError, match=message):
        read_fma(tmp_path, "small")
    path.unlink()
    with pytest.raises(DataError, match=rf"{file} cannot be read .*fma_metadata of the FMA dataset"):
        read_fma(tmp_path, "small")


def test_magnatagatune(tmp_path):
    make_magnatagatune(tmp_path)
    tracks = {track.key: track for track in read_magnatagatune(tmp_path)}
    assert tracks["2"].metadata == {
        "tags": ["no voice", "singer", "tag 0"],
        "title": "BWV54 - I Aria",
        "artist": "American Bach Soloists",
    }
    assert tracks["3"].problem == tracks["200"].problem == "has none of the 50 most frequent tags"
    folders = {track.file.parent.name: track.split for track in tracks.values()}
    assert [folder for folder in "0123456789abcdef" if folders[folder] == "train"] == list("0123456789ab")
    assert folders["c"] == "val" and {folders[folder] for folder in "def"} == {"test"}
    (tmp_path / "clip_info_final.csv").unlink()
    assert read_magnatagatune(tmp_path)[0].metadata == {"tags": ["no voice", "singer", "tag 0"]}


def test_magnatagatune_in_another_form(tmp_path):
    make_magnatagatune(tmp_path)
    path = tmp_path / "annotations_final.csv"
    good = path.read_text()
    path.write_text(good.replace('"f/american', '"x/american', 1))
    (lost,) = [t for t in read_magnatagatune(tmp_path) if t.problem and "folder" in t.problem]
    assert lost.problem.startswith("the path 'x/american_bach")
    path.write_text(good.replace("mp3_path", "path", 1))
    with pytest.raises(DataError, match="there is no column 'mp3_path', which MagnaTagATune has"):
        read_magnatagatune(tmp_path)
    path.unlink()
    with pytest.raises(DataError, match=r"annotations_final.csv cannot be read .*MagnaTagATune"):
        read_magnatagatune(tmp_path)


def test_jamendo(tmp_path):
    make_jamendo(tmp_path)
    tracks = {track.key: track for track in read_jamendo(tmp_path / "data", tmp_path / "audio")}
    assert tracks["track_0000948"].metadata == {
        "genre": ["rock", "pop"],
        "instrument": ["piano"],
        "mood": ["happy"],
        "title": 'Trio 12" No 0',
        "artist": "Both",
    }
    assert tracks["track_0000951"].metadata["artist"] == "Both"  # the line with a cell too many
    assert tracks["track_0000950"].metadata["mood"] == ["happy"] and "genre" not in tracks["track_0000950"].metadata
    assert tracks["track_0000948"].file == tmp_path / "audio" / "48" / "948.mp3"
    assert tracks["track_0000949"].file == tmp_path / "audio" / "49" / "949.low.mp3"
    assert [track.split for track in tracks.values()] == ["train"] * 10 + ["val", "test"]
    (tmp_path / "data" / "raw.meta.tsv").unlink()
    unsplit = read_jamendo(tmp_path / "data", tmp_path / "audio", split=None)
    assert len(unsplit) == 12 and {track.split for track in unsplit} == {"train"}
    assert set(unsplit[0].metadata) == {"genre", "instrument", "mood"}


@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        ("splits/split-0/autotagging-test.tsv", "PATH", "FILE", "the first line is not TRACK_ID ARTIST_ID"),
        ("splits/split-0/autotagging-test.tsv", "mood/theme---dark", "dark", "'dark' is not category---tag"),
        ("splits/split-0/autotagging-test.tsv", "\tinstrument---piano\tmood/theme---dark", "", "line 2: 5 cells"),
        ("raw.meta.tsv", "\tBoth", "", r"raw.meta.tsv, line 2: 7 cells, not the 8"),
    ],
)
def test_jamendo_in_another_form(tmp_path, file, old, new, message):
    make_jamendo(tmp_path)
    path = tmp_path / "data" / file
    path.write_text(path.read_text().replace(old, new, 1))
    with pytest.raises(DataError, match=message):
        read_jamendo(tmp_path / "data", tmp_path / "audio")


def test_jamendo_that_is_not_there(tmp_path):
    make_jamendo(tmp_path)
    with pytest.raises(DataError, match=r"autotagging_top50tags-train.tsv cannot be read .*MTG-Jamendo"):
        read_jamendo(tmp_path / "data", tmp_path / "audio", "autotagging_top50tags")
