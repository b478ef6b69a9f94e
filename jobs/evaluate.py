"""Score any model on shards: `python jobs/evaluate.py FOLDER --val 'DATA/val-*.tar'`."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from muser_dist.cli import Progress, main


@dataclass(frozen=True)
class Evaluate:
    """Scores a model on shards: retrieval in every direction, zero-shot classification and tagging by prompts,
    robustness to their wording, geometry of the joint space. With --train also probes and few-shot curves.

    python jobs/evaluate.py runs/NAME --val 'DATA/val-*.tar' --fields genre tags --html scores.html

    python jobs/evaluate.py runs/NAME --val 'DATA/val-*.tar' --train 'DATA/train-*.tar' --per-row a.npz

    python jobs/evaluate.py clap --weights FOLDER --val 'DATA/val-*.tar' --templates 'A song of {genre}' '{genre}'
    --fields genre --against a.npz
    """

    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL")]
    """A run's folder or an exported model's; "clap", a CLAP checkpoint of transformers in the folder --weights; or a
    function of your own, my_package.models:load, that returns an object with encode_audio(clips, sample_rate),
    encode_text(sentences), sample_rate and seconds (muser_dist/evaluate/external.py)."""
    val: tuple[str, ...]
    """Shards to score on: paths or URLs, with braces and globs."""
    train: tuple[str, ...] = ()
    """Shards that probes are fitted on. Without them there are no probes."""
    fields: tuple[str, ...] | None = None
    """Metadata fields to classify; the recipe's own by default. A field whose values are lists is one of tags, of
    which the 50 most frequent are scored."""
    templates: tuple[str, ...] | None = None
    """Sentences over the fields in place of the recipe's. The first makes each clip's text for retrieval; those
    that can say a field alone make its prompts."""
    languages: tuple[str, ...] | None = None
    """Where fields are objects {language: text}: languages that retrieval by texts is scored in, each by itself; the
    recipe's own by default."""
    probe_on: Literal["tower", "joint"] = "tower"
    """What probes see: the towers' output before their heads, as is usual, or the joint space."""
    probes: tuple[Literal["linear", "mlp"], ...] = ("linear", "mlp")
    """Probes to fit: "linear" is logistic regression, "mlp" has one hidden layer of 256 units."""
    seeds: int = 5
    """Draws of labels behind each point of the few-shot curves; 0 leaves the curves out."""
    rows: int = 10_000
    """Most rows to score, from the first on."""
    train_rows: int = 100_000
    """Most rows to fit probes on, from the first on."""
    weights: str | None = None
    """Argument for the function that makes a model which is not ours, such as the folder of its weights."""
    storage_options: str = ""
    """JSON file with arguments of fsspec's file systems, as of data.storage_options in training."""
    device: str = "cpu"
    """Where the towers compute: cpu, cuda, cuda:1, ..."""
    keep: Path | None = None
    """Folder for embeddings: an interrupted run goes on from there, and another one with the same model and shards
    makes none again."""
    json: Annotated[Path | None, tyro.conf.arg(name="json")] = None
    """File to write the scores to."""
    html: Path | None = None
    """File to write a page to, with the scores and pictures."""
    per_row: Path | None = None
    """File (.npz) to write each row's results to, for --against."""
    against: Path | None = None
    """What --per-row wrote of another model on the same rows: shows the differences, with intervals of a paired
    bootstrap."""


def job(arguments: list[str]) -> None:
    options = tyro.cli(Evaluate, args=arguments, prog="jobs/evaluate.py")
    from muser_dist.data.shards import index_shards  # after the options: importing torch takes seconds
    from muser_dist.data.storage import Storage
    from muser_dist.data.text import check_templates
    from muser_dist.errors import ConfigError
    from muser_dist.evaluate.comparison import (
        PerRow,
        compare_rows,
        describe_comparison,
        load_rows,
        save_rows,
    )
    from muser_dist.evaluate.embedding import embed
    from muser_dist.evaluate.evaluator import Probing, score
    from muser_dist.evaluate.external import External, load_model
    from muser_dist.evaluate.summary import describe
    from muser_dist.files import check_file

    for path, option in ((options.json, "--json"), (options.html, "--html"), (options.per_row, "--per-row")):
        check_file(path, option)
    if options.seeds == 1:
        raise ConfigError("--seeds 1 gives no interval; give 2 or more, or 0 for no few-shot curves")
    other = load_rows(options.against) if options.against else None  # before the work, for its errors
    model, config = load_model(options.model, options.weights, options.device)
    if options.train and options.probe_on == "tower" and isinstance(model, External) and not model.has_features:
        raise ConfigError(
            f"{options.model} has no audio_features(clips, sample_rate) for probes; give --probe-on joint"
        )
    templates = options.templates or config.data.templates
    check_templates(templates, "--templates")
    fields = options.fields if options.fields is not None else config.evaluate.fields
    languages = options.languages if options.languages is not None else config.evaluate.languages
    data = replace(config.data, storage_options=options.storage_options, templates=templates)
    scored = replace(config.evaluate, fields=fields, languages=languages, rows=options.rows)
    config = replace(config, data=data, evaluate=scored)
    storage = Storage.of(config.data)
    val = index_shards(storage, storage.expand(options.val, "val"), "val")
    train = index_shards(storage, storage.expand(options.train, "train"), "train") if options.train else None

    test = embed(model, config, val, storage, Progress("rows embedded"), options.keep)
    fitted = None
    if train:
        more = replace(config, evaluate=replace(config.evaluate, rows=options.train_rows))
        fitted = embed(model, more, train, storage, Progress("training rows embedded"), options.keep)
    per_row: PerRow = {}
    probing = Probing(options.probe_on, options.probes, options.seeds)
    evaluation: dict[str, Any] = {"model": options.model, "data": list(options.val), "trained_on": list(options.train)}
    evaluation |= score(model, config, test, fitted, probing, per_row, Progress("fields probed"))
    print(describe(evaluation))
    if other:
        evaluation["comparison"] = compare_rows(per_row, other)
        print(f"\n{describe_comparison(evaluation['comparison'])}\n")
    if options.per_row:
        save_rows(options.per_row, per_row)
        print(f"each row's results: {options.per_row}")
    if options.json:
        options.json.write_text(json.dumps(evaluation, indent=2))
        print(f"written to {options.json}")
    if options.html:
        from muser_dist.evaluate.scores_page import write_evaluation

        print(f"page: {write_evaluation(options.html, evaluation)}")


if __name__ == "__main__":
    main(job)
