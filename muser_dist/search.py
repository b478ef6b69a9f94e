"""Search in the Parquet that jobs/embed.py writes: exact, and in bounded memory.

Every query is compared with every embedding, a block of rows at a time.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from muser_dist.config import Modality
from muser_dist.embed.parts import Manifest, Parts, embedding_column
from muser_dist.errors import DataError, require
from muser_dist.evaluate.retrieval import unit_rows

_BLOCK_ROWS = 8192


@dataclass(frozen=True)
class Hit:
    """A row that was found.

    Attributes:
        key: of the row.
        score: cosine to the query.
        metadata: its other columns but the embeddings: shard, row, windows, text and fields.
    """

    key: str
    score: float
    metadata: dict[str, Any]


class Index:
    """A folder of embeddings.

    >>> index = Index.open("embeddings")                                             # doctest: +SKIP
    >>> [hit.key for hit in muser.search("a slow waltz", index, k=5)]                # doctest: +SKIP

    Args:
        parts: the folder.
        block_rows: embeddings that are held at a time.

    Attributes:
        manifest: which model made them, and how.
    """

    def __init__(self, parts: Parts, block_rows: int = _BLOCK_ROWS) -> None:
        self._parts = parts
        self._block_rows = block_rows
        self.manifest = parts.manifest

    @staticmethod
    def open(folder: str | Path, block_rows: int = _BLOCK_ROWS) -> "Index":
        """The index that a folder is.

        Raises:
            DataError: the folder holds no embeddings, or not all of them yet.
        """
        manifest, made_by = Manifest.read(Path(folder))
        parts = Parts(Path(folder), manifest, made_by)
        if missing := parts.missing():
            raise DataError(
                f"{folder} is not complete: {len(missing)} of {manifest.parts} parts are missing or torn, the first is "
                f"{parts.path(missing[0]).name}; the same jobs/embed.py command again makes them"
            )
        return Index(parts, block_rows)

    @property
    def modalities(self) -> tuple[Modality, ...]:
        """What was embedded of each row."""
        return self.manifest.modalities

    def check_model(self, sha256: str) -> None:
        """Raises DataError unless the model of this SHA-256 made the embeddings."""
        if sha256 != self.manifest.model:
            raise DataError(
                f"{self._parts.folder} was embedded with another model (SHA-256 {self.manifest.model[:12]}..., and "
                f"this one is {sha256[:12]}...); load that one, or embed with this one into another folder"
            )

    def search(self, queries: np.ndarray, k: int, modality: Modality | None = None) -> list[list[Hit]]:
        """The k rows of the highest cosine to each query.

        Memory is that of a block of embeddings and of k rows for each query.

        Args:
            queries: (n, dim) real, of any length but zero.
            k: most rows for a query.
            modality: whose embeddings are compared; the first by default.

        Returns:
            for each query its hits, the best first. Scores are rounded to float32; equal ones are in the order of keys,
            then of rows.

        Raises:
            DataError: the index lacks the modality, or queries have other dimensions or are not finite.
        """
        require(k >= 1, f"k is {k}; ask for one row at least")
        modality = modality or self.modalities[0]
        if modality not in self.modalities:
            raise DataError(
                f"{self._parts.folder} has no embeddings of {modality}, only of {', '.join(self.modalities)}"
            )
        if queries.ndim != 2 or queries.shape[1] != self.manifest.dim:
            raise DataError(f"queries are {queries.shape}; the index takes (n, {self.manifest.dim})")
        units = unit_rows(queries, "queries")
        best: list[list[tuple[float, str, int]]] = [[] for _ in units]  # negative score, key, row
        for keys, rows, embeddings in self._blocks(modality):
            # Products of float32 in float64 are exact, and their sums far below float32: so equal embeddings get equal
            # scores, in whatever block they lie.
            scores = (units @ embeddings.astype(np.float64).T).astype(np.float32)
            for found, of_query in zip(best, scores, strict=True):
                least = np.partition(of_query, len(of_query) - k)[len(of_query) - k] if len(of_query) > k else -np.inf
                near = np.flatnonzero(of_query >= least)  # those that tie with the last one too
                found += [(-float(of_query[i]), keys[i], int(rows[i])) for i in near]
                found.sort()
                del found[k:]
        about = self._about(sorted({row for found in best for _, _, row in found}))
        return [[Hit(key, -score, about[row]) for score, key, row in found] for found in best]

    def recommend(self, history: Sequence[str], k: int, modality: Modality | None = None) -> list[Hit]:
        """The rows that are nearest to a listener: to the mean of the unit vectors of what they liked.

        Args:
            history: keys of rows, each of which counts once; none of them is recommended. With one key it is what
                resembles that row.
            k, modality: as of `search`.

        Returns:
            as of `search`.

        Raises:
            DataError: no row of the index has one of the keys, or its embedding; or as of `search`.
        """
        modality = modality or self.modalities[0]
        liked = set(history)
        require(len(liked) > 0, "history is empty; name at least one key")
        known: dict[str, np.ndarray] = {}
        rows = 0  # several may have a key
        for keys, _, embeddings in self._blocks(modality) if modality in self.modalities else ():
            mine = [i for i, key in enumerate(keys) if key in liked]
            known |= {keys[i]: embeddings[i] for i in mine}
            rows += len(mine)
        if missing := sorted(liked - known.keys()):
            raise DataError(
                f"{self._parts.folder} has no {modality} embedding of {', '.join(missing[:3])}"
                f"{f' and {len(missing) - 3} others' if len(missing) > 3 else ''}; keys are those of its column `key`"
            )
        mean = unit_rows(np.stack([known[key] for key in sorted(known)]), "embeddings").mean(axis=0)
        (hits,) = self.search(mean[None], k + rows, modality)
        return [hit for hit in hits if hit.key not in liked][:k]

    def _blocks(self, modality: Modality) -> Iterator[tuple[list[str], np.ndarray, np.ndarray]]:
        """Keys, rows and embeddings (n, dim) of the rows that have one, a block at a time."""
        column = embedding_column(modality)
        for part in range(self.manifest.parts):
            with pq.ParquetFile(self._parts.path(part)) as file:
                for batch in file.iter_batches(self._block_rows, columns=["key", "row", column]):
                    batch = batch.filter(batch.column(column).is_valid())
                    if batch.num_rows:
                        values = batch.column(column).flatten().to_numpy().reshape(batch.num_rows, self.manifest.dim)
                        yield batch.column("key").to_pylist(), batch.column("row").to_numpy(), values

    def _about(self, rows: Sequence[int]) -> dict[int, dict[str, Any]]:
        """The columns of these rows but key and embeddings."""
        told: dict[int, dict[str, Any]] = {}
        embeddings = {embedding_column(modality) for modality in self.modalities}
        names = [name for name in self._parts.schema.names if name not in embeddings | {"key"}]
        for part in sorted({row // self.manifest.part_rows for row in rows}):
            wanted = pa.array([row for row in rows if row // self.manifest.part_rows == part], pa.int64())
            table = pq.read_table(self._parts.path(part), columns=names, filters=[("row", "in", wanted.to_pylist())])
            told |= {row["row"]: row for row in table.to_pylist()}
        return told
