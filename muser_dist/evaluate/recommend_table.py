"""The table of a recommender: its embeddings beside the baselines, for every query and set of candidates."""

import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from muser_dist.data.corpora.listeners import SIMULATED
from muser_dist.errors import DataError, require
from muser_dist.evaluate import recommend_baselines as baselines
from muser_dist.evaluate.formats import interval, number, share, table
from muser_dist.evaluate.recommend import (
    CANDIDATES,
    QUERIES,
    Interactions,
    Query,
    Scorer,
    from_embeddings,
    gap_closed,
    measure,
    metric_names,
    summarise,
)

if TYPE_CHECKING:
    from muser_dist.data.corpora.tastes import Truth

RANDOM, POPULARITY, CO_OCCURRENCE, FACTORISATION, ORACLE, BOUND = BASELINES = (
    "random",
    "popularity",
    "co-occurrence",
    "matrix factorisation",
    "oracle",
    "oracle with popularity",
)


def recommendation(
    log: pa.Table,
    validation: np.ndarray,
    cold: Collection[str],
    tables: Mapping[str, Mapping[str, np.ndarray]],
    *,
    truth: "Truth | None" = None,
    base: str | None = None,
    ks: Sequence[int] = (10, 50),
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Scores embeddings and baselines on the interactions that a split holds out.

    The catalogue is the items that all tables have.

    Args:
        log, validation, cold: as of `Interactions.of`.
        tables: by name of a model, (D,) embeddings by item; of each table all have the same D.
        truth: of simulated listeners; adds the oracles.
        base: table that the others are compared with: on cold items, how much of the way from it to the oracle does
            each go in NDCG at the first k? The first table by default.
        ks: of HR@k, NDCG@k, coverage@k and popularity_lift@k.
        seed: of the random order and of matrix factorisation.
        progress: called with (scorers measured, scorers).

    Returns:
        JSON values. `simulated`: what the log's metadata say of its making, None for a log of people. `counts`: see
        `Interactions`, and `items_not_in_all_tables`. `rows`: for each scorer, query and set of candidates what
        `summarise` returns, with `method`, `query` and `candidates_are`. Popularity, the random order, matrix
        factorisation and the oracle rank by user; they are listed under "history". `gap_closed`: for all other
        tables and each query `method`, `query`, `metric`, `base`, `value` and `interval`, if there is a truth and cold
        items were asked for. `left_out`: baselines that were not computed, with the reason.

    Raises:
        DataError: there is no table, no common item or no user who can be asked; an embedding has another shape than
            the others or is not finite; or as of `Interactions.of`.
        ConfigError: `base` is no table, or a table has the name of a baseline.
    """
    if not tables:
        raise DataError("there is no table of embeddings to score")
    base = next(iter(tables)) if base is None else base
    require(base in tables, f"base: {base!r} is none of the tables {', '.join(tables)}")
    for name in tables:
        require(name not in BASELINES, f"a table is called {name!r}, as a baseline is; give it another name")
    items = sorted(set.intersection(*(set(of) for of in tables.values())))
    if not items:
        raise DataError(f"the tables {', '.join(tables)} have no item in common")
    data = Interactions.of(log, validation, items, cold)
    if not len(data.asked("all")):
        raise DataError(
            f"none of {len(data.users):,} users has both an item in training and another one in validation; "
            "move the split, or give a longer log"
        )
    arrays = {name: _stack(name, of, items) for name, of in tables.items()}

    scorers = list(_scorers(data, arrays, truth, seed))
    rows: list[dict[str, Any]] = []
    left_out: dict[str, str] = {}
    figure = f"NDCG@{ks[0]}"
    on_cold: dict[tuple[str, Query], np.ndarray] = {}
    for done, (name, query, make) in enumerate(scorers, start=1):
        try:
            scorer = make()
        except ModuleNotFoundError as error:
            left_out[name] = f"{error}; pip install 'muser_dist[recommend]' brings it"
            continue
        for which, measured in measure(data, scorer, ks, name).items():
            labels = {"method": name, "query": query, "candidates_are": which}
            rows.append(labels | summarise(data, measured, which, ks))
            if which == "cold":
                on_cold[name, query] = measured.metrics[:, metric_names(ks).index(figure)]
        if progress is not None:
            progress(done, len(scorers))
    note = (log.schema.metadata or {}).get(SIMULATED)
    return {
        "simulated": None if note is None else json.loads(note),
        "counts": data.counts | {"items_not_in_all_tables": len(set().union(*tables.values())) - len(items)},
        "rows": rows,
        "gap_closed": [] if truth is None else _gaps(on_cold, [name for name in tables if name != base], base, figure),
        "left_out": left_out,
    }


def describe_recommendation(result: Mapping[str, Any]) -> str:
    """What `recommendation` returns as text for a terminal."""
    names = [name for name in result["rows"][0] if name.startswith(("HR@", "NDCG@")) and "interval" not in name]
    k = min(int(name.partition("@")[2]) for name in names)
    columns = [f"NDCG@{k}", "95 % interval", f"HR@{k}", "MRR", "AUC", f"coverage@{k}", f"popularity lift@{k}"]
    parts = [[result["simulated"]["note"]]] if result["simulated"] else []
    for query in QUERIES:
        for which in CANDIDATES:
            chosen = [row for row in result["rows"] if (row["query"], row["candidates_are"]) == (query, which)]
            lines = [
                [
                    row["method"],
                    share(row[f"NDCG@{k}"]),
                    interval(row[f"NDCG@{k}_interval"]),
                    *(share(row[name]) for name in (f"HR@{k}", "MRR", "AUC", f"coverage@{k}")),
                    _signed(row[f"popularity_lift@{k}"]),
                ]
                for row in chosen
            ]
            if chosen[0]["users"]:
                who = f"{chosen[0]['users']:,} users, {chosen[0]['candidates']:,} items"
                parts.append([f"by {query}, {which} items ({who})", *table(["", *columns], lines)])
    gaps = [
        [
            f"{gap['method']}, by {gap['query']}",
            _signed(gap["value"]),
            interval(gap["interval"]),
        ]
        for gap in result["gap_closed"]
    ]
    if gaps:
        first = result["gap_closed"][0]
        parts.append(
            table(
                [
                    f"{first['metric']} of cold items, of the way from {first['base']} to the oracle",
                    "",
                    "95 % interval",
                ],
                gaps,
            )
        )
    parts.append([f"not computed: {name} ({reason})" for name, reason in result["left_out"].items()])
    return "\n\n".join("\n".join(part) for part in parts if part)


def _signed(value: Any) -> str:
    x = number(value)
    return f"{x:+.3f}" if np.isfinite(x) else "–"


def _scorers(
    data: Interactions, arrays: Mapping[str, np.ndarray], truth: "Truth | None", seed: int
) -> Iterator[tuple[str, Query, Callable[[], Scorer]]]:
    """Name, query and maker of each row of the table."""
    by_history, by_last = (data.queries(query) for query in QUERIES)
    yield RANDOM, "history", lambda: baselines.random(data, seed)
    yield POPULARITY, "history", lambda: baselines.popularity(data)
    yield CO_OCCURRENCE, "history", lambda: baselines.co_occurrence(data, by_history)
    yield FACTORISATION, "history", lambda: baselines.matrix_factorisation(data, seed)
    for name, array in arrays.items():
        yield name, "history", partial(from_embeddings, array, by_history)
    if truth is not None:
        yield ORACLE, "history", lambda: baselines.oracle(data, truth)
        yield BOUND, "history", lambda: baselines.oracle(data, truth, popularity=True)
    yield CO_OCCURRENCE, "last item", lambda: baselines.co_occurrence(data, by_last)
    for name, array in arrays.items():
        yield name, "last item", partial(from_embeddings, array, by_last)


def _stack(name: str, of: Mapping[str, np.ndarray], items: Sequence[str]) -> np.ndarray:
    """(I, D) float64."""
    rows = [np.asarray(of[item], np.float64) for item in items]
    for item, row in zip(items, rows, strict=True):
        if row.ndim != 1 or row.shape != rows[0].shape:
            raise DataError(
                f"{name}: the embedding of {item!r} has the shape {row.shape}, that of {items[0]!r} {rows[0].shape}; "
                "one vector of the same length is needed for each item"
            )
        if not np.isfinite(row).all():
            raise DataError(f"{name}: the embedding of {item!r} is not finite; leave the item out, or encode it again")
    return np.stack(rows)


def _gaps(
    on_cold: Mapping[tuple[str, Query], np.ndarray], names: Sequence[str], base: str, figure: str
) -> list[dict[str, Any]]:
    return [
        {"method": name, "query": query, "metric": figure, "base": base}
        | gap_closed(on_cold[name, query], on_cold[base, query], on_cold[ORACLE, "history"])
        for name in names
        for query in QUERIES
        if len(on_cold[name, query])
    ]
