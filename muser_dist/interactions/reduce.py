"""Adds up what was counted for some items: the weights of pairs, and which of them are worth keeping.

The weight of a pair (a, b) of this support is

    support / (users(a) users(b))^popularity

with the users who have a as a trigger and b as a preference: for popularity 0 the support, for 1/2 the cosine of two
items' users, for 1 the lift, which orders pairs as pointwise mutual information does.
"""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from muser_dist.errors import DataError
from muser_dist.interactions.mining import MiningConfig
from muser_dist.interactions.split import SPLITS, SplitConfig, of_items

PAIRS = pa.schema(
    [
        ("trigger", pa.string()),
        ("item", pa.string()),
        ("weight", pa.float32()),
        ("support", pa.int32()),
        ("split", pa.string()),
    ]
)
"""What comes out. Of co-occurrence both directions, but for those that `per_trigger` leaves out. A pair
may be in several splits: other listeners had it, or it came again later. None with a cold item is in train."""


def items_schema(levels: Sequence[int]) -> pa.Schema:
    """Of `reduce_items`: id (the number), item (the name), split (the earliest that it can be in; others than train are
    cold), and for each split the users who have it as a trigger and as a preference, then or before."""
    counts = [(f"{kind}_{SPLITS[now]}", pa.int64()) for now in levels for kind in ("triggers", "preferences")]
    return pa.schema([("id", pa.uint64()), ("item", pa.string()), ("split", pa.string()), *counts])


def reduce_items(names: pa.Table, counts: pa.Table, split: SplitConfig) -> pa.Table:
    """All about some items, each once, by number.

    Args:
        names: `NAMES`; an item may occur several times.
        counts: `COUNTS`; an item may occur several times.
        split: what is held out.

    Returns:
        rows of `items_schema`.

    Raises:
        DataError: two items have the same number, so that the pairs of one would be taken for the other's.
    """
    named = names.group_by(["item", "name"], use_threads=False).aggregate([]).sort_by("item")
    ids, text = named["item"].to_numpy(), named["name"]
    if len(double := np.flatnonzero(ids[1:] == ids[:-1])):
        first, second = text[int(double[0])].as_py(), text[int(double[0]) + 1].as_py()
        raise DataError(f"the items {first!r} and {second!r} have the same hash; rename one of them in the log")
    added = counts.group_by(["item", "split"], use_threads=False).aggregate(
        [("triggers", "sum"), ("preferences", "sum")]
    )
    level = added["split"].to_numpy()
    columns = [named["item"], text, pa.array(np.array(SPLITS, object)[of_items(split, ids)], pa.string())]
    for now in split.levels:
        of_level = added.filter(pa.array(level == now))
        place = np.searchsorted(ids, of_level["item"].to_numpy())
        for kind in ("triggers", "preferences"):
            users = np.zeros(len(ids), np.int64)
            users[place] = of_level[f"{kind}_sum"].to_numpy()
            columns.append(users)
    return pa.table(columns, schema=items_schema(split.levels))


def reduce_pairs(supports: pa.Table, items: pa.Table, config: MiningConfig, split: SplitConfig) -> pa.Table:
    """The pairs of some triggers that are frequent enough, with their weights; each trigger's best ones.

    Args:
        supports: `SUPPORTS` of these triggers; a pair may occur several times.
        items: of `reduce_items`, all items, sorted by id.
        config: what is frequent enough, and how pairs are weighed.
        split: what is held out.

    Returns:
        `PAIRS`, by split, then by trigger in the order of numbers, then the largest weight first; of equal weight and
        support, in the order of the items' numbers.
    """
    keys = ["trigger", "item", "split"]
    added = supports.group_by(keys, use_threads=False).aggregate([("support", "sum")])
    trigger, item, level, support = (added[name].to_numpy() for name in (*keys, "support_sum"))
    enough = (support >= config.min_support) | (level > 0)
    trigger, item, level, support = (a[enough] for a in (trigger, item, level, support))

    ids = items["id"].to_numpy()
    first, second = np.searchsorted(ids, trigger), np.searchsorted(ids, item)
    weight = np.zeros(len(trigger))
    for now in split.levels:
        here = level == now
        users = items[f"triggers_{SPLITS[now]}"].to_numpy()[first[here]].astype(np.float64)
        users = users * items[f"preferences_{SPLITS[now]}"].to_numpy()[second[here]]
        weight[here] = support[here] / users**config.popularity

    order = np.lexsort((item, -support, -weight, trigger, level))
    change = np.ones(len(order), bool)
    change[1:] = (np.diff(trigger[order]) != 0) | (np.diff(level[order]) != 0)
    first_place = np.maximum.accumulate(np.where(change, np.arange(len(order)), 0))
    order = order[np.arange(len(order)) - first_place < config.per_trigger]
    return pa.table(
        [
            items["item"].take(pa.array(first[order])),
            items["item"].take(pa.array(second[order])),
            weight[order].astype(np.float32),
            support[order].astype(np.int32),
            pa.array(np.array(SPLITS, object)[level[order]], pa.string()),
        ],
        schema=PAIRS,
    )
