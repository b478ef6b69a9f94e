"""Shards behind URLs: the same rows as from disk, whatever the network does, and each byte fetched once."""

import json
import os
import threading
from collections.abc import Iterator
from datetime import datetime
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec
import numpy as np
import pytest

from muser_dist.config import to_dict
from muser_dist.data import storage as storage_module
from muser_dist.data.config import DataConfig
from muser_dist.data.pipeline import plan_digest
from muser_dist.data.storage import Storage, _version, redact
from muser_dist.errors import ConfigError, DataError
from tests.fault_proxy import Fault, fault_proxy, seeded
from tests.object_store import KEY, SECRET, ObjectStore, endpoint, object_store, storage_options
from tests.shardmaker import write_shards
from tests.small import LOCAL, index_of, reader_of, small_config

ROWS = [6, 5, 7]


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    write_shards(folder, ROWS)
    return folder


@pytest.fixture(scope="module")
def store(shards) -> Iterator[ObjectStore]:
    with object_store() as running:
        running.upload(*sorted(shards.glob("*.tar")))
        yield running


@pytest.fixture(autouse=True)
def small_blocks_and_short_pauses(monkeypatch):
    monkeypatch.setattr(storage_module, "BLOCK_BYTES", 20_000)  # so that even a small shard takes several
    monkeypatch.setattr(storage_module, "_LONGEST_PAUSE", 0.05)


def remote(cache: Path, address: tuple[str, int], timeout: float = 20, cache_bytes: int = 1 << 30) -> Storage:
    return Storage({"s3": storage_options(endpoint(address))}, cache, cache_bytes, timeout)


def sizes(shards: Path) -> int:
    return sum(path.stat().st_size for path in shards.glob("*.tar"))


def assert_same_chunks(mine, theirs) -> None:
    assert len(mine) == len(theirs)
    for a, b in zip(mine, theirs, strict=True):
        for name in a.keys() - {"seconds", "shard"}:
            np.testing.assert_array_equal(a[name], b[name])


def test_a_faulty_network_changes_no_row(shards, store, tmp_path):
    faults = seeded(7, {"reset": 0.15, "slow_down": 0.15, "stall": 0.15, "close": 0.15}, most=40)
    config = small_config()
    with fault_proxy(store.address, faults, methods=("GET", "HEAD")) as proxy:
        storage = remote(tmp_path / "cache", proxy.server_address, timeout=1)
        from_s3 = reader_of(config, f"s3://{store.bucket}/train-*.tar", storage)
        chunks = list(from_s3.read(range(16)))
        assert all(proxy.injected[kind] for kind in ("reset", "slow_down", "stall", "close")), proxy.injected
    from_disk = reader_of(config, f"{shards}/train-*.tar")
    assert not any(chunk["problems"] for chunk in chunks)
    assert_same_chunks(chunks, list(from_disk.read(range(16))))
    assert plan_digest(from_s3, 4) == plan_digest(from_disk, 4)


def test_several_passes_cost_one_download(shards, store, tmp_path):
    with fault_proxy(store.address, lambda *_: None) as proxy:
        reader = reader_of(small_config(), f"s3://{store.bucket}/train-*.tar", remote(tmp_path, proxy.server_address))
        list(reader.read(range(4 * sum(ROWS) // small_config().train.chunk)))
        assert sum(proxy.body_bytes.values()) == sizes(shards)


def test_a_broken_stream_goes_on_at_the_byte_that_is_missing(shards, store, tmp_path, monkeypatch):
    monkeypatch.setattr(storage_module, "_ATTEMPTS", 1)
    url = f"s3://{store.bucket}/train-00000.tar"
    whole = (shards / "train-00000.tar").read_bytes()
    with fault_proxy(store.address, lambda method, path, before: Fault("close", 0.0) if before == 3 else None) as proxy:
        # s3fs itself would ask again; the fault must reach us.
        options = {
            "s3": storage_options(endpoint(proxy.server_address)) | {"config_kwargs": {"retries": {"max_attempts": 1}}}
        }
        storage = Storage(options, tmp_path, 1 << 30, 20)
        monkeypatch.setattr("s3fs.S3FileSystem.retries", 1)
        with pytest.raises(DataError, match="cannot be fetched"):
            storage.open(url)
        (part,) = tmp_path.glob("*.part")
        kept = part.stat().st_size
        assert kept == 3 * 20_000
        before = proxy.body_bytes[f"/{store.bucket}/train-00000.tar"]
        with storage.open(url) as copy:
            assert copy.read() == whole
        assert proxy.body_bytes[f"/{store.bucket}/train-00000.tar"] - before == len(whole) - kept
    assert not list(tmp_path.glob("*.part"))


def test_the_cache_stays_below_its_size(shards, store, tmp_path):
    most = max(path.stat().st_size for path in shards.glob("*.tar"))
    storage = remote(tmp_path, store.address, cache_bytes=2 * most)
    reader = reader_of(small_config(), f"s3://{store.bucket}/train-*.tar", storage)
    chunks = list(reader.read(range(2 * sum(ROWS) // 2)))
    assert not any(chunk["problems"] for chunk in chunks)
    kept = [path.stat().st_size for path in tmp_path.glob("*.tar")]
    assert 0 < sum(kept) <= 2 * most


def test_what_a_user_keeps_in_the_folder_of_the_cache_stays(shards, tmp_path):
    mine = [tmp_path / name for name in ("thesis.docx", "results.tar", "env.old/notes.txt")]
    for path in mine:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(bytes(10_000))
        os.utime(path, (0, 0))
    memory = fsspec.filesystem("memory")
    for path in shards.glob("*.tar"):
        memory.pipe_file(f"/full/{path.name}", path.read_bytes())
    storage = Storage({}, tmp_path, 1, 20)
    for url in storage.expand(["memory://full/*.tar"], "data.train"):
        storage.open(url).close()
    assert all(path.exists() for path in mine)
    assert len(list(tmp_path.glob("*.tar"))) == 2  # the user's, and the shard that was read last


def test_a_local_disk_is_not_taken_for_the_storage(shards, tmp_path):
    fsspec.filesystem("memory").pipe_file("/some/a.tar", (shards / "train-00000.tar").read_bytes())
    with pytest.raises(DataError, match=r"cannot be copied to /proc/absent"):
        Storage({}, Path("/proc/absent"), 1 << 30, 20).open("memory://some/a.tar")


def test_a_server_that_tells_times_in_two_ways_tells_of_one_version():
    """Listed in milliseconds, and in seconds when asked for a file."""
    listed = {"ETag": '"1"', "size": 5, "LastModified": datetime(2026, 1, 1, 0, 0, 0, 317_000)}
    asked = listed | {"LastModified": datetime(2026, 1, 1)}
    other = listed | {"ETag": '"2"'}
    assert _version(listed) == _version(asked) != _version(other)
    without = {"size": 5, "mtime": 1.0}
    assert _version(without) != _version(without | {"mtime": 2.0})


def test_another_version_of_a_shard_is_fetched_anew(shards, store, tmp_path):
    storage = remote(tmp_path, store.address)
    (url,) = store.upload(shards / "train-00000.tar", prefix="versions/")
    first = storage.open(url).read()
    other = (shards / "train-00001.tar").read_bytes()
    store.client.put_object(Bucket=store.bucket, Key="versions/train-00000.tar", Body=other)
    fsspec.filesystem("s3", **storage_options(store.endpoint)).invalidate_cache()
    assert storage.open(url).read() == other != first


class NoRanges(SimpleHTTPRequestHandler):
    """A plain web server: it ignores Range and always sends the whole file."""

    def log_message(self, *_) -> None:
        pass


def test_a_plain_web_server_will_do(shards, tmp_path):
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(NoRanges, directory=str(shards)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        url = f"http://127.0.0.1:{server.server_address[1]}/train-{{00000..00002}}.tar"
        chunks = list(reader_of(small_config(), url, Storage({}, tmp_path, 1 << 30, 20)).read(range(6)))
    finally:
        server.shutdown()
        server.server_close()
    assert_same_chunks(chunks, list(reader_of(small_config(), f"{shards}/train-*.tar").read(range(6))))


def test_any_file_system_of_fsspec_will_do(shards, tmp_path):
    memory = fsspec.filesystem("memory")
    for path in shards.glob("*.tar"):
        memory.pipe_file(f"/corpus/{path.name}", path.read_bytes())
    storage = Storage({}, tmp_path, 1 << 30, 20)
    chunks = list(reader_of(small_config(), "memory://corpus/train-*.tar", storage).read(range(6)))
    assert_same_chunks(chunks, list(reader_of(small_config(), f"{shards}/train-*.tar").read(range(6))))


def test_a_shard_that_is_gone_is_no_reason_to_wait(store, tmp_path, monkeypatch):
    monkeypatch.setattr(storage_module, "_LONGEST_PAUSE", 1e6)
    storage = remote(tmp_path, store.address)
    with pytest.raises(DataError, match="cannot be fetched"):
        storage.open(f"s3://{store.bucket}/absent.tar")
    with pytest.raises(DataError, match=r"data\.train: .*absent-\*\.tar: no shard matches"):
        storage.expand([f"s3://{store.bucket}/absent-*.tar"], "data.train")
    with pytest.raises(DataError, match="the shard is missing"):
        storage.expand([f"s3://{store.bucket}/train-{{00000..00005}}.tar"], "data.train")


def test_an_outage_that_lasts_is_named_in_the_end(store, tmp_path, monkeypatch):
    monkeypatch.setattr("s3fs.S3FileSystem.retries", 1)  # it and botocore have pauses of their own
    monkeypatch.setattr(storage_module, "_ATTEMPTS", 3)
    with fault_proxy(store.address, lambda *_: Fault("slow_down"), methods=("GET", "HEAD")) as proxy:
        options = storage_options(endpoint(proxy.server_address)) | {"config_kwargs": {"retries": {"max_attempts": 0}}}
        storage = Storage({"s3": options}, tmp_path, 1 << 30, 20)
        with pytest.raises(
            DataError, match=r"cannot be fetched: 3 attempts failed, the last with: .*Service Unavailable"
        ):
            storage.open(f"s3://{store.bucket}/train-00000.tar")


def test_secrets_are_neither_saved_nor_shown(store, tmp_path):
    options = tmp_path / "options.json"
    options.write_text(json.dumps({"s3": storage_options(store.endpoint)}))
    config = small_config(data={"storage_options": str(options), "cache_folder": str(tmp_path / "cache")})
    storage = Storage.of(config.data)
    assert len(index_of(f"s3://{store.bucket}/train-*.tar", storage)) == 3
    for shown in (json.dumps(to_dict(config)), repr(storage), str(vars(config.data))):
        assert KEY not in shown and SECRET not in shown
    with pytest.raises(DataError, match="which would be saved") as raised:
        LOCAL.expand(["https://user:secret@host/a.tar"], "data.train")
    assert "secret" not in str(raised.value)
    text = "403 for url 'https://me:pw@host/a.tar?X-Signature=abc&b=1' and s3://b/c?versionId=2"
    assert redact(text) == "403 for url 'https://host/a.tar' and s3://b/c"


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "cannot read .*options"), ("{secret", "is no JSON$"), ('{"s3": 1}', 'must hold {"PROTOCOL"')],
)
def test_a_broken_options_file_says_what_is_wrong(tmp_path, content, message):
    path = tmp_path / "options.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError, match=rf"data\.storage_options: .*{message}"):
        Storage.of(DataConfig(storage_options=str(path)))
