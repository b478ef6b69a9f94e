"""From shards over the endpoint to shards with descriptions, without Ray: what is asked, copied, counted and left."""

import io
import json
import os
import tarfile
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from muser_dist.data import rewriting
from muser_dist.data.config import DataConfig
from muser_dist.data.rows import RowReader
from muser_dist.data.shards import ShardIndex, index_shards
from muser_dist.data.storage import Storage
from muser_dist.data.tar import walk
from muser_dist.data.text import TextPolicy, WordTokenizer, read_fields
from muser_dist.errors import DataError
from muser_dist.refine.asker import Asker, Endpoint
from muser_dist.refine.ledger import UNIT, Answers, Ledger
from muser_dist.refine.prompt import Prompt
from muser_dist.refine.shards import read_record, refine_shard, requests
from tests.object_store import object_store, storage_options
from tests.refine.stand_in import PRICES, TEXTS, stand_in
from tests.shardmaker import write_shard
from tests.small import LOCAL

PROMPT = Prompt("small", tuple(code for code in TEXTS if code != "en"))


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def piece(i: int, **fields) -> tuple[str, dict[str, bytes]]:
    metadata = {"title": f"item-{i:03d}", "key": "A minor"} | fields
    return f"folder/piece{i:03d}", {"flac": b"sound" * i, "json": json.dumps(metadata).encode(), "mid": b"notes"}


def refine(pattern_or_urls, folder: Path, server, cap=UNIT, storage=LOCAL, write=True, prompt=PROMPT):
    """What the job does, in this process: the records by shard."""
    urls = pattern_or_urls if isinstance(pattern_or_urls, list) else storage.expand([pattern_or_urls], "--shards")
    folder.mkdir(exist_ok=True)
    ledger = Ledger(folder / "ledger.sqlite", cap)
    asker = Asker(Endpoint(server.url, concurrency=4, first_pause=0.001, attempts=2), ledger, PRICES)
    asker.run(batch for url in urls for batch in requests(storage, url, prompt))
    ledger.close()
    answers = Answers(folder / "ledger.sqlite")
    records = {}
    for url in urls:
        record = refine_shard(storage, url, rows_of(storage, url), prompt, answers, folder, write)
        assert record.read == record.refined + record.left + len(record.problems)
        records[url.rpartition("/")[2]] = record
    answers.close()
    return records


def rows_of(storage: Storage, url: str) -> int:
    return int(index_shards(storage, [url], "--shards").rows[0])


def members(path: Path) -> dict[str, bytes]:
    with tarfile.open(path) as tar:
        return {info.name: tar.extractfile(info).read() for info in tar}


class FailingDisk(io.FileIO):
    """A file whose headers can be read, and its members not."""

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self._other = os.open(path, os.O_WRONLY)

    def fileno(self) -> int:
        return self._other

    def close(self) -> None:
        if not self.closed:
            os.close(self._other)
        super().close()


class FailingStorage(Storage):
    def open(self, url: str) -> io.FileIO:
        return FailingDisk(url)


def test_a_source_that_cannot_be_read_is_named(tmp_path):
    url = str(write_shard(tmp_path / "a.tar", [piece(i) for i in range(3)]))
    storage = FailingStorage({}, tmp_path / "cache", 1, 1.0)
    Ledger(tmp_path / "ledger.sqlite", UNIT).close()
    answers = Answers(tmp_path / "ledger.sqlite")
    with pytest.raises(DataError, match=r"--shards: .*a\.tar cannot be read \(Bad file descriptor\)"):
        refine_shard(storage, url, 3, PROMPT, answers, tmp_path / "out")
    answers.close()


def test_shards_get_descriptions_and_nothing_else_changes(tmp_path):
    rows = [piece(i) for i in range(10)]
    rows.append(("text", {"txt": b"item-077 for the flute"}))  # has no .json yet
    rows.append(("dotted", {"02. song.flac": b"x", "02. song.json": b'{"title": "item-078", "year": 1801}'}))
    write_shard(tmp_path / "in" / "a-0.tar", rows[:6])
    write_shard(tmp_path / "in" / "a-1.tar", rows[6:])
    with stand_in() as server:
        records = refine(f"{tmp_path}/in/a-*.tar", tmp_path / "out", server)
        assert {name: (record.read, record.refined) for name, record in records.items()} == {
            "a-0.tar": (6, 6),
            "a-1.tar": (6, 6),
        }
        for name in records:
            old, new = members(tmp_path / "in" / name), members(tmp_path / "out" / name)
            assert list(old) == [member for member in new if member != "text.json"]
            for member, content in new.items():
                if not member.endswith("json"):
                    assert content == old[member]
                    continue
                before, after = json.loads(old.get(member, b"{}")), json.loads(content)
                english, other = after.pop("summary_en"), after.pop("summary_nen")
                assert after == before
                item = before.get("title", "item-077")
                ((code, text),) = other.items()
                assert (english, text) == (TEXTS["en"].format(item), TEXTS[code].format(item))
                assert code == PROMPT.language(member.partition(".")[0])
        # Training reads them: the sentence of a row, in whatever script, as tokens.
        reader = RowReader(ShardIndex([str(tmp_path / "out" / "a-0.tar")], np.array([6]), {}), LOCAL)
        row = reader.row(0, 3)
        assert row.key == "folder/piece003" and row.audio == "flac"
        policy = TextPolicy(DataConfig(), ("{summary_en}", "{summary_nen}"))
        fields = read_fields(row.read("json"), None)
        said = {policy.say(fields, np.random.default_rng(seed))[0] for seed in range(50)}
        assert said == {fields["summary_en"], *fields["summary_nen"].values()}
        assert WordTokenizer(4096, 48)(sorted(said))[1].min() > 2

        # The same again changes no file and asks nothing; refined shards can be refined, at no cost.
        files = sorted((tmp_path / "out").glob("*.tar"))
        stamps = [(file.stat().st_mtime_ns, file.stat().st_ino) for file in files]
        asked = server.asked.total()
        assert refine(f"{tmp_path}/in/a-*.tar", tmp_path / "out", server) == records
        assert [(file.stat().st_mtime_ns, file.stat().st_ino) for file in files] == stamps
        assert server.asked.total() == asked == 12
        write_shard(tmp_path / "in" / "a-0.tar", [(key, m | {"mid": b"other"}) for key, m in rows[:6]])
        refine(f"{tmp_path}/in/a-*.tar", tmp_path / "out", server)
        assert members(files[0])["folder/piece000.mid"] == b"other" and server.asked.total() == asked


def test_what_cannot_be_refined_is_named_and_stays_as_it_was(tmp_path):
    kinds = {"item-001": "nonsense", "item-002": "wrong_language", "item-003": "broken"}
    rows = [piece(i) for i in range(5)]
    rows[4][1]["json"] = b'{"title": '
    rows += [("nothing", {"flac": b"x", "json": b"{}"}), ("../escape", piece(6)[1]), piece(7)]
    write_shard(tmp_path / "in" / "a.tar", rows)
    with stand_in(lambda item, before: kinds.get(item, "good")) as server:
        (record,) = refine(str(tmp_path / "in" / "a.tar"), tmp_path / "out", server).values()
    reasons = {problem["key"]: problem["reason"] for problem in record.problems}
    language = PROMPT.language("folder/piece002")
    assert (record.read, record.refined, record.left, record.rows) == (8, 2, 0, 7)
    assert reasons["folder/piece001"] == "answer is no JSON"
    assert f'"{language}" ' in reasons["folder/piece002"]
    assert "the endpoint gave no answer: status 500: internal, after 2 attempts" in reasons["folder/piece003"]
    assert "broken JSON" in reasons["folder/piece004"]
    assert "no metadata to describe" in reasons["nothing"]
    assert "unsafe member name" in reasons["../escape"]
    assert [problem["row"] for problem in record.problems] == [1, 2, 3, 4, 5, 6]
    old, new = members(tmp_path / "in" / "a.tar"), members(tmp_path / "out" / "a.tar")
    assert [name for name in old if not name.startswith("..")] == list(new)
    changed = {name for name in new if new[name] != old[name]}
    assert changed == {"folder/piece000.json", "folder/piece007.json"}
    assert asdict(read_record(tmp_path / "out", "a.tar")) == asdict(record)


def test_what_the_cap_leaves_is_counted_and_refined_later(tmp_path):
    write_shard(tmp_path / "in" / "a.tar", [piece(i) for i in range(20)])
    url = str(tmp_path / "in" / "a.tar")
    most = sum(PRICES.cost(r.most_input, r.most_output) for batch in requests(LOCAL, url, PROMPT) for r in batch)
    with stand_in() as server:
        (dry,) = refine(url, tmp_path / "out", server, cap=0, write=False).values()
        assert (dry.left, dry.refined) == (20, 0) and not server.asked
        assert PRICES.cost(dry.left_input, dry.left_output) == most
        assert not (tmp_path / "out" / "a.tar").exists()
        (some,) = refine(url, tmp_path / "out", server, cap=most // 15).values()
        assert 1 <= some.refined < 20 and some.refined + some.left == 20 == some.rows
        (all_,) = refine(url, tmp_path / "out", server, cap=UNIT).values()
        assert all_.refined == 20 and all(count == 1 for count in server.asked.values())
        assert all("summary_en" in json.loads(c) for n, c in members(tmp_path / "out" / "a.tar").items() if "json" in n)


@pytest.mark.parametrize("name", ["piece008.mid", "piece008.json", "piece008.flac", "piece004.mid", "piece003.flac"])
@pytest.mark.parametrize("kept", [-300, 0, 2, 512])
def test_a_shard_that_breaks_off(tmp_path, name, kept):
    """It ends before, in or after what a member holds."""
    whole = write_shard(tmp_path / "whole.tar", [piece(i) for i in range(1, 9)])
    with tarfile.open(whole) as tar:
        end = tar.getmember(f"folder/{name}").offset_data + kept
    shard = tmp_path / "in" / "a.tar"
    shard.parent.mkdir()
    shard.write_bytes(whole.read_bytes()[:end])
    with stand_in() as server:
        folder = tmp_path / "out"
        folder.mkdir()
        ledger = Ledger(folder / "l", UNIT)
        Asker(Endpoint(server.url), ledger, PRICES).run(requests(LOCAL, str(shard), PROMPT))
        ledger.close()
        answers = Answers(folder / "l")
        record = refine_shard(LOCAL, str(shard), 8, PROMPT, answers, folder)
        assert record.read == 8 == record.refined + len(record.problems)
        assert len({name.partition(".")[0] for name in members(folder / "a.tar")}) == record.rows
        assert record.rows >= record.refined >= 2
        shard.unlink()
        with pytest.raises(DataError, match=r"--shards: .*a\.tar .*the same command goes on"):
            refine_shard(LOCAL, str(shard), 8, PROMPT, answers, folder)
        assert list(requests(LOCAL, str(shard), PROMPT)) == []


def test_shards_of_an_object_store(tmp_path):
    write_shard(tmp_path / "in" / "a.tar", [piece(i) for i in range(3)])
    with object_store() as store, stand_in() as server:
        (url,) = store.upload(tmp_path / "in" / "a.tar")
        storage = Storage({"s3": storage_options(store.endpoint)}, tmp_path / "cache", 1 << 30, 10.0)
        (record,) = refine(url, tmp_path / "out", server, storage=storage).values()
        assert record.refined == 3
        stamp = (tmp_path / "out" / "a.tar").stat().st_ino
        assert refine(url, tmp_path / "out", server, storage=storage) == {"a.tar": record}
        assert (tmp_path / "out" / "a.tar").stat().st_ino == stamp


def test_a_second_writer_that_dies_takes_nothing_from_the_first(tmp_path):
    """As when Ray begins a task again because its node seemed to be dead."""
    write_shard(tmp_path / "a.tar", [(f"k{i}", {"json": b"{}", "txt": bytes(50_000)}) for i in range(6)])
    out = tmp_path / "out" / "a.tar"
    out.parent.mkdir()
    with (tmp_path / "a.tar").open("rb") as source:
        samples = [(sample, {}) for sample in walk(source)]

        def broken():
            yield from samples[:2]
            raise KeyboardInterrupt

        def meeting():
            yield from samples[:4]
            with pytest.raises(KeyboardInterrupt):
                rewriting.write_shard(out, broken(), source)
            yield from samples[4:]

        rewriting.write_shard(out, meeting(), source)
    with tarfile.open(out) as tar:
        assert [name for name in tar.getnames() if name.endswith("json")] == [f"k{i}.json" for i in range(6)]
    assert list(out.parent.iterdir()) == [out]
