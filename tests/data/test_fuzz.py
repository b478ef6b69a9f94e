"""No shard, however damaged or hostile, ends a run, costs more than its own rows, or goes unreported."""

import faulthandler
import json
import resource
import subprocess
import sys
import traceback
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest

from muser_dist.config import RunConfig
from muser_dist.data.pipeline import evaluation_chunks
from muser_dist.data.shards import ShardIndex, index_shards
from muser_dist.data.storage import Storage
from muser_dist.errors import DataError
from tests.mutants import mutants
from tests.shardmaker import encode, sample, tone, write_shard
from tests.small import small_config

ROWS = 4
SECONDS = 30  # for one mutant; it takes some 30 ms
GROWTH_BYTES = 512 << 20  # of the resident memory of reader and decoder, over what good shards need
ADDRESS_SPACE_BYTES = 2 << 30  # for the reader, over what it begins with; the decoder limits itself

OF_THE_CHUNK = {"step", "chunk", "row", "problems", "seconds"}  # fields with no entry for each row


@pytest.mark.parametrize("seed", [0])
def test_mutants_cost_no_more_than_their_rows(tmp_path, seed):
    run(tmp_path, seed, 300)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 21))
def test_many_mutants_cost_no_more_than_their_rows(tmp_path, seed):
    run(tmp_path, seed, 500)


def run(folder: Path, seed: int, count: int) -> None:
    """Reads the mutants in another process: what kills or stops it does so there, after naming the mutant."""
    worker = subprocess.run(
        [sys.executable, "-m", "tests.data.test_fuzz", str(folder), str(seed), str(count)],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    report = f"{worker.stdout}\n{worker.stderr[-5000:]}"
    assert worker.returncode == 0, f"the reader ended with status {worker.returncode} (mutants in {folder})\n{report}"
    assert (folder / "done").read_text() == str(count), report


def good_shard(path: Path, first: int) -> Path:
    rows = range(first, first + ROWS)
    return write_shard(
        path, [(f"piece{i:05d}", sample(i) | {"flac": encode(tone(i, 0.3, 8_000), 8_000)}) for i in rows]
    )


def read(config: RunConfig, storage: Storage, index: ShardIndex) -> list[dict[str, bytes]]:
    """All rows; the ones that are not used, and no others, are in the quarantine."""
    rows, used, quarantined = {}, set(), set()
    for chunk in evaluation_chunks(config, index, storage):
        fields = chunk.keys() - OF_THE_CHUNK
        for i, row in enumerate(chunk["row"].tolist()):
            if row < 0:
                continue
            assert row not in rows
            rows[row] = {name: plain(chunk[name][i]) for name in fields}
            if all(chunk[f"valid_{modality}"][i] for modality in config.model.towers()):
                used.add(row)
        quarantined |= {json.loads(problem)["row"] for problem in chunk["problems"]}
    assert sorted(rows) == list(range(index.total))
    # None stands for samples beyond those of the index: they are no rows.
    assert quarantined - {None} == rows.keys() - used
    return [rows[row] for row in sorted(rows)]


def plain(value: str | np.ndarray) -> bytes:
    return value.encode() if isinstance(value, str) else np.asarray(value).tobytes()


def peak_bytes() -> int:
    """Most memory that this process and its children ever had resident."""
    this = psutil.Process()
    total = 0
    for process in (this, *this.children(recursive=True)):
        status = Path(f"/proc/{process.pid}/status").read_text()
        total += int(status.partition("VmHWM:")[2].split()[0]) << 10
    return total


def read_mutants(folder: Path, seed: int, count: int) -> bool:
    """The worker: reads each mutant beside a good shard, says what is wrong with which; whether nothing is."""
    config = small_config(train={"chunk": ROWS, "global_batch": ROWS})
    config = replace(config, evaluate=replace(config.evaluate, rows=1_000_000))
    storage = Storage.of(config.data)
    shard = good_shard(folder / "shard.tar", 0).read_bytes()
    good = str(good_shard(folder / "whole.tar", ROWS))
    alone = read(config, storage, index_shards(storage, [good], "data.train"))

    space = psutil.Process().memory_info().vms + ADDRESS_SPACE_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (space, resource.getrlimit(resource.RLIMIT_AS)[1]))
    before, failed = peak_bytes(), False
    for number, (name, data) in enumerate(mutants(shard, seed, count)):
        faulthandler.dump_traceback_later(SECONDS, exit=True)
        path = folder / f"mutant-{number}.tar"
        path.write_bytes(data)
        (folder / "now").write_text(name)
        try:
            urls = [str(path), good]
            counts = {ROWS}  # as counted before it broke, and as it is counted now
            try:
                counts.add(int(index_shards(storage, urls, "data.train").rows[0]))
            except DataError as error:
                assert path.name in str(error)
            for rows in counts:
                assert read(config, storage, ShardIndex(urls, np.array([rows, ROWS]), {}))[-ROWS:] == alone
            growth = peak_bytes() - before
            assert growth < GROWTH_BYTES, f"needs {growth >> 20} MiB"
            path.unlink()
        except Exception:
            before, failed = max(before, peak_bytes()), True
            print(f"{name} ({path.name}):\n{traceback.format_exc(limit=-4)}", flush=True)
    (folder / "done").write_text(str(count))
    return not failed


if __name__ == "__main__":
    sys.exit(not read_mutants(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])))
