"""Recommendation, scored on held-out interactions: who took which item after training's interactions had ended.

Every user is asked with what training knows of them, and the items of the catalogue are ranked, without those that the
user has met in training. The items that the user took in validation are the right answers.

**Ties never favour the right answer.** Scores are compared on a grid of width TIE, so that rounding decides nothing.
Items of equal score come in random order, and each figure is its exact expectation over these orders. A scorer that
tells nothing apart, as popularity does among items that nobody has heard, thus reaches exactly chance. (Retrieval gives
such a scorer the last ranks; here that would put baselines below chance where they know nothing.)

Figures of a user whose right answers are P among N candidates:

    HR@k    is there a right answer among the first k?
    NDCG@k  sum over the right answers at ranks r <= k of 1 / log2(r + 1), over its maximum (Järvelin & Kekäläinen 2002)
    MRR     1 / rank of the first right answer
    AUC     share of pairs of a right and another candidate that are ordered well, ties counted half

and of all users' first k together:

    coverage@k         share of the candidates that are recommended to anyone
    popularity_lift@k  mean popularity of what is recommended, over that of what the users have taken, less 1: GAP of
                       Abdollahpouri et al. (2019). An item's popularity is the share of users who took it in training;
                       means are over a user's items, then over users. 0 is what people take by themselves.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from scipy import sparse

from muser_dist.errors import DataError
from muser_dist.evaluate.bootstrap import mean_intervals, quantiles, resamples
from muser_dist.evaluate.classification import TIE
from muser_dist.evaluate.retrieval import first_rank_survival, unit_rows

Candidates = Literal["all", "cold", "warm"]
CANDIDATES: tuple[Candidates, ...] = ("all", "cold", "warm")
Query = Literal["history", "last item"]
QUERIES: tuple[Query, ...] = ("history", "last item")
"""What a user is asked with: all that they took in training (user-to-item), or the last of it (item-to-item)."""

Scorer = Callable[[np.ndarray], np.ndarray]
"""From (u,) places of users to (u, items) scores, finite, at most LARGEST in size; the higher, the sooner."""

LARGEST = 1e6
"""Bound of scores: multiples of TIE below it, times nine million items, fit into int64."""

_REFUSED = "skip"  # the signal of an item that was met and not taken
_BLOCK_SCORES = 1 << 21  # scores held at a time


@dataclass(frozen=True)
class Interactions:
    """What U users did with the I items of a catalogue.

    Attributes:
        users, items: their names.
        history: (U, I) float32, how often a user took an item in training; a skip is no taking.
        last: (U,) int64, the item taken last in training; -1 where there is none.
        seen: (U, I) bool, met in training, skips included: not recommended again.
        targets: (U, I) bool, taken in validation and not seen.
        cold: (I,) bool, items without interactions in training by plan.
        counts: events by what became of them.
    """

    users: list[str]
    items: list[str]
    history: sparse.csr_array
    last: np.ndarray
    seen: sparse.csr_array
    targets: sparse.csr_array
    cold: np.ndarray
    counts: dict[str, int]

    @staticmethod
    def of(log: pa.Table, validation: np.ndarray, items: Sequence[str], cold: Collection[str]) -> "Interactions":
        """The interactions of a log with the items of a catalogue.

        Args:
            log: columns user and item (strings), time (integers, null where it is not known; then the order of the rows
                is that of time) and signal ("skip" for what was refused, anything else for what was taken).
            validation: (events,) bool; other events are training's.
            items: the catalogue; each once. Events with other items are counted and left out.
            cold: items that the split holds out of training.

        Raises:
            DataError: a column is missing or has nulls, nothing is left, or training has an event with a cold item.
            ValueError: lengths differ, or an item occurs twice.
        """
        validation = np.asarray(validation, bool)
        if validation.shape != (log.num_rows,):
            raise ValueError(f"the log has {log.num_rows} events and validation the shape {validation.shape}")
        if len(set(items)) != len(items):
            raise ValueError("an item occurs twice in the catalogue")
        for name in ("user", "item", "time", "signal"):
            if name not in log.column_names:
                raise DataError(f"the log has no column {name!r}; it has {', '.join(log.column_names)}")
            if name != "time" and log.column(name).null_count:
                raise DataError(f"{log.column(name).null_count:,} events of the log have no {name}; leave them out")
        known = pc.index_in(log.column("item").cast(pa.string()), pa.array(list(items), pa.string())).to_numpy()
        inside = ~np.isnan(known)
        if not inside.any():
            raise DataError(f"none of {log.num_rows:,} events is with one of the {len(items):,} items of the catalogue")
        place = known[inside].astype(np.int64)
        names = log.column("user").cast(pa.string()).combine_chunks().dictionary_encode()
        user = names.indices.to_numpy()[inside].astype(np.int64)
        taken = pc.not_equal(log.column("signal"), _REFUSED).to_numpy()[inside]
        later = validation[inside]
        held_out = np.isin(np.array(items, object), np.array(list(cold), object))
        if (leaked := held_out[place] & ~later).any():
            raise DataError(
                f"{leaked.sum():,} training events are with cold items, the first with {items[place[leaked][0]]!r}; "
                "the split must hold cold items out of training"
            )
        shape = (len(names.dictionary), len(items))

        def matrix(events: np.ndarray) -> sparse.csr_array:
            ones = np.ones(int(events.sum()), np.float32)
            return sparse.csr_array((ones, (user[events], place[events])), shape=shape)  # which sums repeats

        seen, targets = matrix(~later).astype(bool), matrix(later & taken).astype(bool)
        fresh = targets > targets.multiply(seen)
        time = log.column("time").cast(pa.int64()).fill_null(0).to_numpy()[inside]
        ordered = np.argsort(time, kind="stable")
        ordered = ordered[(taken & ~later)[ordered]]
        last = np.full(shape[0], -1, np.int64)
        last[user[ordered]] = place[ordered]  # of several, the latest stays
        counts = {
            "events": log.num_rows,
            "events_with_unknown_items": int((~inside).sum()),
            "training_events": int((~later).sum()),
            "training_skips": int((~later & ~taken).sum()),
            "validation_events": int(later.sum()),
            "validation_skips": int((later & ~taken).sum()),
            "targets": int(fresh.nnz),
            "targets_seen_before": int(targets.nnz - fresh.nnz),
            "users": shape[0],
            "items": len(items),
            "cold_items": int(held_out.sum()),
        }
        return Interactions(
            names.dictionary.to_pylist(), list(items), matrix(~later & taken), last, seen, fresh, held_out, counts
        )

    def candidates(self, which: Candidates) -> np.ndarray:
        """(I,) bool."""
        return {"all": np.ones(len(self.items), bool), "cold": self.cold, "warm": ~self.cold}[which]

    def asked(self, which: Candidates) -> np.ndarray:
        """Users with a history, a right answer among the candidates, and another candidate: (u,) places, ascending."""
        chosen = self.candidates(which).astype(np.int64)
        right = self.targets.astype(np.int64) @ chosen
        unseen = chosen.sum() - self.seen.astype(np.int64) @ chosen
        return np.flatnonzero((self.last >= 0) & (right > 0) & (unseen > right))

    def queries(self, query: Query) -> sparse.csr_array:
        """(U, I) float64: 1 for each item that a user is asked with, however often it was taken."""
        if query == "history":
            return (self.history > 0).astype(np.float64)
        rows = np.flatnonzero(self.last >= 0)
        return sparse.csr_array((np.ones(len(rows)), (rows, self.last[rows])), shape=self.history.shape)


def from_embeddings(embeddings: np.ndarray, queries: sparse.csr_array) -> Scorer:
    """Cosine between an item and the mean of the unit vectors of the items that a user is asked with.

    Args:
        embeddings: (I, D), of the catalogue's items in its order.
        queries: (U, I), as of `Interactions.queries`: one item to a user is item-to-item recommendation.

    Raises:
        DataError: an embedding is not finite.
    """
    unit = unit_rows(embeddings, "item")

    def score(users: np.ndarray) -> np.ndarray:
        return unit_rows(queries[users] @ unit, "user") @ unit.T

    return score


def metric_names(ks: Sequence[int]) -> list[str]:
    """Names of what `user_metrics` returns."""
    return [*(f"HR@{k}" for k in ks), *(f"NDCG@{k}" for k in ks), "MRR", "AUC"]


def on_grid(scores: np.ndarray, what: str) -> np.ndarray:
    """Scores as int64 multiples of TIE.

    Raises:
        DataError: a score is not finite or larger than LARGEST.
    """
    if not (np.abs(scores) <= LARGEST).all():  # NaN is not either
        raise DataError(f"{what}: a score is not finite, or larger than {LARGEST:g}")
    return np.rint(np.asarray(scores, np.float64) / TIE).astype(np.int64)


def user_metrics(scores: np.ndarray, right: np.ndarray, ks: Sequence[int]) -> np.ndarray:
    """HR@k for each k, NDCG@k for each k, MRR and AUC of one user's ranking: expectations over the order of ties.

    Args:
        scores: (n,) integers, of the candidates.
        right: (n,) bool, at least one True and one False.
        ks: at least 1 each.

    Returns:
        (2 len(ks) + 2,) float64.
    """
    ascending = np.sort(scores)
    # Of each score that a right answer has, the best first: how many have it, and how many candidates are above.
    values, positives = np.unique(scores[right], return_counts=True)
    values, positives = values[::-1], positives[::-1]
    ends = np.searchsorted(ascending, values, side="right")
    above, tied = len(scores) - ends, ends - np.searchsorted(ascending, values)

    k = np.asarray(ks)
    survival = first_rank_survival(int(tied[0]), int(positives[0]))
    # Only the best of these groups matters: if it does not lie whole in the first k, no later one begins there.
    places = np.clip(k - above[0], 0, len(survival) - 1)
    hits = 1 - survival[places]
    reciprocal = -np.diff(survival) @ (1 / (above[0] + np.arange(1.0, len(survival))))

    discount = np.concatenate([[0.0], np.cumsum(1 / np.log2(np.arange(2.0, k.max() + 2)))])  # [r]: of ranks 1 to r
    first, end = (np.minimum(ranks[:, None], k) for ranks in (above, above + tied))
    gains = (positives / tied) @ (discount[end] - discount[first])
    total = positives.sum()
    gains /= discount[np.minimum(k, total)]

    others = len(scores) - total
    rivals = tied - positives
    below = others - rivals - (above - (np.cumsum(positives) - positives))
    auc = positives @ (below + rivals / 2) / (total * others)
    return np.concatenate([hits, gains, [reciprocal, auc]])


@dataclass(frozen=True)
class Measured:
    """Results of a scorer on one set of candidates.

    Attributes:
        users: (u,) int64, who was asked.
        metrics: (u, len(metric_names(ks))) float64.
        first: (u, max(ks)) int64, the first items of each ranking; -1 where there are fewer candidates. Ties are in one
            order for all users, drawn once: who tells nothing apart recommends the same to everybody.
    """

    users: np.ndarray
    metrics: np.ndarray
    first: np.ndarray


def measure(
    data: Interactions, scorer: Scorer, ks: Sequence[int], name: str = "a scorer"
) -> dict[Candidates, Measured]:
    """Ranks every set of candidates for every user who can be asked about it.

    Args:
        data: the interactions.
        scorer: scores the catalogue for some users.
        ks: at least 1 each.
        name: of the scorer, for errors.

    Raises:
        DataError: a score is not finite or too large.
        ValueError: a k is less than 1.
    """
    if any(k < 1 for k in ks) or not ks:
        raise ValueError(f"every k must be at least 1, and one is needed; got {list(ks)}")
    asked = {which: data.asked(which) for which in CANDIDATES}
    chosen = {which: data.candidates(which) for which in CANDIDATES}
    users = np.unique(np.concatenate(list(asked.values())))
    drawn = np.random.default_rng(0).permutation(len(data.items))
    deepest = max(ks)
    metrics: dict[Candidates, list[np.ndarray]] = {which: [] for which in CANDIDATES}
    first: dict[Candidates, list[np.ndarray]] = {which: [] for which in CANDIDATES}
    step = max(1, _BLOCK_SCORES // len(data.items))
    for start in range(0, len(users), step):
        block = users[start : start + step]
        scores = on_grid(scorer(block), name)
        seen, right = data.seen[block].toarray(), data.targets[block].toarray()
        for which in CANDIDATES:
            for row in np.flatnonzero(np.isin(block, asked[which], assume_unique=True)):
                places = np.flatnonzero(chosen[which] & ~seen[row])
                mine = scores[row, places]
                metrics[which].append(user_metrics(mine, right[row, places], ks))
                first[which].append(_first(places, mine, drawn, deepest))
    return {
        which: Measured(
            asked[which],
            np.array(metrics[which]).reshape(-1, 2 * len(ks) + 2),
            np.array(first[which], np.int64).reshape(-1, deepest),
        )
        for which in CANDIDATES
    }


def _first(places: np.ndarray, scores: np.ndarray, drawn: np.ndarray, depth: int) -> np.ndarray:
    """(depth,) the candidates with the highest scores, of equal ones the first that was drawn, padded with -1."""
    unique = scores * len(drawn) - drawn[places]
    best = np.argpartition(-unique, depth - 1)[:depth] if depth < len(places) else np.arange(len(places))
    best = best[np.argsort(-unique[best])]
    return np.pad(places[best], (0, depth - len(best)), constant_values=-1)


def summarise(data: Interactions, measured: Measured, which: Candidates, ks: Sequence[int]) -> dict[str, Any]:
    """A scorer's figures on one set of candidates.

    Args:
        data: the interactions.
        measured: what `measure` says of the set.
        which: the set.
        ks: as of `measure`.

    Returns:
        JSON values. Means over users of what `metric_names` names, and `popularity_lift@k` of each k, each with
        `<name>_interval`, [low, high] of 95 %, bootstrap over users; `coverage@k`, which more users can only raise, so
        that resampled ones say nothing of it. All are None without users, and the lift among cold items, which have no
        popularity. Counts: `users`, and `candidates`.
    """
    names = metric_names(ks)
    chosen = data.candidates(which)
    counts = {"users": len(measured.users), "candidates": int(chosen.sum())}
    of_lists = [f"{name}@{k}" for k in ks for name in ("coverage", "popularity_lift")]
    if not len(measured.users):
        intervals = [f"{name}_interval" for name in (*names, *of_lists) if not name.startswith("coverage")]
        return dict.fromkeys([*names, *of_lists, *intervals]) | counts
    result: dict[str, Any] = dict(zip(names, measured.metrics.mean(axis=0).tolist(), strict=True))
    ends = mean_intervals(measured.metrics)
    result |= {f"{name}_interval": interval for name, interval in zip(names, ends, strict=True)}
    taken = (data.history > 0).astype(np.float64)
    popularity = taken.sum(axis=0) / (data.last >= 0).sum()
    mine = taken[measured.users]
    usual = (mine @ popularity) / mine.sum(axis=1)
    for k in ks:
        lists = measured.first[:, :k]
        there = lists >= 0
        result[f"coverage@{k}"] = len(np.unique(lists[there])) / counts["candidates"]
        offered = np.where(there, popularity[lists], 0).sum(axis=1) / there.sum(axis=1)
        # Over the users that were drawn, the ratio of two means.
        ratios = [(drawn @ offered) / (drawn @ usual) - 1 for drawn in resamples(len(offered))]
        informed = which != "cold"
        result[f"popularity_lift@{k}"] = float(offered.mean() / usual.mean() - 1) if informed else None
        result[f"popularity_lift@{k}_interval"] = quantiles(np.concatenate(ratios)) if informed else None
    return result | counts


def gap_closed(first: np.ndarray, base: np.ndarray, oracle: np.ndarray) -> dict[str, Any]:
    """How much of the way from one scorer to the oracle another one goes: (first - base) / (oracle - base).

    Args:
        first, base, oracle: (u,) a figure of the same users.

    Returns:
        JSON values: `value` of the means, and `interval`, 95 %, bootstrap over users, drawn for all three at once. None
        where the oracle is not above the base.
    """
    values = np.stack([first, base, oracle], axis=1)
    draws = np.concatenate([drawn @ values / len(values) for drawn in resamples(len(values))])
    means = np.concatenate([values.mean(axis=0, keepdims=True), draws])
    with np.errstate(divide="ignore", invalid="ignore"):
        shares = np.where(means[:, 2] > means[:, 1], (means[:, 0] - means[:, 1]) / (means[:, 2] - means[:, 1]), np.nan)
    whole = float(shares[0])
    return {"value": whole if np.isfinite(whole) else None, "interval": quantiles(shares[1:])}
