"""Tables of one's own: formats, columns, splits, paths that lead astray, mistakes."""

import json
import math
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from muser_dist.data.corpora.table import read_table
from muser_dist.data.corpora.writer import SKIPPED, write_tracks
from muser_dist.errors import DataError
from tests.data.corpora.layouts import audio, lines_of, write_csv

ROWS = [
    {"audio": "a.wav", "title": 'One, "two"', "year": 1990, "tags": ["folk", "live"]},
    {"audio": "b/c.wav", "title": None, "year": None, "tags": []},
]


def write(path: Path, rows=ROWS) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        cells = [["" if v in (None, []) else v for v in row.values()] for row in rows]
        write_csv(path, [list(rows[0]), *cells], "\t" if path.suffix == ".tsv" else ",")
    return path


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "parquet"])
def test_formats(tmp_path, kind):
    first, second = read_table(write(tmp_path / f"tracks.{kind}"))
    assert (first.key, first.file, first.split, first.problem) == ("a", tmp_path / "a.wav", "train", None)
    assert (second.key, second.file) == ("b/c", tmp_path / "b" / "c.wav")
    values = {"title": 'One, "two"', "year": 1990, "tags": ["folk", "live"]}
    assert first.metadata == ({name: str(v) for name, v in values.items()} if kind in ("csv", "tsv") else values)
    assert second.metadata == {}


def test_columns_become_fields_that_templates_can_write(tmp_path):
    rows = [{"audio": "a.wav", "Track Title": "x", "b.p.m.": 3.5, "": 1, "nan": math.nan, "zero": 0, "no": False}]
    (track,) = read_table(write(tmp_path / "t.jsonl", rows))
    assert track.metadata == {"Track_Title": "x", "b_p_m": 3.5, "zero": 0, "no": False}
    with pytest.raises(DataError, match=r"t.jsonl, line 1: two columns would be the field {a_b}; rename 'a b'"):
        read_table(write(tmp_path / "t.jsonl", [{"audio": "a.wav", "a_b": 1, "a b": 2}]))


def test_audio_inside_the_table(tmp_path):
    """As some corpora come in Parquet: the column holds no path, and others must not hold bytes."""
    (track,) = read_table(write(tmp_path / "t.parquet", [{"audio": {"bytes": b"RIFF", "path": "a.wav"}}]))
    assert track.problem == "the column 'audio' holds no path but dict"
    with pytest.raises(DataError, match=r"t.parquet, row 1: the column 'cover' holds bytes"):
        read_table(write(tmp_path / "t.parquet", [{"audio": "a.wav", "cover": b"JFIF"}]))


def test_a_file_with_a_byte_order_mark_and_a_cell_of_two_lines(tmp_path):
    (tmp_path / "t.csv").write_bytes(b'\xef\xbb\xbfaudio,caption\r\na.wav,"two\r\nlines"\r\n\r\nb.wav\r\n')
    first, second = read_table(tmp_path / "t.csv")
    assert first.metadata == {"caption": "two\r\nlines"} and second.metadata == {} and second.key == "b"


def test_named_columns(tmp_path):
    splits = ["Train", "validation", "test", "dev", "", "unused"]
    rows = [{"file": "x.wav", "id": f"id {i}", "part": part} for i, part in enumerate(splits)]
    tracks = read_table(write(tmp_path / "t.csv", rows), "file", tmp_path / ".", "id", "part")
    assert [track.key for track in tracks] == [f"id {i}" for i in range(6)]
    assert [track.split for track in tracks][:4] == ["train", "val", "test", "val"]
    assert [track.problem for track in tracks][:4] == [None] * 4
    assert tracks[5].problem == "the column 'part' says 'unused', not train, val or test"


def test_several_captions_for_one_file_stay_together(tmp_path):
    rows = [{"audio": f"{i // 3}.wav", "caption": f"{i}"} for i in range(600)]
    tracks = read_table(write(tmp_path / "t.csv", rows), val_share=0.25)
    splits = [track.split for track in tracks]
    assert splits[::3] == splits[1::3] == splits[2::3]
    assert 0.17 < splits.count("val") / 600 < 0.33
    fewer = read_table(write(tmp_path / "t.csv", rows[300:]), val_share=0.25)
    assert [track.split for track in fewer] == splits[300:]


def test_paths_may_not_leave_the_folder(cluster, tmp_path):
    inside, outside = audio(tmp_path / "music" / "in.wav"), audio(tmp_path / "secret.wav")
    (tmp_path / "music" / "link.wav").symlink_to(outside)
    names = ["../secret.wav", str(outside), "/etc/passwd", "../../../../etc/passwd", "x/../../secret.wav", None]
    good = [str(inside), "x/../in.wav", "./in.wav", "link.wav"]  # a link is the folder's owner's
    table = write(tmp_path / "music" / "t.jsonl", [{"audio": name} for name in [*names, *good]])
    written = write_tracks(tmp_path / "out", read_table(table), 9)
    assert (sum(written.rows.values()), written.skipped) == (4, 6)
    lines = lines_of(tmp_path / "out" / SKIPPED)
    assert [line["reason"] for line in lines[:5]] == [f"lies outside the audio folder {tmp_path}/music"] * 5
    assert lines[5]["reason"] == "the column 'audio' is empty"


def test_a_relative_table_reads_from_its_own_folder(tmp_path, monkeypatch):
    write(tmp_path / "tracks.csv")
    monkeypatch.chdir(tmp_path)
    tracks = read_table(Path("tracks.csv"))
    assert [track.file for track in tracks] == [tmp_path / "a.wav", tmp_path / "b" / "c.wav"]
    tracks = read_table(write(Path("t.csv"), [{"audio": "../x.wav"}]))
    assert tracks[0].problem is not None


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.csv", b"file,title\na.wav,x\n", r"t.csv: there is no column 'audio'; there are 'file', 'title'"),
        ("t.csv", b"", r"t.csv: there is no column 'audio'; there are none"),
        ("t.csv", b"audio,title\na.wav,x,y\n", r"t.csv, line 2: 3 cells under 2 columns"),
        ("t.csv", b"audio,title,title\na.wav,x,y\n", r"t.csv, line 1: the column 'title' occurs twice"),
        ("t.csv", b"audio\n\xff\xfe.wav\n", r"t.csv: is not UTF-8 .*; convert it"),
        ("t.csv", b"audio\n" + b"x" * 200_000, r"t.csv, line 2: field larger than field limit"),
        ("t.jsonl", b'{"audio": "a.wav"}\n{"audio"\n', r"t.jsonl, line 2: broken JSON"),
        ("t.jsonl", b"[1]\n", r"t.jsonl, line 1: is no JSON object"),
        ("t.parquet", b"PAR1 and no more", r"t.parquet cannot be read"),
        ("t.xlsx", b"", r"a table is .csv, .tsv, .jsonl or .parquet"),
    ],
)
def test_mistakes_in_a_table(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_table(tmp_path / name)


def test_mistakes_in_options(tmp_path):
    rows = [{"audio": "a.wav", "id": 1, "split": "train"}, {"audio": "b.wav", "id": 1, "split": "train"}]
    table = write(tmp_path / "t.csv", rows)
    for options, message in [
        ({"key": "id"}, r"t.csv, line 3: the key '1' is also that of .*t.csv, line 2"),
        ({"key": "name"}, "there is no column 'name'"),
        ({"split": "part"}, "there is no column 'part'"),
        ({"root": tmp_path / "nowhere"}, "there is no audio folder .*/nowhere"),
        ({"split": "split", "val_share": 0.1}, "not together with a split column"),
        ({"val_share": 1.5}, "val_share is 1.5"),
    ]:
        with pytest.raises(DataError, match=message):
            read_table(table, **options)
    with pytest.raises(DataError, match=r"nothing.csv cannot be read \(No such file"):
        read_table(tmp_path / "nothing.csv")
