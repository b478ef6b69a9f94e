"""Corpora of notation in their original layout: what the text policy reads of them, what is skipped, and that the
notation in the shards can be read."""

import json
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from muser_dist.data.corpora.clamp import read_clamp
from muser_dist.data.corpora.folder import read_folder
from muser_dist.data.corpora.midicaps import read_midicaps
from muser_dist.data.corpora.wikimt import read_wikimt
from muser_dist.data.corpora.writer import SKIPPED, Track, _check, _with_unique_keys, _write_shard, write_tracks
from muser_dist.data.symbolic.config import SymbolicConfig
from muser_dist.data.symbolic.encode import encode_symbolic
from muser_dist.data.text import TextPolicy, check_templates, read_fields
from muser_dist.errors import DataError
from muser_dist.recipes import find_recipe
from tests.data.corpora.layouts import lines_of
from tests.data.corpora.score_layouts import SCORES, make_clamp, make_folder, make_midicaps, make_wikimt, write
from tests.scores import abc, midi

Sample = dict[str, bytes]


def samples(*shards: Path) -> dict[str, Sample]:
    """The members of each key."""
    found: dict[str, Sample] = {}
    for path in shards:
        with tarfile.open(path) as tar:
            for name in tar.getnames():
                key, _, extension = name.partition(".")
                found.setdefault(key, {})[extension] = tar.extractfile(name).read()
    return found


def in_a_shard(folder: Path, tracks: list[Track]) -> tuple[dict[str, Sample], dict[str, str | None]]:
    """What a shard of the usable tracks holds, and why others, or files, are not: all of `write_tracks` but Ray."""
    checked, lacking = _check(_with_unique_keys(tracks))
    assert not _write_shard(folder / "all.tar", [track for track in checked if track.problem is None])
    told = {track.key: track.problem for track in checked if track.problem is not None}
    return samples(folder / "all.tar"), told | {f"{key} {file.name}": reason for key, file, reason in lacking}


@pytest.mark.parametrize("name", SCORES)
def test_what_is_in_shards_can_be_read_and_says_something(tmp_path, name):
    layout = SCORES[name]
    layout.make(tmp_path / "corpus")
    tracks = layout.read(tmp_path / "corpus")
    found, told = in_a_shard(tmp_path, tracks)
    assert len(found) == sum(layout.rows.values())
    assert len({key for key in told if " " not in key}) == layout.skipped
    assert Counter(t.split for t in _check(_with_unique_keys(tracks))[0] if t.problem is None) == layout.rows
    check_templates(layout.templates)
    (_, align) = find_recipe("clamp2_tiny").stages
    for members in found.values():
        notation = {kind: data for kind, data in members.items() if kind != "json"}
        for kind, data in notation.items():
            patches, length = encode_symbolic({kind: data}, SymbolicConfig())
            assert length > 3 and patches[:length].any(axis=1).all()
        sentence, facts = TextPolicy(align.config.data, layout.templates).say(read_fields(members["json"], None), None)
        assert sentence and facts


@pytest.mark.parametrize("name", SCORES)
def test_splits_and_counts(cluster, tmp_path, name):
    layout = SCORES[name]
    layout.make(tmp_path / "corpus")
    written = write_tracks(tmp_path / "out", layout.read(tmp_path / "corpus"), 3)
    rows: Counter[str] = Counter()
    for shard, count in written.rows.items():
        rows[shard.rpartition("-")[0]] += count
    assert (rows, written.skipped) == (layout.rows, layout.skipped)
    assert len(lines_of(tmp_path / "out" / SKIPPED)) == written.skipped + written.left_out
    assert len(samples(*(tmp_path / "out").glob("*.tar"))) == sum(rows.values())
    assert write_tracks(tmp_path / "out", layout.read(tmp_path / "corpus"), 3) == written  # and all of it stays


def test_wikimt(tmp_path):
    make_wikimt(tmp_path)
    found, told = in_a_shard(tmp_path, read_wikimt(tmp_path / "wikimusictext.jsonl"))
    assert found["wikimusictext-00001"]["abc"] == abc(0)
    assert json.loads(found["wikimusictext-00002"]["json"]) == {
        "title": "Осенний вальс",
        "artist": "Ann",
        "genre": "Folk",
        "description": "A song of 1901.",
    }
    assert [told[f"wikimusictext-{number:05d}"].partition(": ")[2][:20] for number in (4, 5, 6, 13)] == [
        "broken JSON: Invalid",
        'no ABC notation in "',
        "is no JSON object",
        'no ABC notation in "',
    ]
    assert all(reason.startswith(f"line {int(key[-5:])}: ") for key, reason in told.items())


def test_wikimt_as_one_array(tmp_path):
    rows = [{"title": f"Song {i}", "music": abc(i).decode()} for i in range(3)]
    write(tmp_path / "wikimt.json", b"\xef\xbb\xbf \n" + json.dumps([*rows, 7], indent=2).encode())
    *good, bad = read_wikimt(tmp_path / "wikimt.json")
    assert [track.content for track in good] == [abc(i) for i in range(3)]
    assert bad.problem == "line 4: is no JSON object"
    write(tmp_path / "torn.json", b'[{"title": 1}, {"ti')
    with pytest.raises(DataError, match=r"torn.json: broken JSON: .*one array of objects"):
        read_wikimt(tmp_path / "torn.json")
    with pytest.raises(DataError, match=r"none.jsonl cannot be read \(No such file.*WikiMT"):
        read_wikimt(tmp_path / "none.jsonl")


def test_midicaps(tmp_path):
    make_midicaps(tmp_path / "corpus")
    tracks = read_midicaps(tmp_path / "corpus")
    found, told = in_a_shard(tmp_path, tracks)
    first = found[f"lmd_full_0_{0:032x}"]
    assert first["mid"] == midi(0)
    assert json.loads(first["json"]) == {
        "caption": "A lively piece with flute, number 0.",
        "genre": ["pop", "folk"],
        "mood": ["happy", "film"],
        "key": "D minor",
        "time_signature": "4/4",
        "tempo": 96,
        "tempo_word": "Moderate tempo",
        "duration_word": "Short song",
        "instrument_summary": ["Flute"],
        "chord_summary": ["Dm", "Am"],
    }
    assert told[f"lmd_full_2_{2:032x}"] == "cannot be read: No such file or directory"
    assert told[f"lmd_full_0_{3:032x}"] == "is empty"
    assert told["line_9"] == f"line 9: '../corpus-secret.mid' lies outside the folder {tmp_path / 'corpus'}"
    assert told["line_10"].startswith("line 10: '/etc/passwd' lies outside")
    assert told["line_11"] == "line 11: names no file, but 7"
    assert [track.split for track in tracks[:8]] == ["train"] * 6 + ["test"] * 2
    drawn = {track.key: track.split for track in read_midicaps(tmp_path / "corpus", val_share=0.5)}
    assert set(drawn.values()) == {"train", "val", "test"}


def test_clamp(tmp_path):
    make_clamp(tmp_path / "corpus")
    found, told = in_a_shard(tmp_path, read_clamp(tmp_path / "corpus" / "clamp.jsonl"))
    both = found["abc_Folk_tune_0"]
    assert set(both) == {"abc", "mtf", "json"} and both["abc"] == abc(0)
    fields: dict[str, Any] = json.loads(both["json"])
    assert fields == {
        "title": "Planxty",
        "genres": ["Folk", "Dance"],
        "tags": ["slow", "old"],
        "instruments": ["Flute"],
        "summary_en": "A tune, number 0.",
        "summary": {"Russian": "Осенний вальс 0"},
    }
    assert json.loads(found["xml_Folk_tune_2"]["json"])["summary"] == {"Greek": "Αργό βαλς"}
    assert "summary" not in json.loads(found["mid_Folk_tune_3"]["json"])
    assert set(found["abc_Folk_tune_5"]) == {"abc", "json"}  # without the MIDI that is not there
    assert told["abc_Folk_tune_5 tune 5.mid"] == "cannot be read: No such file or directory"
    assert told["abc_Folk_tune_6 tune 6.abc"] == "is a second .abc of its track"
    assert told["line_9"] == "line 9: names no file, but []"
    assert "'../x.abc' lies outside the folder" in told["line_10"]
    assert "broken JSON" in told["line_11"] and "broken JSON" in told["line_12"]


def test_midi_text_is_read_as_the_midi_is(tmp_path):
    make_clamp(tmp_path)
    for i, kinds in ((0, ("mtf1", "mtf")), (4, ("mtf", "mtf"))):
        text = (tmp_path / kinds[0] / "Folk" / f"tune {i}.{kinds[1]}").read_bytes()
        config = SymbolicConfig()
        for seed in (None, 0, 1):
            mine, theirs = (encode_symbolic(m, config, seed) for m in ({"mtf": text}, {"mid": midi(i)}))
            np.testing.assert_array_equal(mine[0], theirs[0])


def test_the_recipe_says_what_the_lines_hold(tmp_path):
    """Half are metadata, a quarter the English summary, and a quarter one in another language."""
    make_clamp(tmp_path)
    (_, align) = find_recipe("clamp2").stages
    data = align.config.data
    values = read_fields(json.dumps(read_clamp(tmp_path / "clamp.jsonl")[1].metadata).encode(), None)
    said = Counter(TextPolicy(data, data.templates).say(values, np.random.default_rng(i))[0] for i in range(400))
    assert said["A tune, number 1."] / 400 == pytest.approx(0.25, abs=0.07)
    assert said["慢板 1"] / 400 == pytest.approx(0.25, abs=0.07)


def test_a_folder(tmp_path):
    make_folder(tmp_path / "corpus")
    tracks = {track.key: track for track in read_folder(tmp_path / "corpus")}
    assert list(tracks) == ["01. Slow Air", "empty", "irish/jig", "reel", "sheet"]
    assert tracks["irish/jig"].metadata == {"title": "The Jig", "type": "jig"}
    assert [file.name for file in tracks["irish/jig"].files] == ["jig.abc", "jig.mid"]
    assert tracks["01. Slow Air"].metadata == {"title": "01. Slow Air"}
    found, told = in_a_shard(tmp_path, list(tracks.values()))
    assert set(found["irish_jig"]) == {"abc", "mid", "json"} and set(found["01_Slow_Air"]) == {"mid", "json"}
    assert told["empty"] == "is empty" and told["reel"].startswith("reel.json: cannot be read: Expecting")
    with pytest.raises(DataError, match="nowhere cannot be listed: No such file"):
        read_folder(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="there is no file with an extension of music"):
        read_folder(tmp_path / "empty")
    assert {track.split for track in read_folder(tmp_path / "corpus", 0.5)} == {"train", "val"}


def test_each_tune_of_a_book_is_a_track(tmp_path):
    """None is lost behind the first, and what stands beside the book is a track of its own."""
    book = b"% a book\nO:Ireland\n\n" + b"\n\n".join(abc(i) for i in range(5)) + b"\nX:6\nK:C\nCDEF|\n"
    write(tmp_path / "corpus" / "book.abc", book)
    write(tmp_path / "corpus" / "book.mid", midi(1))
    write(tmp_path / "corpus" / "book.json", b'{"collector": "Ann"}')
    write(tmp_path / "corpus" / "one.abc", b"% a remark\n" + abc(7))
    tracks = read_folder(tmp_path / "corpus", val_share=0.5)
    assert {track.split for track in tracks} == {"train", "val"}
    found, told = in_a_shard(tmp_path, tracks)
    assert not told and list(found) == [*(f"book-{i:05d}" for i in range(1, 7)), "book", "one"]
    for i in range(5):
        members = found[f"book-{i + 1:05d}"]
        patches, _ = encode_symbolic(members, SymbolicConfig())
        np.testing.assert_array_equal(patches, encode_symbolic({"abc": abc(i)}, SymbolicConfig())[0])
        assert json.loads(members["json"]) == {"title": f"Tune {i}", "collector": "Ann"}
    assert json.loads(found["book-00006"]["json"])["title"] == "book"
    assert set(found["book"]) == {"mid", "json"} and found["one"]["abc"] == b"% a remark\n" + abc(7)
