"""How long pairs of songs take to be mined from a log, and how much memory and disk that needs.

python benchmarks/mining.py --json OUT.json     50 million rows; writes OUT.md beside it
python benchmarks/mining.py --json OUT.json --rows 100000 --alone     a trial, without Ray
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from record import head, provenance, say, table, write

PACKAGES = ("ray", "numpy", "pyarrow")
LIMIT_SECONDS, LIMIT_GIB = 30 * 60, 8
FILE_ROWS = 1_000_000
ROWS_PER_USER, ITEMS_PER_ROW = 250, 1 / 50
TASTES = 64
SECONDS = 365 * 86_400
BEGIN = 1_600_000_000
SESSION = 12  # plays, on average
SPLIT = {"val_users": 0.05, "val_items": 0.05}

# Without it, libraries in each of the processes would start as many threads as there are cores.
ENVIRONMENT = {name: "1" for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}


def main(argv: Sequence[str] | None = None) -> None:
    """Makes the log, measures, and writes the JSON and the page."""
    options = _options(argv)
    results = provenance("benchmarks/mining.py", options.given, PACKAGES)
    with tempfile.TemporaryDirectory(prefix="mining-", dir=options.folder) as folder:
        say(f"making {options.rows:,} rows")
        log_bytes = make_log(Path(folder), options.rows)
        rows = [{"rule": rule} | mine(Path(folder), rule, options) for rule in options.rules]
    worst = {name: max(row[name] for row in rows) for name in ("seconds", "peak_gib")}
    results |= {
        "gpu": None,
        "setting": {"rows": options.rows, "cores": options.cores, "alone": options.alone, "log_bytes": log_bytes},
        "rows": rows,
        "ratios": {
            "seconds_over_limit": round(worst["seconds"] / LIMIT_SECONDS, 4),
            "memory_over_limit": round(worst["peak_gib"] / LIMIT_GIB, 4),
        },
    }
    write(options.json, results, page(results, options.json.name))


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True, help="results; a page of the same name goes beside it")
    parser.add_argument("--rows", type=int, default=50_000_000, help="of the log")
    parser.add_argument(
        "--rules", nargs="+", choices=("cooccurrence", "explicit"), default=["cooccurrence"], help="each is measured"
    )
    parser.add_argument("--cores", type=int, default=2, help="CPUs of the Ray cluster")
    parser.add_argument("--alone", action="store_true", help="one process without Ray: a trial")
    parser.add_argument("--folder", type=Path, help="on the disk that is to be measured; default the temporary folder")
    options = parser.parse_args(argv)
    options.given = list(sys.argv[1:] if argv is None else argv)
    return options


# --- Data ---


def make_log(folder: Path, rows: int) -> int:
    """Writes a log as Parquet, a file at a time; returns its bytes.

    Sessions in the order of time, as a log has them: a user whose activity is log-normal (sigma 1.5), some plays 200 s
    apart, of which one in twenty is liked. Half of the items are drawn by Zipf's law with exponent 0.8 from all, half
    so from those of the user's taste, one of 64.
    """
    draw = np.random.default_rng(0)
    users = max(rows // ROWS_PER_USER, 2)
    items = max(int(rows * ITEMS_PER_ROW) // TASTES * TASTES, TASTES)
    activity = np.cumsum(draw.lognormal(0, 1.5, users))
    popularity, of_taste = (np.cumsum(np.arange(1, n + 1) ** -0.8) for n in (items, items // TASTES))
    size = 0
    for number, begin in enumerate(range(0, rows, FILE_ROWS)):
        count = min(FILE_ROWS, rows - begin)
        lengths = draw.geometric(1 / SESSION, count)  # more than enough
        lengths = lengths[: np.searchsorted(np.cumsum(lengths), count) + 1]
        start = np.sort(draw.integers(begin, begin + count, len(lengths))) / rows * SECONDS
        session = np.repeat(np.arange(len(lengths)), lengths)[:count]
        place = np.arange(count) - (np.cumsum(lengths) - lengths)[session]
        user = _drawn(draw, activity, len(lengths))[session]
        item = np.where(
            draw.random(count) < 0.5,
            _drawn(draw, popularity, count),
            _drawn(draw, of_taste, count) * TASTES + user % TASTES,
        )
        columns = {
            "user": pa.array(np.char.add("u", user.astype(str))),
            "item": pa.array(np.char.add("i", item.astype(str))),
            "time": BEGIN + start[session].astype(np.int64) + 200 * place,
            "signal": pa.array(np.where(draw.random(count) < 0.05, "like", "play")),
            "value": pa.array(draw.uniform(0, 240, count).astype(np.float32)),
        }
        path = folder / f"log-{number:05d}.parquet"
        pq.write_table(pa.table(columns), path)
        size += path.stat().st_size
    return size


def _drawn(draw: np.random.Generator, cumulative: np.ndarray, count: int) -> np.ndarray:
    return np.searchsorted(cumulative, draw.random(count) * cumulative[-1])


# --- Measurements ---


def mine(folder: Path, rule: str, options: argparse.Namespace) -> dict[str, Any]:
    """What the job's process measured."""
    out = folder / "result.json"
    mining = {"rule": rule, "signals": ["like"] if rule == "explicit" else ["play", "like"]}
    task = {
        "log": f"{folder}/log-*.parquet",
        "folder": str(folder / rule),
        "cores": options.cores,
        "alone": options.alone,
        "mining": mining,
        "split": SPLIT,
        "out": str(out),
    }
    command = [sys.executable, str(Path(__file__).with_name("mining_measure.py")), json.dumps(task)]
    environment = {"RAY_ADDRESS": "local", "RAY_USAGE_STATS_ENABLED": "0"}
    subprocess.run(command, env=os.environ | ENVIRONMENT | environment, check=True)
    result = json.loads(out.read_text())
    say(f"{rule}: {result['seconds']:.0f} s, {result['peak_gib']:.2f} GiB, {result['spilled_gib']:.2f} GiB on disk")
    return result


def page(results: dict[str, Any], name: str) -> str:
    """The page beside the JSON."""
    setting, rows = results["setting"], results["rows"]
    titles = [
        "rule",
        "seconds",
        "read",
        "mine",
        "items",
        "pairs",
        "rows a second",
        "peak memory",
        "spilled",
        "pairs out",
    ]
    lines = [
        [
            row["rule"],
            f"{row['seconds']:.0f}",
            *(f"{seconds:.0f}" for seconds in row["phase_seconds"].values()),
            f"{setting['rows'] / row['seconds']:,.0f}",
            f"{row['peak_gib']:.2f} GiB",
            f"{row['spilled_gib']:.2f} GiB",
            f"{sum(row['summary']['pairs'].values()):,}",
        ]
        for row in rows
    ]
    where = "in one process without Ray" if setting["alone"] else f"on a Ray cluster of {setting['cores']} CPUs"
    compared = (
        f"{setting['rows']:,} rows of a synthetic log ({setting['log_bytes'] / 2**30:.2f} GiB of Parquet), mined "
        f"{where}. Sessions of 12 plays on average; users' activity is log-normal (sigma 1.5), items follow Zipf's law "
        "(exponent 0.8), half of them within one of 64 tastes; one user and one item in twenty is held out. Memory is "
        "the sum of "
        "proportional set sizes of the job and all of Ray's processes, looked at each second: the object store counts "
        "as far as it is used, shared pages once. Times hold the start of Ray."
    )
    ratios = results["ratios"]
    found = (
        f"`seconds_over_limit`, over 30 minutes: **{ratios['seconds_over_limit']:.2f}**. "
        f"`memory_over_limit`, over 8 GiB: **{ratios['memory_over_limit']:.2f}**."
    )
    return "\n\n".join([head("Mining pairs from a log", results, name), compared, table(titles, lines), found]) + "\n"


if __name__ == "__main__":
    main()
