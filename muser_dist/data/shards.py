"""The shards of a source and the number of samples in each."""

import json
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from muser_dist.data.storage import Storage, redact
from muser_dist.data.tar import walk
from muser_dist.errors import DataError
from muser_dist.files import write_whole

SIDECAR = "muser-index.json"
"""File beside the shards that holds their row counts: {"format": 1, "rows": {file name: rows}}."""


class ShardIndex:
    """Sorted shards and the number of samples in each.

    Kept in arrays, so that a million shards travel to decoding tasks without being copied.

    Args:
        urls: paths or URLs.
        rows: (shards,) int64.
        problems: by URL, why a shard could not be read to its end when it was counted.
    """

    def __init__(self, urls: "list[str] | tuple[str, ...] | np.ndarray", rows: np.ndarray, problems: dict[str, str]):
        self._urls = urls if isinstance(urls, np.ndarray) else np.array([os.fsencode(url) for url in urls])
        self.rows = rows
        self.problems = problems

    def __len__(self) -> int:
        return len(self._urls)

    def url(self, shard: int) -> str:
        """Path or URL of a shard."""
        return os.fsdecode(self._urls[shard])

    @property
    def urls(self) -> list[str]:
        """All paths or URLs."""
        return [os.fsdecode(url) for url in self._urls]

    @property
    def total(self) -> int:
        """Samples in all shards."""
        return int(self.rows.sum())

    @staticmethod
    def join(indices: "list[ShardIndex]") -> "ShardIndex":
        """The shards of several sources, one after the other."""
        problems = {url: problem for index in indices for url, problem in index.problems.items()}
        return ShardIndex(
            np.concatenate([index._urls for index in indices]),
            np.concatenate([index.rows for index in indices]),
            problems,
        )

    def save(self, path: Path) -> None:
        """Writes the index as JSON."""
        content = {
            "format": 1,
            "shards": list(zip(self.urls, self.rows.tolist(), strict=True)),
            "problems": self.problems,
        }
        write_whole(path, json.dumps(content))

    @staticmethod
    def load(path: Path) -> "ShardIndex":
        """Reads what `save` wrote."""
        try:
            content = json.loads(path.read_text())
            urls, rows = zip(*content["shards"], strict=True)
        except (ValueError, KeyError) as error:
            raise DataError(f"{path} is broken ({error}); delete it and rows are counted anew") from None
        return ShardIndex(urls, np.array(rows, np.int64), content["problems"])


def index_shards(
    storage: Storage, urls: list[str], setting: str, progress: Callable[[int, int], None] | None = None
) -> ShardIndex:
    """Row counts out of the sidecar beside the shards where there is one, else out of the tar headers.

    Args:
        storage: where they are read from.
        urls: sorted shards.
        setting: the option that named them, for errors.
        progress: called with (shards done, shards) while counting.

    Raises:
        DataError: a file is no tar at all. (A shard that breaks off later is counted as far as
            it goes; the break is in `problems`.)
    """
    sidecars = {folder: read_sidecar(storage, folder) for folder in {_folder(url) for url in urls}}
    known = {url: sidecars[_folder(url)].get(url.rpartition("/")[2]) for url in urls}
    uncounted = [url for url in urls if known[url] is None]
    problems: dict[str, str] = {}
    with ThreadPoolExecutor(8) as pool:
        counts = pool.map(lambda url: _count(storage, url), uncounted)
        for done, (url, (rows, problem)) in enumerate(zip(uncounted, counts, strict=True), start=1):
            if problem is not None and rows == 0:
                pool.shutdown(wait=False, cancel_futures=True)  # the others need not be counted to say so
                raise DataError(f"{setting}: {redact(url)} {problem}; take it out of the pattern or fetch it again")
            if problem is not None:
                problems[url] = problem
            known[url] = rows
            if progress is not None:
                progress(done, len(uncounted))
    if not any(known.values()):
        raise DataError(f"{setting}: {len(urls)} shards hold no sample at all")
    return ShardIndex(urls, np.array([known[url] for url in urls], np.int64), problems)


def shard_versions(storage: Storage, index: ShardIndex) -> list[list[str]]:
    """What tells each shard, or file, from other versions of it: `Storage.version`, whose errors it raises."""
    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(storage.version, index.urls))


def _folder(url: str) -> str:
    return url.rpartition("/")[0]


def read_sidecar(storage: Storage, folder: str) -> dict[str, int]:
    """The row counts by file name that lie beside the shards of a folder; empty where there are none.

    Raises:
        DataError: the file is broken.
    """
    path = f"{folder}/{SIDECAR}" if folder else SIDECAR
    content = storage.read(path)
    if content is None:
        return {}
    try:
        values = json.loads(content)
    except ValueError as error:
        raise DataError(f"{path}: broken index ({error}); delete it and it is made anew") from None
    rows = values.get("rows") if isinstance(values, dict) and values.get("format") == 1 else None
    if not isinstance(rows, dict) or not all(isinstance(n, int) and n >= 0 for n in rows.values()):
        raise DataError(f'{path}: is no index of format 1 ({{"format": 1, "rows": {{name: count}}}}); delete it')
    return rows


def _count(storage: Storage, url: str) -> tuple[int, str | None]:
    rows = 0
    try:
        with storage.open(url) as file:
            for _ in walk(file):
                rows += 1
    except DataError as error:
        return rows, str(error)
    except OSError as error:
        return 0, f"cannot be read: {error}"
    return rows, None
