"""The training step under Ray Train, under torchrun, and without either: speed, share of each phase, memory.

python benchmarks/step.py --json OUT.json          writes OUT.md beside it; twenty minutes on two cores
python benchmarks/step.py --gpu --json OUT.json    one GPU, the base size in bfloat16: share of the peak rate as well
python benchmarks/step.py --launchers none --json OUT.json    without Ray and DeepSpeed
"""

import argparse
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import flops
import torch
from launchers import LAUNCHERS, run
from record import provenance, say, write
from step_page import page

from muser_dist.config import RunConfig, to_dict
from muser_dist.recipes import load_recipe

PACKAGES = ("torch", "ray", "deepspeed", "transformers", "timm", "numpy")


def main(argv: Sequence[str] | None = None) -> None:
    """Measures, and writes the JSON and the page."""
    options = _options(argv)
    results = provenance("benchmarks/step.py", options.given, PACKAGES)
    results["gpu"] = torch.cuda.get_device_name() if options.gpu else None
    configs = {world: config_of(options, world) for world in options.workers}
    counts = flops.of_towers(configs[options.workers[0]])
    rows = speed_rows(options, configs, counts)
    rows += phase_rows(options, configs)
    by_round = ratios_by_round(rows)
    results |= {
        "recipe": options.recipe,
        "config": to_dict(configs[options.workers[0]]),
        "model": asdict(counts),
        "rows": rows,
        "ratios": ratios(rows, by_round),
        "ratios_by_round": by_round,
    }
    write(options.json, results, page(results, options.json.name))


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True, help="results; a page of the same name goes beside it")
    parser.add_argument("--gpu", action="store_true", help="one GPU for each rank; without, one thread of the CPU")
    parser.add_argument("--recipe", help="name, or package.module:function; default tiny, with --gpu base_size:base")
    parser.add_argument("--launchers", nargs="+", choices=LAUNCHERS, default=list(LAUNCHERS))
    parser.add_argument("--workers", type=int, nargs="+", help="numbers of ranks; default 1 2, with --gpu 1")
    parser.add_argument("--rounds", type=int, default=7, help="of all launchers, which take turns")
    parser.add_argument("--steps", type=int, default=5, help="measured in each run")
    parser.add_argument("--warmup", type=int, default=2, help="steps before those")
    parser.add_argument("--precision", choices=("fp32", "bf16"), help="default: the recipe's")
    parser.add_argument("--global-batch", type=int, help="default: the recipe's")
    parser.add_argument("--chunk", type=int, help="default: the recipe's")
    options = parser.parse_args(argv)
    options.given = list(sys.argv[1:] if argv is None else argv)
    options.recipe = options.recipe or ("base_size:base" if options.gpu else "tiny")
    options.workers = options.workers or ([1] if options.gpu else [1, 2])
    if options.gpu and torch.cuda.device_count() < max(options.workers):
        parser.error(f"--workers {max(options.workers)}: this machine has {torch.cuda.device_count()} GPUs")
    return options


def config_of(options: argparse.Namespace, world: int) -> RunConfig:
    """The recipe with the options' batch and precision, for so many ranks.

    Raises:
        SystemExit: its global batch is not whole chunks for each rank.
    """
    config = load_recipe(options.recipe)
    given = {name: getattr(options, name) for name in ("precision", "global_batch", "chunk")}
    train = replace(config.train, **{name: value for name, value in given.items() if value is not None})
    train = replace(train, workers=world, gpu=options.gpu)
    if train.chunks_per_step % world:
        raise SystemExit(
            f"--workers {world}: {train.chunks_per_step} chunks of {train.chunk} rows cannot be dealt evenly; give "
            f"--global-batch {train.chunk * world * -(-train.chunks_per_step // world)}"
        )
    return replace(config, train=train)


# --- Measurements ---


def speed_rows(
    options: argparse.Namespace, configs: dict[int, RunConfig], counts: flops.Counts
) -> list[dict[str, Any]]:
    """A row for each run: the launchers take turns, in the opposite order every other round."""
    rows = []
    for world, config in configs.items():
        names = [name for name in options.launchers if name != "none" or world == 1]
        for round_ in range(options.rounds):
            for name in names if round_ % 2 == 0 else reversed(names):
                row = speed_row(options, config, name, world, counts)
                rows.append({"task": "speed", "launcher": name, "world": world, "round": round_} | row)
                say(
                    f"W={world}, round {round_ + 1}/{options.rounds}, {name}: {row['samples_per_second']:.2f} samples/s"
                )
    return rows


def speed_row(
    options: argparse.Namespace, config: RunConfig, launcher: str, world: int, counts: flops.Counts
) -> dict[str, Any]:
    """One run, its processes started for it alone; figures are those of the steps after the warm-up."""
    got = run(launcher, world, "step_measure:speed", _setting(options, config), options.gpu)
    samples, seconds = options.steps * config.train.global_batch, sum(got["step_seconds"])
    each = samples / seconds / world
    executed = counts.hardware(flops.forwards(config, config.train.chunks_per_step // world))
    row = {
        "samples_per_second": samples / seconds,
        "step_seconds": got["step_seconds"],
        "cpu_seconds_per_sample": sum(rank["cpu_seconds"] for rank in got["ranks"]) / samples,
        "peak_bytes": max(rank["peak_bytes"] for rank in got["ranks"]),
        "bytes_before": got["bytes_before"],
        "flops_per_rank": each * counts.model,
        "share_of_matrix_rate": each * counts.model / got["matrix_rate"],
    }
    peak = flops.peak(got["gpu"]) if got["gpu"] else None
    if peak and config.train.precision == "bf16":
        row |= {"mfu": each * counts.model / peak, "hfu": each * executed / peak}
    return row


def phase_rows(options: argparse.Namespace, configs: dict[int, RunConfig]) -> list[dict[str, Any]]:
    """Seconds of a step by phase, in runs of their own: looking at the clock would disturb the others."""
    rows = []
    for world, config in configs.items():
        for name in options.launchers:
            if name == "none" and world > 1:
                continue
            seconds = run(name, world, "step_measure:phases", _setting(options, config), options.gpu)
            rows.append({"task": "phases", "launcher": name, "world": world, "seconds": seconds})
            say(f"W={world}, phases, {name}: " + ", ".join(f"{k} {1000 * v:.0f} ms" for k, v in seconds.items()))
    return rows


def _setting(options: argparse.Namespace, config: RunConfig) -> dict[str, Any]:
    return {"config": to_dict(config), "warmup": options.warmup, "steps": options.steps}


# --- Ratios ---


def ratios_by_round(rows: list[dict[str, Any]]) -> dict[str, list[float]]:
    """Samples a second of one launcher over another's in the same round."""
    found: dict[str, list[float]] = {}
    for world in dict.fromkeys(row["world"] for row in rows):
        for name, other in (("ray", "torchrun"), ("torchrun", "none")):
            a, b = (
                [row["samples_per_second"] for row in rows if is_speed(row, launcher, world)]
                for launcher in (name, other)
            )
            if a and b:
                key = f"{name}_over_{other}" + (f"_w{world}" if world > 1 else "")
                found[key] = [x / y for x, y in zip(a, b, strict=True)]
    return found


def ratios(rows: list[dict[str, Any]], by_round: dict[str, list[float]]) -> dict[str, float]:
    """Medians over rounds; on a GPU the shares of its peak rate too."""
    found = {name: round(statistics.median(values), 4) for name, values in by_round.items()}
    for world, launcher in dict.fromkeys((row["world"], row["launcher"]) for row in rows):
        of_case = [row for row in rows if is_speed(row, launcher, world) and "mfu" in row]
        for figure in ("mfu", "hfu") if of_case else ():
            key = f"{figure}_{launcher}" + (f"_w{world}" if world > 1 else "")
            found[key] = round(statistics.median(row[figure] for row in of_case), 4)
    return found


def is_speed(row: dict[str, Any], launcher: str, world: int) -> bool:
    """Whether it is one of this launcher's runs with so many ranks."""
    return (row["task"], row["launcher"], row["world"]) == ("speed", launcher, world)


if __name__ == "__main__":
    main()
