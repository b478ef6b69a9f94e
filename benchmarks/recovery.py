"""What each kind of failure costs: seconds until a run is as far as it was, and samples that are trained on again.

python benchmarks/recovery.py --json OUT.json     writes OUT.md beside it; a quarter of an hour on two cores

Each failure befalls a run of its own on a local cluster of several raylets; processes are killed or
stopped from outside. The numbers are those of the run's own events.jsonl.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import record

KINDS = {
    "worker killed": "SIGKILL to one worker's process",
    "worker hangs": "SIGSTOP to one worker's process, with train.hang_seconds at 20",
    "node lost": "the raylet of one worker is killed; a run of 1:3 workers goes on with one fewer",
    "node joins": "a raylet with room for one more worker is added to such a run",
    "job killed": "SIGKILL to the driver, and the same command again at once",
}
BATCH, CHECKPOINT_STEPS, FAIL_AFTER = 64, 25, 40


def main() -> None:
    """Runs every kind as often as asked and writes the JSON and the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="results; a page of the same name goes beside it")
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--rounds", type=int, default=2, help="runs of each kind")
    parser.add_argument("--run", nargs=3, metavar=("KIND", "DATA", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        run(options.run[0], options.run[1], Path(options.run[2]))
        return
    if options.json is None:
        parser.error("the following arguments are required: --json")
    rows = []
    with tempfile.TemporaryDirectory(prefix="recovery-") as temporary:
        data = Path(temporary, "data")
        make = [sys.executable, "jobs/make_shards.py", "demo", "--out", str(data), "--train", "640", "--val", "64"]
        subprocess.run(make, check=True, stdout=subprocess.DEVNULL)
        for number in range(options.rounds):
            for kind in options.kinds:
                folder = Path(temporary, f"{number}-{kind.replace(' ', '-')}")
                rows.append(measure(kind, str(data / "train-*.tar"), folder) | {"round": number + 1})
                record.say(f"{rows[-1]}")
    results = record.provenance("benchmarks/recovery.py", sys.argv[1:], ("ray", "torch", "deepspeed"))
    results |= {"gpu": None, "rows": rows, "ratios": {}}
    record.write(options.json, results, page(results, options.json.name))


def measure(kind: str, data: str, folder: Path) -> dict[str, Any]:
    """One run with one failure, in a process of its own; what its events say."""
    folder.mkdir()
    command = [sys.executable, __file__, "--run", kind, data, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    if done.returncode:
        raise RuntimeError(f"{kind}: {done.stderr[-3000:]}")
    return json.loads((folder / "row.json").read_text())


def page(results: dict[str, Any], name: str) -> str:
    """The results in Markdown."""
    lines = []
    for kind, what in KINDS.items():
        rows = [row for row in results["rows"] if row["kind"] == kind]
        if rows:
            lost = [row["seconds_lost"] for row in rows]
            repeated = [row["rows_repeated"] for row in rows]
            spread = f"{min(lost):.0f} to {max(lost):.0f}"
            lines.append([kind, what, f"{statistics.median(lost):.0f}", spread, f"{statistics.median(repeated):.0f}"])
    titles = ["failure", "how", "seconds lost, median", "from, to", "samples repeated, median"]
    return (
        f"{record.head('What failures cost', results, name)}\n\n"
        f"Two workers of the tiny recipe on short clips, {BATCH} rows a step, a checkpoint every {CHECKPOINT_STEPS} "
        f"steps; the failure comes {FAIL_AFTER} steps after the start. Seconds lost are those until the run is as far "
        "as it was, less those that the new steps took themselves: noticing, starting workers and data anew, and the "
        "steps since the last checkpoint once more.\n\n"
        f"{record.table(titles, lines)}\n\n"
        "Up to 20 s of a lost or joining node are Ray's, which looks that often how many workers there is room for.\n"
    )


# --- One run ---


def run(kind: str, data: str, folder: Path) -> None:
    """A run that meets a failure; `row.json` in the folder tells what it cost."""
    import ray
    from ray.cluster_utils import Cluster

    from muser_dist.train.runlog import EVENTS, read_lines

    fast = {"health_check_period_ms": 1000, "health_check_timeout_ms": 1000, "health_check_failure_threshold": 3}
    head = {"num_cpus": 2, "_system_config": fast | {"health_check_initial_delay_ms": 0}}
    cluster = Cluster(initialize_head=True, head_node_args=head)

    def node() -> Any:
        return cluster.add_node(num_cpus=0, resources={"trainer": 1})

    first, _ = node(), node()
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    driver = Driver(data, folder, cluster.address, "1:3" if kind.startswith("node") else "2")
    driver.start()
    driver.wait_for(lambda: driver.steps_since_start() >= FAIL_AFTER)
    if kind == "node lost":
        cluster.remove_node(first, allow_graceful=False)
    elif kind == "node joins":
        node()
    elif kind == "job killed":
        driver.kill()
        driver.start()
    else:
        worker_processes()[-1].send_signal(signal.SIGSTOP if kind == "worker hangs" else signal.SIGKILL)
    driver.wait_for(lambda: any(event["event"] == "caught up" for event in driver.events()))
    driver.kill()
    events = read_lines(folder / "run" / EVENTS)
    start = [event for event in events if event["event"] == "start"][-1]
    caught_up = next(event for event in events if event["event"] == "caught up")
    row = {"kind": kind, "seconds_lost": caught_up["seconds_lost"], "rows_repeated": start["rows_repeated"]}
    (folder / "row.json").write_text(json.dumps(row | {"workers_after": start["workers"]}))
    ray.shutdown()
    cluster.shutdown()


def worker_processes() -> list[psutil.Process]:
    """The processes of this machine that train for a cluster started by this one."""
    children = psutil.Process().children(recursive=True)
    return [child for child in children if child.cmdline()[:1] and "RayTrainWorker" in child.cmdline()[0]]


class Driver:
    """The job, as a process that can be killed and started again."""

    def __init__(self, data: str, folder: Path, address: str, workers: str) -> None:
        self._folder = folder / "run"
        self._environment = os.environ | {"RAY_ADDRESS": address}
        options = {
            "--data.train": data,
            "--storage": str(folder),
            "--name": "run",
            "--data.crop-seconds": "1",
            "--train.workers": workers,
            "--train.resource": "trainer",
            "--train.cpus-per-worker": "0",
            "--train.global-batch": str(BATCH),
            "--train.samples": str(BATCH * 100_000),
            "--train.checkpoint-samples": str(BATCH * CHECKPOINT_STEPS),
            "--train.hang-seconds": "20",
            "--train.log-steps": "1",
        }
        self._command = [
            sys.executable,
            "jobs/pretrain.py",
            "tiny",
            *(word for pair in options.items() for word in pair),
        ]
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Starts the job."""
        self._process = subprocess.Popen(self._command, env=self._environment, stdout=subprocess.DEVNULL)

    def kill(self) -> None:
        """Kills it."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def events(self) -> list[dict[str, Any]]:
        """What the run has written so far."""
        from muser_dist.train.runlog import EVENTS, read_lines

        return read_lines(self._folder / EVENTS)

    def steps_since_start(self) -> int:
        """Steps that are done since workers were started last."""
        from muser_dist.train.runlog import METRICS, last_line

        starts = [event for event in self.events() if event["event"] == "start"]
        line = last_line(self._folder / METRICS)
        return line["step"] - starts[-1]["step"] if starts and line else 0

    def wait_for(self, condition: Callable[[], bool]) -> None:
        """Waits; the job may not end meanwhile."""
        pause = threading.Event()
        while not condition():
            if self._process is None or self._process.poll() is not None:
                raise RuntimeError("the job ended")
            pause.wait(0.2)


if __name__ == "__main__":
    main()
