"""Shards whose items get descriptions: what is asked about them, and the same shards with the descriptions in them.

A new shard has the name, keys and members of its source; only the .json members differ. An item without descriptions
stays as it was, and templates leave out what it lacks; one that no job can read is left out. Beside the shards lies,
for each, refined/NAME.json: its counts and its entries of the quarantine.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from pydantic import TypeAdapter, ValidationError

from muser_dist.data.rewriting import identity, open_source, unreadable, write_shard
from muser_dist.data.rows import Row
from muser_dist.data.storage import Storage, redact
from muser_dist.data.tar import Sample, walk
from muser_dist.data.text import read_fields
from muser_dist.errors import DataError
from muser_dist.files import write_whole
from muser_dist.refine.answers import read_descriptions
from muser_dist.refine.ledger import Answers
from muser_dist.refine.prompt import Prompt, Request

RECORDS = "refined"
"""Folder beside the shards with a record of each."""

BATCH = 64
"""Requests that come together."""


@dataclass(frozen=True)
class Record:
    """What became of a shard's rows: read = refined + left + entries of the quarantine.

    Attributes:
        read: rows that the shard holds, or should hold by its index.
        refined: rows that got descriptions.
        left: rows about which nothing was asked yet.
        left_input, left_output: most tokens of what is to be asked about those.
        problems: row, shard, key and reason of each row that got none.
        rows: rows of the new shard.
        content: SHA-256 over the source's identity and the new metadata; "" when no shard was to be written.
    """

    read: int = 0
    refined: int = 0
    left: int = 0
    left_input: int = 0
    left_output: int = 0
    problems: list[dict[str, Any]] = field(default_factory=list)
    rows: int = 0
    content: str = ""


def requests(storage: Storage, url: str, prompt: Prompt) -> Iterator[list[Request | None]]:
    """What is to be asked about the rows of a shard, in order; None about a row that cannot be used.

    A shard that cannot be read, or not to its end, gives no more; `refine_shard` tells.
    """
    batch: list[Request | None] = []
    try:
        with storage.open(url) as file:
            for sample in walk(file):
                try:
                    batch.append(prompt.request(sample.key, _fields(url, sample, file)))
                except DataError:
                    batch.append(None)
                if len(batch) == BATCH:
                    yield batch
                    batch = []
    except (DataError, OSError):
        pass
    if batch:
        yield batch


def refine_shard(
    storage: Storage, url: str, indexed: int, prompt: Prompt, answers: Answers, folder: Path, write: bool = True
) -> Record:
    """Writes a shard with the descriptions that are there, unless just that lies there already.

    Args:
        storage: where the source is read from.
        url: the source.
        indexed: rows that its index counts.
        prompt: makes the requests, whose answers are looked up.
        answers: what came back.
        folder: for the new shard.
        write: whether to write it, or only to count.

    Raises:
        DataError: the source cannot be opened or read.
        OSError: the new shard cannot be written.
    """
    name = Path(url).name
    path, about = folder / name, folder / RECORDS / f"{name}.json"
    shard = redact(url)
    counts = {"refined": 0, "left": 0, "left_input": 0, "left_output": 0}
    problems: list[dict[str, Any]] = []
    copied: list[tuple[Sample, bytes | None]] = []

    def quarantine(row: int, key: str, reason: str) -> None:
        problems.append({"row": row, "shard": shard, "key": key, "reason": reason})

    with open_source(storage, url) as file:
        size = os.fstat(file.fileno()).st_size
        read, end = 0, "the shard holds fewer samples than its index says"
        try:
            for sample in walk(file):
                read += 1
                metadata = None
                whole = all(member.offset + member.size <= size for member in sample.members.values())
                try:
                    if not whole:
                        raise DataError("cut short: the shard ends inside it")
                    fields = _fields(url, sample, file)
                    request = prompt.request(sample.key, fields)
                    answer = answers.get(request.digest)
                    if isinstance(answer, str):
                        raise DataError(answer)
                    if answer is None:
                        counts["left"] += 1
                        counts["left_input"] += request.most_input
                        counts["left_output"] += request.most_output
                    else:
                        metadata = _merged(url, sample, file, read_descriptions(answer, request.language))
                        counts["refined"] += 1
                except DataError as problem:
                    quarantine(sample.index, sample.key, str(problem))
                if whole and sample.problem is None:  # the others are of no use to training either
                    copied.append((sample, metadata))
        except DataError as damage:
            end = f"the shard {damage}"
        except OSError as error:
            raise unreadable(url, error) from None
        for row in range(read, indexed):
            quarantine(row, "", end)
        content = _digest(url, file, copied) if write else ""
        record = Record(max(read, indexed), **counts, problems=problems, rows=len(copied), content=content)
        if write and not (path.exists() and content == read_record(folder, name).content):
            write_shard(path, ((sample, {} if new is None else {"json": new}) for sample, new in copied), file)
        if write:
            about.parent.mkdir(exist_ok=True)
            write_whole(about, json.dumps(asdict(record)))
    return record


def read_record(folder: Path, name: str) -> Record:
    """The record of a shard that was written; an empty one where there is none that can be read."""
    try:
        return TypeAdapter(Record).validate_json((folder / RECORDS / f"{name}.json").read_bytes())
    except (OSError, ValidationError):
        return Record()


def _fields(url: str, sample: Sample, file: BinaryIO) -> dict[str, Any]:
    """The metadata of a sample; raises DataError where it cannot be used."""
    if sample.problem is not None:
        raise DataError(sample.problem)
    row = Row.of(redact(url), sample, file)
    return read_fields(row.read("json"), row.read("txt"))


def _merged(url: str, sample: Sample, file: BinaryIO, descriptions: dict[str, Any]) -> bytes:
    """The .json member with the descriptions in it."""
    metadata = json.loads(Row.of(redact(url), sample, file).read("json") or b"{}")
    return json.dumps(metadata | descriptions).encode()


def _digest(url: str, file: BinaryIO, copied: list[tuple[Sample, bytes | None]]) -> str:
    """Of what the new shard is made from, without reading its sound."""
    digest = hashlib.sha256(json.dumps(identity(url, file)).encode())
    for sample, metadata in copied:
        digest.update(f"\n{sample.offset} ".encode() + (metadata or b""))
    return digest.hexdigest()
