"""CLaMP 2 on real tunes: what pretraining on masked patches adds to alignment with texts, and what headers give away.

python benchmarks/clamp_table.py --data $PDTUNES --work FOLDER --json OUT.json       writes OUT.md beside it

Trains the recipe clamp2_tiny on ABC, MIDI and captions with several seeds: with and without the stage m3 before it, at
the same budget of alignment; and with the first seed with the fields K: and M: hidden from the encoder, which captions
name in words, and for a while more with a pair of the two notations besides. Runs are processes of one thread, as many
at a time as --processes. What is done lies in --work: the same command goes on.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from clamp_table_page import page
from clamp_table_run import header_copy, pretrain, run
from muser_table_run import compared, without_classes
from record import provenance, write
from runs import commits, scores_of, start

from muser_dist.config import EvaluateConfig, PairConfig, RunConfig, Stages
from muser_dist.recipes import find_recipe

FIELDS = ("type", "meter", "mode")
M3, UNTRAINED = "m3", "untrained"
WITHOUT, WITH, HIDDEN = "without m3", "with m3", "with m3, K: and M: hidden"
DIRECT = "with m3, then the ABC-MIDI pair"
VARIANTS = (WITHOUT, WITH, HIDDEN, DIRECT)
SEEDED = (M3, WITHOUT, WITH)
FROM = {WITH: M3, HIDDEN: M3, DIRECT: WITH}
"""What a run goes on from."""


def main(argv: Sequence[str] | None = None) -> None:
    """Trains and scores what is missing, and writes the JSON and the page."""
    options = _options(argv)
    if options.run:
        variant, seed = options.run
        config, folder = config_of(options, variant, int(seed)), folder_of(options, variant, int(seed))
        pretrain(config, folder) if variant == M3 else run(config, variant, folder, trained=variant != UNTRAINED)
        return
    seeds = range(options.seeds)
    runs = [
        (variant, seed) for variant in (M3, UNTRAINED, *VARIANTS) for seed in seeds if seed == 0 or variant in SEEDED
    ]
    after = {(variant, seed): (FROM[variant], seed) for variant, seed in runs if variant in FROM}
    folders = {job: folder_of(options, *job) for job in runs}
    configs = {job: config_of(options, *job) for job in runs}
    start(__file__, options.given, folders, configs, options.processes, after)
    given = sys.argv[1:] if argv is None else argv
    words = [word.replace(str(options.data), "$PDTUNES").replace(str(options.work), "$WORK") for word in given]
    results = provenance("benchmarks/clamp_table.py", words, ("torch", "transformers", "scikit-learn", "numpy", "mido"))
    results |= {"gpu": None, "samples": options.samples, "m3_samples": options.m3_samples}
    results["pretraining"] = [_scores(options, M3, seed) for seed in seeds]
    results["rows"] = [_scores(options, UNTRAINED, 0)]
    results["rows"] += [
        _scores(options, variant, seed) for variant in VARIANTS for seed in seeds if seed == 0 or variant in SEEDED
    ]
    results["runs_made_at"] = commits([*results["pretraining"], *results["rows"]])
    results["header_copy"] = header_copy(config_of(options, UNTRAINED, 0))
    results["comparison"] = compared(
        [folder_of(options, WITH, seed), folder_of(options, WITHOUT, seed)] for seed in seeds
    )
    write(options.json, results, page(results, options.json.name))


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of PDTunes-Audio's shards")
    parser.add_argument("--work", type=Path, required=True, help="folder for models and scores, which are kept")
    parser.add_argument("--json", type=Path, required=True, help="results; a page of the same name goes beside it")
    parser.add_argument("--seeds", type=int, default=3, help="runs with and without m3")
    parser.add_argument("--m3-samples", type=int, default=8_192, help="that the pretraining trains on")
    parser.add_argument("--samples", type=int, default=65_536, help="that each alignment trains on")
    parser.add_argument("--rows", type=int, default=10_000, help="most rows to embed of each set of shards")
    parser.add_argument("--processes", type=int, default=2, help="runs at a time, of one thread each")
    parser.add_argument("--run", nargs=2, metavar=("VARIANT", "SEED"), help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    options.given = list(sys.argv[1:] if argv is None else argv)
    options.work = options.work.absolute()
    return options


def folder_of(options: argparse.Namespace, variant: str, seed: int) -> Path:
    """What a run leaves behind; other budgets have other folders."""
    name = variant.replace(" ", "-").replace(",", "").replace(":", "")
    budget = f"{options.m3_samples}" if variant == M3 else f"{options.m3_samples}-{options.samples}-{options.rows}"
    return options.work / f"{name}-{budget}-{seed}"


def config_of(options: argparse.Namespace, variant: str, seed: int) -> RunConfig:
    """A stage of clamp2_tiny on this corpus."""
    recipe = find_recipe("clamp2_tiny")
    assert isinstance(recipe, Stages)
    base = recipe.stages[0 if variant == M3 else 1].config
    data = replace(
        base.data, train=(f"{options.data}/pdtunes-train-*.tar",), val=(f"{options.data}/pdtunes-val-*.tar",)
    )
    model, objective, train = base.model, base.objective, base.train
    if variant in (WITH, HIDDEN):
        assert model.symbolic is not None
        weights = str(folder_of(options, M3, seed))
        model = replace(model, symbolic=replace(model.symbolic, weights=weights))
    if variant == DIRECT:
        # From random weights ABC is like ABC and MIDI like MIDI, whatever the tune: all would collapse to one point.
        model = replace(model, start=str(folder_of(options, WITH, seed)))
        objective = replace(objective, pairs=(*objective.pairs, PairConfig("symbolic", "notation")))
        train = replace(train, lr=3e-4)
    if variant == HIDDEN:
        headers = tuple(name for name in data.symbolic.headers if name not in "KM")
        data = replace(data, symbolic=replace(data.symbolic, headers=headers))
    samples = {M3: options.m3_samples, DIRECT: options.samples // 4}.get(variant, options.samples)
    return replace(
        base,
        name=variant.replace(" ", "-"),
        seed=seed,
        data=data,
        model=model,
        objective=objective,
        train=replace(
            train,
            workers=1,
            samples=samples // train.global_batch * train.global_batch,
            warmup_samples=min(train.warmup_samples, samples // 8),
            chunk=train.global_batch,
        ),
        evaluate=EvaluateConfig(fields=FIELDS, rows=options.rows),
    )


def _scores(options: argparse.Namespace, variant: str, seed: int) -> dict:
    return without_classes(scores_of(folder_of(options, variant, seed)))


if __name__ == "__main__":
    main()
