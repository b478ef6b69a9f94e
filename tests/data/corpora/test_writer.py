"""Tracks to shards: what is in them, what is skipped, going on after an interruption, other corpora."""

import io
import json
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest
import soundfile

from muser_dist.data.corpora.writer import MANIFEST, SIDECAR, SKIPPED, Track, write_index, write_tracks
from muser_dist.errors import ConfigError, DataError
from muser_dist.files import alone_in, whole_file
from tests.data.corpora.layouts import audio, lines_of

pytestmark = pytest.mark.usefixtures("cluster")


def members(folder: Path) -> dict[str, dict[str, bytes]]:
    """The files in each shard, by their names, in order."""
    found = {}
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            infos = tar.getmembers()
            assert all(i.isreg() and i.mtime == 0 and i.uid == 0 and i.uname == "muser" for i in infos)
            found[path.name] = {i.name: tar.extractfile(i).read() for i in infos}
    return found


def seen(folder: Path) -> list[str]:
    """What lies in a folder, but for the lock, which some versions of filelock leave there."""
    return sorted(path.name for path in folder.iterdir() if path.name != ".lock")


def keys(folder: Path) -> list[str]:
    return [name.partition(".")[0] for shard in members(folder).values() for name in shard if name.endswith(".json")]


@pytest.fixture
def tracks(tmp_path) -> list[Track]:
    """Ten for training, three for validation."""
    kinds = ("wav", "flac", "mp3", "ogg")
    made = []
    for i in range(13):
        file = audio(tmp_path / "music" / f"{i}.{kinds[i % 4]}", i)
        made.append(Track(f"song {i:02d}", file, {"number": i, "title": f"Größe {i}"}, "val" if i > 9 else "train"))
    return made


def test_shards_hold_the_files_as_they_are(tracks, tmp_path):
    calls = []
    written = write_tracks(tmp_path / "out", tracks, 4, progress=lambda *call: calls.append(call))
    rows = {"train-00000.tar": 4, "train-00001.tar": 4, "train-00002.tar": 2, "val-00000.tar": 3}
    assert (written.rows, written.skipped) == (rows, 0)
    assert json.loads((tmp_path / "out" / SIDECAR).read_text()) == {"format": 1, "rows": rows}
    assert seen(tmp_path / "out") == sorted([*rows, SIDECAR, MANIFEST, SKIPPED])
    assert (tmp_path / "out" / SKIPPED).read_text() == ""
    assert calls[0] == (0, 13) and calls[-1] == (13, 13) and calls == sorted(calls)
    found = members(tmp_path / "out")
    assert {name: len(files) // 2 for name, files in found.items()} == rows
    for shard, files in found.items():
        for track in tracks:
            key = track.key.replace(" ", "_")
            if f"{key}.json" in files:
                assert shard.startswith(track.split)
                assert json.loads(files[f"{key}.json"]) == track.metadata
                assert files[key + track.file.suffix] == track.file.read_bytes()
                assert soundfile.info(io.BytesIO(files[key + track.file.suffix])).duration == pytest.approx(1, abs=0.2)
    assert sorted(keys(tmp_path / "out")) == [track.key.replace(" ", "_") for track in tracks]


def test_the_seed_mixes_the_tracks_and_equal_calls_make_equal_bytes(tracks, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        write_tracks(tmp_path / name, tracks, 4, seed)
    a, b, c = ([path.read_bytes() for path in sorted((tmp_path / name).glob("*.tar"))] for name in "abc")
    assert a == b and a != c
    assert keys(tmp_path / "a") != sorted(keys(tmp_path / "a"))
    assert sorted(keys(tmp_path / "a")) == sorted(keys(tmp_path / "c"))


def test_an_interrupted_call_goes_on(tracks, tmp_path):
    write_tracks(tmp_path, tracks, 4)
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in tmp_path.glob("*.tar")}
    lost = tmp_path / "train-00001.tar"
    lost.unlink()
    (tmp_path / SIDECAR).unlink()
    (tmp_path / ".train-00001.tar.part").write_bytes(b"half a shard")
    calls = []
    written = write_tracks(tmp_path, tracks, 4, progress=lambda *call: calls.append(call))
    assert calls[0] == (9, 13) and calls[-1] == (13, 13)
    assert sum(written.rows.values()) == 13 and (tmp_path / SIDECAR).exists()
    assert not list(tmp_path.glob(".*.part"))
    for path, (modified, content) in before.items():
        assert path.read_bytes() == content
        assert (path.stat().st_mtime_ns == modified) == (path != lost)


def test_tracks_without_a_usable_file_are_listed(tracks, tmp_path):
    empty, text = tmp_path / "empty.wav", tmp_path / "notes.txt"
    empty.write_bytes(b"")
    text.write_text("la la la")
    bad = [
        Track("lost", tmp_path / "lost.wav", {}),
        Track("empty", empty, {}),
        Track("text", text, {}),
        Track("folder", (tmp_path / "folder.wav"), {}),
        Track("null", tmp_path / "a\0b.wav", {}),
        Track("told", tracks[0].file, {}, problem="because"),
    ]
    (tmp_path / "folder.wav").mkdir()
    written = write_tracks(tmp_path / "out", [*bad, *tracks], 5)
    assert sum(written.rows.values()) == 13 and written.skipped == 6
    listed = {line["key"]: (line["file"], line["reason"]) for line in lines_of(tmp_path / "out" / SKIPPED)}
    assert {key: reason for key, (_, reason) in listed.items() if key != "text"} == {
        "lost": "cannot be read: No such file or directory",
        "empty": "is empty",
        "folder": "is no file",
        "null": "cannot be read: embedded null byte",
        "told": "because",
    }
    assert listed["text"][1].startswith("is neither audio nor notation by its extension (")
    assert listed["lost"][0] == str(tmp_path / "lost.wav")


def test_a_file_that_goes_away_while_shards_are_written(tracks, tmp_path):
    """It is skipped where it was found missing, and still is when the call is repeated, even if it never ended."""
    gone, out = audio(tmp_path / "gone.wav"), tmp_path / "out"
    tracks.append(Track("gone", gone, {}))

    def interrupted(done: int, total: int) -> None:
        gone.unlink(missing_ok=True)
        if done == total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_tracks(out, tracks, 4, progress=interrupted)
    assert not (out / SIDECAR).exists()
    shards = {path: path.stat().st_mtime_ns for path in out.glob("*.tar")}
    for _ in range(2):
        audio(gone)
        written = write_tracks(out, tracks, 4)
        assert sum(written.rows.values()) == 13 and written.skipped == 1
        (line,) = lines_of(out / SKIPPED)
        assert line["key"] == "gone" and line["reason"] == "cannot be read: No such file or directory"
        assert json.loads((out / SIDECAR).read_text())["rows"] == written.rows
        assert {path: path.stat().st_mtime_ns for path in out.glob("*.tar")} == shards


def test_a_shard_that_lacks_tracks_for_no_known_reason_is_made_anew(tracks, tmp_path):
    before = write_tracks(tmp_path, tracks, 4)
    whole = {path: path.read_bytes() for path in tmp_path.glob("*.tar")}
    lost = tmp_path / "train-00001.tar"
    lost.write_bytes(bytes(len(whole[lost])))
    calls = []
    assert write_tracks(tmp_path, tracks, 4, progress=lambda *call: calls.append(call)) == before
    assert {path: path.read_bytes() for path in whole} == whole and lines_of(tmp_path / SKIPPED) == []
    assert calls == [(13, 13)]


def test_a_folder_that_another_job_works_in_is_not_touched(tracks, tmp_path):
    with alone_in(tmp_path), pytest.raises(DataError, match="another job works in"):
        write_tracks(tmp_path, tracks, 4)
    assert [name for name in seen(tmp_path) if name != "music"] == []


def test_what_still_writes_when_a_call_goes_on_replaces_no_shard(tracks, tmp_path):
    """As a task does that Ctrl-C did not reach, on a cluster that goes on."""
    left = []

    def died(done: int, total: int) -> None:
        left.append(sorted(tmp_path.glob(".*.part")))
        (tmp_path / ".train-00000.tar.0.part").write_bytes(b"of a task whose node died")

    with pytest.raises(FileNotFoundError), whole_file(tmp_path / "train-00000.tar") as file:
        write_tracks(tmp_path, tracks, 4, progress=died)
        file.write(b"of an earlier call")
    assert left[0] == [] and not list(tmp_path.glob(".*.part"))
    assert len(keys(tmp_path)) == 13


@pytest.mark.parametrize(
    ("given", "made"),
    [
        (["a", "a", "a-2", "a"], ["a", "a-2", "a-2-2", "a-3"]),
        (["../../etc/passwd", "/x", "..", ""], ["etc_passwd", "x", "track", "track-2"]),
        (["01. Song", "CD1/01.Song", "夜曲", "caf\udce9"], ["01_Song", "CD1_01_Song", "夜曲", "caf"]),
    ],
)
def test_keys_are_safe_and_unique(tracks, tmp_path, given, made):
    write_tracks(tmp_path / "out", [replace(tracks[0], key=key) for key in given], 9)
    assert sorted(keys(tmp_path / "out")) == sorted(made)


def test_long_keys_still_fit_into_file_names(tracks, tmp_path):
    write_tracks(tmp_path / "out", [replace(tracks[0], key="夜" * 300)] * 2, 9)
    names = [name for files in members(tmp_path / "out").values() for name in files]
    assert len(set(names)) == 4 and all(len(name.encode()) < 255 and "�" not in name for name in names)


@pytest.mark.parametrize("other", ["rows", "seed", "metadata", "fewer", "split", "file"])
def test_another_corpus_in_the_same_folder_is_refused(tracks, tmp_path, other):
    write_tracks(tmp_path, tracks, 4)
    shards = {path: path.stat().st_mtime_ns for path in tmp_path.glob("[!.]*")}
    changed, rows, seed = list(tracks), 4, 0
    if other == "rows":
        rows = 5
    elif other == "seed":
        seed = 1
    elif other == "fewer":
        changed.pop()
    else:
        change = {"metadata": {"number": 99}, "split": "test", "file": tracks[1].file}[other]
        changed[0] = replace(tracks[0], **{other: change})
    with pytest.raises(DataError, match=r"holds shards of another corpus.*Choose another folder"):
        write_tracks(tmp_path, changed, rows, seed)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("[!.]*")} == shards


def test_shards_that_somebody_else_put_there_are_refused(tracks, tmp_path):
    (tmp_path / "train-00000.tar").write_bytes(b"")
    with pytest.raises(DataError, match=r"train-00000.tar was there before"):
        write_tracks(tmp_path, tracks, 4)


def test_damaged_and_foreign_shards_are_found_when_a_call_is_repeated(tracks, tmp_path):
    write_tracks(tmp_path, tracks, 4)
    first, second = tmp_path / "train-00000.tar", tmp_path / "train-00001.tar"
    whole = first.read_bytes()
    first.write_bytes(whole[:5000])
    with pytest.raises(DataError, match=r"train-00000.tar is damaged.*make it anew") as caught:
        write_tracks(tmp_path, tracks, 4)
    assert "\n" not in str(caught.value)  # Ray's traceback is not for users
    first.write_bytes(second.read_bytes())
    with pytest.raises(DataError, match=r"train-00000.tar has other tracks.*delete it"):
        write_tracks(tmp_path, tracks, 4)


def test_nothing_to_write(tmp_path, tracks):
    with pytest.raises(
        DataError, match=r"none of 1 tracks can be written, the first \(.*nowhere.wav\) because: cannot"
    ):
        write_tracks(tmp_path / "out", [Track("a", tmp_path / "nowhere.wav", {})], 4)
    with pytest.raises(DataError, match="none of 0 tracks"):
        write_tracks(tmp_path / "out", [], 4)
    with pytest.raises(DataError, match="shard_rows is 0"):
        write_tracks(tmp_path / "out", tracks, 0)
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_written(tracks, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"--out: cannot write to .*file/out"):
        write_tracks(tmp_path / "file" / "out", tracks, 4)


def test_an_index_of_shards_that_are_there(tracks, tmp_path):
    made = write_tracks(tmp_path, tracks, 4).rows
    (tmp_path / SIDECAR).write_text('{"format": 1, "rows": {"train-00000.tar": 999}}')
    calls = []
    assert write_index(tmp_path, lambda *call: calls.append(call)) == made
    assert json.loads((tmp_path / SIDECAR).read_text()) == {"format": 1, "rows": made}
    assert calls == [(i, 4) for i in range(1, 5)]
    (tmp_path / "val-00001.tar").write_bytes(b"no tar")
    with pytest.raises(DataError, match=r"val-00001.tar is no tar archive.*take it away"):
        write_index(tmp_path)
    with pytest.raises(DataError, match="holds no shard"):
        write_index(tmp_path / "nowhere")
