"""Simulated listeners over real clips: an interaction log whose true tastes are known. Nobody listened to anything.

No public log comes with audio at hand. This one is drawn from a model that is written down here, so that a recommender
can be compared with an oracle that knows the truth. What it reaches says how much of these tastes it has learned, and
nothing about people.

**Items** are the clips of some shards. Their popularity is rank^-exponent, the ranks being those of a hash of key and
seed: popularity has nothing to do with the music. A share of them, by another hash, is cold: released when the test
period begins, the last share of the time.

**Listeners** have two tastes and divide their sessions between them by shares (b, 1 - b), b ~ Beta(2, 2). A taste gives
every value of every field in FIELDS a weight ~ N(0, 1); a clip's appeal a is the sum of the weights of its values, and
of a value that it lacks 0. Tastes turn slowly: at time t of a span T the weights are cos(d t/T) w + sin(d t/T) w', d
the drift and w' another draw, so they stay N(0, 1). The number of listens is log-normal; they fall into sessions of
geometric length, placed uniformly in time and at least GAP apart.

**A session** keeps to one taste. Each of its listens takes clip i with a probability that is proportional to

    popularity_i exp(a_i)        or, for noise, to        popularity_i

among the clips that are released. With z = (a_i - mean a) / deviation of a over all clips, a listen is broken off with
probability 0.05 + 0.45 s(-2 z), s the logistic function, and one that is not is liked with probability 0.3 s(2 z - 2).

Everything is a function of the settings and the clips' keys and metadata; their order in the shards does not matter.
"""

import hashlib
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from muser_dist.data.corpora.tastes import NOTE, Clips, Truth, appeal
from muser_dist.errors import DataError, require
from muser_dist.files import write_whole

LOG, TRUTH = "simulated-log.parquet", "simulated-truth.npz"
SIMULATED = b"muser_dist.simulated"
"""Key of the log's file metadata that holds {"note", "settings", "test_start", ...} as JSON."""

START = 1_704_067_200
"""Time of the first day: 2024-01-01, in seconds of Unix time."""
LISTEN, GAP = 180.0, 1800.0
"""Seconds of a listen that is not broken off, and least seconds between two sessions of a listener."""
MOST_LISTENS = 10_000

SCHEMA = pa.schema(
    [
        ("user", pa.string()),
        ("item", pa.string()),
        ("time", pa.int64()),
        ("signal", pa.string()),
        ("value", pa.float32()),
    ]
)
"""The log's columns: who, the clip's key, seconds of Unix time, "play", "skip" or "like", and the seconds that were
listened or, for a like, 1."""
_SIGNALS = ("play", "skip", "like")

_BLOCK = 1 << 21  # probabilities held at a time


@dataclass(frozen=True)
class Population:
    """Settings of the simulation. The defaults were fixed before anything was measured on them."""

    listeners: int = 2000
    seed: int = 7
    median_listens: float = 100.0
    """Of the log-normal distribution, before rounding to at least 1 and at most MOST_LISTENS."""
    activity_sigma: float = 1.0
    """Standard deviation of the logarithm of the number of listens."""
    popularity_exponent: float = 0.8
    noise: float = 0.2
    """Share of the listens that taste has no part in."""
    drift: float = np.pi / 6
    """Angle by which tastes turn over the whole time, in radians."""
    session_listens: float = 8.0
    """Mean listens of a session."""
    days: int = 365
    test_share: float = 0.2
    """Share of the days, the last ones, in which cold clips are there."""
    cold_share: float = 0.1
    """Share of the clips that are cold."""

    def __post_init__(self) -> None:
        require(self.listeners >= 1, f"listeners is {self.listeners}; there is one at least")
        require(self.seed >= 0, f"seed is {self.seed}; it must not be negative")
        require(self.median_listens >= 1 and self.activity_sigma >= 0, "median_listens is below 1 or its sigma below 0")
        require(self.session_listens >= 1, "session_listens is below 1")
        for name in ("noise", "test_share", "cold_share"):
            require(0 <= getattr(self, name) <= 1, f"{name} is {getattr(self, name)}; it is a share, from 0 to 1")
        needed = MOST_LISTENS * (LISTEN + GAP) / 86_400
        require(self.days > needed, f"days is {self.days}; the busiest listener needs {needed:.0f}")

    @property
    def test_start(self) -> int:
        """When the test period begins, in seconds of Unix time."""
        return START + round(self.days * 86_400 * (1 - self.test_share))


def simulate(
    clips: Clips, population: Population, progress: Callable[[int, int], None] | None = None
) -> tuple[pa.Table, Truth]:
    """The log of simulated listeners, and the truth behind it.

    Args:
        clips: what they choose from.
        population: the settings.
        progress: called with (listeners done, listeners).

    Returns:
        a table of SCHEMA in the order of time, whose schema's metadata say under SIMULATED what it is; and the truth.

    Raises:
        DataError: all clips are cold.
    """
    popularity, cold = _popularity(clips.keys, population), _cold(clips.keys, population)
    if cold.all():
        raise DataError(f"all of {len(cold)} clips are cold; give more clips, or a smaller cold_share")
    world = _World(clips.values, popularity, cold, population)
    events, tastes, shares = [], [], []
    for number in range(population.listeners):
        listener = _Listener(np.random.default_rng([population.seed, number]), len(clips.vocabulary))
        events.append(_history(listener, world))
        tastes.append(listener.weights(np.full(2, 1 - population.test_share / 2) * population.drift, np.arange(2)))
        shares.append(listener.shares)
        if progress is not None:
            progress(number + 1, population.listeners)
    width = len(str(population.listeners - 1))
    users = [f"simulated-{number:0{width}d}" for number in range(population.listeners)]
    user = np.repeat(np.arange(len(users)), [len(history.item) for history in events])
    item, time, signal, value = (np.concatenate(column) for column in zip(*events, strict=True))
    order = np.argsort(time, kind="stable")
    named = ((user, users), (item, clips.keys), (signal, _SIGNALS))
    texts = [pa.DictionaryArray.from_arrays(codes[order], list(names)).cast(pa.string()) for codes, names in named]
    note = {
        "note": NOTE,
        "settings": asdict(population),
        "test_start": population.test_start,
        "clips": len(cold),
        "cold_clips": int(cold.sum()),
    }
    log = pa.table(
        [texts[0], texts[1], time[order], texts[2], value[order]],
        SCHEMA.with_metadata({SIMULATED: json.dumps(note)}),
    )
    return log, Truth(users, clips.keys, clips.values, np.stack(tastes), np.stack(shares), popularity, cold)


def write_listeners(folder: Path, log: pa.Table, truth: Truth) -> None:
    """Writes LOG and TRUTH, each whole or not at all.

    Raises:
        DataError: the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        buffer = io.BytesIO()
        pq.write_table(log, buffer, compression="zstd")
        write_whole(folder / LOG, buffer.getvalue())
        truth.save(folder / TRUTH)
    except OSError as error:
        raise DataError(f"cannot write simulated listeners to {folder}: {error.strerror or error}") from None


def _fraction(seed: int, what: str, key: str) -> float:
    """A hash of a key as a number in [0, 1)."""
    digest = hashlib.blake2b(f"{seed} {what} {key}".encode(), digest_size=6).digest()
    return int.from_bytes(digest, "big") / 2**48


def _popularity(keys: Sequence[str], population: Population) -> np.ndarray:
    popularity = np.empty(len(keys))
    order = np.argsort([_fraction(population.seed, "popularity", key) for key in keys], kind="stable")
    popularity[order] = np.arange(1.0, len(keys) + 1) ** -population.popularity_exponent
    return popularity


def _cold(keys: Sequence[str], population: Population) -> np.ndarray:
    return np.array([_fraction(population.seed, "cold", key) < population.cold_share for key in keys])


class _Listener:
    """Somebody's two tastes, and the random numbers that are left."""

    def __init__(self, rng: np.random.Generator, vocabulary: int) -> None:
        self.rng = rng
        share = rng.beta(2, 2)
        self.shares = np.array([share, 1 - share])
        self._first, self._other = rng.standard_normal((2, 2, vocabulary))

    def weights(self, angles: np.ndarray, tastes: np.ndarray) -> np.ndarray:
        """(s, V): each of s tastes (0 or 1), turned by its angle."""
        return np.cos(angles)[:, None] * self._first[tastes] + np.sin(angles)[:, None] * self._other[tastes]


class _World:
    """What is the same for all listeners."""

    def __init__(self, values: np.ndarray, popularity: np.ndarray, cold: np.ndarray, population: Population) -> None:
        self.values, self.popularity, self.population = values, popularity, population
        self.span = population.days * 86_400.0
        released = np.stack([~cold, np.ones_like(cold)])  # before the test period, and in it
        self.available = np.where(released, popularity, 0.0)


class _Events(NamedTuple):
    """(n,) arrays: places of clips and of signals, int64 seconds, float32 values."""

    item: np.ndarray
    time: np.ndarray
    signal: np.ndarray
    value: np.ndarray


def _history(listener: _Listener, world: _World) -> _Events:
    """All that a listener does, listens first and then likes."""
    settings, rng = world.population, listener.rng
    drawn = settings.median_listens * np.exp(settings.activity_sigma * rng.standard_normal())
    listens = int(np.clip(np.rint(drawn), 1, MOST_LISTENS))
    opens = rng.random(listens) < 1 / settings.session_listens
    opens[0] = True
    session = np.cumsum(opens) - 1  # of each listen
    first = np.flatnonzero(opens)  # listen of each session
    length = np.diff([*first, listens])
    taken = length * LISTEN + GAP
    spaces = rng.exponential(size=len(first) + 1)
    spaces *= (world.span - taken.sum()) / spaces.sum()
    start = np.cumsum(spaces[:-1]) + np.cumsum(taken) - taken
    taste = (rng.random(len(first)) >= listener.shares[0]).astype(np.int64)
    weights = listener.weights(settings.drift * start / world.span, taste)
    late = (START + start >= settings.test_start).astype(np.int64)
    noisy, chance = rng.random(listens) < settings.noise, rng.random(listens)
    item, liking = _choose(world, weights, late, session, noisy, chance)

    skipped = rng.random(listens) < 0.05 + 0.45 * _logistic(-2 * liking)
    liked = ~skipped & (rng.random(listens) < 0.3 * _logistic(2 * liking - 2))
    heard = np.where(skipped, rng.uniform(5, 60, listens), LISTEN)
    before = np.cumsum(heard) - heard
    begun = START + start[session] + before - before[first][session]
    time = np.concatenate([begun, (begun + heard)[liked]])
    signal = np.concatenate([skipped.astype(np.int64), np.full(liked.sum(), _SIGNALS.index("like"))])
    value = np.concatenate([heard, np.ones(liked.sum())])
    return _Events(np.concatenate([item, item[liked]]), time.astype(np.int64), signal, value.astype(np.float32))


def _choose(
    world: _World, weights: np.ndarray, late: np.ndarray, session: np.ndarray, noisy: np.ndarray, chance: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The clip of each listen, and z, how well it suits the session's taste.

    Args:
        weights, late: of each of s sessions, its taste (s, V) and whether it is in the test period.
        session, noisy, chance: of each listen, its session, ascending, whether it is noise, and a number in [0, 1).
    """
    item, liking = np.empty(len(session), np.int64), np.empty(len(session))
    step = max(1, _BLOCK // len(world.values))
    for low in range(0, len(weights), step):
        appeals = appeal(weights[low : low + step], world.values)
        available = world.available[late[low : low + step]]
        mine = slice(*np.searchsorted(session, [low, low + step]))
        row = session[mine] - low
        by_taste = _draw(available * np.exp(appeals), row, chance[mine])
        # Of two distributions, whether the test period has begun or not.
        by_popularity = _draw(world.available, late[session[mine]], chance[mine])
        item[mine] = np.where(noisy[mine], by_popularity, by_taste)
        deviation = appeals.std(axis=1)
        away = appeals[row, item[mine]] - appeals.mean(axis=1)[row]
        liking[mine] = away / np.where(deviation > 0, deviation, 1)[row]
    return item, liking


def _draw(mass: np.ndarray, row: np.ndarray, chance: np.ndarray) -> np.ndarray:
    """Places drawn by inverse distribution functions.

    Args:
        mass: (r, n), not negative; a place without mass is never drawn.
        row: (m,), which row of it each draw is from.
        chance: (m,) in [0, 1).
    """
    reached = np.cumsum(mass, axis=1)
    reached /= reached[:, -1:]
    # All rows end to end: row r is the stretch from r to r + 1, which rounding must not leave.
    wanted = np.minimum(row + chance, np.nextafter(row + 1.0, 0))
    place = np.searchsorted((reached + np.arange(len(mass))[:, None]).ravel(), wanted, side="right")
    return place - row * mass.shape[1]


def _logistic(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))
