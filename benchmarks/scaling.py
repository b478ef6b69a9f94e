"""How the training step scales: measured on 1, 2 and 4 processes of this machine, and predicted for 8 to 1,024 GPUs.

python benchmarks/scaling.py --json OUT.json    writes OUT.md beside it; five minutes on two cores

The measurements test the cost model (scaling_model.py), whose work is counted and whose costs are fitted to one and
two processes: it must predict four. The same model, with a cluster's data sheet in place of fitted costs, then
predicts GPUs. Every number of that sheet is an option, and the page prints them all.
"""

import argparse
import json
import os
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import flops
from launchers import run
from record import provenance, say, write
from scaling_model import Cluster, Costs, Demand, Work, all_reduce, crowd, fit, gather, predict
from scaling_page import page

from muser_dist.config import RunConfig, to_dict
from muser_dist.recipes import load_recipe

PACKAGES = ("torch", "deepspeed", "transformers", "timm", "numpy", "scipy")
GPUS = (1, 8, 16, 32, 64, 128, 256, 512, 1024)
INGEST = Path(__file__).with_name("results") / "ingest.json"


def main(argv: Sequence[str] | None = None) -> None:
    """Measures, fits, predicts, and writes the JSON and the page."""
    options = _options(argv)
    results = provenance("benchmarks/scaling.py", options.given, PACKAGES) | {"gpu": None}
    config, target = load_recipe(options.recipe), load_recipe(options.predict)
    work = Work.of(config, flops.of_towers(config))
    target_work = Work.of(target, flops.of_towers(target))
    rows = measure(options, config)
    costs = compare(rows, work, os.cpu_count() or 1, options.workers[:-1])
    predictions = predict_all(options, target_work)
    results |= {
        "recipe": options.recipe,
        "cores": os.cpu_count(),
        "work": {options.recipe: asdict(work), options.predict: asdict(target_work)},
        "costs": asdict(costs),
        "fitted_to": options.workers[:-1],
        "rows": rows,
        "cluster": asdict(options.cluster),
        "decode_seconds": options.decode_seconds,
        "predicted_recipe": options.predict,
        "predictions": predictions,
        "ratios": ratios(rows, predictions, options.workers[-1]),
    }
    write(options.json, results, page(results, options.json.name))


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True, help="results; a page of the same name goes beside it")
    parser.add_argument("--recipe", default="tiny", help="what is measured here: name, or package.module:function")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4], help="the others predict the last")
    parser.add_argument("--chunks", type=int, nargs="+", default=[1, 2, 4], help="of each rank in a measured step")
    parser.add_argument("--loss-rows", type=int, nargs="+", default=[1024, 2048, 4096], help="N of the loss alone")
    parser.add_argument("--megabytes", type=float, nargs="+", default=[0.01, 1, 8, 32], help="of measured collectives")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--predict", default="base_size:base", help="recipe that is predicted")
    parser.add_argument("--rows-per-gpu", type=int, default=256, help="of the table whose global batch grows")
    parser.add_argument("--global-batch", type=int, default=65_536, help="of the table whose global batch stays")
    parser.add_argument("--decode-seconds", type=float, help="of a core for a clip; default: what ingest.json says")
    cluster = parser.add_argument_group("the cluster that is predicted; assumptions, none of them measured here")
    for field in fields(Cluster):
        cluster.add_argument(f"--{field.name.replace('_', '-')}", type=type(field.default), default=field.default)
    options = parser.parse_args(argv)
    options.given = list(sys.argv[1:] if argv is None else argv)
    options.cluster = Cluster(**{field.name: getattr(options, field.name) for field in fields(Cluster)})
    if options.decode_seconds is None:
        options.decode_seconds = _decode_seconds()
    if len(options.workers) < 2 or options.workers != sorted(set(options.workers)):
        parser.error("--workers: give at least two different numbers, in ascending order")
    return options


def _decode_seconds() -> float:
    """CPU seconds a clip of our data path, everything counted, as ingest.py measured them."""
    rows = json.loads(INGEST.read_text())["rows"]
    kind = rows[0]["format"]
    mine = [row for row in rows if (row["contestant"], row["format"], row["consumer"]) == ("ours", kind, "fast")]
    return statistics.median(row["cpu_seconds_per_clip"] for row in mine)


def measure(options: argparse.Namespace, config: RunConfig) -> list[dict[str, Any]]:
    """The rows of every number of processes."""
    rows = []
    for world in options.workers:
        most = max(options.chunks) * world * config.train.chunk
        train = replace(config.train, workers=world, global_batch=most, samples=1000 * most)
        setting = {
            "config": to_dict(replace(config, train=train)),
            "chunks": options.chunks,
            "rows": options.loss_rows,
            "megabytes": options.megabytes,
            "rounds": options.rounds,
        }
        found = run("torchrun", world, "scaling_measure:cells", setting)
        for row in found:
            size = f"{row['rows']} rows" if "rows" in row else f"{row['bytes'] / 1e6:.2f} MB"
            say(f"W={world} {row['kind']} of {size}: {1000 * row['seconds']:.1f} ms")
        rows += found
    return rows


def compare(rows: list[dict[str, Any]], work: Work, cores: int, known: Sequence[int]) -> Costs:
    """Fits costs to the rows of the known numbers of processes, and adds to every row what they predict."""
    demands = [crowd(demand_of(row, work), row["world"], cores) for row in rows]
    fitted = [(demand, row["seconds"]) for demand, row in zip(demands, rows, strict=True) if row["world"] in known]
    costs = fit(*zip(*fitted, strict=True))
    for row, demand in zip(rows, demands, strict=True):
        row["predicted_seconds"] = costs.seconds(demand)
        alone = demand_of(row, work)
        row["predicted_bytes"] = alone.features + alone.gradients
    return costs


def demand_of(row: dict[str, Any], work: Work) -> Demand:
    """What a rank had to do in a measured cell."""
    world = row["world"]
    if row["kind"] == "step":
        return replace(work, global_batch=row["rows"]).step(world)
    if row["kind"] == "loss":
        return work.objective(row["rows"], world)
    return {"all_gather": gather, "all_reduce": all_reduce}[row["kind"]](row["bytes"], world)


def predict_all(options: argparse.Namespace, work: Work) -> dict[str, Any]:
    """Both tables: a global batch that grows with the GPUs, and one that stays."""
    growing = {gpus: replace(work, global_batch=gpus * options.rows_per_gpu) for gpus in GPUS}
    staying = {gpus: replace(work, global_batch=options.global_batch) for gpus in GPUS}
    found = {}
    for name, works in (("growing", growing), ("staying", staying)):
        rows, knee = predict(options.cluster, works, options.decode_seconds)
        found[name] = {"rows": [asdict(row) for row in rows], "knee": knee}
    return found


def ratios(rows: list[dict[str, Any]], predictions: dict[str, Any], last: int) -> dict[str, float]:
    """How far the model is off where it was not fitted, and what it predicts."""

    def off(predicted: str, measured: str, of: list[dict[str, Any]]) -> float:
        return round(max(abs(row[predicted] / row[measured] - 1) for row in of), 3)

    steps = [row for row in rows if row["kind"] == "step"]
    found = {
        f"worst_error_of_steps_w{last}": off("predicted_seconds", "seconds", [r for r in steps if r["world"] == last]),
        "worst_error_of_steps_fitted": off("predicted_seconds", "seconds", [r for r in steps if r["world"] != last]),
        "worst_error_of_bytes": off("predicted_bytes", "received_bytes", [r for r in steps if r["world"] > 1]),
    }
    for name, table in predictions.items():
        found[f"knee_{name}"] = table["knee"]
        found[f"efficiency_{name}_{GPUS[-1]}"] = round(table["rows"][-1]["efficiency"], 3)
    return found


if __name__ == "__main__":
    main()
