"""What each child process of ingest.py does: drive one contestant, or time the plan, and write what it saw.

`python benchmarks/ingest_measure.py '{"task": "speed" | "plan", "out": PATH, ...}'`
"""

import json
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from ingest_rivals import CONTESTANTS, Setting, chunks, reader_of, start_ray, training_config


def speed(contestant: str, setting: dict[str, Any], seconds: float, warmup: float, pause: float = 0) -> dict[str, Any]:
    """Takes batches for so many seconds after the first one.

    Args:
        contestant: a name of CONTESTANTS.
        setting: fields of Setting.
        seconds: from the first batch to the end.
        warmup: how many of them are left out of all figures but the peaks.
        pause: sleep after each batch, for a consumer that is slower than the data path.

    Returns:
        the contestant's row of the results.
    """
    watch = _Watch()
    batches = CONTESTANTS[contestant](Setting(**setting))
    deliveries: list[tuple[float, int, float]] = []  # when, rows, seconds blocked
    asked = time.monotonic()
    for rows in batches:
        now = time.monotonic()
        deliveries.append((now, rows, now - asked))
        if now - deliveries[0][0] >= seconds:
            break
        time.sleep(pause)
        asked = time.monotonic()
    else:
        raise SystemExit(f"{contestant}: the data ended after {len(deliveries)} batches")
    watch.stop()
    first = deliveries[0][0]
    begin, end = first + warmup, deliveries[-1][0]
    rate = _slope(deliveries, begin, end)
    waits = np.array([wait for when, _, wait in deliveries if when > begin])
    row = {
        "rows_per_second": round(rate, 2),
        "seconds_to_first_batch": round(first - watch.started, 2),
        "rows_delivered": sum(rows for _, rows, _ in deliveries),
        "wait_seconds": {f"p{p}": round(float(np.percentile(waits, p)), 4) for p in (50, 95, 99)},
    }
    return row | watch.figures(begin, deliveries)


def _slope(deliveries: list[tuple[float, int, float]], begin: float, end: float) -> float:
    """Rows a second: the line through the rows delivered so far, looked at every 50 ms.

    Two ends alone would make much of where they fall among batches that come in bursts.
    """
    when = np.array([when for when, _, _ in deliveries])
    total = np.cumsum([0] + [rows for _, rows, _ in deliveries])
    looks = np.append(np.arange(begin, end, 0.05), end)
    return float(np.polyfit(looks, total[np.searchsorted(when, looks, side="right")], 1)[0])


class _Watch:
    """Samples CPU time of this process and all below it, and Ray's object store."""

    def __init__(self) -> None:
        self.root = psutil.Process()
        # Python's start and imports are part of the time to the first batch.
        self.started = time.monotonic() - (time.time() - self.root.create_time())
        self.samples: list[tuple[float, float, dict[int, float]]] = []  # when, busy machine, CPU by process
        self.titles: dict[int, Counter[str]] = defaultdict(Counter)
        self.store: list[tuple[float, int, int]] = []  # when, bytes used, bytes ever spilled
        self.store_capacity = 0
        self._read_store: Callable[[], Any] | None = None
        self._ended = threading.Event()
        self._look()
        self._thread = threading.Thread(target=self._look_on, daemon=True)
        self._thread.start()

    def _look_on(self) -> None:
        while not self._ended.wait(2.0):
            self._look()

    def stop(self) -> None:
        """Ends with a last look."""
        self._ended.set()
        self._thread.join()
        self._look()

    def _look(self) -> None:
        cpu = {}
        for process in (self.root, *self.root.children(recursive=True)):
            try:
                cpu[process.pid] = sum(process.cpu_times()[:4])  # user, system, and both of children that ended
                title = "consumer" if process is self.root else _title(process.cmdline())
                self.titles[process.pid][title] += 1
            except psutil.Error:
                continue  # it has just ended
        machine = psutil.cpu_times()
        busy = sum(machine) - machine.idle - machine.iowait - machine.guest - machine.guest_nice
        self.samples.append((time.monotonic(), busy, cpu))
        if stats := self._store_stats():
            self.store.append((time.monotonic(), stats.object_store_bytes_used, stats.spilled_bytes_total))
            self.store_capacity = stats.object_store_bytes_avail

    def _store_stats(self) -> Any:
        ray = sys.modules.get("ray")
        if ray is None or not hasattr(ray, "is_initialized") or not ray.is_initialized():
            return None
        if self._read_store is None:
            # What `ray memory --stats-only` asks, but over one channel instead of a new one each time.
            from ray._private.grpc_utils import init_grpc_channel
            from ray.core.generated import node_manager_pb2, node_manager_pb2_grpc

            (node,) = ray.nodes()
            channel = init_grpc_channel(f"{node['NodeManagerAddress']}:{node['NodeManagerPort']}")
            stub = node_manager_pb2_grpc.NodeManagerServiceStub(channel)
            request = node_manager_pb2.FormatGlobalMemoryInfoRequest(include_memory_info=False)
            self._read_store = lambda: stub.FormatGlobalMemoryInfo(request, timeout=30).store_stats
        return self._read_store()

    def figures(self, begin: float, deliveries: list[tuple[float, int, float]]) -> dict[str, Any]:
        """CPU for each clip delivered from then on, and the peaks of the store over all the time."""
        before_begin = [sample for sample in self.samples if sample[0] <= begin]  # a busy machine may have few looks
        (start, busy_before, before), (stop, busy_after, after) = before_begin[-1], self.samples[-1]
        elapsed, rate = stop - start, _slope(deliveries, start, stop)
        by_title: dict[str, float] = defaultdict(float)
        for pid, spent in after.items():
            by_title[self._title_of(pid)] += (spent - before.get(pid, 0.0)) / elapsed / rate
        spent = sum(by_title.values())
        figures: dict[str, Any] = {
            "cpu_seconds_per_clip": round(spent, 5),
            "cpu_seconds_by_process": {
                name: round(value, 5) for name, value in sorted(by_title.items(), key=lambda item: -item[1])
            },
            "cores_used": round(spent * rate, 2),
            "cores_used_by_others": round((busy_after - busy_before) / elapsed - spent * rate, 2),
        }
        if self.store:
            figures["object_store"] = {
                "peak_mb": round(max(used for _, used, _ in self.store) / 1e6, 1),
                "end_mb": round(self.store[-1][1] / 1e6, 1),
                "capacity_mb": round(self.store_capacity / 1e6),
                "spilled_mb": round(self.store[-1][2] / 1e6, 1),
            }
        return figures

    def _title_of(self, pid: int) -> str:
        """What the process was seen to do most often, idling aside."""
        titles = self.titles[pid]
        return max(titles, key=lambda title: (title != "IDLE", titles[title]))


def _title(command: list[str]) -> str:
    """A short name of a process: Ray's workers say what they run, others are known by their program."""
    line = " ".join(command).strip()  # workers overwrite their command line and pad it
    if line.startswith("ray::"):
        return line.split("->")[-1].split("(")[0].split(".")[0].removeprefix("ray::")
    if "-m" in command[:-1]:
        return command[command.index("-m") + 1].rpartition(".")[2]
    program = next((word for word in command if word.endswith(".py")), line.partition(" ")[0] or "ended")
    return "worker" if program.endswith(Path(__file__).name) else Path(program).stem


def plan(setting: dict[str, Any], sizes: list[int], rows_per_shard: int, repeats: int = 3) -> dict[str, Any]:
    """Seconds from the index file to the plan, and from the plan to the first chunk, by number of shards.

    Real shards are named again and again until there are as many as asked for. The dataset is new
    each time; Ray is warm.
    """
    from muser_dist.data.pipeline import ray_dataset
    from muser_dist.data.shards import ShardIndex

    place = Setting(**setting)
    start_ray(place, place.cores)
    config = training_config(place)
    seen: dict[int, dict[str, list[float]]] = {size: defaultdict(list) for size in sizes}
    with tempfile.TemporaryDirectory() as folder:
        for repeat in range(repeats + 1):  # the first pass, over the fewest shards alone, warms Ray up
            for size in sizes if repeat else sizes[:1]:
                path = Path(folder) / f"{size}.json"
                if not path.exists():
                    urls = tuple(np.resize(np.array(place.shards, object), size))
                    ShardIndex(urls, np.full(size, rows_per_shard, np.int64), {}).save(path)
                start = time.monotonic()
                index = ShardIndex.load(path)
                reader = reader_of(config, index)
                seconds = {"plan": time.monotonic() - start}
                steps = size * rows_per_shard // config.train.global_batch
                for name, first_step in (("start", 0), ("resumed", steps * 9 // 10)):
                    start = time.monotonic()
                    stream = chunks(ray_dataset(reader, first_step, steps, place.cores), config)
                    block = next(stream)
                    seconds[name] = time.monotonic() - start
                    stream.close()
                    if int(block["step"][0]) != first_step or not block["valid_audio"].all():
                        raise SystemExit(f"{size} shards, step {first_step}: the first chunk is not as it should be")
                    _wait_until_free(place.cores)
                for name, value in seconds.items() if repeat else ():
                    seen[size][name].append(round(value, 4))
    return {
        "plan": [
            {"shards": size}
            | {f"{name}_seconds": statistics.median(values) for name, values in seen[size].items()}
            | {"each": dict(seen[size])}
            for size in sizes
        ]
    }


def _wait_until_free(cores: int) -> None:
    """Until the slots of the dataset before have ended."""
    import ray

    while ray.available_resources().get("CPU", 0) < cores:
        time.sleep(0.1)


if __name__ == "__main__":
    arguments = json.loads(sys.argv[1])
    out = Path(arguments.pop("out"))
    result = {"speed": speed, "plan": plan}[arguments.pop("task")](**arguments)
    out.write_text(json.dumps(result))
