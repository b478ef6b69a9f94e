"""Which rows a run reads, and in which order: shard patterns, row counts, the plan of an epoch.

The order depends on the seed and on the row counts of the sorted shards, never on a URL, so it
is the same from disk and from S3. Any position is found without replaying earlier ones.
"""

import glob
import json
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
from braceexpand import UnbalancedBracesError, braceexpand  # type: ignore[attr-defined]

from muser_dist.data.tar import walk
from muser_dist.errors import DataError
from muser_dist.files import write_whole

SIDECAR = "muser-index.json"
"""File beside the shards that holds their row counts: {"format": 1, "rows": {file name: rows}}."""


def expand(patterns: Iterable[str], setting: str) -> list[str]:
    """The shards that the patterns name, sorted.

    Args:
        patterns: paths or fsspec URLs with braces and globs.
        setting: the option that holds them, for errors.

    Raises:
        DataError: a pattern matches nothing or is malformed; the message names it.
    """
    urls: list[str] = []
    for pattern in patterns:
        try:
            expanded = list(braceexpand(pattern))
        except UnbalancedBracesError:
            raise DataError(f"{setting}: the braces in {pattern!r} are not balanced") from None
        for url in expanded:
            urls.extend(_matches(url, setting))
    return sorted(set(urls))


def _matches(url: str, setting: str) -> list[str]:
    if "://" in url:
        try:
            fs, path = fsspec.core.url_to_fs(url)
            found = [fs.unstrip_protocol(match) for match in fs.glob(path)] if glob.has_magic(path) else [url]
            missing = not found or (found == [url] and not fs.exists(path))
        except (OSError, ValueError, ImportError) as error:
            raise DataError(f"{setting}: {url} cannot be listed: {error}") from None
    else:
        found = glob.glob(url) if glob.has_magic(url) else [url]
        missing = not found or (found == [url] and not Path(url).is_file())
    if not missing:
        # Absolute: tasks read them from other working directories than the job's.
        return [match if "://" in match else os.path.abspath(match) for match in found]
    folder = url.rpartition("/")[0] or "."
    if "://" not in url and not Path(folder).is_dir():
        raise DataError(f"{setting}: {url}: there is no folder {folder}; check the path")
    what = "no shard matches" if glob.has_magic(url) else "the shard is missing"
    raise DataError(f"{setting}: {url}: {what}; check the pattern, or list what is in {folder}")


@dataclass(frozen=True)
class ShardIndex:
    """Sorted shards and the number of samples in each.

    Attributes:
        urls: paths or URLs.
        rows: (shards,) int64.
        problems: by URL, why a shard could not be read to its end when it was counted.
    """

    urls: tuple[str, ...]
    rows: np.ndarray
    problems: dict[str, str]

    @property
    def total(self) -> int:
        """Samples in all shards."""
        return int(self.rows.sum())

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
        return ShardIndex(tuple(urls), np.array(rows, np.int64), content["problems"])


def index_shards(urls: list[str], setting: str, progress: Callable[[int, int], None] | None = None) -> ShardIndex:
    """Row counts out of the sidecar beside the shards where there is one, else out of the tar headers.

    Args:
        urls: sorted shards.
        setting: the option that named them, for errors.
        progress: called with (shards done, shards) while counting.

    Raises:
        DataError: a file is no tar at all. (A shard that breaks off later is counted as far as
            it goes; the break is in `problems`.)
    """
    sidecars = {folder: _read_sidecar(folder) for folder in {_folder(url) for url in urls}}
    known = {url: sidecars[_folder(url)].get(url.rpartition("/")[2]) for url in urls}
    uncounted = [url for url in urls if known[url] is None]
    problems: dict[str, str] = {}
    with ThreadPoolExecutor(8) as pool:
        for done, (url, (rows, problem)) in enumerate(
            zip(uncounted, pool.map(_count, uncounted), strict=True), start=1
        ):
            if problem is not None and rows == 0:
                raise DataError(f"{setting}: {url} {problem}; take it out of the pattern or fetch it again")
            if problem is not None:
                problems[url] = problem
            known[url] = rows
            if progress is not None:
                progress(done, len(uncounted))
    if not any(known.values()):
        raise DataError(f"{setting}: {len(urls)} shards hold no sample at all")
    return ShardIndex(tuple(urls), np.array([known[url] for url in urls], np.int64), problems)


def _folder(url: str) -> str:
    return url.rpartition("/")[0]


def _read_sidecar(folder: str) -> dict[str, int]:
    path = f"{folder}/{SIDECAR}" if folder else SIDECAR
    try:
        with fsspec.open(path, "rb") as file:
            content = json.load(file)
    except OSError:
        return {}  # there is none, or the storage does not say whether there is one
    except ValueError as error:
        raise DataError(f"{path}: broken index ({error}); delete it and it is made anew") from None
    rows = content.get("rows") if isinstance(content, dict) and content.get("format") == 1 else None
    if not isinstance(rows, dict) or not all(isinstance(n, int) and n >= 0 for n in rows.values()):
        raise DataError(f'{path}: is no index of format 1 ({{"format": 1, "rows": {{name: count}}}}); delete it')
    return rows


def _count(url: str) -> tuple[int, str | None]:
    rows = 0
    try:
        with fsspec.open(url, "rb") as file:
            for _ in walk(file):
                rows += 1
    except DataError as error:
        return rows, str(error)
    except OSError as error:
        return 0, f"cannot be read: {error}"
    return rows, None


@dataclass(frozen=True)
class Rows:
    """Rows of a plan, in order; each array is (n,) int64. A padding row is -1 in all of them.

    Attributes:
        epoch: the pass over the data.
        index: number of the row among all rows of the sorted shards.
        shard: position of its shard.
        row: its number in the shard.
    """

    epoch: np.ndarray
    index: np.ndarray
    shard: np.ndarray
    row: np.ndarray


class Plan:
    """The order of rows: an endless stream of shuffled epochs, or one pass in order.

    An epoch is a sequence of windows of permuted shards, with the rows permuted inside each;
    epochs are joined end to end, and each row occurs once in each.
    """

    def __init__(self, shard_rows: np.ndarray, seed: int, window_shards: int, shuffle: bool) -> None:
        self.shard_rows = shard_rows
        self.first = np.concatenate([[0], np.cumsum(shard_rows)])
        self.total = int(self.first[-1])
        self.seed = seed
        self.window_shards = window_shards
        self.shuffle = shuffle
        # Bound to the instance, so that caches of two plans never mix.
        self._epoch = lru_cache(maxsize=2)(self._lay_out_epoch)
        self._window = lru_cache(maxsize=4)(self._permute_window)

    def __reduce__(self) -> tuple[Any, ...]:
        return Plan, (self.shard_rows, self.seed, self.window_shards, self.shuffle)

    def rows(self, start: int, stop: int) -> Rows:
        """The rows at the positions start <= p < stop of the stream; the position is one number.

        Without shuffling the stream ends after one pass, and later positions are padding.
        """
        if not self.shuffle:
            index = np.arange(start, stop)
            index[index >= self.total] = -1
            return self._locate(np.zeros_like(index), index)
        epochs, indices = [], []
        while start < stop:
            epoch, within = divmod(start, self.total)
            _, window_starts = self._epoch(epoch)
            window = int(np.searchsorted(window_starts, within, side="right")) - 1
            permuted = self._window(epoch, window)
            offset = within - int(window_starts[window])
            part = permuted[offset : offset + stop - start]
            indices.append(part)
            epochs.append(np.full(len(part), epoch))
            start += len(part)
        return self._locate(np.concatenate(epochs), np.concatenate(indices))

    def rng(self, epoch: int, index: int) -> np.random.Generator:
        """The source of all random choices for one row in one epoch: crop, template, augmentation."""
        return np.random.default_rng([self.seed, 3, epoch, index])

    def _lay_out_epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Order of the shards, and the position in the epoch at which each window begins."""
        order = np.random.default_rng([self.seed, 1, epoch]).permutation(len(self.shard_rows))
        window_rows = np.add.reduceat(self.shard_rows[order], np.arange(0, len(order), self.window_shards))
        return order, np.concatenate([[0], np.cumsum(window_rows)[:-1]])

    def _permute_window(self, epoch: int, window: int) -> np.ndarray:
        order, _ = self._epoch(epoch)
        shards = order[window * self.window_shards : (window + 1) * self.window_shards]
        indices = np.concatenate([np.arange(self.first[shard], self.first[shard + 1]) for shard in shards])
        return np.random.default_rng([self.seed, 2, epoch, window]).permutation(indices)

    def _locate(self, epoch: np.ndarray, index: np.ndarray) -> Rows:
        padding = index < 0
        shard = np.searchsorted(self.first, index, side="right") - 1
        row = index - self.first[shard]
        for values in (epoch, shard, row):
            values[padding] = -1
        return Rows(epoch, index, shard, row)
