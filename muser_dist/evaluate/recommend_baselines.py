"""What a recommender is compared with: scorers that hear no music, and an oracle that knows the true tastes.

Of items that nobody has taken in training, popularity, co-occurrence and matrix factorisation know nothing: each gives
all of them the same score, and on cold candidates reaches exactly chance (see the rule on ties in
muser_dist/evaluate/recommend.py). Embeddings of any table, a model's audio or its texts, are scored by
`recommend.from_embeddings`.
"""

from typing import TYPE_CHECKING

import numpy as np
from scipy import sparse

from muser_dist.errors import DataError
from muser_dist.evaluate.recommend import Interactions, Scorer

if TYPE_CHECKING:
    from muser_dist.data.corpora.tastes import Truth

FACTORS = 64
ALPHA = 40.0
"""Of matrix factorisation: its dimensions, and how much a listen adds to confidence, as in the paper."""


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

    Confidence is ALPHA times the number of times that a user took an item; other settings are the library's defaults.
    Factors of cold items are 0, and so are their scores.

    Raises:
        ModuleNotFoundError: implicit is not installed.
    """
    from implicit.als import AlternatingLeastSquares
    from threadpoolctl import threadpool_limits

    model = AlternatingLeastSquares(factors=FACTORS, alpha=ALPHA, random_state=seed)
    with threadpool_limits(1, "blas"):  # its own threads would each start as many
        model.fit(sparse.csr_matrix(data.history), show_progress=False)
    of_users, of_items = (np.asarray(factors, np.float64) for factors in (model.user_factors, model.item_factors))

    def score(users: np.ndarray) -> np.ndarray:
        return of_users[users] @ of_items.T

    return score


def oracle(data: Interactions, truth: "Truth") -> Scorer:
    """The true tastes of simulated listeners, which only their maker knows: no model can do better in the long run.

    It does not know how popular an item will be, as nobody does of new ones.

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

    def score(users: np.ndarray) -> np.ndarray:
        return truth.affinity(of_users[users])[:, of_items]

    return score
