"""Published layouts, all formats, and what is wrong with rows and files."""

import bz2
import gzip
import json
import time

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from muser_dist.errors import ConfigError, DataError
from muser_dist.interactions import readers
from muser_dist.interactions.log import LAYOUTS, SCHEMA, LogLayout, load_layout
from muser_dist.interactions.readers import Piece, partitions_for, pieces_of, read_piece
from tests.interactions.cases import STORAGE, read

NOON = 1_241_438_400  # 2009-05-04 12:00:00 UTC

PUBLISHED = {
    "taste_profile": ("train_triplets.txt", "b80344\tSOAKIMP12A8C130995\t1\nb80344\tSOAPDEY12A81C210A9\t12\n"),
    "music4all_onion": (
        "userid_trackid_timestamp.tsv",
        "user_id\ttrack_id\ttimestamp\nu_1\t0009fFIM1eYThaPg\t2009-05-04 12:00:00\nu_1\t4jf\t2009-05-04 12:00:01\n",
    ),
    "lastfm_1k": (
        "userid-timestamp-artid-artname-traid-traname.tsv",
        'user_000001\t2009-05-04T12:00:00Z\tf1b1\tDeep "D" Dish\t\tFuck Me Im Famous (Pacha Ibiza)-09-28-2007\n'
        "user_000001\t2009-05-04T12:00:01Z\t\t坂本龍一\tba2f\tComposition 0919 (Live_2009_4_15)\n",
    ),
    "lastfm_360k": (
        "usersha1-artmbid-artname-plays.tsv",
        "00000c289a1829a808ac09c00daf10bc3c4e223b\t3bd73256\tbetty blowtorch\t2137\n00000c28\t\tgrey's\t12\n",
    ),
    "lfm_2b": (
        "listening_events.tsv",
        "user_id\ttrack_id\talbum_id\ttimestamp\n31\t53\t7\t2009-05-04 12:00:00\n31\t54\t8\t2009-05-04 12:00:01\n",
    ),
}
EXPECTED = {
    "taste_profile": [("b80344", "SOAKIMP12A8C130995", None, 1.0), ("b80344", "SOAPDEY12A81C210A9", None, 12.0)],
    "music4all_onion": [("u_1", "0009fFIM1eYThaPg", NOON, None), ("u_1", "4jf", NOON + 1, None)],
    "lastfm_1k": [
        ("user_000001", 'Deep "D" Dish - Fuck Me Im Famous (Pacha Ibiza)-09-28-2007', NOON, None),
        ("user_000001", "坂本龍一 - Composition 0919 (Live_2009_4_15)", NOON + 1, None),
    ],
    "lastfm_360k": [
        ("00000c289a1829a808ac09c00daf10bc3c4e223b", "betty blowtorch", None, 2137.0),
        ("00000c28", "grey's", None, 12.0),
    ],
    "lfm_2b": [("31", "53", NOON, None), ("31", "54", NOON + 1, None)],
}


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("compression", ["", ".gz", ".bz2"])
def test_published_text_logs(name, compression, tmp_path):
    file, content = PUBLISHED[name]
    pack = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress}[compression]
    path = tmp_path / (file + compression)
    path.write_bytes(pack(content.encode()))
    rows, left_out = read(path, load_layout(name), latest=int(time.time()))
    assert [(row["user"], row["item"], row["time"], row["value"]) for row in rows] == EXPECTED[name]
    assert {row["signal"] for row in rows} == {"play"} and not left_out


def test_yambda(tmp_path):
    columns = {
        "uid": pa.array([10, 10, 20], pa.uint32()),
        "timestamp": pa.array([0, 15_929_455, 5], pa.uint32()),
        "item_id": pa.array([6, 7, 4_000_000_000], pa.uint32()),
        "is_organic": pa.array([1, 0, 1], pa.uint8()),
    }
    listens = columns | {"played_ratio_pct": pa.array([100, 7, 120], pa.uint16())}
    events = listens | {
        "played_ratio_pct": pa.array([100, None, None], pa.uint16()),
        "event_type": pa.array(["listen", "like", "dislike"]).dictionary_encode(),
    }
    for name, table in (("yambda_likes", columns), ("yambda_listens", listens), ("yambda", events)):
        pq.write_table(pa.table(table), tmp_path / f"{name}.parquet")
        rows, left_out = read(tmp_path / f"{name}.parquet", LAYOUTS[name])
        assert [(r["user"], r["item"], r["time"]) for r in rows] == [
            ("10", "6", 0),
            ("10", "7", 15_929_455),
            ("20", "4000000000", 5),
        ]
        assert not left_out
        signals = {"yambda_likes": ["like"] * 3, "yambda_listens": ["play"] * 3, "yambda": ["play", "like", "dislike"]}
        assert [row["signal"] for row in rows] == signals[name]
    assert [row["value"] for row in rows] == [100.0, None, None]


def test_every_kind_of_bad_row_is_counted(tmp_path):
    path = tmp_path / "log.csv"
    good = [b"ann,a,2009-05-04 12:00:00,Like,1e1", b'"b,ob",a,2009-05-04T12:00:00.25Z,,', b"cid,a,2009-05-04,play, 3 "]
    bad = {
        b",a,2009-05-04 12:00:00,like,1": "missing user",
        b"caf\xe9,a,2009-05-04 12:00:00,like,1": "missing user",
        b"ann,,2009-05-04 12:00:00,like,1": "missing item",
        b"ann,a,,like,1": "missing time or position",
        b"ann,a,4 May,like,1": "unreadable time or position",
        b"ann,a,2009-13-04 12:00:00,like,1": "unreadable time or position",
        b"ann,a,1970-01-01 00:00:00,like,1": "time before 1990",
        b"ann,a,2999-01-01 00:00:00,like,1": "time in the future",
        b"ann,a,2009-05-04 12:00:00,like,much": "unreadable value",
        b"ann,a,2009-05-04 12:00:00,like,1e99": "unreadable value",
        b"ann,a,2009-05-04 12:00:00": "malformed row",
        b"ann,a,2009-05-04 12:00:00,like,1,2": "malformed row",
    }
    path.write_bytes(b"\xef\xbb\xbfuser,item,time,signal,value\n" + b"\n".join([*good, *bad, b"", b""]))
    layout = LogLayout("user", ("item",), time="time", time_format="iso", signal_column="signal", value="value")
    rows, left_out = read(path, layout, latest=int(time.time()))
    assert rows == [
        {"user": "ann", "item": "a", "time": NOON, "signal": "like", "value": 10.0},
        {"user": "b,ob", "item": "a", "time": NOON, "signal": "play", "value": None},
        {"user": "cid", "item": "a", "time": NOON - 43_200, "signal": "play", "value": 3.0},
    ]
    assert left_out == {reason: list(bad.values()).count(reason) for reason in bad.values()}


def test_json_lines(tmp_path):
    path = tmp_path / "log.jsonl"
    lines = [
        '{"user": 1, "item": "a", "time": 1241438400}',
        '{"user": "1", "item": "b", "time": 1241438400.7, "value": 2.5}',
        '{"user": true, "item": "b", "time": 1241438400}',
        '{"user": "1", "item": {"x": 1}, "time": 1241438400}',
        '{"user": "1", "item": "\\ud800", "time": 1241438400}',
        '{"user": "1", "item": "b"}',
        '["1", "b"]',
        '{"user": "1"',
        "[" * 100_000,
        "",
    ]
    path.write_text("\n".join(lines))
    rows, left_out = read(path, LogLayout("user", ("item",), time="time", value="value"))
    assert [(r["user"], r["item"], r["time"], r["value"]) for r in rows] == [
        ("1", "a", NOON, None),
        ("1", "b", NOON, 2.5),
        ("1", "?", NOON, None),
    ]
    assert left_out == {
        "missing user": 1,
        "missing item": 1,
        "missing time or position": 1,
        "malformed row": 3,
    }


@pytest.mark.parametrize("ending", ["parquet", "jsonl"])
def test_lists_of_items(ending, tmp_path):
    playlists = [
        {"id": 1, "songs": ["a", "b"], "at": [5, 6]},
        {"id": 2, "songs": [], "at": []},
        {"id": 3, "songs": None, "at": None},
        {"id": 4, "songs": ["a"], "at": [7, 8]},
        {"id": 5, "songs": ["c"], "at": [9]},
    ]
    path = tmp_path / f"log.{ending}"
    if ending == "parquet":
        pq.write_table(pa.Table.from_pylist(playlists), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in playlists))
    rows, left_out = read(path, LogLayout("id", ("songs",), position="at", lists=True))
    assert [(r["user"], r["item"], r["time"]) for r in rows] == [("1", "a", 5), ("1", "b", 6), ("5", "c", 9)]
    assert left_out == {"empty history": 2, "malformed row": 1}
    rows, left_out = read(path, LogLayout("id", ("songs",), lists=True))
    assert [(r["user"], r["item"], r["time"]) for r in rows] == [
        ("1", "a", 0),
        ("1", "b", 1),
        ("4", "a", 0),
        ("5", "c", 0),
    ]
    assert left_out == {"empty history": 2}


def test_parquet_of_any_type(tmp_path):
    path = tmp_path / "log.parquet"
    moment = pa.array([NOON * 1000, NOON * 1000 + 999, None], pa.timestamp("ms"))
    pq.write_table(pa.table({"u": [1.0, 2.0, 3.0], "i": pa.array([b"a", b"b", b"c"]), "t": moment}), path)
    rows, left_out = read(path, LogLayout("u", ("i",), time="t"))
    assert [(r["user"], r["item"], r["time"]) for r in rows] == [("1", "a", NOON), ("2", "b", NOON)]
    assert left_out == {"missing time or position": 1}
    pq.write_table(pa.table({"u": [1], "i": ["a"], "t": [NOON * 1000]}), path)
    assert read(path, LogLayout("u", ("i",), time="t", time_unit="ms"))[0][0]["time"] == NOON
    pq.write_table(pa.table({"u": [True], "i": ["a"], "t": [1]}), path)
    with pytest.raises(DataError, match="the column 'u' holds bool, not names"):
        read(path, LogLayout("u", ("i",), time="t"))


@settings(max_examples=60)
@given(
    lines=st.lists(st.text("ab\r é", min_size=0, max_size=12), max_size=30),
    piece_bytes=st.integers(1, 40),
    names=st.booleans(),
    end=st.sampled_from(["", "\n"]),
)
def test_pieces_together_are_the_file(tmp_path_factory, lines, piece_bytes, names, end):
    path = tmp_path_factory.mktemp("log") / "log.tsv"
    lines = [f"u{i}\tx{line.replace(chr(13), '')}" for i, line in enumerate(lines)]
    path.write_bytes("\n".join(["user\titem"] * names + lines).encode() + end.encode())
    layout = LogLayout("user", ("item",), columns=() if names else ("user", "item"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(readers, "PIECE_BYTES", piece_bytes)
        rows, left_out = read(path, layout) if path.stat().st_size else ([], {})
    assert [f"{row['user']}\t{row['item']}" for row in rows] == lines
    assert not left_out


def test_rows_have_the_schema(tmp_path):
    path = tmp_path / "log.tsv"
    path.write_text("a\tx\nb\ty\n")
    layout = LogLayout("user", ("item",), columns=("user", "item"))
    (piece,) = pieces_of(STORAGE, [str(path)], layout)
    ((table, _),) = read_piece(STORAGE, piece, layout, None)
    assert table.schema == SCHEMA


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("log.tsv", b"user\tsong\n", "there is no column 'item'; there are 'user', 'song'"),
        ("log.tsv", b"user\titem\tuser\n", "the column 'user' occurs twice"),
        ("log.tsv", b"", "there is no column 'user'; there are none"),
        ("log.txt", b"", r"a log is \.parquet, \.csv"),
        ("log.parquet", b"PAR1 no", "cannot be read"),
        ("log.tsv.gz", gzip.compress(b"user\titem\na\tb\n" * 9999, mtime=0)[:-60], "cannot be read"),
        ("log.tsv.bz2", b"no", "cannot be read"),
    ],
)
def test_files_that_cannot_be_read(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as error:
        read(tmp_path / name, LogLayout("user", ("item",)))
    assert name in str(error.value)


def test_a_file_that_is_not_there(tmp_path):
    layout = LogLayout("user", ("item",))
    with pytest.raises(DataError, match=r"gone\.csv cannot be opened"):
        pieces_of(STORAGE, [str(tmp_path / "gone.csv")], layout)


def test_a_layout_of_your_own(tmp_path):
    path = tmp_path / "mine.json"
    path.write_text('{"user": "listener", "item": ["song"], "signals": {"thumb": "like"}}')
    assert load_layout(str(path)) == LogLayout("listener", ("song",), signals={"thumb": "like"})
    for content, message in (
        ('{"user": "listener", "items": ["song"]}', "item: Field required"),
        ("[", "is no JSON"),
        ('{"user": "u", "item": ["i"], "time": "t", "position": "p"}', "time and position are both given"),
        ('{"user": "u", "item": ["i"], "columns": ["u"]}', "'i': not among columns"),
    ):
        path.write_text(content)
        with pytest.raises(ConfigError, match=message):
            load_layout(str(path))
    with pytest.raises(ConfigError, match="there are events, playlists, taste_profile"):
        load_layout("spotify")


def test_partitions_grow_with_the_log():
    layout = LogLayout("user", ("item",))
    pieces = [Piece(f"{i}.tsv", 0, readers.PIECE_BYTES) for i in range(50)]
    assert [partitions_for(pieces[:n], layout) for n in (0, 1, 2, 3, 50)] == [1, 1, 2, 4, 64]
    assert partitions_for([Piece("a.tsv.gz", 0, 2 * readers.PIECE_BYTES)], layout) == 8


def test_partitions_of_parquet_go_by_its_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "PIECE_ROWS", 64)
    layout, lists = LogLayout("user", ("item",)), LogLayout("user", ("item",), lists=True)
    for i in range(40):
        columns = {"user": ["u"] * 8, "item": ["i"] * 8, "tags": [["a", "b"] * 50] * 8}
        pq.write_table(pa.table(columns), tmp_path / f"{i}.parquet")
    small = pieces_of(STORAGE, [str(tmp_path / f"{i}.parquet") for i in range(40)], layout)
    assert len(small) == 40 and partitions_for(small, layout) == 8  # 320 rows, however many files
    pq.write_table(pa.table({"user": ["u"] * 2048, "item": ["i"] * 2048}), tmp_path / "large.parquet")
    assert partitions_for(pieces_of(STORAGE, [str(tmp_path / "large.parquet")], layout), layout) == 32
    pq.write_table(pa.table({"user": ["u"] * 32, "item": [["i"] * 64] * 32}), tmp_path / "lists.parquet")
    assert partitions_for(pieces_of(STORAGE, [str(tmp_path / "lists.parquet")], lists), lists) == 32


def test_parquet_columns_with_dots_in_their_names(tmp_path):
    layout, lists = LogLayout("user.id", ("track.id",)), LogLayout("user.id", ("track.id",), lists=True)
    pq.write_table(
        pa.table({"user.id": ["u", "v"], "track.id": ["a", "b"], "user": ["x", "y"]}), tmp_path / "a.parquet"
    )
    pq.write_table(
        pa.table({"user.id": ["u"], "track.id": [["a", "b", "c"]], "track": [[1, 2]]}), tmp_path / "b.parquet"
    )
    assert [(row["user"], row["item"]) for row in read(tmp_path / "a.parquet", layout)[0]] == [("u", "a"), ("v", "b")]
    assert [row["item"] for row in read(tmp_path / "b.parquet", lists)[0]] == ["a", "b", "c"]
    (piece,) = pieces_of(STORAGE, [str(tmp_path / "b.parquet")], lists)
    assert piece.rows == 3
    # A column of another name's beginning is no part of it.
    pq.write_table(pa.table({"user.id": ["u"], "track.id": ["a"], "track.id2": [[1, 2, 3]]}), tmp_path / "c.parquet")
    (piece,) = pieces_of(STORAGE, [str(tmp_path / "c.parquet")], layout)
    assert piece.rows == 1
