"""Says what shards hold: `python jobs/inspect_shards.py 'DATA/train-*.tar' --against 'DATA/val-*.tar'`."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from muser_dist.cli import Progress, main
from muser_dist.data.config import DataConfig
from muser_dist.errors import require
from muser_dist.files import check_file


@dataclass(frozen=True)
class Inspect:
    """Reports what a set of shards holds, what in it cannot be used, and what occurs twice.

    Every row is read, its header looked at and 12 seconds from its middle decoded, on all cores.
    """

    shards: tyro.conf.Positional[tuple[str, ...]]
    """Paths or URLs, with braces and globs."""
    against: tuple[str, ...] = ()
    """Other shards, such as those of validation: reports what both sets hold."""
    batch: int = 1024
    """Rows of a global batch, for the number of false negatives in it."""
    templates: tuple[str, ...] = DataConfig().templates
    """Sentences as of data.templates; two rows whose first sentence states the same facts have the same text."""
    rows: int | None = None
    """About how many rows of a set to look at, the first ones of each shard; all by default."""
    storage_options: str = ""
    """JSON file with arguments of fsspec's file systems, as of data.storage_options in training."""
    json: Annotated[Path | None, tyro.conf.arg(name="json")] = None
    """File to write all numbers to."""


def job(arguments: list[str]) -> None:
    options = tyro.cli(Inspect, args=arguments, prog="jobs/inspect_shards.py")
    require(len(options.shards) > 0, "the shards are missing; give a pattern such as 'DATA/train-*.tar'")
    require(options.batch >= 2, f"--batch is {options.batch}; a batch has at least 2 rows")
    require(options.rows is None or options.rows >= 1, f"--rows is {options.rows}; look at 1 row at least")
    check_file(options.json, "--json")
    from muser_dist.data.catalogue import scan
    from muser_dist.data.inspection import inspect, leakage
    from muser_dist.data.storage import Storage

    storage = Storage.of(DataConfig(storage_options=options.storage_options))
    sets = [storage.expand(options.shards, "shards")]
    if options.against:
        sets.append(storage.expand(options.against, "--against"))
    catalogues = [scan(storage, urls, options.templates, options.rows, Progress("shards")) for urls in sets]
    result: dict[str, Any] = {"shards": inspect(catalogues[0], options.batch)}
    if options.against:
        result["against"] = inspect(catalogues[1], options.batch)
        result["leakage"] = leakage(*catalogues)
    for line in describe(result):
        # Keys and values are other people's: they must not steer the terminal.
        print("".join(c if c.isprintable() else "�" for c in line))
    if options.json:
        options.json.write_text(json.dumps(result, indent=2))
        print(f"written to {options.json}")


def describe(result: dict[str, Any]) -> Iterable[str]:
    """The lines of the report."""
    yield from describe_set(result["shards"])
    if "leakage" in result:
        yield ""
        yield "== both here and in --against"
        rows, others = (result[name]["shards"]["looked_at"] for name in ("shards", "against"))
        for name, found in result["leakage"].items():
            counts = f"{found['rows']:>9,} of {rows:,} rows; {found['against']:,} of {others:,} in --against"
            yield f"same {name:<10} {counts}"
            for pair in found["examples"]:
                yield f"    {place(pair['row'])} = {place(pair['against'])}"


def describe_set(report: dict[str, Any]) -> Iterable[str]:
    """The lines about one set of shards."""
    shards, audio, false = report["shards"], report["audio"], report["false_negatives"]
    looked = shards["looked_at"]
    yield f"{shards['shards']:,} shards, {shards['rows']:,} rows, {shards['bytes']:,} bytes, {looked:,} rows looked at"
    for entry in shards["damaged"]:
        yield f"    {entry['shard']} {entry['problem']}"
    for entry in shards["index_differs"]:
        yield f"    {entry['shard']} holds {entry['rows']:,} rows, but muser-index.json says {entry['index']:,}"
    yield ""
    yield f"== usable: {report['usable']:,} of {looked:,} rows ({percent(report['usable'], looked)})"
    for problem in report["problems"]:
        yield f"{problem['rows']:>9,}  {problem['kind']}"
        yield f"           first: {place(problem)}: {problem['reason']}"
    if report["notation"]:
        yield ""
        counts = ", ".join(f"{extension} {rows:,}" for extension, rows in report["notation"].items())
        yield f"== notation, not looked into: {counts}"
    yield ""
    yield f"== audio: {audio['hours']:,.2f} hours"
    for title, name, unit in (("format", "formats", ""), ("rate", "sample_rates", " Hz"), ("channels", "channels", "")):
        yield f"{title:<9} " + ", ".join(f"{value}{unit} {rows:,}" for value, rows in audio[name].items())
    if audio["seconds"]["min"] is not None:
        yield "seconds   " + ", ".join(f"{name} {value:,.1f}" for name, value in audio["seconds"].items())
    if audio["unknown_length"]:
        yield f"          {audio['unknown_length']:,} clips whose headers do not tell"
    yield ""
    yield "== fields: share of the rows, distinct values, the most frequent ones"
    for name, field in report["fields"].items():
        frequent = ", ".join(f"{entry['value'][:30]} ({entry['rows']:,})" for entry in field["most_frequent"])
        yield f"{name:<20} {field['share']:>6.1%} {field['distinct']:>9,}  {frequent}"
    yield ""
    yield "== copies: rows that others repeat"
    for name, copies in report["copies"].items():
        yield f"same {name:<10} {copies['rows']:>9,} rows in {copies['groups']:,} groups"
        for group in copies["largest"][:3]:
            yield f"    {group['rows']:,} rows: " + ", ".join(place(row) for row in group["examples"][:3])
    yield ""
    yield f"== false negatives: {false['batch']:,} rows in a batch out of {false['rows']:,}, {false['texts']:,} texts"
    yield f"rows in a batch with the anchor's text   {false['per_anchor']:.3f} on average"
    yield f"anchors that have such a row             {false['share']:.1%}"
    yield f"floor of the plain InfoNCE loss          {false['loss_floor']:.4f} nats"


def place(row: dict[str, Any]) -> str:
    """Where a row is."""
    return f"{row['shard'].rpartition('/')[2]}:{row['key']}"


def percent(part: int, whole: int) -> str:
    """Share of a whole that may be 0."""
    return f"{part / max(1, whole):.1%}"


if __name__ == "__main__":
    main(job)
