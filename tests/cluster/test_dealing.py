"""What Ray Data delivers is the plan: on any number of workers, from disk and S3, through deaths."""

import json
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from muser_dist.data.chunks import ChunkReader, chain_digest, chunk_digest
from muser_dist.data.executor import execution_options
from muser_dist.data.pipeline import plan_digest, ray_dataset
from muser_dist.data.storage import Storage
from tests.fatal import FATAL
from tests.fault_proxy import fault_proxy, seeded
from tests.object_store import endpoint, object_store, storage_options
from tests.shardmaker import sample, write_shard, write_shards
from tests.small import reader_of, small_config

ROOT = Path(__file__).parents[2]
STEPS = 8


def config(workers: int):
    return small_config(train={"workers": workers, "global_batch": 20, "chunk": 4, "samples": 20 * STEPS})


def delivered(reader: ChunkReader, workers: int, first_step: int = 0, steps: int = STEPS) -> list[dict]:
    """The chunks in order, as so many workers were dealt them; each its own."""
    dataset = ray_dataset(reader, first_step, steps, slots=2)
    dataset.context.execution_options = execution_options(512, reader.chunk_bytes, 2, workers)
    chunks, errors = [], []

    def consume(rank: int, shard) -> None:
        try:
            for block in shard.iter_batches(batch_size=None, batch_format="numpy"):
                chunk = {name: column[0] for name, column in block.items()}
                assert chunk["chunk"] % workers == rank
                chunks.append(chunk)
        except BaseException as error:
            errors.append(error)

    shards = dataset.streaming_split(workers, equal=True)
    threads = [threading.Thread(target=consume, args=(rank, shard), daemon=True) for rank, shard in enumerate(shards)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert not errors and not any(thread.is_alive() for thread in threads)
    return sorted(chunks, key=lambda chunk: (chunk["step"], chunk["chunk"]))


def digest(chunks: list[dict], first: str = "") -> str:
    for chunk in chunks:
        if (chunk["row"] >= 0).any():
            first = chain_digest(
                first, chunk_digest(int(chunk["step"]), int(chunk["chunk"]), list(chunk["key"]), chunk["crop"])
            )
    return first


def test_the_plan_is_delivered_on_any_number_of_workers_from_disk_and_s3(cluster, tmp_path):
    pattern = write_shards(tmp_path / "shards", [9, 4, 12, 6])
    expected = plan_digest(reader_of(config(1), pattern), STEPS)
    for workers, others in ((1, 3), (4, 2)):
        chunks = delivered(reader_of(config(workers), pattern), workers)
        assert digest(chunks) == expected
        # Cut after three steps and gone on with on another number of workers.
        head = [chunk for chunk in chunks if chunk["step"] < 3]
        tail = delivered(reader_of(config(others), pattern), others, first_step=3)
        assert digest(tail, digest(head)) == expected
        assert {int(chunk["step"]) for chunk in tail} == set(range(3, STEPS))  # nothing that was skipped is there
    with object_store() as store:
        store.upload(*sorted((tmp_path / "shards").glob("*.tar")))
        faults = seeded(1, {"reset": 0.2, "slow_down": 0.2, "close": 0.2}, most=6)
        with fault_proxy(store.address, faults, methods=("GET", "HEAD")) as proxy:
            options = {"s3": storage_options(endpoint(proxy.server_address))}
            storage = Storage(options, tmp_path / "cache", 1 << 30, 10)
            reader = reader_of(config(2), f"s3://{store.bucket}/train-*.tar", storage)
            from_s3 = delivered(reader, 2)
            assert sum(proxy.injected.values()) > 0
    assert digest(from_s3) == expected
    from_disk = [chunk for chunk in reader_of(config(2), pattern).read(range(6 * STEPS))]
    for mine, theirs in zip(from_s3, from_disk, strict=True):
        np.testing.assert_array_equal(mine["audio"], theirs["audio"])
        np.testing.assert_array_equal(mine["text_ids"], theirs["text_ids"])


@given(st.integers(0, 5 * STEPS), st.integers(1, 5), st.integers(1, 5))
@settings(max_examples=40)
def test_a_run_may_be_cut_at_any_chunk_and_go_on_with_other_workers(shards_of_the_module, cut, before, after):
    """In one process: `delivered` has shown that Ray deals what the readers make."""
    pattern, expected = shards_of_the_module

    def parts(workers: int, start: int, stop: int) -> list[dict]:
        reader = reader_of(config(workers), pattern)
        slots = [number // 5 * reader.slots_per_step + number % 5 for number in range(start, stop)]
        outlines = [reader.outline(slot) for slot in slots]
        return [
            {"step": o.step, "chunk": o.chunk, "row": o.rows.index, "key": o.keys, "crop": o.crop} for o in outlines
        ]

    assert digest(parts(after, cut, 5 * STEPS), digest(parts(before, 0, cut))) == expected


@pytest.fixture(scope="module")
def shards_of_the_module(tmp_path_factory) -> tuple[str, str]:
    pattern = write_shards(tmp_path_factory.mktemp("shards"), [9, 4, 12, 6])
    return pattern, plan_digest(reader_of(config(1), pattern), STEPS)


def test_skipped_rows_are_not_decoded(tmp_path, monkeypatch):
    decoded = Counter()
    reader = reader_of(config(1), write_shards(tmp_path, [9, 4, 12, 6]))
    original = type(reader)._decode

    def counting(self, outline):
        decoded.update(row.key for row in outline.found)
        return original(self, outline)

    monkeypatch.setattr(type(reader), "_decode", counting)
    list(reader.read(range(25, 30)))  # the sixth step
    assert decoded.total() == 20
    assert sorted(decoded.elements()) == sorted(key for slot in range(25, 30) for key in reader.outline(slot).keys)


def test_a_member_that_kills_its_decoder_costs_one_row(cluster, tmp_path):
    samples = [(f"piece{i}", sample(i) | ({"flac": FATAL} if i == 5 else {})) for i in range(20)]
    write_shard(tmp_path / "train-00000.tar", samples)
    chunks = delivered(reader_of(config(2), f"{tmp_path}/*.tar"), 2, steps=1)
    heard = dict(
        zip((key for c in chunks for key in c["key"]), (v for c in chunks for v in c["valid_audio"]), strict=False)
    )
    assert [key for key, valid in heard.items() if key and not valid] == ["piece5"]
    (problem,) = (json.loads(problem) for chunk in chunks for problem in chunk["problems"])
    assert problem["key"] == "piece5" and "SIGSEGV" in problem["reason"]


def test_the_death_of_a_decoding_node_loses_and_repeats_no_row(tmp_path):
    pattern = write_shards(tmp_path, [64] * 16)
    result = tmp_path / "outcome.json"
    command = [sys.executable, "-m", "tests.cluster.dying_node", pattern, str(result)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-5000:]
    outcome = json.loads(result.read_text())
    assert outcome["died_after"] < outcome["chunks"] == 128  # the node that died had its share of the work
    assert outcome["delivered"] == outcome["planned"]
