"""Time, memory and traffic of the contrastive loss next to open_clip's, from features to their gradients.

python benchmarks/objective.py --json OUT.json          writes OUT.md beside it; a quarter of an hour on two cores
python benchmarks/objective.py --gpu --json OUT.json    one NVIDIA GPU: N up to 1,048,576 in bfloat16

Needs neither Ray nor DeepSpeed. Processes of this machine stand for ranks, over gloo on the loopback device.
"""

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from objective_measure import CONTESTANTS, DIM, PAIRS
from record import provenance, write

OURS, EXACT, DEFAULT, RING, REFERENCE = "ours", "open_clip_exact", "open_clip_default", "ours_ring", "reference"
SIZES = (1024, 4096, 8192)


def main() -> None:
    """Runs all measurements and writes the JSON and the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True, help="results; a page of the same name goes beside it")
    parser.add_argument("--gpu", action="store_true", help="measures one GPU instead of the CPU")
    parser.add_argument("--rounds", type=int, default=5, help="of all contestants, alternating, in one process")
    parser.add_argument(
        "--sizes", type=int, nargs="+", default=SIZES, help="N of the tables of times; the last decides"
    )
    parser.add_argument("--memory", type=int, nargs="+", default=(16_384, 32_768), help="N of the table of memory")
    options = parser.parse_args()
    rows = measure_gpu(options) if options.gpu else measure_cpu(options)
    results = provenance("benchmarks/objective.py", sys.argv[1:], ("torch", "open_clip_torch", "numpy"))
    results |= {
        "gpu": rows[0].get("gpu"),
        "rows": rows,
        "ratios": gpu_ratios(rows) if options.gpu else cpu_ratios(rows, options),
    }
    write(options.json, results, page(results, options.json.name))


# --- Measurements ---


def measure_cpu(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Times for each N, W and number of pairs; memory of each contestant in a process of its own."""
    rows = []
    for world in (1, 2):
        for pairs in (1, 2):
            for n in options.sizes:
                names = [OURS, RING, EXACT, DEFAULT] if world > 1 else [OURS, EXACT]
                names += [REFERENCE] * (n <= 128)
                rows += run("time", world=world, pairs=pairs, n=n, contestants=names, rounds=options.rounds)
    if 128 not in options.sizes:
        rows += run("time", world=1, pairs=1, n=128, contestants=[OURS, EXACT, REFERENCE], rounds=options.rounds)
    for n in options.memory:
        for name in (OURS, EXACT) if n == options.memory[0] else (OURS,):
            rows += run("memory", world=1, pairs=1, n=n, contestants=[name], rounds=1)
    return rows


def measure_gpu(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Times and peak memory on one GPU; open_clip where it fits."""
    rows = run("gpu", world=1, pairs=2, n=65_536, contestants=[OURS, EXACT], rounds=options.rounds)
    for n in (8_192, 262_144, 1_048_576):
        names = [OURS, EXACT] if n <= 16_384 else [OURS]
        rows += run("gpu", world=1, pairs=2, n=n, contestants=names, rounds=min(3, options.rounds))
    return rows


def run(task: str, **setting: Any) -> list[dict[str, Any]]:
    """What the processes of one setting measured: a row for each contestant."""
    child = Path(__file__).with_name("objective_measure.py")
    command = [sys.executable, str(child), json.dumps({"task": task} | setting)]
    done = subprocess.run(command, check=True, timeout=3600, stdout=subprocess.PIPE, text=True)
    rows = json.loads(done.stdout.splitlines()[-1])
    for row in rows:
        took = f"{1e3 * row['seconds']:.0f} ms" if "seconds" in row else row.get("error", "")
        print(f"{task}: W={row['world']} pairs={row['pairs']} N={row['n']} {row['contestant']} {took}", file=sys.stderr)
    return rows


# --- Ratios ---


def find(rows: list[dict[str, Any]], **wanted: Any) -> dict[str, Any]:
    """The one row that has these fields."""
    (row,) = [row for row in rows if all(row.get(name) == value for name, value in wanted.items())]
    return row


def over(a: dict[str, Any], b: dict[str, Any], figure: Callable[[dict[str, Any]], Any]) -> float:
    """The ratio of a figure, the median over rounds where it was taken in several."""
    x, y = figure(a), figure(b)
    values = [p / q for p, q in zip(x, y, strict=True)] if isinstance(x, list) else [x / y]
    return round(statistics.median(values), 3)


def cpu_ratios(rows: list[dict[str, Any]], options: argparse.Namespace) -> dict[str, float]:
    """What the project promises."""
    n = options.sizes[-1]

    def at(world: int, pairs: int, name: str) -> dict[str, Any]:
        return find(rows, task="time", world=world, pairs=pairs, n=n, contestant=name)

    def memory(name: str, n: int) -> dict[str, Any]:
        return find(rows, task="memory", n=n, contestant=name)

    def each(row: dict[str, Any]) -> list[float]:
        return row["each_seconds"]

    few, many = options.memory[0], options.memory[-1]
    return {
        "time_over_open_clip_w1": over(at(1, 1, OURS), at(1, 1, EXACT), each),
        "time_over_open_clip_w2": over(at(2, 2, OURS), at(2, 2, EXACT), each),
        "bytes_over_open_clip_w2": over(at(2, 2, OURS), at(2, 2, EXACT), lambda row: row["bytes"]),
        "ring_time_over_open_clip_w2": over(at(2, 2, RING), at(2, 2, EXACT), each),
        "ring_bytes_over_open_clip_w2": over(at(2, 2, RING), at(2, 2, EXACT), lambda row: row["bytes"]),
        "memory_over_open_clip": over(memory(OURS, few), memory(EXACT, few), lambda row: row["peak_bytes"]),
        "memory_growth": over(memory(OURS, many), memory(OURS, few), lambda row: row["peak_bytes"]),
    }


def gpu_ratios(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Share of the measured matrix rate (8·N²·D floating point operations for each pair), and over open_clip."""
    main = find(rows, n=65_536, contestant=OURS)
    theirs = next(row for n in (65_536, 8_192) if "seconds" in (row := find(rows, n=n, contestant=EXACT)))
    largest = find(rows, n=1_048_576, contestant=OURS)
    ratios = {
        "share_of_matrix_rate": round(8 * 65_536**2 * DIM * 2 / main["seconds"] / main["matrix_rate"], 3),
        "peak_gb_at_1048576": round(largest["peak_bytes"] / 1e9, 2),
    }
    mine = find(rows, n=theirs["n"], contestant=OURS)
    ratios[f"time_over_open_clip_at_{theirs['n']}"] = round(mine["seconds"] / theirs["seconds"], 3)
    return ratios


# --- The page ---

ON_CPU = (
    "Contestants take turns in the same processes, with one thread each; times are medians, ratios medians of the "
    "rounds' ratios. Bytes are what a rank receives, from the counters of the loopback device. Peaks are resident "
    "memory above that before the call, features not included, each in a process of its own."
)
ON_GPU = (
    "One GPU, one process for each N. Ours rounds features to bfloat16; open_clip's runs under autocast to bfloat16. "
    "Times are medians; peaks are all memory that was allocated, features included. The matrix rate is that of a "
    "product of two 8192 x 8192 matrices of bfloat16 in the same process; the loss counts as 8·N²·D for each pair."
)


def page(results: dict[str, Any], name: str) -> str:
    """The results as tables."""
    machine = results["gpu"] or results["cpu"]
    versions = ", ".join(f"{name} {value}" for name, value in results["versions"].items())
    lines = [
        "# The loss: time, memory and traffic from features to their gradients",
        "",
        f"`{name}` holds the numbers. Commit {results['commit']}, {machine}; {versions}. The command:",
        "",
        f"```\n{results['command']}\n```",
        "",
        f"Features are float32, D = {DIM}; normalising them is part of every contestant. One pair is "
        f"{PAIRS[0][0]}-{PAIRS[0][1]}, the second {PAIRS[1][0]}-{PAIRS[1][1]}.",
        "",
        *(f"- **{name}**: {function.__doc__.splitlines()[0]}" for name, function in CONTESTANTS.items()),
        "",
        ON_GPU if results["gpu"] else ON_CPU,
        "",
        "| W | pairs | N | contestant | seconds | MB received a rank | peak MB |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in results["rows"]:
        seconds = f"{row['seconds']:.3f}" if "seconds" in row else row.get("error", "")
        wire = f"{row['bytes'] / 1e6:.1f}" if "bytes" in row else ""
        peak = f"{row['peak_bytes'] / 1e6:.0f}" if "peak_bytes" in row else ""
        lines.append(
            f"| {row['world']} | {row['pairs']} | {row['n']:,} | {row['contestant']} | {seconds} | {wire} | {peak} |"
        )
    lines += ["", "| ratio | value |", "|---|---|", *(f"| {k} | {v} |" for k, v in results["ratios"].items()), ""]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
