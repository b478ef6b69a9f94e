"""Refines on Ray: tasks read shards on all machines and write them anew; this process asks in between.

The tasks neither have the key nor spend anything, so one that Ray runs again costs nothing.
"""

import hashlib
import json
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from muser_dist.data.rewriting import check_names, on_ray
from muser_dist.data.session import connected
from muser_dist.data.shards import SIDECAR, ShardIndex
from muser_dist.data.storage import Storage, redact
from muser_dist.data.text import one_line
from muser_dist.errors import ConfigError, DataError
from muser_dist.files import alone_in, remove_parts, write_whole
from muser_dist.refine.asker import Asker, Endpoint
from muser_dist.refine.ledger import UNIT, Answers, Ledger, Prices, Spending
from muser_dist.refine.prompt import Prompt, Request
from muser_dist.refine.shards import Record, refine_shard, requests

MANIFEST, LEDGER, QUARANTINE, REPORT = "refine.json", "ledger.sqlite", "quarantine.jsonl", "report.json"
FORMAT = 1


@dataclass(frozen=True)
class Report:
    """What a job has done, with all jobs in its folder before: read = refined + quarantined + left.

    Attributes:
        read, refined, quarantined, left: rows.
        left_cost: units of money that the rows that are left cost at most.
        spending: of all jobs.
        written: whether there are new shards.
    """

    read: int
    refined: int
    quarantined: int
    left: int
    left_cost: int
    spending: Spending
    written: bool

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values, with money in the currency."""
        spent = {
            name: value / UNIT if name in ("cost", "presumed") else value
            for name, value in asdict(self.spending).items()
        }
        return asdict(self) | {"left_cost": self.left_cost / UNIT, "spending": spent}


def refine(
    index: ShardIndex,
    storage: Storage,
    prompt: Prompt,
    endpoint: Endpoint,
    prices: Prices,
    cap: int,
    folder: Path,
    made_by: dict[str, Any],
    progress: Callable[[int, int, str], None],
) -> Report:
    """Asks about all rows of shards what was not asked yet, and writes the shards with the descriptions.

    Args:
        index: the shards and how many rows they hold.
        storage: where they are read from.
        prompt: what is asked.
        endpoint: whom.
        prices: of tokens.
        cap: units of money that may be spent, with what jobs in the folder spent before.
        folder: for ledger and shards; every node must see it.
        made_by: command, commit and versions.
        progress: called with (rows that need no more asking, rows, what was spent).

    Raises:
        ClusterError: no cluster answers, or its nodes die.
        ConfigError: the folder cannot be written, or the new shards would overwrite others.
        DataError: the folder is another job's, or one works in it; or a shard cannot be read.
        EndpointError: the endpoint refuses, or does not answer.
    """
    check_names(index, folder)  # else the lock would lie among the shards
    with alone_in(folder):
        claim(folder, index, prompt, made_by)
        remove_parts(folder)
        with connected():
            ledger = Ledger(folder / LEDGER, cap)
            try:

                def asked(done: int) -> None:
                    progress(done, index.total, so_far(asker))

                asker = Asker(endpoint, ledger, prices, asked)
                # Closed, so that no more is read where the cap ends it.
                with closing(_requests_on_ray(index, storage, prompt)) as batches:
                    asker.run(batches)
                if not asker.capped:
                    asked(index.total)
                spending, write = ledger.spending, ledger.any_answer
            finally:
                ledger.close()
            records = _records_on_ray(index, storage, prompt, folder, write)
        return _finish(index, records, prices, spending, folder, write)


def so_far(asker: Asker) -> str:
    """What a job has spent till now, and what it got no answer to."""
    spent, cap = asker.ledger.spending, asker.ledger.cap
    line = f"{spent.input + spent.output:,} tokens, {spent.cost / UNIT:,.4f} of {cap / UNIT:,.4f} spent"
    if asker.given_up:
        line += f"; {asker.given_up:,} given up, the last because: {one_line(asker.reason)[:100]}"
    return line


def claim(folder: Path, index: ShardIndex, prompt: Prompt, made_by: dict[str, Any]) -> None:
    """Makes a folder this job's.

    Raises:
        ConfigError: it cannot be written.
        DataError: it is another job's.
    """
    inputs = json.dumps([[redact(url), rows] for url, rows in zip(index.urls, index.rows.tolist(), strict=True)])
    content = {"prompt": asdict(prompt), "shards": hashlib.sha256(inputs.encode()).hexdigest()}
    content = json.loads(json.dumps(content))
    path = folder / MANIFEST
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            if strangers := sorted(folder.glob("*.tar")):
                raise DataError(f"{strangers[0]} was there before; give another --out")
            write_whole(path, json.dumps({"format": FORMAT, "content": content, "made_by": made_by}, indent=1))
        there = json.loads(path.read_text())["content"]
        before = {"shards": there["shards"], **there["prompt"]}
    except OSError as error:
        raise ConfigError(f"--out: cannot write to {folder} ({error.strerror}); give another") from None
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is broken ({error}); give another --out") from None
    mine = {"shards": content["shards"], **content["prompt"]}
    if changed := [name for name, value in mine.items() if before.get(name) != value]:
        raise DataError(
            f"{folder} is of a job with other settings or shards ({', '.join(changed)} differ; {MANIFEST} holds "
            "its own); give another --out"
        )


def _requests_on_ray(
    index: ShardIndex, storage: Storage, prompt: Prompt
) -> Generator[list[Request | None], None, None]:
    """Yields the requests about all shards, in batches."""

    def read(shard: int) -> Iterator[str]:
        for batch in requests(storage, index.url(shard), prompt):
            yield json.dumps([request and asdict(request) for request in batch])

    for batch in on_ray(len(index), read):
        yield [request and Request(**request) for request in json.loads(batch)]


def _records_on_ray(index: ShardIndex, storage: Storage, prompt: Prompt, folder: Path, write: bool) -> list[Record]:
    """Writes all shards; returns what became of their rows."""

    def refined(shard: int) -> Iterator[str]:
        answers = Answers(folder / LEDGER)
        try:
            rows = int(index.rows[shard])
            record = refine_shard(storage, index.url(shard), rows, prompt, answers, folder, write)
        except OSError as error:
            raise DataError(f"--out: cannot write {Path(index.url(shard)).name} to {folder} ({error})") from None
        finally:
            answers.close()
        yield json.dumps([shard, asdict(record)])

    records = [json.loads(record) for record in on_ray(len(index), refined)]
    assert sorted(shard for shard, _ in records) == list(range(len(index))), "a shard is missing, or there twice"
    return [TypeAdapter(Record).validate_python(record) for _, record in sorted(records, key=lambda record: record[0])]


def _finish(
    index: ShardIndex, records: list[Record], prices: Prices, spending: Spending, folder: Path, written: bool
) -> Report:
    """Writes the list of what got no descriptions, the report and the index of the new shards."""
    problems = [problem for record in records for problem in record.problems]
    report = Report(
        read=sum(record.read for record in records),
        refined=sum(record.refined for record in records),
        quarantined=len(problems),
        left=sum(record.left for record in records),
        left_cost=sum(prices.cost(record.left_input, record.left_output) for record in records),
        spending=spending,
        written=written,
    )
    assert report.read == report.refined + report.quarantined + report.left
    write_whole(folder / QUARANTINE, "".join(json.dumps(problem) + "\n" for problem in problems))
    if written:
        rows = {Path(url).name: record.rows for url, record in zip(index.urls, records, strict=True)}
        write_whole(folder / SIDECAR, json.dumps({"format": 1, "rows": rows}, indent=1))
    write_whole(folder / REPORT, json.dumps(report.to_dict(), indent=1))
    return report
