"""What a set of shards holds, row by row, in arrays small enough for millions of rows."""

import hashlib
import os
import re
import signal
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from typing import Any

import numpy as np

from muser_dist.data import fingerprint
from muser_dist.data.config import DataConfig
from muser_dist.data.decoder import Crop, decoder
from muser_dist.data.leakage import file_id, title_id
from muser_dist.data.rows import Row, RowReader
from muser_dist.data.shards import ShardIndex, read_sidecar
from muser_dist.data.storage import Storage
from muser_dist.data.symbolic.members import is_notation
from muser_dist.data.tar import walk
from muser_dist.data.text import TextPolicy, check_templates, read_fields, text_id
from muser_dist.errors import DataError

_EXCERPT = DataConfig(sample_rate=fingerprint.RATE, crop_seconds=fingerprint.SECONDS)


@dataclass(frozen=True)
class Problem:
    """Rows that cannot be used for one reason, and the first of them."""

    rows: int
    row: int
    reason: str


@dataclass(frozen=True)
class Catalogue:
    """What was found in the shards and in the rows that were looked at, n in all.

    A row takes 36 bytes, 16 for each value of its metadata, and 4 for each 23 ms of the excerpt that
    its fingerprint is of: 2 KiB at most. Joining the shards takes that twice for a moment.

    Attributes:
        storage: where the shards are read from.
        urls: the shards.
        samples: (shards,) int64, by their headers.
        looked: (shards,) int64, rows looked at: the first ones of each shard.
        indexed: rows by the index beside each shard; None where there is none.
        damage: why each shard could not be read to its end; None where it could.
        bytes: size of all shards.
        formats: rows by extension and by what their headers say: (extension, Hz, channels).
        notation: rows by extension of a member that holds notation; what is in it is not looked at.
        problems: by kind of reason.
        usable: rows with text, and audio that can be decoded or notation.
        seconds: (n,) float32, length by the header; NaN where it is not known.
        file, title, text: (n,) int64, ids of the encoded audio, of title and artist, and of the facts
            that the first template states; -1 where the row has none.
        prints: (words,) uint32, the rows' fingerprints.
        ends: (n,) int64, where each of them ends.
        fields: by name, (entries, 2) int64: a row, and an id of a value that it has there. A list
            has several; an object {language: value} is the fields "name[language]".
    """

    storage: Storage
    urls: list[str]
    samples: np.ndarray
    looked: np.ndarray
    indexed: list[int | None]
    damage: list[str | None]
    bytes: int
    formats: Counter[tuple[str, int, int]]
    notation: Counter[str]
    problems: dict[str, Problem]
    usable: int
    seconds: np.ndarray
    file: np.ndarray
    title: np.ndarray
    text: np.ndarray
    prints: np.ndarray
    ends: np.ndarray
    fields: dict[str, np.ndarray]

    def row(self, number: int) -> Row:
        """A row that was looked at, by its number in the arrays."""
        ends = np.cumsum(self.looked)
        shard = int(np.searchsorted(ends, number, side="right"))
        reader = RowReader(ShardIndex(self.urls, self.samples, {}), self.storage)
        return reader.row(shard, number - int(ends[shard] - self.looked[shard]))

    @staticmethod
    def join(parts: "Sequence[Catalogue]") -> "Catalogue":
        """The catalogue of several, one after the other; at least one."""
        problems: dict[str, Problem] = {}
        fields: dict[str, list[np.ndarray]] = {}
        rows = words = 0
        ends = []
        for part in parts:
            for kind, new in part.problems.items():
                old = problems.get(kind, Problem(0, rows + new.row, new.reason))
                problems[kind] = Problem(old.rows + new.rows, old.row, old.reason)
            for name, table in part.fields.items():
                fields.setdefault(name, []).append(table + np.array([rows, 0]))
            ends.append(part.ends + words)
            rows += len(part.ends)
            words += len(part.prints)
        arrays = ("samples", "looked", "seconds", "file", "title", "text", "prints")
        return Catalogue(
            storage=parts[0].storage,
            urls=[url for part in parts for url in part.urls],
            indexed=[count for part in parts for count in part.indexed],
            damage=[damage for part in parts for damage in part.damage],
            bytes=sum(part.bytes for part in parts),
            formats=sum((part.formats for part in parts), Counter()),
            notation=sum((part.notation for part in parts), Counter()),
            problems=problems,
            usable=sum(part.usable for part in parts),
            ends=np.concatenate(ends),
            fields={name: np.concatenate(tables) for name, tables in fields.items()},
            **{name: np.concatenate([getattr(part, name) for part in parts]) for name in arrays},
        )


def scan(
    storage: Storage,
    urls: list[str],
    templates: tuple[str, ...],
    rows: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Catalogue:
    """Looks at the rows of shards, on all cores of this machine.

    The processes import the main module, which must guard what it does by `__name__ == "__main__"`.

    Args:
        storage: where they are read from.
        urls: the shards; at least one.
        templates: sentences over the fields, of which the first that a row can say is its text.
        rows: about how many rows to look at, the first ones of each shard; all when None.
        progress: called with (shards done, shards).

    Raises:
        DataError: an index beside the shards is broken, or a process died. What is wrong with a
            shard or a row is in the catalogue.
        ConfigError: a template is malformed.
    """
    check_templates(templates, "templates")
    sidecars = {folder: read_sidecar(storage, folder) for folder in {url.rpartition("/")[0] for url in urls}}
    policy = TextPolicy(DataConfig(templates=templates), templates)
    most = None if rows is None else -(-rows // len(urls))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    # Ctrl-C is for this process. Spawned, because remote storage reads in threads, which no fork survives.
    deaf = partial(signal.signal, signal.SIGINT, signal.SIG_IGN)
    workers = min(cores, len(urls))
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=deaf) as pool:
        jobs = []
        for url in urls:
            folder, _, name = url.rpartition("/")
            jobs.append(pool.submit(_scan_shard, storage, url, sidecars[folder].get(name), policy, most))
        try:
            for done, job in enumerate(as_completed(jobs), start=1):
                job.result()
                if progress is not None:
                    progress(done, len(urls))
        except BrokenProcessPool:
            raise DataError("a process that looked at shards died; watch the memory, or look at fewer rows") from None
        finally:
            pool.shutdown(cancel_futures=True)
    return Catalogue.join([job.result() for job in jobs])


def _scan_shard(storage: Storage, url: str, indexed: int | None, policy: TextPolicy, most: int | None) -> Catalogue:
    samples, size, damage = 0, 0, None
    try:
        with storage.open(url) as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(0)
            for _ in walk(file):  # one at a time: the samples before a damage count
                samples += 1
    except DataError as error:
        damage = str(error)
    except OSError as error:
        damage = f"cannot be read: {error.strerror or error}"
    looked = samples if most is None else min(samples, most)
    reader = RowReader(ShardIndex([url], np.array([samples]), {}), storage)
    found = _Found()
    for number in range(looked):
        found.add(reader.row(0, number), policy)
    return Catalogue(
        storage=storage,
        urls=[url],
        samples=np.array([samples], np.int64),
        looked=np.array([looked], np.int64),
        indexed=[indexed],
        damage=[damage],
        bytes=size,
        formats=found.formats,
        notation=found.notation,
        problems=found.problems,
        usable=found.usable,
        seconds=np.array(found.seconds, np.float32),
        file=np.array(found.file, np.int64),
        title=np.array(found.title, np.int64),
        text=np.array(found.text, np.int64),
        prints=np.concatenate([np.zeros(0, np.uint32), *found.prints]),
        ends=np.cumsum([len(words) for words in found.prints], dtype=np.int64),
        fields={name: np.array(entries, np.int64) for name, entries in found.fields.items()},
    )


class _Found:
    """Rows of one shard, as lists."""

    def __init__(self) -> None:
        self.formats: Counter[tuple[str, int, int]] = Counter()
        self.notation: Counter[str] = Counter()
        self.problems: dict[str, Problem] = {}
        self.usable = 0
        self.seconds: list[float] = []
        self.file: list[int] = []
        self.title: list[int] = []
        self.text: list[int] = []
        self.prints: list[np.ndarray] = []
        self.fields: dict[str, list[tuple[int, int]]] = {}

    def add(self, row: Row, policy: TextPolicy) -> None:
        """Looks at the next row."""
        self.seconds.append(float("nan"))
        self.prints.append(np.zeros(0, np.uint32))
        for ids in (self.file, self.title, self.text):
            ids.append(-1)
        if row.problem is not None:
            self._report(row.problem)
            return
        written = [extension for extension in row.extensions if is_notation(f".{extension}")]
        self.notation.update(written)
        heard = stated = False
        if row.audio or not written:
            try:
                self._hear(row)
                heard = True
            except (DataError, OSError) as error:
                self._report(str(error))
        try:
            self._read(row, policy)
            stated = True
        except (DataError, OSError) as error:
            self._report(str(error))
        self.usable += stated and (heard or bool(written))

    def _hear(self, row: Row) -> None:
        isolated = decoder(_EXCERPT)
        sound = row.sound()
        self.file[-1] = file_id(sound)
        rate, channels, self.seconds[-1] = isolated.probe(sound)
        self.formats[row.audio or "", rate, channels] += 1
        waveform = np.zeros((1, _EXCERPT.crop_samples), np.int16)
        decoded = isolated.decode({0: Crop(sound, 0.5, None)}, waveform)[0]
        if isinstance(decoded, DataError):
            raise decoded
        self.prints[-1] = fingerprint.fingerprint(waveform[0, : decoded.length])

    def _read(self, row: Row, policy: TextPolicy) -> None:
        metadata, text = row.read("json"), row.read("txt")
        if metadata is None and text is None:
            raise DataError("no .json and no .txt member")
        values = read_fields(metadata, text)
        number = len(self.file) - 1
        for name, value in entries(values):
            self.fields.setdefault(name, []).append((number, value_id(value)))
        self.title[-1] = next(iter(title_id(values)), -1)
        _, facts = policy.say(values, None)
        self.text[-1] = text_id(facts)

    def _report(self, reason: str) -> None:
        # What is particular to a row would make a kind of each: names, and what follows the general words.
        kind = re.split(r"[:;(]", re.sub(r"'[^']*'|\"[^\"]*\"", "…", reason))[0].strip()
        number = len(self.file) - 1
        old = self.problems.get(kind, Problem(0, number, reason))
        self.problems[kind] = Problem(old.rows + 1, old.row, old.reason)


def entries(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yields name and value of all that the fields of a row hold, as `Catalogue.fields` counts them."""
    for name, value in values.items():
        named = {f"{name}[{key}]": inner for key, inner in value.items()} if isinstance(value, dict) else {name: value}
        for label, inner in named.items():
            label = label.encode(errors="replace").decode()  # JSON may hold half a surrogate pair
            for single in dict.fromkeys(inner if isinstance(inner, list) else [inner]):
                yield label, " ".join(single.split())


def value_id(value: str) -> int:
    """An id in [0, 2^63) of a field's value."""
    return int.from_bytes(hashlib.blake2b(value.encode(), digest_size=8).digest(), "big") >> 1
