"""Score a model on validation shards: `python jobs/evaluate.py FOLDER --val 'DATA/val-*.tar'`."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import tyro

from muser_dist.cli import main


@dataclass(frozen=True)
class Evaluate:
    """Scores a model: retrieval between text and each audio modality, zero-shot classification."""

    folder: tyro.conf.Positional[Path]
    """A run's folder, or an exported model's."""
    val: tuple[str, ...]
    """Shards to score on: paths or URLs, with braces and globs."""
    fields: tuple[str, ...] | None = None
    """Metadata fields to classify; the recipe's own by default."""
    rows: int = 10_000
    """Most rows to score, from the first on."""
    storage_options: str = ""
    """JSON file with arguments of fsspec's file systems, as of data.storage_options in training."""
    device: str = "cpu"
    """Where the towers compute: cpu, cuda, cuda:1, ..."""
    json: Annotated[Path | None, tyro.conf.arg(name="json")] = None
    """File to write the scores to."""


def job(arguments: list[str]) -> None:
    options = tyro.cli(Evaluate, args=arguments, prog="jobs/evaluate.py")
    from muser_dist import Muser  # after the options: importing torch takes seconds
    from muser_dist.data.shards import index_shards
    from muser_dist.data.storage import Storage
    from muser_dist.evaluate.evaluator import describe, evaluate

    muser = Muser.from_pretrained(options.folder, options.device)
    config = muser.config
    fields = options.fields if options.fields is not None else config.evaluate.fields
    config = replace(
        config,
        data=replace(config.data, storage_options=options.storage_options),
        evaluate=replace(config.evaluate, fields=fields, rows=options.rows),
    )
    storage = Storage.of(config.data)
    index = index_shards(storage, storage.expand(options.val, "val"), "val")
    evaluation = evaluate(muser, config, index, storage)
    print(describe(evaluation))
    if options.json:
        options.json.write_text(json.dumps({"data": list(options.val)} | evaluation, indent=2))
        print(f"written to {options.json}")


if __name__ == "__main__":
    main(job)
