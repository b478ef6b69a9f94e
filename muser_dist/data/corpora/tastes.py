"""Tastes over the metadata of clips: what simulated listeners choose by, and what an oracle knows of them."""

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from muser_dist.data.rows import Row
from muser_dist.data.shards import ShardIndex
from muser_dist.data.storage import Storage, redact
from muser_dist.data.tar import walk
from muser_dist.data.text import normal_form, read_fields
from muser_dist.errors import DataError
from muser_dist.files import write_whole

FIELDS = ("type", "meter", "mode", "instrument", "book")
"""Metadata that tastes are over. A corpus may lack some of them."""

NOTE = "SIMULATED listeners over real clips, drawn from a model (muser_dist/data/corpora/listeners.py): nobody listened"


@dataclass(frozen=True)
class Clips:
    """What listeners choose from, sorted by key.

    Attributes:
        keys: n keys.
        vocabulary: the (field, value) pairs that occur, sorted.
        values: (n, FIELDS) int64, where in the vocabulary the clip's value of each field is; len(vocabulary) if it has
            none.
        problems: why rows of the shards are no clips here.
    """

    keys: list[str]
    vocabulary: list[tuple[str, str]]
    values: np.ndarray
    problems: list[str]

    @staticmethod
    def of(metadata: Mapping[str, Mapping[str, Any]], problems: Sequence[str] = ()) -> "Clips":
        """Clips out of their metadata fields, by key; letter case and spacing of values do not matter.

        Raises:
            DataError: no clip has any of FIELDS.
        """
        keys = sorted(metadata)
        said = [
            {name: normal_form(value) for name in FIELDS if isinstance(value := metadata[key].get(name), str)}
            for key in keys
        ]
        vocabulary = sorted({pair for values in said for pair in values.items()})
        if not vocabulary:
            found = sorted({name for fields in metadata.values() for name in fields})[:20]
            raise DataError(
                f"none of the {len(keys)} clips has any of the fields that tastes are over ({', '.join(FIELDS)}); "
                f"their metadata holds {', '.join(found) or 'nothing'}"
            )
        place = {pair: i for i, pair in enumerate(vocabulary)}
        values = np.array([[place.get((name, of.get(name, "")), len(vocabulary)) for name in FIELDS] for of in said])
        return Clips(keys, vocabulary, values, list(problems))


def read_clips(storage: Storage, index: ShardIndex, progress: Callable[[int, int], None] | None = None) -> Clips:
    """The clips of some shards, by their .json members.

    Args:
        storage: where the shards are read from.
        index: the shards.
        progress: called with (shards done, shards).

    Raises:
        DataError: a shard cannot be read, two clips share a key, or no clip has any of FIELDS. A row without usable
            metadata is in `problems`.
    """
    metadata: dict[str, dict[str, Any]] = {}
    shard_of: dict[str, str] = {}
    problems = []
    for number, (url, rows) in enumerate(zip(index.urls, index.rows.tolist(), strict=True)):
        name = redact(url)
        try:
            with storage.open(url) as file:
                for sample in islice(walk(file), rows):
                    row = Row.of(name, sample, file)
                    try:
                        if row.problem is not None:
                            raise DataError(row.problem)
                        if (member := row.read("json")) is None:
                            raise DataError("no .json member")
                        fields = read_fields(member, None)
                    except DataError as error:
                        problems.append(f"{name}: {row.key}: {error}")
                        continue
                    if row.key in metadata:
                        raise DataError(
                            f"holds the key {row.key!r}, as {shard_of[row.key]} does; a log names clips by their keys, "
                            "so give shards in which each occurs once"
                        )
                    metadata[row.key], shard_of[row.key] = fields, name
        except DataError as error:
            raise DataError(f"{name} {error}") from None
        except OSError as error:
            raise DataError(f"{name} cannot be read: {error.strerror or error}") from None
        if progress is not None:
            progress(number + 1, len(index))
    return Clips.of(metadata, problems)


@dataclass(frozen=True)
class Truth:
    """What an oracle knows: every listener's tastes at the middle of the test period.

    Attributes:
        users: U names, as in the log.
        items: n keys, sorted.
        values: (n, FIELDS) int64, as of `Clips`.
        tastes: (U, 2, V) float64, the weight that each taste gives to each value of the vocabulary.
        shares: (U, 2) float64, the share of the sessions that keep to each taste.
        popularity: (n,) float64, rank^-exponent.
        cold: (n,) bool, released with the test period.
    """

    users: list[str]
    items: list[str]
    values: np.ndarray
    tastes: np.ndarray
    shares: np.ndarray
    popularity: np.ndarray
    cold: np.ndarray

    def affinity(self, users: np.ndarray) -> np.ndarray:
        """log of how much likelier than by popularity alone some listeners are to choose each clip, noise apart.

        A listener chooses clip i with probability popularity_i sum_k share_k exp(a_ki) / sum_j popularity_j exp(a_kj);
        its first factor is left out here, because what nobody has heard yet has no popularity to know.

        Args:
            users: (u,) integers, places in `users`.

        Returns:
            (u, n) float64.
        """
        likelihood = np.exp(appeal(self.tastes[users], self.values))
        ratio = likelihood / (likelihood @ self.popularity)[..., None]
        return np.log((self.shares[users][..., None] * ratio).sum(axis=1))

    def save(self, path: Path) -> None:
        """Writes a NumPy archive, whole or not at all."""
        content = asdict(self) | {"users": np.array(self.users), "items": np.array(self.items), "note": np.array(NOTE)}
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **content)
        write_whole(path, buffer.getvalue())

    @staticmethod
    def load(path: Path) -> "Truth":
        """What `save` wrote.

        Raises:
            DataError: the file cannot be read.
        """
        names = ("values", "tastes", "shares", "popularity", "cold")
        try:
            with np.load(path, allow_pickle=False) as archive:
                arrays = {name: archive[name] for name in names}
                return Truth(archive["users"].tolist(), archive["items"].tolist(), **arrays)
        except (OSError, ValueError, KeyError, EOFError, BadZipFile) as error:
            raise DataError(f"{path}: no truth of simulated listeners (jobs/make_listeners.py): {error}") from None


def appeal(weights: np.ndarray, values: np.ndarray) -> np.ndarray:
    """How much clips appeal to tastes: the sums of the weights of their values.

    Args:
        weights: (..., V), of each value of the vocabulary.
        values: (n, FIELDS) int64, as of `Clips`.

    Returns:
        (..., n) float64.
    """
    padded = np.concatenate([weights, np.zeros((*weights.shape[:-1], 1))], axis=-1)
    total = np.zeros((*weights.shape[:-1], len(values)))
    for of_field in values.T:
        total += padded[..., of_field]
    return total
