import io
import os
import tarfile

import pytest

from muser_dist.data import tar as tar_module
from muser_dist.data.tar import Member, Stored, split_name, walk
from muser_dist.errors import DataError
from tests.shardmaker import sample, write_shard


def make(entries: list[tuple[tarfile.TarInfo, bytes]], **options) -> io.BytesIO:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", **options) as tar:
        for info, data in entries:
            info.size = len(data) if info.isreg() else 0
            tar.addfile(info, io.BytesIO(data))
    buffer.seek(0)
    return buffer


def file(name: str, data: bytes = b"x") -> tuple[tarfile.TarInfo, bytes]:
    return tarfile.TarInfo(name), data


def read(buffer: io.BytesIO, member: Member) -> bytes:
    file = os.memfd_create("shard")
    try:
        os.write(file, buffer.getvalue())
        return Stored(file, member.offset, member.size).read()
    finally:
        os.close(file)


def test_members_of_a_key_are_one_sample_and_read_back():
    buffer = make([file("a/1.flac", b"sound"), file("a/1.JSON", b"{}"), file("a/2.ogg", b"more")])
    first, second = walk(buffer)
    assert (first.index, first.key, list(first.members)) == (0, "a/1", ["flac", "json"])
    assert (second.index, second.key, second.problem) == (1, "a/2", None)
    assert read(buffer, first.members["flac"]) == b"sound"
    assert read(buffer, second.members["ogg"]) == b"more"


def test_reading_members_while_walking_does_not_lose_the_place():
    buffer = make([file(f"{i}.txt", str(i).encode()) for i in range(20)])
    assert [read(buffer, s.members["txt"]) for s in walk(buffer)] == [str(i).encode() for i in range(20)]


@pytest.mark.parametrize(
    ("name", "key", "extension"),
    [("a.b/c.d.MP3", "a.b/c", "d.mp3"), ("plain", "plain", ""), ("x/.hidden", "x/", "hidden")],
)
def test_a_name_is_split_at_the_first_dot_of_the_file(name, key, extension):
    assert split_name(name) == (key, extension)


def test_a_name_that_is_not_utf8_can_be_written_down():
    (only,) = walk(make([file("caf\udce9.flac")]))
    assert only.key == "caf\ufffd"
    only.key.encode()


def test_thousands_of_long_name_headers_are_damage_and_no_crash():
    header = make([file("n" * 200)], format=tarfile.GNU_FORMAT).getvalue()[:1024]  # one long-name header and its data
    with pytest.raises(DataError):
        list(walk(io.BytesIO(header * 1500)))


def test_long_names_of_both_kinds_are_read():
    name = "d/" * 60 + "n" * 120 + ".flac"
    for kind in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        (only,) = walk(make([file(name)], format=kind))
        assert only.members["flac"].name == name


@pytest.mark.parametrize("name", ["/etc/passwd.json", "../up.json", "a/../../b.json"])
def test_names_that_leave_the_folder_are_refused(name):
    (only,) = walk(make([file(name)]))
    assert "unsafe member name" in only.problem


def test_links_are_refused_and_folders_skipped():
    link = tarfile.TarInfo("a.flac")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    folder = tarfile.TarInfo("a")
    folder.type = tarfile.DIRTYPE
    (only,) = walk(make([(folder, b""), (link, b"")]))
    assert "is a link" in only.problem


def test_a_second_member_of_the_same_name_is_a_problem():
    (only,) = walk(make([file("a.flac", b"1"), file("a.flac", b"2")]))
    assert "two members" in only.problem


def test_a_huge_member_is_a_problem(monkeypatch):
    monkeypatch.setattr(tar_module, "MAX_MEMBER_BYTES", 3)
    (only,) = walk(make([file("a.flac", b"1234")]))
    assert "4 bytes, more than 3" in only.problem


@pytest.mark.parametrize("content", [b"", b"no tar at all" * 100, b"\x1f\x8b" + bytes(600)])
def test_what_is_no_tar_says_so(content):
    with pytest.raises(DataError, match="is no tar archive"):
        list(walk(io.BytesIO(content)))


def test_a_disk_that_fails_is_no_damage():
    with open("/proc/self/mem", "rb") as file, pytest.raises(OSError, match="Input/output"):  # nothing is at its start
        list(walk(file))


def test_cut_at_every_block_it_yields_what_is_there_and_then_complains(tmp_path):
    path = write_shard(tmp_path / "s.tar", [(f"k{i}", sample(i)) for i in range(3)])
    whole = path.read_bytes()
    end = next(n for n in range(len(whole), 0, -1) if whole[n - 1])  # of the last member's data
    for cut in range(512, end, 512):
        seen = []
        with pytest.raises(DataError, match="damaged or cut short"):
            for found in walk(io.BytesIO(whole[:cut])):
                seen.append(found)
        assert [s.key for s in seen] == [f"k{i}" for i in range(len(seen))]
        assert len(seen) >= 1


def test_a_corrupt_header_in_the_middle_is_not_taken_for_the_end(tmp_path):
    path = write_shard(tmp_path / "s.tar", [(f"k{i}", {"txt": b"x"}) for i in range(4)])
    data = bytearray(path.read_bytes())
    data[2 * 1024 + 148 : 2 * 1024 + 156] = b"garbage!"  # checksum of the third header
    seen = []
    with pytest.raises(DataError, match="byte 2048"):
        for s in walk(io.BytesIO(bytes(data))):
            seen.append(s.key)
    assert seen == ["k0", "k1"]


def test_a_member_cut_short_is_an_error():
    buffer = make([file("a.txt", b"x" * 2000)])
    (only,) = walk(buffer)
    with pytest.raises(DataError, match="488 of 2,000 bytes"):
        read(io.BytesIO(buffer.getvalue()[:1000]), only.members["txt"])
