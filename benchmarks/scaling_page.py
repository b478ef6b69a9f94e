"""The page of scaling.py: measurements, what the cost model says of them, and what it predicts."""

from typing import Any

from record import head, table

_PARTS = ("towers", "loss", "features", "gradients", "latency", "update", "fixed")


def page(results: dict[str, Any], name: str) -> str:
    """Markdown.

    Args:
        results: what scaling.py wrote as JSON.
        name: file name of that JSON.
    """
    parts = [_head(results, name), _measured(results), _costs(results), _predicted(results), _assumptions(results)]
    ratios = [[ratio, f"{value:g}"] for ratio, value in results["ratios"].items()]
    return "\n\n".join([*parts, f"## Ratios\n\n{table(['ratio', 'value'], ratios)}"]) + "\n"


def _head(results: dict[str, Any], name: str) -> str:
    fitted, cores = ", ".join(map(str, results["fitted_to"])), results["cores"]
    return f"""{head("How the training step scales", results, name)}

The model: a step takes the sum, over what a rank has to do, of so much of it times its cost. What it has to do is
counted: operations of towers and of the loss's products, bytes that it receives, messages that wait for each other,
parameters that it updates ([docs/objective.md](../../docs/objective.md) has the formulas of the loss). Costs are
fitted to what W = {fitted} took on this machine, by least squares of relative errors; the largest W is predicted.
Processes beyond this machine's {cores} cores share them: everything takes W / {cores} times as long then."""


def _measured(results: dict[str, Any]) -> str:
    rows = []
    for row in results["rows"]:
        fitted = "" if row["world"] in results["fitted_to"] else "predicted"
        size = f"{row['rows']:,} rows" if "rows" in row else f"{row['bytes'] / 1e6:.2f} MB"
        took = [f"{1000 * row['seconds']:.1f}", f"{1000 * row['predicted_seconds']:.1f}"]
        error = f"{row['predicted_seconds'] / row['seconds'] - 1:+.0%}"
        wire = [f"{row['received_bytes'] / 1e6:.2f}", f"{row['predicted_bytes'] / 1e6:.2f}"]
        rows.append([str(row["world"]), row["kind"], size, *took, error, *wire, fitted])
    titles = ["W", "what", "size", "ms", "model: ms", "error", "MB received a rank", "by formula", ""]
    return f"""## Measured

`{results["recipe"]}`, gloo on the loopback device, one thread a process; medians of
{len(results["rows"][0]["each_seconds"])} rounds, all cells of a W taking turns in the same processes. "step" is the
whole training step with DeepSpeed, "loss" the loss and its gradient alone. Bytes are from the counters of the loopback
device, which also see headers, barriers and other programs.

{table(titles, rows)}"""


def _costs(results: dict[str, Any]) -> str:
    costs = results["costs"]

    def rate(name: str, unit: str, scale: float) -> list[str]:
        return [name.replace("_", " "), f"{1 / costs[name] / scale:,.2f} {unit}" if costs[name] else "not found: 0 s"]

    rows = [
        rate("tower_operation", "GFLOP/s", 1e9),
        rate("loss_operation", "GFLOP/s", 1e9),
        rate("parameter", "M/s", 1e6),
        rate("byte", "GB/s", 1e9),
        ["message", f"{1e6 * costs['message']:.0f} µs"],
        ["step", f"{1e3 * costs['step']:.2f} ms"],
    ]
    return f"## Costs of this machine\n\n{table(['each', 'fitted'], rows)}"


def _predicted(results: dict[str, Any]) -> str:
    growing, staying = results["predictions"]["growing"], results["predictions"]["staying"]
    rows_per_gpu = growing["rows"][0]["global_batch"] // growing["rows"][0]["world"]
    work = results["work"][results["predicted_recipe"]]
    return f"""## Predicted

`{results["predicted_recipe"]}` ({work["parameters"] / 1e6:.0f} M parameters,
{(work["forward"] + work["backward"]) / 1e9:,.0f} GFLOP a sample) on {results["cluster"]["name"]}s. Efficiency is
samples/s of a GPU over those of one alone; the knee is the most GPUs that still have 0.8 of it.

With {rows_per_gpu} rows for each GPU, so that the global batch grows; knee {growing["knee"]:,}:

{_prediction(growing)}

With a global batch of {staying["rows"][0]["global_batch"]:,} on however many; knee {staying["knee"]:,}:

{_prediction(staying)}

Milliseconds of a step by part; "features" also has the ids and the numbers of rows that the loss exchanges."""


def _prediction(predicted: dict[str, Any]) -> str:
    rows = []
    for row in predicted["rows"]:
        milliseconds = [f"{1000 * row['parts'][part]:,.1f}" for part in _PARTS]
        size = [f"{row['world']:,}", f"{row['global_batch']:,}"]
        comes_of_it = [f"{row['samples_per_second']:,.0f}", f"{row['efficiency']:.2f}"]
        needs = [f"{row['decode_cpus']:,.0f}", f"{row['held'] / 1e6:,.0f}"]
        rows.append([*size, *milliseconds, *comes_of_it, *needs])
    return table(["GPUs", "N", *_PARTS, "samples/s", "efficiency", "decoding cores", "features held, MB"], rows)


def _assumptions(results: dict[str, Any]) -> str:
    cluster = results["cluster"]
    return f"""## Assumptions of the predictions

No GPU was measured for them. Each line is an option of the command.

- Towers run at {cluster["utilisation"]:.0%} and the loss at {cluster["loss_utilisation"]:.0%} of
  {cluster["peak"] / 1e12:,.0f} TFLOP/s, however many rows a GPU has.
- An update moves 28 bytes for each parameter that a GPU owns, at {cluster["memory"] / 1e12:.1f} TB/s; everything else
  in a step takes {1e3 * cluster["step"]:.0f} ms.
- Collectives run in rings, so that a rank receives (W - 1) / W of what is gathered and twice that of what is summed,
  at {cluster["link_share"]:.0%} of {cluster["nvlink"] / 1e9:.0f} GB/s inside a node of {cluster["node"]} GPUs and of
  {cluster["network"] / 1e9:.0f} GB/s a GPU as soon as there are two nodes. Nobody else uses the network.
- A collective waits for log2(W) messages of {1e6 * cluster["latency"]:.0f} µs.
- {cluster["overlap"]:.0%} of the gradients' travel is hidden behind other work. At ZeRO 1 and 2 DeepSpeed sums whole
  gradients and then gathers the parameters: three times their size, where reduce-scatter would need two.
- Features are gathered; `objective.gather_mib` must allow what is held, or the ring takes more traffic than this.
- Chunks always wait decoded. Decoding takes {1e3 * results["decode_seconds"]:.2f} ms of a core for a clip
  (`ingest.json`: 30 s at 44.1 kHz, of which 5 s are decoded; longer crops take longer), whatever reads them.
- No rank is slower than another, and nothing fails."""
