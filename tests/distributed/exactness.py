"""The worst error of every cell: `python -m tests.distributed.exactness --json OUT` writes a table beside it."""

import argparse
import json
from pathlib import Path

from tests.distributed.engine_cells import engine_results
from tests.distributed.loss_cells import TOLERANCE, errors, loss_errors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True, help="results; a table of the same name goes beside it")
    out = parser.parse_args().json
    losses: dict[str, dict[str, float]] = {}
    engines: dict[str, dict[str, float]] = {}
    for world in (1, 2, 3, 4):
        for name, path, of_loss, of_gradients in loss_errors(world):
            losses.setdefault(name, {})[f"{path}, W = {world}"] = max(of_loss, *of_gradients.values())
        for objective, stage, words, (value, exact), (got, want) in engine_results(world):
            worst = max(abs(value - exact) / abs(exact), *errors(got, want).values())
            words = "padded K" if words.startswith("K") else words
            engines.setdefault(f"{objective}, ZeRO {stage}, {words}", {})[f"W = {world}"] = worst
        print(f"W = {world} done", flush=True)
    command = f"python -m tests.distributed.exactness --json {out}"
    results = {"command": command, "tolerance": TOLERANCE, "losses": losses, "engine": engines}
    out.write_text(json.dumps(results, indent=1) + "\n")
    out.with_suffix(".md").write_text(
        "# Exactness: the worst norm-wise relative error of each cell\n\n"
        f"`{command}`: float32 against float64 in one process, gloo on a CPU. Bound: {TOLERANCE:g}.\n"
        "Batches have masked rows, missing modalities, repeated texts and clips.\n\n"
        "## Losses on features, uneven rows on the ranks\n\n" + _table(losses, "loss") + "\n\n"
        "## Every parameter, through DeepSpeed\n\nChunks of a rank; the last rows have a number of chunks that W does "
        "not divide.\n\n" + _table(engines, "objective, stage, chunks") + "\n"
    )


def _table(cells: dict[str, dict[str, float]], what: str) -> str:
    columns = list(dict.fromkeys(column for row in cells.values() for column in row))
    lines = [f"| {what} | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for name, row in cells.items():
        lines.append(f"| {name} | " + " | ".join(f"{row[c]:.1e}" if c in row else "" for c in columns) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
