"""Embedding notation without Ray: the job's Parquet holds what Muser.encode_symbolic gives, and words find tunes."""

import json

import numpy as np
import pytest

from muser_dist import Muser
from muser_dist.data.decoder import Decoder, decoder
from muser_dist.data.decoder_child import TOGETHER
from muser_dist.data.pipeline import evaluation_chunks
from muser_dist.data.rows import FileReader, RowReader, index_files
from muser_dist.data.symbolic.encode import encode_windows as encode_all
from muser_dist.data.tar import Stored
from muser_dist.embed.songs import Wanted
from muser_dist.errors import ConfigError, DataError
from muser_dist.models.model import MultimodalModel
from muser_dist.search import Index
from tests.data.symbolic.notation import melody, note, score
from tests.embed.test_embed import embed, parts_of, table_of
from tests.scores import abc, midi, piece, symbolic_config
from tests.shardmaker import sample, write_shard
from tests.small import LOCAL, index_of

CONFIG = symbolic_config(max_patches=8)
SHEET = score([[note("C5", 32)], [note("C3", 32)]]).encode()


@pytest.fixture(scope="module")
def muser():
    yield Muser(MultimodalModel(CONFIG), CONFIG)
    decoder(CONFIG.data).close()


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    rows = [(f"tune{i:02d}", piece(i, *(("abc",), ("mid",), ("abc", "mid"))[i % 3])) for i in range(12)]
    rows += [("long", {"mid": melody(*range(40, 90))}), ("sheet", {"musicxml": SHEET} | sample(3))]
    bad = [("broken", piece(0) | {"abc": b"no notes"}), ("none", piece(1)), ("torn", piece(2) | {"mid": midi(2)[:40]})]
    write_shard(folder / "a-0.tar", [*rows[:7], *bad])
    write_shard(folder / "a-1.tar", rows[7:])
    return f"{folder}/a-*.tar"


def contents():
    """The file of each good row that counts."""
    made = {f"tune{i:02d}": midi(i) if i % 3 == 1 else abc(i) for i in range(12)}
    return made | {"long": melody(*range(40, 90)), "sheet": SHEET}


def test_rows_of_shards_are_what_encode_symbolic_gives(muser, shards, tmp_path):
    rows = RowReader(index_of(shards), LOCAL)
    songs, parts = parts_of(muser, rows, tmp_path, modalities=("symbolic", "text"), fields=("instrument",))
    embedded, entries = embed(muser, songs, parts)
    table = {row["key"]: row for row in table_of(parts)}
    expected = contents()
    vectors = dict(zip(expected, muser.encode_symbolic(list(expected.values())), strict=True))
    assert embedded == len(table) == 17  # the three without notation have their text
    for key, vector in vectors.items():
        np.testing.assert_allclose(table[key]["symbolic_embedding"], vector, atol=1e-5)
    assert table["long"]["windows"] > 10 and table["tune00"]["windows"] == 2
    for key in ("broken", "none", "torn"):
        assert table[key]["symbolic_embedding"] is None and table[key]["windows"] == 0
        np.testing.assert_allclose(table[key]["text_embedding"], muser.encode_text([table[key]["text"]])[0], atol=1e-5)
    problems = [json.loads(line) for line in parts.quarantine.read_text().splitlines()]
    assert entries == 4 and {(p["key"], p["member"]) for p in problems} == {
        ("broken", "abc"),
        ("none", ""),
        ("torn", "mid"),
        ("long", "json"),
    }
    assert table["tune04"]["instrument"] == json.loads(sample(4)["json"])["instrument"]


def test_a_tune_is_found_by_itself_and_by_words(muser, shards, tmp_path):
    songs, parts = parts_of(muser, RowReader(index_of(shards), LOCAL), tmp_path / "out", modalities=("symbolic",))
    assert embed(muser, songs, parts) == (14, 3)
    index = Index.open(tmp_path / "out")
    assert index.modalities == ("symbolic",) and index.manifest.symbolic == CONFIG.data.symbolic
    for key, content in contents().items():
        path = tmp_path / f"query.{'musicxml' if key == 'sheet' else 'mid' if content[:2] == b'MT' else 'abc'}"
        path.write_bytes(content)
        for query in (content, path, str(path)):
            (hit,) = muser.search(query, index, k=1)
            assert hit.key == key and hit.score > 0.9999
    words = "a piece for horn"
    cosines = muser.encode_text([words])[0] @ muser.encode_symbolic(list(contents().values())).T
    best = [list(contents())[i] for i in np.argsort(-cosines)[:3]]
    assert [hit.key for hit in muser.search(words, index, k=3)] == best


def test_a_folder_of_files(muser, tmp_path):
    root = tmp_path / "tunes"
    (root / "irish").mkdir(parents=True)
    files = {"irish/jig.abc": abc(1), "irish/jig.mid": midi(1), "sheet.XML": SHEET, "bad.midi": b"MThd"}
    for name, content in (files | {"cover.jpg": b"", "song.flac": b""}).items():
        (root / name).write_bytes(content)
    rows = FileReader(index_files(str(root), notation=True), str(root))
    songs, parts = parts_of(muser, rows, tmp_path / "out", modalities=("symbolic",))
    assert embed(muser, songs, parts) == (3, 1)
    found = {row["key"]: row["symbolic_embedding"] for row in table_of(parts)}
    for name in ("irish/jig.abc", "irish/jig.mid", "sheet.XML"):
        np.testing.assert_allclose(found[name], muser.encode_symbolic([files[name]])[0], atol=1e-5)
    assert "bad.midi" in parts.quarantine.read_text()
    with pytest.raises(DataError, match=r"there is no file of notation \(abc, musicxml"):
        index_files(str(tmp_path / "out"), notation=True)


def test_short_pieces_are_what_evaluation_reads(muser, shards, tmp_path):
    """Those that fit into a window: evaluation takes the head of longer ones."""
    index = index_of(shards)
    songs, parts = parts_of(muser, RowReader(index, LOCAL), tmp_path, modalities=("symbolic",))
    embed(muser, songs, parts)
    table = {row["row"]: row for row in table_of(parts)}
    read = 0
    for chunk in evaluation_chunks(CONFIG, index, LOCAL):
        embeddings = muser.encode_chunks("symbolic", [chunk])
        for row, valid, vector in zip(chunk["row"].tolist(), chunk["valid_symbolic"], embeddings, strict=True):
            assert (row in table) == bool(valid)
            if valid and table[row]["windows"] == 1:
                np.testing.assert_allclose(table[row]["symbolic_embedding"], vector, atol=1e-5)
                read += 1
    assert read >= 1


def test_windows_come_from_the_child_as_they_are_made_here(tmp_path):
    """More than the child tells at a time, and with an error after them."""
    made = Decoder(CONFIG.data)
    content = melody(*(40 + i % 50 for i in range(900)))
    (tmp_path / "a.mid").write_bytes(content)
    with (tmp_path / "a.mid").open("rb") as file:
        member = Stored(file.fileno(), 0, len(content))
        got = list(made.pieces(member, "mid"))
        expected = list(encode_all("mid", content, CONFIG.data.symbolic))
        assert len(got) == len(expected) > 2 * TOGETHER
        for (patches, *numbers), (right, *others) in zip(got, expected, strict=True):
            assert numbers == others and np.array_equal(patches, right)
        with pytest.raises(DataError, match="truncated MIDI"):
            list(made.pieces(Stored(file.fileno(), 0, 100), "mid"))
        next(iter(made.pieces(member, "mid")))  # given up after one
        assert len(list(made.pieces(member, "mid"))) == len(expected)
    made.close()


def test_sound_and_notation_are_read_apart():
    with pytest.raises(ConfigError, match="sound and notation are read apart"):
        Wanted(("audio", "symbolic"), "all", 1.0, ())
