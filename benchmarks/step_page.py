"""The page of step.py: its results in words and tables, every number out of the JSON."""

import statistics
from collections.abc import Callable
from typing import Any

from record import head, table
from step_measure import PHASES

_WHAT = {
    "ray": "Ray Train's TorchTrainer, DeepSpeed",
    "torchrun": "torchrun, DeepSpeed; Ray is not running",
    "none": "one process, plain torch (`PlainEngine`)",
}


def page(results: dict[str, Any], name: str) -> str:
    """Markdown.

    Args:
        results: what step.py wrote as JSON.
        name: file name of that JSON.
    """
    return "\n\n".join([_head(results, name), _speed(results), _phases(results), _ratios(results)]) + "\n"


def _head(results: dict[str, Any], name: str) -> str:
    train, model = results["config"]["train"], results["model"]
    rounds = 1 + max(row["round"] for row in results["rows"] if row["task"] == "speed")
    steps = len(results["rows"][0]["step_seconds"])
    passes = "encoded twice where a rank has several (GradCache)" if train["cache_gradients"] else "encoded once"
    where = "one GPU" if results["gpu"] else "one thread of the CPU"
    return f"""{head("The training step under Ray, under torchrun, and without", results, name)}

`{results["recipe"]}`: {model["parameters"] / 1e6:.1f} M parameters, ZeRO {train["zero_stage"]}, {train["precision"]},
global batch {train["global_batch"]} in chunks of {train["chunk"]}, {passes}.
A step is what `muser_dist/train/loop.py` does from decoded chunks to updated parameters; the chunks are synthetic and
the same under each launcher. Each rank has {where}.

Each run starts its processes anew, so that the machine has nothing of another launcher's on it, warms up, and measures
{steps} steps. Launchers take turns, in the opposite order every other round; ratios are medians of those
in each of {rounds} rounds.

{chr(10).join(f"- **{launcher}**: {what}" for launcher, what in _WHAT.items() if _of(results, "speed", launcher))}"""


def _speed(results: dict[str, Any]) -> str:
    gpu = bool(results["gpu"])
    rows = []
    for world, launcher in _cases(results):
        runs = [row for row in _of(results, "speed", launcher) if row["world"] == world]

        def middle(figure: str, runs: list[dict[str, Any]] = runs) -> float:
            return statistics.median(row[figure] for row in runs)

        rates = sorted(row["samples_per_second"] for row in runs)
        rows.append(
            [str(world), launcher, f"{middle('samples_per_second'):.2f}", f"{rates[0]:.2f} to {rates[-1]:.2f}"]
            + [f"{1000 * middle('cpu_seconds_per_sample'):.1f}", f"{middle('flops_per_rank') / 1e9:,.1f}"]
            + [f"{middle('share_of_matrix_rate'):.2f}"]
            + [f"{middle('mfu'):.3f} / {middle('hfu'):.3f}" if "mfu" in runs[0] else ""] * gpu
            + [f"{middle('peak_bytes') / 1e6:,.0f}", f"{middle('bytes_before') / 1e6:,.0f}"]
        )
    titles = ["W", "launcher", "samples/s", "all runs", "CPU ms a sample", "GFLOP/s a rank", "of the matrix rate"]
    titles += ["MFU / HFU"] * gpu + ["peak MB", "MB before"]
    of = "allocated by torch on a rank's GPU" if gpu else "resident in a rank's process, libraries included"
    share = (
        "MFU counts them over the maker's rate of dense bfloat16 products, HFU with GradCache's second forward pass. "
        if gpu
        else "A CPU has no agreed peak, so no MFU. "
    )
    return f"""## Speed and memory

{table(titles, rows)}

Operations are those of the towers' products and convolutions, forward and backward, a second forward pass not counted
({_gflop(results):.1f} GFLOP a sample). {share}
The matrix rate is that of a large square product, which the same process measures before it begins. Memory is what is
{of}, the most of all ranks; "before" is before the model was made. CPU time is that of the ranks alone."""


def _phases(results: dict[str, Any]) -> str:
    rows = []
    for world, launcher in _cases(results):
        for row in _of(results, "phases", launcher):
            if row["world"] == world:
                total = sum(row["seconds"].values())
                shares = [f"{seconds / total:.1%}" for seconds in row["seconds"].values()]
                rows.append([str(world), launcher, f"{total:.3f}", *shares])
    words = "\n".join(f"- **{phase}**: {what}" for phase, what in PHASES.items())
    return f"""## Phases

Runs of their own; of rank 0, waiting for other ranks included.

{table(["W", "launcher", "seconds a step", *PHASES], rows)}

{words}"""


def _ratios(results: dict[str, Any]) -> str:
    def spread(name: str, figure: Callable[[list[float]], float]) -> str:
        values = results["ratios_by_round"].get(name)
        return f"{figure(values):.3f}" if values else ""

    rows = [[name, f"{value:.3f}", spread(name, min), spread(name, max)] for name, value in results["ratios"].items()]
    return f"## Ratios\n\n{table(['ratio', 'value', 'least round', 'greatest round'], rows)}"


def _gflop(results: dict[str, Any]) -> float:
    return (results["model"]["forward"] + results["model"]["backward"]) / 1e9


def _cases(results: dict[str, Any]) -> list[tuple[int, str]]:
    return sorted({(row["world"], row["launcher"]) for row in results["rows"]}, key=lambda case: (case[0], case[1]))


def _of(results: dict[str, Any], task: str, launcher: str) -> list[dict[str, Any]]:
    return [row for row in results["rows"] if (row["task"], row["launcher"]) == (task, launcher)]
