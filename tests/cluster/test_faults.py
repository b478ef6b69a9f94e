"""What may happen to a run, one test each: it goes on, or ends with a message and can be resumed.

Killed workers, damaged checkpoints and other numbers of workers: test_training.py. Killed nodes:
test_elastic.py and test_dealing.py.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import ray

from muser_dist.config import ObjectiveConfig, RunConfig
from muser_dist.data.pipeline import plan_digest
from muser_dist.errors import MuserError
from muser_dist.train.launch import pretrain
from muser_dist.train.runlog import EVENTS, METRICS, last_line, read_lines
from muser_dist.train.store import CheckpointStore
from tests.cluster.plugins import ARMED, arm
from tests.fault_proxy import Fault, fault_proxy
from tests.object_store import endpoint, object_store, storage_options
from tests.small import LOCAL, reader_of, small_config

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
STEPS, BATCH = 20, 16


def run_config(corpus: Path, storage: Path, name: str, **train: object) -> RunConfig:
    settings = {
        "workers": 2,
        "samples": STEPS * BATCH,
        "global_batch": BATCH,
        "chunk": 4,
        "checkpoint_samples": 4 * BATCH,
        "max_failures": 1,
    }
    return small_config(
        train=settings | train,
        data={"train": (f"{corpus}/train-*.tar",)},
        objective=ObjectiveConfig(name="tests.cluster.plugins:faulty"),
        name=name,
        storage=str(storage),
    )


def check_accounts(config: RunConfig, corpus: Path) -> None:
    """The run is complete, each row was delivered in its place, and each is used or quarantined."""
    lines = read_lines(config.folder / METRICS)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert all(line["rows_read"] == line["rows_used"] + line["rows_quarantined"] for line in lines)
    assert lines[-1]["digest"] == plan_digest(reader_of(config, f"{corpus}/train-*.tar"), STEPS)
    assert (config.folder / "model" / "model.safetensors").exists()


def events(config: RunConfig, kind: str) -> list[dict]:
    return [event for event in read_lines(config.folder / EVENTS) if event["event"] == kind]


def wait_for(condition: Callable[[], object], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.1)


def test_a_loss_that_is_not_finite(cluster, corpus, tmp_path):
    config = run_config(corpus, tmp_path, "nan")
    arm(cluster, "nan", call=11)
    with pytest.raises(MuserError, match=r"not finite at step 11.*rank 1"):
        pretrain(config, ["test"])
    assert CheckpointStore(config, LOCAL).steps() == [4, 8]
    pretrain(config, ["test"])  # the fault does not come again
    assert [event["step"] for event in events(config, "start")] == [0, 8]
    check_accounts(config, corpus)


@pytest.mark.parametrize("max_failures", (0, 1))
def test_a_worker_that_runs_out_of_memory_says_what_to_change(cluster, corpus, tmp_path, max_failures):
    config = run_config(corpus, tmp_path, "memory", max_failures=max_failures)
    arm(cluster, "memory", call=11)
    with pytest.raises(
        MuserError, match=r"^rank 1: out of memory with chunks of 4 rows; give a smaller --train\.chunk"
    ):
        pretrain(config, ["test"])
    pretrain(replace(config, train=replace(config.train, zero_stage=3)), ["test"])
    check_accounts(config, corpus)


def test_a_worker_that_hangs_is_named(cluster, corpus, tmp_path):
    config = run_config(corpus, tmp_path, "hang", hang_seconds=15.0)
    arm(cluster, "hang", call=11)
    pretrain(config, ["test"])
    (hang,) = events(config, "hang")
    assert "did nothing for 15 s" in hang["error"] and "Ranks 1" in hang["error"].replace("ranks", "Ranks")
    check_accounts(config, corpus)


def test_one_rank_is_five_times_slower(cluster, corpus, tmp_path):
    config = run_config(corpus, tmp_path, "slow")
    arm(cluster, "slow", 0, seconds=0.5)
    try:
        pretrain(config, ["test"])
    finally:
        (cluster / "slow-1").unlink()
    check_accounts(config, corpus)


def test_the_driver_is_killed_and_the_job_submitted_again(cluster, corpus, tmp_path):
    config = run_config(corpus, tmp_path, "driver")
    arm(cluster, "slow", 0, seconds=0.3)  # so that it is killed in the middle
    environment = os.environ | {"RAY_ADDRESS": ray.get_runtime_context().gcs_address, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tests.cluster.run_of", str(corpus), str(tmp_path), "driver"]
    first = subprocess.Popen(command, env=environment, cwd=ROOT, stdout=subprocess.DEVNULL)
    try:
        wait_for(lambda: CheckpointStore(config, LOCAL).steps() or first.poll() is not None)
        assert first.poll() is None
    finally:
        first.send_signal(signal.SIGKILL)
        first.wait()
        (cluster / "slow-1").unlink()
    assert last_line(config.folder / METRICS)["step"] < STEPS
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert events(config, "start")[-1]["step"] > 0
    check_accounts(config, corpus)


def test_an_object_store_that_is_full(corpus, tmp_path):
    """A small store, all of which is taken when the run begins."""
    (tmp_path / "armed").mkdir()
    environment = os.environ | {ARMED: str(tmp_path / "armed"), "PYTHONPATH": str(ROOT), "RAY_ADDRESS": "local"}
    command = [sys.executable, "-m", "tests.cluster.run_of", str(corpus), str(tmp_path), "store", "full-store"]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    check_accounts(run_config(corpus, tmp_path, "store"), corpus)


def test_s3_that_fails_for_data_and_for_checkpoints(cluster, corpus, tmp_path):
    def schedule(method: str, path: str, before: int) -> Fault | None:
        """Each object can be read at the third attempt; parts of checkpoints can be written at the third."""
        return Fault("slow_down") if before < 2 and (method != "PUT" or "safetensors" in path) else None

    with object_store() as store:
        store.upload(*sorted(corpus.glob("train-*.tar")))
        methods = frozenset({"GET", "HEAD", "PUT"})
        with fault_proxy(store.address, schedule, methods) as proxy:
            options = tmp_path / "options.json"
            options.write_text(json.dumps({"s3": storage_options(endpoint(proxy.address))}))
            config = run_config(corpus, tmp_path, "s3", checkpoint_storage=f"s3://{store.bucket}/checkpoints")
            data = {"train": (f"s3://{store.bucket}/train-*.tar",), "storage_options": str(options)}
            config = replace(config, data=replace(config.data, cache_folder=str(tmp_path / "cache"), **data))
            arm(cluster, "kill", call=11)
            pretrain(config, ["test"])
            assert proxy.injected["slow_down"] > 8
        keys = [item["Key"] for item in store.client.list_objects_v2(Bucket=store.bucket)["Contents"]]
    assert "checkpoints/s3/checkpoint-00000020/checkpoint.json" in keys
    assert not list(config.folder.glob("checkpoint-*"))
    assert [event["step"] for event in events(config, "start")] in ([0, 8], [0, 4])  # as fast as writing was
    check_accounts(replace(config, data=replace(config.data, storage_options="")), corpus)


def test_checkpoint_storage_that_is_full_for_good(cluster, corpus, tmp_path):
    """A file system of its own, too small for two checkpoints; when there is room, the run goes on."""
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", small], capture_output=True)
    if mounted.returncode:
        pytest.skip("a file system of its own cannot be mounted here")
    try:
        config = run_config(corpus, tmp_path, "full", checkpoint_storage=str(small), checkpoint_patience=3.0)
        room = small / "room"
        room.write_bytes(bytes(500_000))
        with pytest.raises(MuserError, match=r"No space left .*--train\.checkpoint-storage; .* goes on from step \d"):
            pretrain(config, ["test"])
        kept = CheckpointStore(config, LOCAL).steps()
        room.unlink()
        subprocess.run(["mount", "-o", "remount,size=64m", small], check=True)
        pretrain(config, ["test"])
        assert events(config, "start")[-1]["step"] == max(kept, default=0)
        check_accounts(config, corpus)
    finally:
        subprocess.run(["umount", small], check=True)
