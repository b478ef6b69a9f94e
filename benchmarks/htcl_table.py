"""HTCL on real clips with simulated listeners: what its second stage adds for songs nobody has heard, and at what cost.

python benchmarks/htcl_table.py --data $PDTUNES --work FOLDER --json OUT.json        writes OUT.md beside it

Makes the log (jobs/make_listeners.py with its defaults) and its pairs (jobs/mine_pairs.py), trains the recipe htcl_tiny
with several seeds, and with the first one the second stage also without L1, without L3, and with liked songs left out
of the negatives; and scores songs that have no interaction in training. Runs are processes of one thread, as many at a
time as --processes. What is done lies in --work: the same command goes on.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from htcl_table_page import page
from muser_table_run import EMBEDDINGS, compared, run, without_classes
from record import provenance, say, write
from runs import commits, scores_of, start

from muser_dist.config import EvaluateConfig, RunConfig, Stages
from muser_dist.data.corpora.listeners import LOG, SIMULATED, TRUTH
from muser_dist.data.corpora.tastes import Truth
from muser_dist.evaluate.embedding import Embedded
from muser_dist.evaluate.fields import read_labels
from muser_dist.evaluate.recommend_table import recommendation
from muser_dist.recipes import find_recipe

FIELDS = ("type", "meter", "mode", "instrument")
TEMPLATES = (
    "A song of {type}, played on the {instrument}, in {meter} time, in a {mode} key",
    "{instrument}, {type}, {mode}, {meter}",
    "{caption}",
)
STAGE_1, STAGE_2 = "stage 1", "stage 2"
ABLATIONS = ("stage 2 without L1", "stage 2 without L3", "stage 2, liked songs no negatives")
VARIANTS = (STAGE_1, STAGE_2, *ABLATIONS)
TASTES = (*FIELDS, "book")
ROOT = Path(__file__).parents[1]


def main(argv: Sequence[str] | None = None) -> None:
    """Trains and scores what is missing, and writes the JSON and the page."""
    options = _options(argv)
    if options.run:
        variant, seed = options.run
        run(config_of(options, variant, int(seed)), variant, folder_of(options, variant, int(seed)))
        return
    _make_pairs(options)
    seeds = range(options.seeds)
    runs = [(variant, seed) for seed in seeds for variant in _variants(seed)]
    runs.sort(key=lambda job: job[0] != STAGE_1)  # and then seed by seed, so that none waits for what runs last
    after = {(variant, seed): (STAGE_1, seed) for variant, seed in runs if variant != STAGE_1}
    folders = {job: folder_of(options, *job) for job in runs}
    configs = {job: config_of(options, *job) for job in runs}
    start(__file__, options.given, folders, configs, options.processes, after)
    given = sys.argv[1:] if argv is None else argv
    words = [word.replace(str(options.data), "$PDTUNES").replace(str(options.work), "$WORK") for word in given]
    results = provenance("benchmarks/htcl_table.py", words, ("torch", "transformers", "implicit", "numpy"))
    results |= {"gpu": None, "samples_of_stage_1": options.samples_of_stage_1, "samples": options.samples}
    results |= {"global_batch": options.global_batch}
    results["mining"] = json.loads((options.work / "pairs" / "summary.json").read_text())
    results["rows"] = [
        without_classes(scores_of(folders[job])) for job in sorted(runs, key=lambda job: VARIANTS.index(job[0]))
    ]
    results["runs_made_at"] = commits(results["rows"])
    results["comparison"] = compared(
        [folder_of(options, STAGE_2, seed), folder_of(options, STAGE_1, seed)] for seed in seeds
    )
    results["recommendation"] = [_recommend(options, seed) for seed in seeds]
    write(options.json, results, page(results, options.json.name))


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of PDTunes-Audio's shards")
    parser.add_argument("--work", type=Path, required=True, help="folder for log, models and scores, which are kept")
    parser.add_argument("--json", type=Path, required=True, help="results; a page of the same name goes beside it")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each variant")
    parser.add_argument("--samples-of-stage-1", type=int, default=98_304, help="that the first stage trains on")
    parser.add_argument("--samples", type=int, default=32_768, help="that each second stage trains on")
    parser.add_argument("--global-batch", type=int, default=128)
    parser.add_argument("--processes", type=int, default=2, help="runs at a time, of one thread each")
    parser.add_argument("--run", nargs=2, metavar=("VARIANT", "SEED"), help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    options.given = list(sys.argv[1:] if argv is None else argv)
    options.work = options.work.absolute()
    return options


def folder_of(options: argparse.Namespace, variant: str, seed: int) -> Path:
    """What a run leaves behind; other budgets have other folders."""
    name = variant.replace(" ", "-").replace(",", "")
    budget = f"{options.samples_of_stage_1}" + (f"-{options.samples}" if variant != STAGE_1 else "")
    return options.work / f"{name}-{budget}-{options.global_batch}-{seed}"


def _variants(seed: int) -> tuple[str, ...]:
    return VARIANTS if seed == 0 else (STAGE_1, STAGE_2)


def config_of(options: argparse.Namespace, variant: str, seed: int) -> RunConfig:
    """A stage of htcl_tiny on this corpus."""
    recipe = find_recipe("htcl_tiny")
    assert isinstance(recipe, Stages)
    base = recipe.stages[0 if variant == STAGE_1 else 1].config
    objective = base.objective
    samples = options.samples_of_stage_1 if variant == STAGE_1 else options.samples
    data = replace(
        base.data,
        train=(f"{options.data}/pdtunes-train-*.tar",),
        val=(f"{options.data}/pdtunes-val-*.tar",),
        templates=TEMPLATES,
        keep_clips=True,
        cache_folder=str(options.work / "clips"),
        # What the instrument tells apart needs no ear for the meter: half of what texts state is left out.
        field_dropout=0.5,
    )
    if variant != STAGE_1:
        data = replace(data, pairs=str(options.work / "pairs" / "pairs"))
        semantic, partner, fused = objective.pairs
        pairs = {ABLATIONS[0]: (partner, fused), ABLATIONS[1]: (semantic, partner)}.get(variant, objective.pairs)
        objective = replace(objective, pairs=pairs, exclude_liked=variant == ABLATIONS[2])
    folder = folder_of(options, variant, seed)
    config = replace(
        base,
        storage=str(folder.parent),
        name=folder.name,
        seed=seed,
        data=data,
        objective=objective,
        train=replace(
            base.train,
            workers=1,
            samples=samples // options.global_batch * options.global_batch,
            warmup_samples=samples // 16,
            global_batch=options.global_batch,
            chunk=options.global_batch,
        ),
        evaluate=EvaluateConfig(fields=FIELDS),
    )
    if variant == STAGE_1:
        return config
    return config.starting_from(config_of(options, STAGE_1, seed), recipe.stages[1].takes)


def _make_pairs(options: argparse.Namespace) -> None:
    """The log of simulated listeners, and the pairs of songs that its training part holds."""
    log, pairs = options.work / LOG, options.work / "pairs"
    shards = [f"{options.data}/pdtunes-train-*.tar", f"{options.data}/pdtunes-val-*.tar"]
    if not log.exists():
        _job("make_listeners.py", "--shards", *shards, "--out", str(options.work))
    if not (pairs / "summary.json").exists():
        start = json.loads(pq.read_schema(log).metadata[SIMULATED])["test_start"]
        # One listener will do: of pairs that two have, the log holds some for every fourth clip alone.
        rule = ["--mining.rule", "explicit", "--mining.triggers", "play", "--mining.signals", "like"]
        rule += ["--mining.min-support", "1"]
        split = ["--split.val-from", str(start)]
        _job("mine_pairs.py", str(log), "--layout", "events", "--out", str(pairs), *rule, *split)


def _job(name: str, *arguments: str) -> None:
    say(f"jobs/{name} ...")
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"PYTHONPATH": path}
    subprocess.run([sys.executable, str(ROOT / "jobs" / name), *arguments], check=True, env=environment)


def _recommend(options: argparse.Namespace, seed: int) -> dict[str, Any]:
    """The table of recommendations of one seed's models."""
    log = pq.read_table(options.work / LOG)
    truth = Truth.load(options.work / TRUTH)
    start = json.loads(log.schema.metadata[SIMULATED])["test_start"]
    rows = {variant: Embedded.load(folder_of(options, variant, seed) / EMBEDDINGS) for variant in _variants(seed)}
    tables = {variant: _by_key(of, of.joint["spectrogram"], of.valid["spectrogram"]) for variant, of in rows.items()}
    first = rows[STAGE_1]
    tables["text only"] = _by_key(first, first.joint["text"], first.valid["text"])
    tables["facts"] = _by_key(first, facts(first.fields), np.ones(len(first), bool))
    held_out = log["time"].to_numpy() >= start
    cold = {item for item, is_cold in zip(truth.items, truth.cold, strict=True) if is_cold}
    return recommendation(log, held_out, cold, tables, truth=truth, base=STAGE_1, seed=seed)


def _by_key(rows: Embedded, vectors: np.ndarray, there: np.ndarray) -> dict[str, np.ndarray]:
    return {key: vector for key, vector, known in zip(rows.keys, vectors, there, strict=True) if known}


def facts(rows: list[dict[str, Any]]) -> np.ndarray:
    """What the simulated listeners like clips for, as vectors: one-hot values, whitened, so that fields count alike.

    A model that heard all of it without fail would know no more of a clip.
    """
    columns = []
    for field in TASTES:
        labels = read_labels(field, rows)
        columns.append(labels.sets[0][:, None] == np.arange(len(labels.classes)))
    known = np.concatenate(columns, axis=1).astype(np.float64)
    left, sizes, _ = np.linalg.svd(known - known.mean(axis=0), full_matrices=False)
    return left[:, sizes > 1e-6 * sizes[0]]


if __name__ == "__main__":
    main()
