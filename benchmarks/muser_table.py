"""MUSER's ablation on real music: its recipes with small towers at one budget, and what each representation knows.

python benchmarks/muser_table.py --data $PDTUNES --work FOLDER --json OUT.json       writes OUT.md beside it

Each recipe trains in a process of its own with one thread, as many at a time as --processes. What is done lies in
--work: the same command goes on, and makes the page of what there is. Towers, optimizer, batch and number of samples
are the same for all; recipes differ in objective, pairs, targets, picture, augmentation and crops.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from muser_table_page import page
from muser_table_run import compared, run, without_classes
from record import provenance, write
from runs import commits, scores_of, start

from muser_dist.config import EvaluateConfig, RunConfig, TowerConfig
from muser_dist.recipes import load_recipe

FIELDS = ("type", "meter", "mode", "instrument")
TEMPLATES = (
    "A song of {type}, played on the {instrument}, in {meter} time, in a {mode} key",
    "{instrument}, {type}, {mode}, {meter}",
    "{caption}",
)
SEEDS = {
    "muser": 3,
    "muser_audio_text": 3,
    "muser_audio_only": 3,
    "muser_paper": 1,
    "muser_code": 1,
    "muser_symbolic": 1,
    "clmr": 1,
}
UNTRAINED = "untrained"
# Of the small towers it learns most from as much computing (benchmarks/LOG.md).
AUDIO = TowerConfig("htcl_audio", {"width": 128, "depth": 2, "heads": 4, "channels": 128, "mels": 64, "hop": 320})
DIMS = [16, 32, 64, 128]
NOTATION = TowerConfig("m3", {"width": 128, "depth": 3, "heads": 4})


def main(argv: Sequence[str] | None = None) -> None:
    """Trains and scores what is missing, and writes the JSON and the page."""
    options = _options(argv)
    if options.run:
        recipe, seed = options.run
        run(config_of(options, recipe, int(seed)), recipe, folder_of(options, recipe, int(seed)))
        return
    jobs = [(UNTRAINED, 0)]
    for number in range(options.seeds):
        jobs += [(recipe, number) for recipe in options.recipes if number < SEEDS[recipe]]
    folders = {job: folder_of(options, *job) for job in jobs}
    configs = {job: config_of(options, *job) for job in jobs}
    start(__file__, options.given, folders, configs, options.processes)
    given = sys.argv[1:] if argv is None else argv
    words = [word.replace(str(options.data), "$PDTUNES").replace(str(options.work), "$WORK") for word in given]
    results = provenance("benchmarks/muser_table.py", words, ("torch", "transformers", "timm", "scikit-learn", "numpy"))
    results |= {"gpu": None, "samples": options.samples, "global_batch": options.global_batch}
    results["rows"] = [without_classes(scores_of(folder)) for folder in folders.values()]
    results["runs_made_at"] = commits(results["rows"])
    results["floor"] = without_classes(json.loads((folder_of(options, UNTRAINED, 0) / "floor.json").read_text()))
    results["comparison"] = compared(
        [folder_of(options, "muser", seed), folder_of(options, "muser_audio_text", seed)]
        for seed in range(options.seeds)
    )
    results["with_notation"] = compared([[folder_of(options, recipe, 0) for recipe in ("muser_symbolic", "muser")]])
    write(options.json, results, page(results, options.json.name))


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of PDTunes-Audio's shards")
    parser.add_argument("--work", type=Path, required=True, help="folder for models and scores, which are kept")
    parser.add_argument("--json", type=Path, required=True, help="results; a page of the same name goes beside it")
    parser.add_argument("--recipes", nargs="+", choices=list(SEEDS), default=list(SEEDS))
    parser.add_argument("--seeds", type=int, default=max(SEEDS.values()), help="most runs of each recipe")
    parser.add_argument("--samples", type=int, default=32_768, help="that each run trains on")
    parser.add_argument("--global-batch", type=int, default=128)
    parser.add_argument("--processes", type=int, default=2, help="runs at a time, of one thread each")
    parser.add_argument("--run", nargs=2, metavar=("RECIPE", "SEED"), help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    options.given = list(sys.argv[1:] if argv is None else argv)
    return options


def folder_of(options: argparse.Namespace, recipe: str, seed: int) -> Path:
    """What a run leaves behind; other budgets have other folders."""
    return options.work / f"{recipe}-{options.samples}-{options.global_batch}-{seed}"


def config_of(options: argparse.Namespace, recipe: str, seed: int) -> RunConfig:
    """A recipe with small towers on this corpus."""
    base = load_recipe("muser" if recipe == UNTRAINED else recipe)
    config, towers = base, base.model.towers()
    if towers.keys() & {"spectrogram"}:
        kind = base.model.spectrogram.options.get("kind", "log_mel") if base.model.spectrogram else "log_mel"
        towers["spectrogram"] = TowerConfig("spectrogram", {"kind": kind, "depths": [2, 2, 4, 2], "dims": DIMS})
    if "audio" in towers:
        towers["audio"] = AUDIO
    if "text" in towers:
        towers["text"] = TowerConfig("text", {"width": 128, "depth": 2, "heads": 4})
    if "symbolic" in towers:
        towers["symbolic"] = NOTATION
    data = replace(
        base.data,
        train=(f"{options.data}/pdtunes-train-*.tar",),
        val=(f"{options.data}/pdtunes-val-*.tar",),
        crop_seconds=min(8.0, base.data.crop_seconds),
        templates=TEMPLATES,
        # A sentence without the instrument, which is the easy one, is told from others by rhythm and key alone.
        field_dropout=0.5,
        tokenizer="words",
        vocabulary=16_384,
        max_tokens=32,
        symbolic=replace(base.data.symbolic, max_patches=128),
        keep_clips=True,
        cache_folder=str(options.work / "clips"),
    )
    if data.classes:
        data = replace(data, classes=FIELDS)
    steps = options.samples // options.global_batch
    return replace(
        config,
        name=recipe,
        seed=seed,
        data=data,
        model=replace(base.model, **towers, projection_dim=min(128, base.model.projection_dim)),
        train=replace(
            base.train,
            workers=1,
            optimizer="adamw",
            lr=1e-3,
            betas=(0.9, 0.98),
            weight_decay=0.1,
            clip_norm=1.0,
            samples=steps * options.global_batch,
            warmup_samples=options.samples // 8,
            global_batch=options.global_batch,
            chunk=options.global_batch,
            cache_gradients=False,
        ),
        evaluate=EvaluateConfig(fields=FIELDS),
    )


if __name__ == "__main__":
    main()
