"""What a recommender is compared with: scorers that hear no music, and an oracle that knows the true tastes.

Of items that nobody has taken in training, popularity, co-occurrence and matrix factorisation know nothing: each gives
all of them the same score, and on cold candidates reaches exactly chance (see the rule on ties in
muser_dist/evaluate/recommend.py). Embeddings of any table, a model's audio or its texts, are scored by
`recommend.from_embeddings`.
"""

from dataclasses import replace
from itertools import product
from typing import TYPE_CHECKING

import numpy as np
from scipy import sparse

from muser_dist.errors import DataError
from muser_dist.evaluate.recommend import Interactions, Scorer, measure

if TYPE_CHECKING:
    from muser_dist.data.corpora.tastes import Truth

FACTORS = 64
SETTINGS = tuple(product((1.0, 10.0), (1.0, 10.0, 100.0)))
"""Of matrix factorisation: its dimensions, and the (alpha, penalty) that are tried."""
HELD_OUT = 0.1
"""Share of training's pairs that decides between these."""


def random(data: Interactions, seed: int = 0) -> Scorer:
    """A random order, another one for each user."""

    def score(users: np.ndarray) -> np.ndarray:
        return np.stack([np.random.default_rng([seed, user]).random(len(data.items)) for user in users])

    return score


def popularity(data: Interactions) -> Scorer:
    """log(1 + number of users who took an item in training), the same for every user; 0 for cold items."""
    takers = np.log1p((data.history > 0).sum(axis=0))

    def score(users: np.ndarray) -> np.ndarray:
        return np.broadcast_to(takers, (len(users), len(takers)))

    return score


def co_occurrence(data: Interactions, queries: sparse.csr_array) -> Scorer:
    """Item-item cosine: the mean, over the items that a user is asked with, of how like each candidate is to them.

    The likeness of two items is the cosine of their columns in the matrix of who took what in training, the number of
    users who took both over the geometric mean of those who took each (Deshpande & Karypis 2004). 0 for cold items.
    The matrix of all pairs is never made.

    Args:
        data: the interactions.
        queries: (U, I), as of `Interactions.queries`.
    """
    taken = (data.history > 0).astype(np.float64)
    takers = taken.sum(axis=0)
    scale = sparse.diags_array(np.where(takers > 0, 1 / np.sqrt(np.maximum(takers, 1)), 0))
    columns = sparse.csr_array(taken @ scale)

    def score(users: np.ndarray) -> np.ndarray:
        asked = queries[users]
        sums = (asked @ columns.T) @ columns
        return sums.toarray() / np.maximum(asked.sum(axis=1), 1)[:, None]

    return score


def matrix_factorisation(data: Interactions, seed: int = 0) -> Scorer:
    """Alternating least squares on implicit feedback (Hu, Koren & Volinsky 2008), by the library implicit.

    How often a user took an item, times alpha, is the confidence; that of other items is 1. Alpha and the penalty
    decide whether this baseline is a strong or a weak one (Rendle et al. 2022), and no value suits all logs: the pair
    out of SETTINGS is taken that has the best NDCG@10 on a tenth of training's (user, item) pairs, held out for that.
    Factors of cold items are 0, and so are their scores.

    Raises:
        ModuleNotFoundError: implicit is not installed.
    """
    pairs = data.history.tocoo()
    held = np.random.default_rng(seed).random(pairs.nnz) < HELD_OUT

    def part(chosen: np.ndarray) -> sparse.csr_array:
        return sparse.csr_array((pairs.data[chosen], (pairs.row[chosen], pairs.col[chosen])), shape=pairs.shape)

    kept = part(~held)
    inner = replace(data, history=kept, seen=data.seen > part(held).astype(bool), targets=part(held).astype(bool))

    def quality(setting: tuple[float, float]) -> float:
        ndcg = measure(inner, _factorise(kept, setting, seed), (10,), "matrix factorisation")["warm"].metrics[:, 1]
        return float(ndcg.mean()) if len(ndcg) else 0.0

    return _factorise(data.history, max(SETTINGS, key=quality), seed)


def _factorise(history: sparse.csr_array, setting: tuple[float, float], seed: int) -> Scorer:
    from implicit.als import AlternatingLeastSquares
    from threadpoolctl import threadpool_limits

    alpha, penalty = setting
    model = AlternatingLeastSquares(factors=FACTORS, alpha=alpha, regularization=penalty, random_state=seed)
    with threadpool_limits(1, "blas"):  # its own threads would each start as many
        model.fit(sparse.csr_matrix(history), show_progress=False)
    of_users, of_items = (np.asarray(factors, np.float64) for factors in (model.user_factors, model.item_factors))

    def score(users: np.ndarray) -> np.ndarray:
        return of_users[users] @ of_items.T

    return score


def oracle(data: Interactions, truth: "Truth", popularity: bool = False) -> Scorer:
    """The true tastes of simulated listeners, which only their maker knows.

    By tastes alone it does not know how popular an item will be, as nobody does of new ones: no model can do better on
    cold items. On warm ones, of which popularity can be learned, tastes times `popularity` are the bound.

    Raises:
        DataError: a user or an item is not among those of the truth.
    """

    def places(names: list[str], known: list[str], what: str) -> np.ndarray:
        place = {name: i for i, name in enumerate(known)}
        if strange := [name for name in names if name not in place]:
            raise DataError(
                f"the truth lacks {len(strange):,} of {len(names):,} {what}, the first is {strange[0]!r}; it must be "
                "the one that was written beside the log"
            )
        return np.array([place[name] for name in names], np.int64)

    of_users, of_items = places(data.users, truth.users, "users"), places(data.items, truth.items, "items")
    prior = np.log(truth.popularity[of_items]) if popularity else 0.0

    def score(users: np.ndarray) -> np.ndarray:
        return truth.affinity(of_users[users])[:, of_items] + prior

    return score
