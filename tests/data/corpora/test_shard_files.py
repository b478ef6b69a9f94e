"""One shard, without Ray: writers that die or meet, and which of its tracks one that is there may lack."""

import json
import os
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest

from muser_dist.data.corpora import writer
from muser_dist.data.corpora.writer import SKIPPED, Track


@pytest.fixture
def tracks(tmp_path: Path) -> list[Track]:
    """Six, each larger than what a file object holds back."""
    (tmp_path / "music").mkdir()
    made = []
    for i in range(6):
        file = tmp_path / "music" / f"{i}.mp3"
        file.write_bytes(bytes([65 + i]) * 300_000)
        made.append(Track(f"k{i}", file, {"number": i}))
    return made


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    return tmp_path / "out" / "train-00000.tar"


def keys(shard: Path) -> list[str]:
    with tarfile.open(shard) as tar:
        return [name.removesuffix(".json") for name in tar.getnames() if name.endswith(".json")]


def test_a_second_writer_that_dies_takes_nothing_from_the_first(tracks, shard, monkeypatch):
    """As when Ray begins a task again because its node seemed to be dead."""
    add = writer._add_sample
    second = False

    def meeting(tar: tarfile.TarFile, key: str, members: dict[str, bytes]) -> None:
        nonlocal second
        if second and key == "k2":
            raise KeyboardInterrupt
        if not second and key == "k4":
            second = True
            with pytest.raises(KeyboardInterrupt):
                writer._write_shard(shard, tracks)
            second = False
            assert len(list(shard.parent.iterdir())) == 1  # what the first writes; the second left nothing
        add(tar, key, members)

    monkeypatch.setattr(writer, "_add_sample", meeting)
    assert writer._write_shard(shard, tracks) == []
    assert keys(shard) == [track.key for track in tracks] and list(shard.parent.iterdir()) == [shard]


def test_a_shard_is_on_the_disk_before_it_has_its_name(tracks, shard, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fsync", lambda file: synced.append((os.fstat(file).st_size, shard.exists())))
    writer._write_shard(shard, tracks)
    assert synced == [(shard.stat().st_size, False)]


@pytest.mark.parametrize(("start", "stop"), [(606_000, 1_500_000), (0, None)])
def test_a_shard_of_zeros_is_made_anew(tracks, shard, start, stop):
    """Which two writers of one file, or a machine that went down, may have left: zeros read as the end."""
    writer._write_shard(shard, tracks)
    whole = shard.read_bytes()
    damaged = bytearray(whole)
    damaged[start:stop] = bytes(len(whole[start:stop]))
    shard.write_bytes(damaged)
    assert len(writer._keys(shard)) < 6  # and no error
    assert writer._write_shard(shard, tracks) == []
    assert shard.read_bytes() == whole


def written_without(tracks: list[Track], shard: Path, *missing: int) -> list[Track]:
    """Writes the shard while some files cannot be read; returns what was skipped. Then they can be."""
    for i in missing:
        tracks[i].file.rename(tracks[i].file.with_suffix(".away"))
    skipped = writer._write_shard(shard, tracks)
    for i in missing:
        tracks[i].file.with_suffix(".away").rename(tracks[i].file)
    return skipped


def test_a_shard_that_lacks_what_is_told_stays(tracks, shard):
    skipped = written_without(tracks, shard, 1, 3)
    assert [track.key for track in skipped] == ["k1", "k3"]
    content = shard.read_bytes()
    broken = '{"key": "k5", "file\n7\n{}\n'  # a call that died, and a hand
    (shard.parent / SKIPPED).write_text(broken + writer._lines(skipped, []))
    assert writer._write_shard(shard, tracks) == skipped
    assert shard.read_bytes() == content


@pytest.mark.parametrize("told", ["nothing", "no list", "one of two", "a further file", "torn"])
def test_a_shard_that_lacks_what_is_not_told_is_made_anew(tracks, shard, told):
    first, second = written_without(tracks, shard, 1, 3)
    lines = {
        "nothing": "",
        "one of two": writer._lines([first], []),
        "a further file": writer._lines([first], [(second.key, Path("other.mid"), "is empty")]),
        "torn": writer._lines([first, second], [])[:-20],
    }
    if told in lines:
        (shard.parent / SKIPPED).write_text(lines[told])
    assert writer._write_shard(shard, tracks) == []
    assert keys(shard) == [track.key for track in tracks]


def test_the_list_says_why_even_of_names_that_are_no_text(tracks, shard):
    odd = replace(tracks[0], file=Path(os.fsdecode(b"gone-\xff\xe2\x80\xa8.mp3")))
    skipped = writer._write_shard(shard, [odd, *tracks[1:]])
    (shard.parent / SKIPPED).write_text(text := writer._lines(skipped, []))
    assert json.loads(text)["reason"] == "cannot be read: No such file or directory"
    assert writer._write_shard(shard, [odd, *tracks[1:]]) == skipped
