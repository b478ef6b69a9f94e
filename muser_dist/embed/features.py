"""Shards with features: the same shards with a tower's outputs for consecutive windows of each clip, as KEY.npy.

Keys and other members stay. A row that cannot be heard has no features, not even another network's; one that no job
can read (cut short, with an unsafe name or one that comes twice) is left out; the reasons are in the quarantine. In the
folder lie, beside the shards, features.json (whose features they are), features/NAME.json (what became of a shard's
rows), quarantine.jsonl, and the shards' index. Read = with features + entries of the quarantine.
"""

import hashlib
import io
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from pydantic import TypeAdapter, ValidationError

from muser_dist.config import Modality
from muser_dist.data.decoder import decoder
from muser_dist.data.features import EXTENSION, to_float16
from muser_dist.data.rewriting import check_names, identity, on_ray, open_source, unreadable, write_shard
from muser_dist.data.rows import Row
from muser_dist.data.shards import SIDECAR, ShardIndex
from muser_dist.data.storage import Storage, redact
from muser_dist.data.tar import Sample, walk
from muser_dist.errors import ConfigError, DataError, UnreadError
from muser_dist.files import alone_in, remove_parts, write_whole
from muser_dist.muser import Muser

MANIFEST, RECORDS, QUARANTINE = "features.json", "features", "quarantine.jsonl"

GPU_SHARE = 0.25
"""Of a GPU for a task: while one encodes, others decode."""


@dataclass(frozen=True)
class Source:
    """Whose features they are.

    Attributes:
        model: its `Muser.sha256`.
        modality: the tower that hears.
        size: values of a window.
        sample_rate, seconds, pad: of a window.
        shards: SHA-256 over the shards' names and their numbers of rows.
    """

    model: str
    modality: Modality
    size: int
    sample_rate: int
    seconds: float
    pad: str
    shards: str

    @staticmethod
    def of(muser: Muser, modality: Modality, index: ShardIndex) -> "Source":
        """That of a model's tower, for some shards."""
        names = [[redact(url), rows] for url, rows in zip(index.urls, index.rows.tolist(), strict=True)]
        width: int = muser.model.towers[modality].width  # type: ignore[assignment]
        shards = hashlib.sha256(json.dumps(names).encode()).hexdigest()
        data = muser.config.data
        return Source(muser.sha256, modality, width, data.sample_rate, data.crop_seconds, data.pad, shards)


@dataclass(frozen=True)
class Record:
    """What became of a shard's rows: read = made + entries of the quarantine.

    Attributes:
        read: rows that the shard holds, or should hold by its index.
        made: rows that got features.
        rows: rows of the new shard.
        problems: row, shard, key and reason of each row that got none.
        content: SHA-256 over the features' and the source's identity.
    """

    read: int
    made: int
    rows: int
    problems: list[dict[str, Any]] = field(default_factory=list)
    content: str = ""


def claim(folder: Path, source: Source, made_by: dict[str, Any]) -> None:
    """Makes a folder this job's.

    Raises:
        ConfigError: it cannot be written.
        DataError: it is another job's.
    """
    path = folder / MANIFEST
    mine = asdict(source)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            if strangers := sorted(folder.glob("*.tar")):
                raise DataError(f"{strangers[0]} was there before; give another --out")
            write_whole(path, json.dumps({"format": 1, "content": mine, "made_by": made_by}, indent=1))
        there = json.loads(path.read_text())["content"]
        changed = [f"{n}: {there.get(n)!r} there, {value!r} here" for n, value in mine.items() if there.get(n) != value]
    except OSError as error:
        raise ConfigError(f"--out: cannot write to {folder} ({error.strerror}); give another") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path} is broken ({error}); give another --out") from None
    if changed:
        raise DataError(f"{folder} holds other features ({'; '.join(changed)}); give another --out")


def write_features(
    load: Callable[[], Muser], source: Source, storage: Storage, url: str, indexed: int, folder: Path
) -> Record:
    """Writes a shard with features, unless just that lies there already.

    Args:
        load: gives the model, where it is needed.
        source: whose features they are.
        storage: where the shard is read from.
        url: the shard.
        indexed: rows that its index counts.
        folder: for the new shard.

    Raises:
        DataError: the shard cannot be opened or read, or the model is another one.
        OSError: the new shard cannot be written.
    """
    name = Path(url).name
    path, about = folder / name, folder / RECORDS / f"{name}.json"
    with open_source(storage, url) as file:
        identified = json.dumps([asdict(source), indexed, identity(url, file)])
        content = hashlib.sha256(identified.encode()).hexdigest()
        there = _read_record(about)
        if there is not None and there.content == content and path.exists():
            return there
        size = file.seek(0, io.SEEK_END)
        samples: list[Sample] = []
        problems: dict[int, str] = {}
        end = "the shard holds fewer samples than its index says"
        file.seek(0)
        try:
            for sample in walk(file):
                samples.append(sample)
                if any(member.offset + member.size > size for member in sample.members.values()):
                    problems[sample.index] = "cut short: the shard ends inside it"
                elif sample.problem is not None:
                    problems[sample.index] = sample.problem
        except DataError as damage:
            end = f"the shard {damage}"
        except OSError as error:
            raise unreadable(url, error) from None
        usable = [sample for sample in samples if sample.index not in problems]  # others are of no use to training
        features = _features(load(), source.modality, url, usable, file, problems)
        keys = dict(enumerate(sample.key for sample in samples))
        problems |= dict.fromkeys(range(len(samples), indexed), end)
        told = [
            {"row": row, "shard": redact(url), "key": keys.get(row, ""), "reason": problems[row]}
            for row in sorted(problems)
        ]
        record = Record(max(len(samples), indexed), len(features), len(usable), told, content)
        write_shard(path, ((sample, {EXTENSION: features.get(sample.index)}) for sample in usable), file)
    about.parent.mkdir(exist_ok=True)
    write_whole(about, json.dumps(asdict(record)))
    return record


def _features(
    muser: Muser, modality: Modality, url: str, samples: list[Sample], file: BinaryIO, problems: dict[int, str]
) -> dict[int, bytes]:
    """By number of the sample what its member holds; what cannot be heard is added to the problems.

    All are held at a time: they are a small part of the sound that they are made of.
    """

    def windows() -> Iterator[tuple[int, np.ndarray, int]]:
        for sample in samples:
            try:
                row = Row.of(redact(url), sample, file)
                if row.problem is not None:
                    raise DataError(row.problem)
                for waveform, length in decoder(muser.config.data).windows(row.sound(), None):
                    yield sample.index, waveform, length
            except UnreadError as error:
                raise unreadable(url, error) from None
            except DataError as error:
                problems[sample.index] = str(error)

    made: dict[int, list[np.ndarray]] = {}
    heard = windows()
    while batch := list(islice(heard, muser.window_batch)):
        numbers, waveforms, lengths = zip(*batch, strict=True)
        arrays = {"audio": np.stack(waveforms), "audio_length": np.array(lengths, np.int32)}
        for number, values in zip(numbers, muser.encode_chunk(modality, arrays)[1], strict=True):
            made.setdefault(number, []).append(values)
    written = {}
    for number in made.keys() - problems.keys():  # some windows may have come before a clip broke off
        buffer = io.BytesIO()
        try:
            np.save(buffer, to_float16(np.stack(made[number])), allow_pickle=False)
        except DataError as error:
            problems[number] = str(error)
        else:
            written[number] = buffer.getvalue()
    return written


def _read_record(path: Path) -> Record | None:
    try:
        return TypeAdapter(Record).validate_json(path.read_bytes())
    except (OSError, ValidationError):
        return None


def make_features(
    model: Path,
    muser: Muser,
    modality: Modality,
    index: ShardIndex,
    storage: Storage,
    folder: Path,
    gpu: bool,
    made_by: dict[str, Any],
    progress: Callable[[int, int], None],
) -> tuple[int, int]:
    """Writes all shards with features, on Ray: a task decodes and encodes a shard, and writes it.

    Args:
        model: folder of the exported model; every node must see it, the shards, and `folder`.
        muser: that model.
        modality: the tower that hears.
        index: the shards and how many rows they hold.
        storage: where they are read from.
        folder: for the new shards. What is there whole of them stays.
        gpu: encodes on the cluster's GPUs.
        made_by: command, commit and versions.
        progress: called with (rows done, rows).

    Returns:
        how many rows have features, and entries of the quarantine.

    Raises:
        ClusterError: no cluster answers, its nodes die, or it has no GPU.
        ConfigError: the folder cannot be written, or the new shards would overwrite others.
        DataError: it is another job's, or one works in it; or as `write_features`.
    """
    from muser_dist.data.session import connected  # importing Ray takes seconds
    from muser_dist.embed.job import load_model

    source = Source.of(muser, modality, index)
    device, total, place = "cuda" if gpu else "cpu", index.total, str(model)

    def work(shard: int) -> Iterator[str]:
        try:
            record = write_features(
                lambda: load_model(place, source.model, device),
                source,
                storage,
                index.url(shard),
                int(index.rows[shard]),
                folder,
            )
        except OSError as error:
            raise DataError(f"--out: cannot write {Path(index.url(shard)).name} to {folder} ({error})") from None
        yield json.dumps([shard, asdict(record)])

    records: dict[int, Record] = {}
    check_names(index, folder)  # else the lock would lie among the shards
    with alone_in(folder):
        claim(folder, source, made_by)
        remove_parts(folder)
        with connected():
            progress(0, total)
            for made in on_ray(len(index), work, GPU_SHARE if gpu else 0.0):
                shard, record = json.loads(made)
                records[shard] = TypeAdapter(Record).validate_python(record)
                progress(sum(int(index.rows[done]) for done in records), total)
        assert sorted(records) == list(range(len(index))), "a shard is missing"
        problems = [problem for shard in sorted(records) for problem in records[shard].problems]
        write_whole(folder / QUARANTINE, "".join(json.dumps(problem) + "\n" for problem in problems))
        rows = {Path(index.url(shard)).name: records[shard].rows for shard in sorted(records)}
        write_whole(folder / SIDECAR, json.dumps({"format": 1, "rows": rows}, indent=1))
    made_rows = sum(record.made for record in records.values())
    assert sum(record.read for record in records.values()) == made_rows + len(problems)
    return made_rows, len(problems)
