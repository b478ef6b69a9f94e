"""Held-out interactions never touch training."""

from contextlib import nullcontext

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from muser_dist.errors import ConfigError
from muser_dist.interactions.ids import hash_name, hash_names
from muser_dist.interactions.mining import INTERACTIONS, MiningConfig, mine
from muser_dist.interactions.split import SplitConfig, of_interactions, of_items, of_users, seconds
from tests.interactions import reference

NAMES = pa.array([f"song {i}" for i in range(20_000)])
SPLIT = SplitConfig(val_users=0.1, test_users=0.2, val_items=0.1, test_items=0.2, val_from="500", test_from="800")


def interactions(seed, rows=400, users=20, items=30):
    draw = np.random.default_rng(seed)
    user = hash_names(pa.array([f"user {i}" for i in range(users)]))[draw.integers(0, users, rows)]
    item = hash_names(NAMES[:items])[draw.integers(0, items, rows)]
    columns = [user, item, draw.integers(0, 1000, rows), np.zeros(rows, np.int8), np.full(rows, 3, np.int8)]
    return pa.table(columns, schema=INTERACTIONS)


def level_of(table, split=SPLIT):
    return of_interactions(split, *(table[name].to_numpy() for name in ("user", "item", "time")))


def as_set(table):
    return sorted(map(tuple, (row.values() for row in table.to_pylist())))


@pytest.mark.parametrize("rule", ["explicit", "cooccurrence"])
@settings(max_examples=25)
@given(seed=st.integers(0, 2**32), later=st.sampled_from([0, 1]))
def test_pairs_are_the_same_as_if_what_is_held_out_had_never_been_logged(rule, seed, later):
    table, config = interactions(seed), MiningConfig(rule, window=100, partners=3, max_events=15)
    level = level_of(table)
    assert set(level.tolist()) == {0, 1, 2}
    whole = mine(table, config, SPLIT, ordered=True)
    before = mine(table.filter(pa.array(level <= later)), config, SPLIT, ordered=True)
    for name in ("supports", "counts"):
        found, expected = (
            as_set(t.filter(pa.array(t["split"].to_numpy() <= later)))
            for t in (getattr(whole, name), getattr(before, name))
        )
        assert found == expected and found


def test_no_held_out_user_item_or_time_is_in_training():
    table = interactions(0, rows=20_000, users=300, items=300)
    level = level_of(table)
    user, item, time = (table[name].to_numpy() for name in ("user", "item", "time"))
    for now in (1, 2):
        here, earlier = level == now, level < now
        assert here.sum() > 500
        cold = np.unique(item[of_items(SPLIT, item) == now])
        held_out = np.unique(user[of_users(SPLIT, user) == now])
        assert len(cold) and len(held_out)
        assert not np.isin(item[earlier], cold).any() and not np.isin(user[earlier], held_out).any()
    assert time[level == 0].max() < 500 and time[level <= 1].max() < 800
    mined = mine(table, MiningConfig(min_support=1), SPLIT, ordered=True)
    train = mined.supports.filter(pa.array(mined.supports["split"].to_numpy() == 0))
    for column in ("trigger", "item"):
        assert len(train) and not of_items(SPLIT, train[column].to_numpy()).any()


def test_shares_and_draws():
    items = hash_names(NAMES)
    drawn = of_items(SPLIT, items)
    assert np.bincount(drawn) / len(items) == pytest.approx([0.7, 0.1, 0.2], abs=0.02)
    expected = [reference.drawn(name, "item", 0.1, 0.2, 0) for name in NAMES[:500].to_pylist()]
    assert drawn[:500].tolist() == expected
    assert (of_items(SplitConfig(val_items=0.1, test_items=0.2, seed=1), items) != drawn).any()
    # Users and items of the same names are drawn apart, and a larger share keeps whom a smaller one has drawn.
    assert (of_users(SPLIT, items) != drawn).mean() > 0.2
    more = of_items(SplitConfig(val_items=0.3, test_items=0.2), items)
    assert (more[drawn > 0] == drawn[drawn > 0]).all()


def test_names_have_the_same_number_everywhere():
    assert hash_name("zoë") == reference.hash_of("zoë") == hash_names(pa.array(["zoë"]))[0]


@pytest.mark.parametrize(
    ("when", "level"), [("1970-01-01", 1), ("1970-01-01T00:16:40", 1), ("1970-01-01T01:16:40+01:00", 1), ("1001", 0)]
)
def test_moments(when, level):
    one = np.zeros(1, np.uint64)
    assert of_interactions(SplitConfig(val_from=when), one, one, np.array([1000])) == level


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"val_users": 0.5, "test_users": 0.5}, "some must be left"),
        ({"val_items": -0.1}, r"split\.val_items is -0\.1"),
        ({"val_from": "yesterday"}, "'yesterday' is neither a date"),
        ({"val_from": "--5"}, "'--5' is neither a date"),
        ({"val_from": "2001-01-01", "test_from": "2000-01-01"}, r"must be before split\.test_from"),
        ({"seed": -1}, "must not be negative"),
    ],
)
def test_settings_that_cannot_be(change, message):
    with pytest.raises(ConfigError, match=message):
        SplitConfig(**change)


def test_eight_digits_are_a_date():
    assert [seconds(when, "") for when in ("20090301", "2009-03-01", "1235865600")] == [1_235_865_600] * 3
    assert [seconds(when, "") for when in ("25000000", "020090301", "-20090301")] == [
        25_000_000,
        20_090_301,
        -20_090_301,
    ]


@pytest.mark.parametrize("option", ["val_from", "test_from"])
@pytest.mark.parametrize(
    ("when", "relative", "message"),
    [
        ("25000000", False, r"'25000000' is before 1990"),
        ("1980-01-01", False, r"'1980-01-01' is before 1990"),
        ("2001-09-10", False, r"in the future"),
        ("999999999000", False, r"not milliseconds"),
        ("2009-03-01", True, r"'2009-03-01' is a date, and the log's times"),
        ("20090301", True, r"'20090301' is a date, and the log's times"),
        ("20000101", False, ""),
        ("25000000", True, ""),
        ("020090301", True, ""),
        ("5", True, ""),
    ],
)
def test_times_that_no_log_has(option, when, relative, message):
    split = SplitConfig(**{option: when})
    expected = pytest.raises(ConfigError, match=rf"split\.{option}: .*{message}") if message else nullcontext()
    with expected:
        split.check_times(relative, None if relative else 10**9)
