"""What it does to count equal texts as matches: same_text against instance targets on texts that repeat.

python benchmarks/targets.py --data $PDTUNES --json OUT.json      writes OUT.md beside it

The tiny recipe's spectrogram and text towers, in one process without Ray, on texts over type, mode and meter alone,
which repeat as metadata does. Both kinds of targets see the same rows, crops and texts, for the same number
of steps, with several seeds.
"""

import argparse
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from plain import train
from record import head, provenance, table, write

from muser_dist.config import EvaluateConfig, ObjectiveConfig, PairConfig, RunConfig
from muser_dist.data.shards import index_shards
from muser_dist.data.storage import Storage
from muser_dist.evaluate.evaluator import evaluate
from muser_dist.muser import Muser
from muser_dist.recipes.tiny import tiny

TARGETS = ("instance", "same_text")
FIELDS = ("type", "mode", "meter")
TEMPLATES = ("A {type}, in a {mode} key, in {meter} time", "{type}, {mode}, {meter}")


def main() -> None:
    """Trains each seed with both kinds of targets, in turns, and writes the JSON and the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder of PDTunes-Audio's shards")
    parser.add_argument("--json", type=Path, required=True, help="results; a page of the same name goes beside it")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--samples", type=int, default=16_384, help="of each run")
    parser.add_argument("--global-batch", type=int, default=256)
    options = parser.parse_args()
    torch.set_num_threads(2)
    runs = [run(options, targets, seed) for seed in range(options.seeds) for targets in TARGETS]
    given = [word.replace(options.data, "$PDTUNES") for word in sys.argv[1:]]
    results = provenance("benchmarks/targets.py", given, ("torch", "transformers", "timm", "numpy"))
    results |= {"gpu": None, "samples": options.samples, "global_batch": options.global_batch, "runs": runs}
    write(options.json, results, page(results, options.json.name))


def config_of(options: argparse.Namespace, targets: Any, seed: int) -> RunConfig:
    """The run of a seed with one kind of targets."""
    base = tiny()
    return replace(
        base,
        seed=seed,
        data=replace(
            base.data,
            train=(f"{options.data}/pdtunes-train-*.tar",),
            val=(f"{options.data}/pdtunes-val-*.tar",),
            templates=TEMPLATES,
        ),
        model=replace(base.model, audio=None),
        objective=ObjectiveConfig(pairs=(PairConfig("spectrogram", "text"),), targets=targets),
        train=replace(
            base.train,
            workers=1,
            samples=options.samples,
            global_batch=options.global_batch,
            chunk=options.global_batch // 4,
            warmup_samples=options.samples // 8,
            cache_gradients=False,
        ),
        evaluate=EvaluateConfig(fields=FIELDS),
    )


def run(options: argparse.Namespace, targets: str, seed: int) -> dict[str, Any]:
    """Trains and scores once."""
    config = config_of(options, targets, seed)
    storage, start = Storage.of(config.data), time.monotonic()
    false_negatives, losses = [], []

    def watch(step: int, chunks: list[dict[str, Any]], figures: dict[str, float]) -> None:
        ids = np.concatenate([chunk["text_id"] for chunk in chunks])
        false_negatives.append(float(np.mean([(ids == i).sum() - 1 for i in ids if i >= 0])))
        losses.append(figures)
        if step % 10 == 0:
            print(f"{targets}, seed {seed}, step {step}: {figures}", file=sys.stderr, flush=True)

    model, config = train(config, watch)
    val = index_shards(storage, storage.expand(list(config.data.val), "data.val"), "data.val")
    scores = evaluate(Muser(model, config), config, val, storage)
    return {
        "targets": targets,
        "seed": seed,
        "seconds": round(time.monotonic() - start, 1),
        "same_text_per_anchor": round(statistics.mean(false_negatives), 2),
        "first_loss": losses[0],
        "last_loss": losses[-1],
        "scores": scores_of(scores),
        "chance": {f"R@10 {name}": s["chance_R@10"] for name, s in scores["retrieval"].items()}
        | {f"majority {field}": by["spectrogram"]["majority"] for field, by in scores["zero_shot"].items()},
    }


def scores_of(evaluation: dict[str, Any]) -> dict[str, float]:
    """The figures that are compared."""
    figures = {}
    for name, scores in evaluation["retrieval"].items():
        figures |= {f"{name} R@10": scores["R@10"], f"{name} MRR": scores["MRR"]}
    for field, by_modality in evaluation["zero_shot"].items():
        scores = by_modality["spectrogram"]
        figures |= {
            f"zero-shot {field} accuracy": scores["accuracy"],
            f"zero-shot {field} macro F1": scores["macro_f1"],
        }
    return figures


def page(results: dict[str, Any], name: str) -> str:
    """The scores of both kinds of targets: mean over seeds, and the difference seed by seed."""
    runs = results["runs"]
    by_targets = {targets: [r for r in runs if r["targets"] == targets] for targets in TARGETS}
    same = statistics.mean(r["same_text_per_anchor"] for r in runs)
    lines = [
        head("Equal texts as matches: same_text against instance targets", results, name),
        "",
        f"The tiny recipe's spectrogram and text towers, {results['samples']:,} samples in steps of "
        f"{results['global_batch']}, {len(by_targets['instance'])} seeds; texts state type, mode and meter alone. Of "
        f"the {results['global_batch'] - 1} other rows of a batch {same:.1f} have exactly the anchor's text: false "
        "negatives with instance targets, matches with same_text. Rows, crops, texts and initial weights are the "
        "same for both. In retrieval all clips whose text states the same facts are right.",
        "",
    ]
    rows = []
    chance = runs[0]["chance"]
    for figure in runs[0]["scores"]:
        pairs = [[r["scores"][figure] for r in by_targets[targets]] for targets in TARGETS]
        difference = ", ".join(f"{b - a:+.3f}" for a, b in zip(*pairs, strict=True))
        means = [f"{statistics.mean(values):.3f}" for values in pairs]
        retrieval = figure.removesuffix(" R@10")
        known = chance.get(f"R@10 {retrieval}") if figure.endswith("R@10") else None
        if figure.endswith("accuracy"):
            known = chance[f"majority {figure.split()[1]}"]
        rows.append([figure, "" if known is None else f"{known:.3f}", *means, difference])
    titles = ["score on validation", "chance or majority", *TARGETS, "difference by seed"]
    lines += [table(titles, rows), "", f"{sum(r['seconds'] for r in runs) / 60:.0f} minutes on two CPU cores.", ""]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
