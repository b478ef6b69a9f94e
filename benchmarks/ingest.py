"""How fast training chunks come out of our data path, next to other ways to read the same shards.

python benchmarks/ingest.py --json OUT.json     writes OUT.md beside it; half an hour on two cores
python benchmarks/ingest.py --json OUT.json --seconds 8 --rounds 1 --formats mp3 --plan 100 1000     a trial
"""

import argparse
import io
import json
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from ingest_page import page
from ingest_rivals import BATCH, CONTESTANTS
from record import provenance, say, write

PACKAGES = ("ray", "torch", "webdataset", "soundfile", "soxr", "numpy", "pyarrow")
FORMATS = ("mp3", "flac", "ogg")
RATE = 44_100
CLIP_SECONDS = 30.0
START_SECONDS = {False: 6, True: 15}
"""About how long a contestant takes to its first batch, without Ray and with it."""

RAY = ("ours", "ray_webdataset", "ray_webdataset_tuned")
"""Contestants with an object store; the first two also meet a slow consumer."""

SLOW_STORE_MB = 512
"""Object store under the slow consumer: so small that it is full before the measured time begins."""

# Without it, libraries in each of the decoding processes would start as many threads as there are cores.
ENVIRONMENT = {name: "1" for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}


@dataclass(frozen=True)
class Job:
    """One child process: what its row is known by, what it is asked, and about how long it takes."""

    known: dict[str, Any]
    task: dict[str, Any]
    seconds: float


def main(argv: Sequence[str] | None = None) -> None:
    """Runs all measurements and writes the JSON and the page."""
    options = _options(argv)
    results = provenance("benchmarks/ingest.py", list(sys.argv[1:] if argv is None else argv), PACKAGES)
    results["gpu"] = None
    with tempfile.TemporaryDirectory(prefix="ingest-") as temporary:
        folder = options.data or Path(temporary)
        results["data"] = {kind: make_shards(folder / kind, kind, options) for kind in options.formats}
        results |= measure(options, folder)
    write(options.json, results, page(results, options.json.name))


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True, help="results; a page of the same name goes beside it")
    parser.add_argument("--data", type=Path, help="folder for the shards, made when missing; else a temporary one")
    parser.add_argument(
        "--formats", nargs="+", choices=FORMATS, default=list(FORMATS), help="the first is the main one"
    )
    parser.add_argument("--contestants", nargs="+", choices=CONTESTANTS, default=list(CONTESTANTS))
    parser.add_argument(
        "--seconds", type=float, default=40.0, help="of each measurement; the first quarter is left out"
    )
    parser.add_argument("--rounds", type=int, default=3, help="of all contestants on the main format; others get one")
    parser.add_argument("--cores", type=int, default=os.cpu_count(), help="processes or slots that may decode")
    parser.add_argument("--plan", type=int, nargs="*", default=[10**e for e in range(2, 7)], help="numbers of shards")
    parser.add_argument("--shards", type=int, default=16, help="of each format")
    parser.add_argument("--rows-per-shard", type=int, default=64)
    parser.add_argument("--distinct", type=int, default=24, help="clips that are composed; rows repeat them")
    return parser.parse_args(argv)


# --- Data ---


def make_shards(folder: Path, kind: str, options: argparse.Namespace) -> dict[str, Any]:
    """Shards of one format, composed unless they are there; returns what they hold."""
    settings = {"shards": options.shards, "rows_per_shard": options.rows_per_shard, "distinct_clips": options.distinct}
    done = folder / "made.json"  # written last
    if not done.exists() or json.loads(done.read_text())["settings"] != settings:
        say(f"making {options.shards} shards of {options.rows_per_shard} {kind} clips of {CLIP_SECONDS:g} s")
        folder.mkdir(parents=True, exist_ok=True)
        with ProcessPoolExecutor(options.cores) as pool:
            clips = list(pool.map(_clip, range(options.distinct), [kind] * options.distinct))
        for shard in range(options.shards):
            with tarfile.open(folder / f"train-{shard:05d}.tar", "w") as tar:
                for row in range(options.rows_per_shard):
                    number = shard * options.rows_per_shard + row
                    for extension, data in clips[number % options.distinct].items():
                        info = tarfile.TarInfo(f"clip{number:07d}.{extension}")
                        info.size = len(data)
                        tar.addfile(info, io.BytesIO(data))
        bits = 8 * statistics.mean(len(clip[kind]) for clip in clips)
        done.write_text(json.dumps({"settings": settings, "kbit_per_second": round(bits / CLIP_SECONDS / 1000)}))
    made = json.loads(done.read_text())
    return made["settings"] | {"kbit_per_second": made["kbit_per_second"]}


def _clip(index: int, kind: str) -> dict[str, bytes]:
    """Members of a row: a composed piece at 44.1 kHz in stereo, and its metadata."""
    import soundfile
    import soxr

    from muser_dist.data.corpora.demo import compose

    waveform, rate, metadata = compose(0, index, seconds=CLIP_SECONDS)
    stereo = waveform if waveform.ndim == 2 else np.stack([waveform, waveform], axis=1)
    stereo = soxr.resample(stereo, rate, RATE)
    # A recording's hiss, at -50 dB: synthetic silence would make flac three times smaller than it is on music.
    stereo += np.random.default_rng(index).normal(0, 10 ** (-50 / 20), stereo.shape)
    file = io.BytesIO()
    subtype, rest = {
        "mp3": ("MPEG_LAYER_III", {"bitrate_mode": "CONSTANT", "compression_level": 0.5}),  # 160 kbit/s
        "flac": ("PCM_16", {}),
        "ogg": ("VORBIS", {}),
    }[kind]
    with soundfile.SoundFile(file, "w", RATE, 2, subtype, format=kind.upper(), **rest) as sound:
        for start in range(0, len(stereo), RATE):  # libsndfile 1.2 overflows its stack on long vorbis writes
            sound.write(np.clip(stereo[start : start + RATE], -1, 1))
    return {kind: file.getvalue(), "json": json.dumps(metadata).encode()}


# --- Measurements ---


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All measurements in their order; returns rows, ratios and the cost of the plan."""
    main_format = options.formats[0]
    rounds = {kind: options.rounds if kind == main_format else 1 for kind in options.formats}
    seconds = {kind: options.seconds if kind == main_format else options.seconds / 2 for kind in options.formats}

    def setting(kind: str, **fields: Any) -> dict[str, Any]:
        # Rows for twice the time: buffers are filled before the consumer's time begins.
        basis = {"folder": str((folder / kind).resolve()), "extension": kind, "cores": options.cores}
        return basis | {"seconds": 2 * seconds[kind] + 30} | fields

    jobs = []
    for kind in options.formats:
        for round_ in range(rounds[kind]):
            for name in options.contestants:
                known = {"contestant": name, "format": kind, "round": round_, "consumer": "fast"}
                times = {"seconds": seconds[kind], "warmup": seconds[kind] / 4}
                task = {"task": "speed", "contestant": name, "setting": setting(kind)} | times
                jobs.append(Job(known, task, seconds[kind] + START_SECONDS[name in RAY]))
    for name in [name for name in RAY[:2] if name in options.contestants]:
        known = {"contestant": name, "format": main_format, "round": 0, "consumer": "slow"}
        times = {"seconds": options.seconds, "warmup": 0.6 * options.seconds}
        task = {"task": "speed", "contestant": name, "setting": setting(main_format, store_mb=SLOW_STORE_MB)} | times
        jobs.append(Job(known, task, options.seconds + START_SECONDS[True]))
    plan = {"task": "plan", "sizes": options.plan, "rows_per_shard": options.rows_per_shard}
    plan_job = Job({"measurement": "plan"}, plan | {"setting": setting(main_format)}, 200)

    left = sum(job.seconds for job in jobs) + plan_job.seconds * bool(options.plan)
    rows: list[dict[str, Any]] = []
    for job in jobs:
        if job.known["consumer"] == "slow":
            rate = statistics.median(_figures(rows, job.known["contestant"], main_format).values())
            job.task["pause"] = BATCH / (rate / 4)
        row = run(job)
        rows.append(job.known | row)
        left -= job.seconds
        say(f"{_words(job)}: {row['rows_per_second']:.1f} rows/s; about {left / 60:.1f} min left")
    by_round = {kind: ratios_by_round(rows, kind) for kind in options.formats}
    ratios = {name: round(statistics.median(values), 3) for name, values in by_round[main_format].items()}
    cpu = [_figures(rows, name, main_format, "cpu_seconds_per_clip") for name in ("ours", "limit")]
    if all(cpu):
        ratios["cpu_ours_over_limit"] = round(statistics.median(cpu[0][i] / cpu[1][i] for i in cpu[0]), 3)
    if slow := [row for row in rows if (row["contestant"], row["consumer"]) == ("ours", "slow")]:
        buffer_mb = (SLOW_STORE_MB // 2 << 20) / 1e6
        ratios["slow_store_peak_over_buffer"] = round(slow[0]["object_store"]["peak_mb"] / buffer_mb, 3)
    results: dict[str, Any] = {"cores": options.cores, "rows": rows, "ratios": ratios, "ratios_by_round": by_round}
    if options.plan:
        results |= run(plan_job)
        results["ratios"] |= plan_ratios(results["plan"])
    return results


def run(job: Job) -> dict[str, Any]:
    """What the job's process measured."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "result.json"
        child = Path(__file__).with_name("ingest_measure.py")
        command = [sys.executable, str(child), json.dumps(job.task | {"out": str(out)})]
        subprocess.run(command, env=os.environ | ENVIRONMENT, check=True, timeout=10 * job.seconds + 600)
        return json.loads(out.read_text())


def _words(job: Job) -> str:
    known = job.known
    slow = ", slow consumer" if known["consumer"] == "slow" else ""
    return f"{known['format']}, round {known['round'] + 1}, {known['contestant']}{slow}"


def _figures(
    rows: list[dict[str, Any]], contestant: str, kind: str, figure: str = "rows_per_second"
) -> dict[int, float]:
    """A figure of a contestant at full speed, by round."""
    wanted = (contestant, kind, "fast")
    return {row["round"]: row[figure] for row in rows if (row["contestant"], row["format"], row["consumer"]) == wanted}


def ratios_by_round(rows: list[dict[str, Any]], kind: str) -> dict[str, list[float]]:
    """Our rows a second over each other contestant's in the same round."""
    mine = _figures(rows, "ours", kind)
    return {
        f"ours_over_{name}": [round(mine[round_] / rate, 3) for round_, rate in _figures(rows, name, kind).items()]
        for name in CONTESTANTS
        if mine and name != "ours" and _figures(rows, name, kind)
    }


def plan_ratios(plan: list[dict[str, Any]]) -> dict[str, float]:
    """How the first chunk's time grows from the fewest shards to the most, and the seconds of the largest plan."""
    few, many = plan[0], plan[-1]
    over = f"{many['shards']:.0e}_over_{few['shards']:.0e}".replace("e+0", "e")
    return {
        f"first_chunk_{over}_start": round(many["start_seconds"] / few["start_seconds"], 3),
        f"first_chunk_{over}_resumed": round(many["resumed_seconds"] / few["resumed_seconds"], 3),
        f"plan_seconds_{many['shards']:.0e}".replace("e+0", "e"): many["plan_seconds"],
    }


if __name__ == "__main__":
    main()
