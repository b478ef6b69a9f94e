"""Which row comes when: the plan of an epoch, and how several sources share a global batch.

The order depends on the seed and on the row counts of the sorted shards, never on a URL, so it is
the same from disk and from S3. Any position is found without replaying earlier ones.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from fractions import Fraction
from functools import lru_cache
from typing import Any

import numpy as np

from muser_dist.data.partners import Partners
from muser_dist.errors import ConfigError


@dataclass(frozen=True)
class Rows:
    """Rows of a plan, in order; each array is (n,) int64. A padding row is -1 in all of them.

    Attributes:
        epoch: the pass over the source.
        index: number of the row among all rows of the sorted shards of all sources.
        source: number of the source.
        shard: position of its shard among the shards of all sources.
        row: its number in the shard.
    """

    epoch: np.ndarray
    index: np.ndarray
    source: np.ndarray
    shard: np.ndarray
    row: np.ndarray

    @staticmethod
    def padding(count: int) -> "Rows":
        """Rows that are none."""
        return Rows(*(np.full(count, -1) for _ in range(5)))


class Epochs:
    """The order of one source's rows: an endless stream of shuffled epochs, or one pass in order.

    An epoch is a sequence of windows of permuted shards, with the rows permuted inside each;
    epochs are joined end to end, and each row occurs once in each.

    With a share below 1 an epoch holds that share of the rows alone, always the same ones: the first of a random
    order of each shard's rows, so that a larger share holds those of a smaller one (but for rounding, which is
    evened out over the shards).

    Args:
        shard_rows: (shards,) int64, the rows of each shard.
        seed: decides the order.
        source: number of the source; two sources of the same size have different orders.
        window_shards: shards in a window.
        shuffle: whether the order is shuffled, and endless.
        share: of the rows that epochs hold, where they are shuffled.
        partners: where given, only rows that have one are in epochs, or that share of them.
        before: shards and rows of the sources before this one, by which `partners` counts.

    Attributes:
        total: rows in all shards.
        length: rows in an epoch; 0 where none has a partner.
    """

    def __init__(
        self,
        shard_rows: np.ndarray,
        seed: int,
        source: int,
        window_shards: int,
        shuffle: bool,
        share: float = 1.0,
        partners: Partners | None = None,
        before: tuple[int, int] = (0, 0),
    ) -> None:
        self.first = np.concatenate([[0], np.cumsum(shard_rows)])
        self.total = int(self.first[-1])
        self.partners, self.rows_before = partners, before[1]
        there = shard_rows
        if partners is not None:
            there = partners.triggers[before[0] : before[0] + len(shard_rows)]
        # By shards' ends, not by shards: of many small ones each would round to nothing.
        p, q = Fraction(str(share)).as_integer_ratio()
        ends = [0, *np.cumsum(there).tolist()]
        self.kept = there if p == q else np.diff([-(-end * p // q) for end in ends])
        self.length = int(self.kept.sum())
        self.seed = seed
        self.source = source
        self.window_shards = window_shards
        self.shuffle = shuffle
        # Bound to the instance, so that caches of two plans never mix.
        self._epoch = lru_cache(maxsize=2)(self._lay_out_epoch)
        self._window = lru_cache(maxsize=4)(self._permute_window)
        self._lead = lru_cache(maxsize=4096)(self._first_row)

    def at(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Epoch and row number at the positions start <= p < stop of the stream; -1 after its end.

        The position is one number. Without shuffling the stream ends after one pass.
        """
        if not self.shuffle:
            index = np.arange(start, stop)
            return np.where(index < self.total, 0, -1), np.where(index < self.total, index, -1)
        epochs, indices = [], []
        while start < stop:
            epoch, within = divmod(start, self.length)
            _, window_starts = self._epoch(epoch)
            window = int(np.searchsorted(window_starts, within, side="right")) - 1
            permuted = self._window(epoch, window)
            offset = within - int(window_starts[window])
            part = permuted[offset : offset + stop - start]
            indices.append(part)
            epochs.append(np.full(len(part), epoch))
            start += len(part)
        return np.concatenate(epochs or [np.zeros(0, int)]), np.concatenate(indices or [np.zeros(0, int)])

    def _lay_out_epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Order of the shards, and the position in the epoch at which each window begins."""
        order = np.random.default_rng([self.seed, 10 * self.source + 1, epoch]).permutation(len(self.kept))
        window_rows = np.add.reduceat(self.kept[order], np.arange(0, len(order), self.window_shards))
        return order, np.concatenate([[0], np.cumsum(window_rows)[:-1]])

    def _permute_window(self, epoch: int, window: int) -> np.ndarray:
        order, _ = self._epoch(epoch)
        shards = order[window * self.window_shards : (window + 1) * self.window_shards]
        indices = np.concatenate([self._rows(int(shard)) for shard in shards])
        return np.random.default_rng([self.seed, 10 * self.source + 2, epoch, window]).permutation(indices)

    def leads(self, index: int) -> bool:
        """Whether a row of an epoch, by number, is the first of its shard there."""
        shard = int(np.searchsorted(self.first, index, side="right")) - 1
        return index == self._lead(shard)

    def _first_row(self, shard: int) -> int:
        return int(self._rows(shard)[0])

    def _rows(self, shard: int) -> np.ndarray:
        """The rows of a shard that epochs hold."""
        rows = np.arange(self.first[shard], self.first[shard + 1])
        if self.partners is not None:
            start, stop = (int(self.first[i]) + self.rows_before for i in (shard, shard + 1))
            rows = self.partners.with_partner(start, stop) - self.rows_before
        if self.kept[shard] == len(rows):
            return rows
        chosen = np.random.default_rng([self.seed, 10 * self.source + 3, shard]).permutation(rows)
        return np.sort(chosen[: self.kept[shard]])


def apportion(weights: Sequence[Fraction], total: int) -> list[int]:
    """Shares of `total` items by largest remainder (Hamilton): whole numbers that sum to it.

    Args:
        weights: they sum to 1.
        total: items to share out.
    """
    exact = [weight * total for weight in weights]
    shares = [int(share) for share in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: (shares[i] - exact[i], i))
    for i in by_remainder[: total - sum(shares)]:
        shares[i] += 1
    return shares


class Plan:
    """The stream of rows that a run is made of, out of one source or several.

    Up to the end of any step t, each source has had its share of the t·N rows by largest
    remainder: what it has had is never off by a row, and a single batch by less than two. Inside
    a batch the sources are shuffled, so that chunks hold all of them.

    Args:
        sources: the row counts of the shards of each source.
        weights: the share of each source, in any unit.
        batch: rows in a global batch (N).
        seed, window_shards, shuffle, share: as of `Epochs`.
        partners: where given, rows come in pairs, of a song and one of its partners. The stream of the sources holds
            the first of each alone, and N is an even number.

    Raises:
        ConfigError: a source's share of a batch is less than a row.
    """

    def __init__(
        self,
        sources: Sequence[np.ndarray],
        weights: Sequence[float],
        batch: int,
        seed: int,
        window_shards: int,
        shuffle: bool,
        share: float = 1.0,
        partners: Partners | None = None,
    ) -> None:
        self._arguments = (list(sources), list(weights), batch, seed, window_shards, shuffle, share, partners)
        self._partners = partners
        if partners is not None:
            batch //= 2
        self.sources = []
        before = (0, 0)
        for i, rows in enumerate(sources):
            self.sources.append(Epochs(rows, seed, i, window_shards, shuffle, share, partners, before))
            before = (before[0] + len(rows), before[1] + self.sources[i].total)
        exact = [Fraction(str(weight)) for weight in weights]
        self.weights = [weight / sum(exact) for weight in exact]
        if min(self.weights) * batch < 1:
            raise ConfigError(
                f"data.sources: the smallest weight gives less than one row in a global batch of {batch}; "
                "raise it, or --train.global-batch"
            )
        self.batch = batch
        self.seed = seed
        self.shuffle = shuffle
        self.shard_rows = np.concatenate(list(sources))
        self.first = np.concatenate([[0], np.cumsum(self.shard_rows)])
        self.total = int(self.first[-1])
        self._first_of_source = np.concatenate([[0], np.cumsum([source.total for source in self.sources])])
        self._batch = lru_cache(maxsize=4)(self._mix)

    def __reduce__(self) -> tuple[Any, ...]:
        return Plan, tuple(self._arguments)

    def rows(self, start: int, stop: int) -> Rows:
        """The rows at the positions start <= p < stop of the stream; the position is one number.

        Without shuffling the stream ends after one pass, and later positions are padding. Of a stream of pairs both
        bounds are even.
        """
        if self._partners is None:
            return self._rows(start, stop)
        triggers = self._rows(start // 2, stop // 2)
        pairs = [
            self._partners.draw(index, np.random.default_rng([self.seed, 6, epoch, index]).random())
            for epoch, index in zip(triggers.epoch.tolist(), triggers.index.tolist(), strict=True)
        ]
        index = np.array(pairs, np.int64)
        source = np.searchsorted(self._first_of_source, index, side="right") - 1
        partners = self._locate(triggers.epoch.copy(), index, source)
        both = ((getattr(triggers, f.name), getattr(partners, f.name)) for f in fields(Rows))
        return Rows(*(np.stack(two, 1).reshape(-1) for two in both))

    def _rows(self, start: int, stop: int) -> Rows:
        if len(self.sources) == 1:
            epoch, index = self.sources[0].at(start, stop)
            return self._locate(epoch, index, np.zeros_like(index))
        parts = []
        while start < stop:
            step, place = divmod(start, self.batch)
            end = min(place + stop - start, self.batch)
            parts.append([values[place:end] for values in self._batch(step)])
            start += end - place
        return self._locate(*map(np.concatenate, zip(*parts, strict=True)))

    def leads(self, rows: Rows) -> list[bool]:
        """Which of the rows at some positions are the first of their shard in each pass; partners are none."""
        apart = 1 if self._partners is None else 2
        return [
            i % apart == 0 and source >= 0 and self.sources[source].leads(index - int(self._first_of_source[source]))
            for i, (source, index) in enumerate(zip(rows.source.tolist(), rows.index.tolist(), strict=True))
        ]

    def rng(self, epoch: int, index: int) -> np.random.Generator:
        """The source of all random choices for one row in one epoch: crop, template, augmentation.

        A song that comes several times in an epoch, as others' partner, makes the same choices.
        """
        return np.random.default_rng([self.seed, 3, epoch, index])

    def view_rng(self, epoch: int, index: int) -> np.random.Generator:
        """The same for the row's second view: apart, so that asking for it changes nothing else."""
        return np.random.default_rng([self.seed, 5, epoch, index])

    def notation_rng(self, epoch: int, index: int) -> np.random.Generator:
        """The same for the row's notation."""
        return np.random.default_rng([self.seed, 7, epoch, index])

    def features_rng(self, epoch: int, index: int) -> np.random.Generator:
        """The same for the run of the row's features."""
        return np.random.default_rng([self.seed, 8, epoch, index])

    def _mix(self, step: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Epoch, row number and source of each row of a global batch."""
        # Not negative: a share of at least one row a step outgrows the rounding of the step before.
        before, after = (apportion(self.weights, t * self.batch) for t in (step, step + 1))
        parts = []
        for number, source in enumerate(self.sources):
            epoch, index = source.at(before[number], after[number])
            parts.append((epoch, index + self._first_of_source[number], np.full(len(index), number)))
        mixed = np.random.default_rng([self.seed, 4, step]).permutation(self.batch)
        epochs, indices, numbers = (np.concatenate(values)[mixed] for values in zip(*parts, strict=True))
        return epochs, indices, numbers

    def _locate(self, epoch: np.ndarray, index: np.ndarray, source: np.ndarray) -> Rows:
        padding = index < 0
        shard = np.searchsorted(self.first, index, side="right") - 1
        row = index - self.first[shard]
        for values in (epoch, source, shard, row):
            values[padding] = -1
        return Rows(epoch, index, source, shard, row)
