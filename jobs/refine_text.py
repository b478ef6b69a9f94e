"""Lets a language model describe music from its metadata: `python jobs/refine_text.py --shards 'DATA/*.tar' ...`.

Asks an OpenAI-compatible endpoint for a description of each item in English and in one other language, and writes the
shards anew with both in the metadata: summary_en, and summary_nen as {language: text}. Train on them with
--data.templates '{summary_en}' '{summary_nen}'. The same command again asks only what has no answer yet. It runs on
this machine's cores, or on the Ray cluster that RAY_ADDRESS names, every node of which must see the folder.
"""

import json
import os
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path

import tyro

from muser_dist.cli import Progress, main
from muser_dist.errors import ConfigError, require


@dataclass(frozen=True, kw_only=True)
class Refine:
    """Writes shards with descriptions by a language model.

    Nothing is asked beyond --max-cost: with 0 it says what all descriptions would cost at most.
    """

    shards: tuple[str, ...]
    """Shards: paths or URLs, with braces and globs."""
    out: Path
    """Folder for the new shards, and for what was asked and answered; made when missing."""
    endpoint: str
    """Base URL of the API, such as http://localhost:8000/v1; /chat/completions is added."""
    model: str
    """The model's name there."""
    price_in: float
    """What a million tokens of the prompts cost, in any currency; 0 for your own machines."""
    price_out: float
    """What a million tokens of the answers cost."""
    max_cost: float
    """Most that may be spent, by all jobs in this folder together. With 0 nothing is asked, even where it is free."""
    key_variable: str = ""
    """Environment variable that holds the API key; none is sent when not given."""
    languages: tuple[str, ...] = ("zh", "es", "fr", "de", "ru", "ja", "ar", "hi", "pt", "ko")
    """Each item gets English and one of these (ISO 639-1), by a hash of its key."""
    fields: tuple[str, ...] = ()
    """Metadata fields that the model is shown; all when empty."""
    template: Path | None = None
    """File with another prompt, with $metadata, $language and, if you like, $code in it."""
    parameters: str = ""
    """Other parameters of the request, as a JSON object. One of max_tokens and max_completion_tokens bounds what an
    answer costs. By default {"max_tokens": 1000, "temperature": 0.7, "response_format": {"type": "json_object"}}."""
    concurrency: int = 16
    """Requests at a time."""
    timeout: float = 120.0
    """Seconds after which a request is given up."""
    attempts: int = 8
    """Of each item, before it is given up until the next job."""
    storage_options: str = ""
    """JSON file with arguments of fsspec's file systems, as of data.storage_options in training."""
    cache_folder: str = ""
    """Folder on each node for copies of remote shards, as of data.cache_folder in training."""


def job(arguments: list[str]) -> None:
    options = tyro.cli(Refine, args=arguments, prog="jobs/refine_text.py", description=__doc__)
    require(len(options.shards) > 0, "--shards is empty; name at least one")
    require(0 <= options.max_cost <= 1_000_000, f"--max-cost is {options.max_cost}; give 0 to 1,000,000")
    require(
        "RAY_JOB_CONFIG_JSON_ENV_VAR" not in os.environ or options.out.is_absolute(),
        f"--out {options.out} is a relative path, which in a submitted job means a temporary copy of your working "
        "directory; give an absolute path that every node sees",
    )
    from muser_dist.data.config import DataConfig  # after the options: importing torch takes seconds
    from muser_dist.data.shards import index_shards
    from muser_dist.data.storage import Storage
    from muser_dist.refine.asker import Endpoint
    from muser_dist.refine.job import QUARANTINE, refine
    from muser_dist.refine.ledger import UNIT, Prices
    from muser_dist.refine.prompt import PARAMETERS, TEMPLATE, Prompt
    from muser_dist.train.preflight import provenance

    prompt = Prompt(
        model=options.model,
        languages=options.languages,
        template=read_template(options.template) if options.template else TEMPLATE,
        parameters=read_parameters(options.parameters) if options.parameters else PARAMETERS,
        fields=options.fields,
    )
    endpoint = Endpoint(
        options.endpoint,
        read_key(options.key_variable),
        options.key_variable,
        options.concurrency,
        options.timeout,
        options.attempts,
    )
    storage = Storage.of(DataConfig(storage_options=options.storage_options, cache_folder=options.cache_folder))
    report = refine(
        index_shards(storage, storage.expand(options.shards, "--shards"), "--shards"),
        storage,
        prompt,
        endpoint,
        Prices.per_million(options.price_in, options.price_out),
        int(Decimal(str(options.max_cost)) * UNIT),
        options.out.absolute(),
        provenance(["python", "jobs/refine_text.py", *arguments]),
        Progress("rows", every=2.0),
    )
    spent = report.spending
    print(f"{report.read:,} rows: {report.refined:,} refined, {report.quarantined:,} quarantined, {report.left:,} left")
    print(
        f"{spent.requests:,} requests, {spent.input:,} + {spent.output:,} tokens, {spent.cost / UNIT:,.4f} spent of "
        f"{options.max_cost:,.4f}"
        + (f" ({spent.presumed / UNIT:,.4f} of it for requests whose end is unknown)" if spent.presumed else "")
    )
    if report.quarantined:
        print(f"why rows were quarantined: {options.out / QUARANTINE}")
    if report.left:
        print(f"the rows that are left cost {report.left_cost / UNIT:,.4f} at most; raise --max-cost to go on")
    if report.written:
        print(
            f"next: python jobs/pretrain.py tiny --data.train '{options.out}/*.tar' --data.templates "
            "'{summary_en}' '{summary_nen}'"
        )


def read_template(path: Path) -> str:
    """The prompt in a file."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ConfigError(f"--template: cannot read {path} ({error})") from None


def read_parameters(text: str) -> dict[str, object]:
    """The request's parameters."""
    try:
        values = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"--parameters is no JSON ({error})") from None
    require(isinstance(values, dict), '--parameters is no JSON object; give one such as {"max_tokens": 500}')
    return values


def read_key(variable: str) -> str:
    """The key, from the environment only: a command line is seen and saved in many places."""
    require(
        not variable or bool(os.environ.get(variable)),
        # Not quoted: somebody may have given the key itself.
        "--key-variable: the environment has no variable of that name; give a name, and export it before the command",
    )
    return os.environ.get(variable, "") if variable else ""


if __name__ == "__main__":
    main(job)
