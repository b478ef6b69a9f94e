"""From interactions to pairs of songs that the same listeners prefer: functions of Arrow tables, and nothing else.

The way of a log with 10^9 rows: `number` turns rows of `log.SCHEMA` into numbers, which are shuffled by user; `mine`
takes all interactions of some users and counts, for each pair of items, the users who have it; what it counted is
shuffled by item, and `reduce.py` adds up, weighs and chooses. `phases.py` keeps the tables in files.

Two rules say what a pair is. Interactions of a user (or of a playlist) stand in the order of their times or positions;
those that are equal in all are one; where a log has no order, a hash decides. Of each interaction and one of the
`partners` before it, not farther away than `window`:

- explicit: the earlier is a trigger, the later a preference, and happened later. That is our reading of HTCL's "song
  to song by explicit feedback" (Pan et al., ICMR 2025), whose own rule is not published.
- cooccurrence: both are preferences; the pair counts in both directions. Sarwar et al., WWW 2001, is the classic for
  items that users have in common.

The support of a pair is the number of users who have it, so nobody counts twice.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from muser_dist.data.config import Strict
from muser_dist.errors import require
from muser_dist.interactions.ids import hash_names, mix
from muser_dist.interactions.split import SPLITS, SplitConfig, of_interactions

Rule = Literal["explicit", "cooccurrence"]

_TRIGGER, _PREFERENCE = 1, 2
_CHUNK_EVENTS, _CHUNK_PAIRS = 1 << 20, 1 << 22
"""Interactions and pairs that the users of one chunk may have at most, unless one user alone has more: the first bounds
what keys count to, the second their memory (32 MiB)."""

INTERACTIONS = pa.schema(
    [("user", pa.uint64()), ("item", pa.uint64()), ("time", pa.int64()), ("signal", pa.int8()), ("role", pa.int8())]
)
"""What is shuffled by user; role has a bit for a trigger and one for a preference."""

NAMES = pa.schema([("item", pa.uint64()), ("name", pa.string())])
COUNTS = pa.schema([("item", pa.uint64()), ("split", pa.int8()), ("triggers", pa.int64()), ("preferences", pa.int64())])
"""Users who have an item as a trigger and as a preference, in a split and those before it."""

SUPPORTS = pa.schema([("trigger", pa.uint64()), ("item", pa.uint64()), ("split", pa.int8()), ("support", pa.int32())])


@dataclass(frozen=True)
class MiningConfig(Strict):
    rule: Rule = "cooccurrence"
    """"explicit": a preference after a trigger, in this direction. "cooccurrence": preferences of one user or playlist
    near each other, in both directions."""
    signals: tuple[str, ...] = ("play",)
    """Signals that are preferences: "like", or "play" with a minimum in min_value."""
    triggers: tuple[str, ...] = ("play",)
    """Explicit: signals that are triggers, whatever their value."""
    min_value: dict[str, float] = field(default_factory=dict)
    """By signal, the value from which on it is a preference: seconds or percent heard, plays."""
    window: int = 1800
    """Farthest that the two interactions of a pair may lie apart: seconds, or positions in a playlist. Without meaning
    where the log has no order."""
    partners: int = 5
    """Of the interactions before one, how many, from the nearest on, may form a pair with it."""
    max_events: int = 100_000
    """Interactions of one user that are used: the last ones, or a random sample where the log has no order. Bounds the
    memory that one user can take."""
    min_support: int = 2
    """Fewest users that a training pair must have. Held-out pairs need one: they are few, and true all the same."""
    popularity: float = 0.5
    """How strongly popularity is taken out of the weight: 0 not at all, 0.5 as the cosine does, 1 as lift and pointwise
    mutual information do."""
    per_trigger: int = 100
    """Pairs that a trigger has at most in each split: those of the largest weight, then support."""

    def __post_init__(self) -> None:
        require(len(self.signals) > 0, "mining.signals is empty; name what is a preference, such as like")
        require(self.rule != "explicit" or len(self.triggers) > 0, "mining.triggers is empty; name at least one")
        for name in ("partners", "max_events", "min_support", "per_trigger"):
            require(getattr(self, name) >= 1, f"mining.{name} is {getattr(self, name)}; it must be at least 1")
        require(self.window >= 0, f"mining.window is {self.window}; it must not be negative")
        require(0 <= self.popularity <= 1, f"mining.popularity is {self.popularity}; give 0 to 1")
        for signal in self.min_value:
            require(
                signal in self.signals,
                f"mining.min_value: {signal!r} is not among mining.signals ({', '.join(self.signals)})",
            )

    @property
    def used_signals(self) -> list[str]:
        """All signals that a pair can have, in lower case, sorted."""
        names = (*self.signals, *(self.triggers if self.rule == "explicit" else ()))
        return sorted({name.lower() for name in names})


# --- Numbers ---


def number(
    rows: pa.Table, config: MiningConfig, known: np.ndarray | None
) -> tuple[pa.Table, pa.Table, Counter[str], Counter[str]]:
    """Interactions that may form pairs, as numbers.

    Args:
        rows: of `log.SCHEMA`.
        config: which signals matter.
        known: sorted numbers of the items that there are; None: all items are.

    Returns:
        `INTERACTIONS`; `NAMES` of their items, each once; how many rows are left out, by reason; rows by signal.
    """
    reasons: Counter[str] = Counter()
    rows = rows.combine_chunks()
    user, user_names = _encoded(rows["user"])
    item, item_names = _encoded(rows["item"])
    signal, signal_names = _encoded(rows["signal"])
    items = hash_names(item_names)
    good = np.ones(rows.num_rows, bool)
    if known is not None:
        place = np.minimum(np.searchsorted(known, items), max(len(known) - 1, 0))
        there = known[place] == items if len(known) else np.zeros(len(items), bool)
        good = there[item] if len(items) else good
        reasons["unknown item"] = int((~good).sum())

    value = rows["value"].to_numpy()
    names = [name.as_py() for name in signal_names]
    minima = {name.lower(): minimum for name, minimum in config.min_value.items()}
    preferred = {name.lower() for name in config.signals}
    minimum = np.array([minima.get(name, -np.inf) for name in names])
    trigger = np.array([config.rule == "explicit" and name in map(str.lower, config.triggers) for name in names], bool)
    preference = np.array([name in preferred for name in names], bool)
    if len(names):
        enough = np.isneginf(minimum[signal]) | (value >= minimum[signal])  # a value that is not there is not enough
        role = _TRIGGER * trigger[signal] + _PREFERENCE * (preference[signal] & enough)
        matters = (trigger | preference)[signal]
        reasons["signal not used"] = int((good & ~matters).sum())
        reasons["value below the minimum"] = int((good & matters & (role == 0)).sum())
        good = good & (role > 0)
    else:
        role = np.zeros(0, np.int64)
    codes = {name: code for code, name in enumerate(config.used_signals)}
    code = np.array([codes.get(name, -1) for name in names], np.int8)
    keep = np.flatnonzero(good)
    users = hash_names(user_names)
    numbers = pa.table(
        [
            users[user[keep]],
            items[item[keep]],
            pc.fill_null(rows["time"], 0).to_numpy()[keep],
            code[signal[keep]],
            role[keep].astype(np.int8),
        ],
        schema=INTERACTIONS,
    )
    used = np.unique(item[keep])
    counted = np.bincount(signal, minlength=len(names))
    return (
        numbers,
        pa.table([items[used], item_names.take(pa.array(used))], schema=NAMES),
        +reasons,
        Counter({name: int(number) for name, number in zip(names, counted, strict=True)}),
    )


def _encoded(column: pa.ChunkedArray) -> tuple[np.ndarray, pa.Array]:
    """The values' places in the array of different values, and that array."""
    array = column.combine_chunks()
    array = array if isinstance(array, pa.Array) else pa.concat_arrays(array.chunks)
    encoded = array.dictionary_encode()
    return encoded.indices.to_numpy(), encoded.dictionary


# --- All interactions of some users ---


@dataclass(frozen=True)
class Mined:
    """What `mine` found.

    Attributes:
        supports: `SUPPORTS`; a pair may occur several times.
        counts: `COUNTS`; an item may occur several times.
        reasons: interactions that were left out, by reason.
        used: interactions used, by split.
        users: users with an interaction that is used, by split.
        paired: users with a pair, by split.
    """

    supports: pa.Table
    counts: pa.Table
    reasons: Counter[str]
    used: Counter[str]
    users: Counter[str]
    paired: Counter[str]


def mine(interactions: pa.Table, config: MiningConfig, split: SplitConfig, ordered: bool) -> Mined:
    """Pairs of users, each with how many of these users have it.

    Args:
        interactions: `INTERACTIONS`: all that these users have, in any order.
        config: what a pair is.
        split: what is held out.
        ordered: whether times or positions say in which order they happened.
    """
    user, item, time, signal, role = (interactions[name].to_numpy() for name in INTERACTIONS.names)
    order = time if ordered else (mix(user ^ mix(item, split.seed), split.seed) >> np.uint64(1)).astype(np.int64)
    # Of equal ones, the strongest role comes first and stays.
    sorting = np.lexsort((-role, signal, item, order, user))
    user, item, time, signal, role, order = (a[sorting] for a in (user, item, time, signal, role, order))
    repeats = np.zeros(len(user), bool)
    repeats[1:] = np.all([a[1:] == a[:-1] for a in (user, order, item, signal)], axis=0)
    user, item, time, role, order = (a[~repeats] for a in (user, item, time, role, order))
    level = of_interactions(split, user, item, time)

    reasons = Counter({"exact repeat": int(repeats.sum()), "beyond max_events": 0})
    used: Counter[str] = Counter()
    users: Counter[str] = Counter()
    paired: Counter[str] = Counter()
    supports, counts = [SUPPORTS.empty_table()], [COUNTS.empty_table()]
    for now in split.levels:
        there = np.flatnonzero(level <= now)
        sizes = np.diff(np.append(_starts(user[there]), len(there)))
        from_end = np.repeat(np.cumsum(sizes), sizes) - np.arange(len(there))
        there, beyond = there[from_end <= config.max_events], there[from_end > config.max_events]
        reasons["beyond max_events"] += int((level[beyond] == now).sum())
        used[SPLITS[now]] = int((level[there] == now).sum())
        users[SPLITS[now]] = len(np.unique(user[there][level[there] == now]))
        for chunk in _chunks(user[there], max(min(_CHUNK_EVENTS, _CHUNK_PAIRS // config.partners), 1)):
            part = there[chunk]
            mined = _Chunk.of(user[part], item[part], order[part], role[part], level[part] == now, config, ordered)
            pairs, with_pairs = mined.supports()
            paired[SPLITS[now]] += with_pairs
            supports.append(_with_split(pairs, now, SUPPORTS))
            counts.append(_with_split(mined.counts(), now, COUNTS))
    return Mined(pa.concat_tables(supports), pa.concat_tables(counts), +reasons, used, users, paired)


def _with_split(columns: dict[str, np.ndarray], now: int, schema: pa.Schema) -> pa.Table:
    rows = len(columns["item"])
    return pa.table(columns | {"split": np.full(rows, now, np.int8)}).select(schema.names).cast(schema)


def _starts(values: np.ndarray) -> np.ndarray:
    """Where runs of equal values begin."""
    return np.flatnonzero(np.append(True, values[1:] != values[:-1])) if len(values) else np.zeros(0, np.int64)


def _chunks(user: np.ndarray, most: int) -> Iterator[slice]:
    """Whole users together, of at most so many interactions unless one has more."""
    ends = np.append(_starts(user)[1:], len(user))
    begin = 0
    while begin < len(user):
        end = int(ends[max(np.searchsorted(ends, begin + most, "right") - 1, np.searchsorted(ends, begin, "right"))])
        yield slice(begin, end)
        begin = end


@dataclass(frozen=True)
class _Chunk:
    """Interactions of some users, sorted, with small numbers in place of 64-bit ones: so a (user, item, item) is one
    int64, and sorting plain integers is all that counting takes. (With n interactions it is below n^3, and n is at most
    2^20; below n^2 where there is one user alone.)"""

    user: np.ndarray
    item: np.ndarray
    items: np.ndarray  # the 64-bit numbers
    order: np.ndarray | None
    role: np.ndarray
    new: np.ndarray  # of this split itself, not of one before it
    config: MiningConfig

    @staticmethod
    def of(
        user: np.ndarray,
        item: np.ndarray,
        order: np.ndarray,
        role: np.ndarray,
        new: np.ndarray,
        config: MiningConfig,
        ordered: bool,
    ) -> "_Chunk":
        small_user = np.cumsum(np.append(0, user[1:] != user[:-1]))
        items, small_item = np.unique(item, return_inverse=True)
        return _Chunk(small_user, small_item, items, order if ordered else None, role, new, config)

    def supports(self) -> tuple[dict[str, np.ndarray], int]:
        """Pairs with how many users have each, and how many users have any."""
        size = len(self.items)
        keys = [np.zeros(0, np.int64)]
        for lag in range(1, min(self.config.partners, len(self.user) - 1) + 1):
            earlier, later = slice(None, -lag), slice(lag, None)
            pair = self.user[earlier] == self.user[later]
            pair &= self.item[earlier] != self.item[later]
            pair &= self.new[earlier] | self.new[later]
            if self.order is not None:
                distance = self.order[later] - self.order[earlier]
                pair &= distance <= self.config.window
                if self.config.rule == "explicit":
                    pair &= distance > 0
            if self.config.rule == "explicit":
                pair &= (self.role[earlier] & _TRIGGER > 0) & (self.role[later] & _PREFERENCE > 0)
            place = np.flatnonzero(pair)
            a, b = self.item[place], self.item[place + lag]
            if self.config.rule == "cooccurrence":
                a, b = np.minimum(a, b), np.maximum(a, b)
            keys.append((self.user[place] * size + a) * size + b)
        key = np.sort(np.concatenate(keys))
        key = key[_starts(key)]
        pairs, support = _counted(np.sort(key % size**2))
        a, b = self.items[pairs // size], self.items[pairs % size]
        if self.config.rule == "cooccurrence":
            a, b, support = np.append(a, b), np.append(b, a), np.append(support, support)
        return {"trigger": a, "item": b, "support": support}, len(_starts(key // size**2))

    def counts(self) -> dict[str, np.ndarray]:
        """Items, and how many users have each as a trigger and as a preference."""
        preferences = self._users(self.role & _PREFERENCE > 0)
        triggers = self._users(self.role & _TRIGGER > 0) if self.config.rule == "explicit" else preferences
        return {"item": self.items, "triggers": triggers, "preferences": preferences}

    def _users(self, where: np.ndarray) -> np.ndarray:
        size = len(self.items)
        key = np.sort(self.user[where] * size + self.item[where])
        return np.bincount(key[_starts(key)] % size, minlength=size)


def _counted(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The different ones of sorted values, and how often each occurs."""
    starts = _starts(values)
    return values[starts], np.diff(np.append(starts, len(values)))
