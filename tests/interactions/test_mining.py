"""Pairs out of logs: the pipeline over files, in several pieces and partitions, next to the definition."""

import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from muser_dist.errors import ConfigError, DataError
from muser_dist.interactions import mining, readers
from muser_dist.interactions.log import LogLayout
from muser_dist.interactions.mining import INTERACTIONS, NAMES, MiningConfig, mine
from muser_dist.interactions.reduce import reduce_items
from muser_dist.interactions.split import SplitConfig
from tests.interactions import reference
from tests.interactions.cases import items_of, pairs_of, phases_of, run, write_log

START = 1_000_000_000
LATEST = START + 10_000
TIMED = LogLayout("user", ("item",), time="time", signal_column="signal", value="value")
PLAYLISTS = LogLayout("user", ("item",), position="time", signal_column="signal", value="value")
UNORDERED = LogLayout("user", ("item",), signal_column="signal", value="value")


USERS, ODD_USERS = ["ann", "bob", "zoë", "max", "max"], ["", None]
ITEMS, ODD_ITEMS = [f"song {i}" for i in range(8)], ["", "nobody's"]
CLOCK, ODD_CLOCK = [str(START + s) for s in range(20)], ["", "noon", "0", "-5", str(LATEST + 1), "9" * 18]
PLACES, ODD_PLACES = [str(s) for s in range(20)], ["", "x", "-1"]
SIGNALS, ODD_SIGNALS = ["play", "like", "like"], ["skip", ""]
VALUES, ODD_VALUES = ["10", "60.5", "90"], ["", "loud"]


def random_log(seed, size, order):
    """Rows of which about a third have something odd, and some come twice."""
    draw = np.random.default_rng(seed)
    columns = ((USERS, ODD_USERS), (ITEMS, ODD_ITEMS), order, (SIGNALS, ODD_SIGNALS), (VALUES, ODD_VALUES))
    rows = [tuple(draw.choice(odd if draw.random() < 0.07 else good) for good, odd in columns) for _ in range(size)]
    rows += rows[: draw.integers(0, size // 10 + 1)]
    return [tuple(None if cell is None else str(cell) for cell in row) for row in rows]


def logs(*order):
    """Logs of any size, and small ones in which anything may be."""
    cells = [good + odd for good, odd in ((USERS, ODD_USERS), (ITEMS, ODD_ITEMS), order, (SIGNALS, []), (VALUES, []))]
    anything = st.lists(st.tuples(*map(st.sampled_from, cells)), max_size=10)
    some, many = (
        st.builds(random_log, st.integers(0, 2**32), st.integers(*sizes), st.just(order))
        for sizes in ((0, 40), (60, 150))
    )
    return st.one_of(anything, some, many)


CONFIGS = st.builds(
    MiningConfig,
    rule=st.sampled_from(["explicit", "cooccurrence"]),
    signals=st.sampled_from([("play", "like"), ("like",), ("play",)]),
    triggers=st.sampled_from([("play",), ("play", "skip")]),
    min_value=st.just({}),
    window=st.sampled_from([20, 3, 1, 0]),
    partners=st.integers(1, 4),
    max_events=st.sampled_from([1000, 10, 3]),
    min_support=st.sampled_from([1, 2]),
    popularity=st.sampled_from([0.0, 0.5, 1.0]),
    per_trigger=st.sampled_from([1, 3, 100]),
)
SHARES = st.sampled_from([0.0, 0.3])
SPLIT = st.builds(
    SplitConfig,
    val_users=SHARES,
    test_users=SHARES,
    val_items=SHARES,
    test_items=SHARES,
    val_from=st.sampled_from(["", str(START + 8)]),
    test_from=st.sampled_from(["", str(START + 15)]),
    seed=st.integers(0, 3),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("mining")


@settings(max_examples=80)
@given(
    log=st.one_of(
        st.tuples(st.just(TIMED), logs(CLOCK, ODD_CLOCK)),
        st.tuples(st.just(PLAYLISTS), logs(PLACES, ODD_PLACES)),
        st.tuples(st.just(UNORDERED), logs([None], [None])),
    ),
    config=CONFIGS,
    minimum=st.sampled_from([None, 50.0]),
    split=SPLIT,
    ending=st.sampled_from(["tsv", "jsonl", "parquet"]),
    partitions=st.sampled_from([1, 2, 8]),
    piece_bytes=st.sampled_from([400, 3000]),
    chunk=st.sampled_from([1, 8, 1 << 20]),
    known=st.booleans(),
)
def test_the_pipeline_is_the_definition(
    folder, log, config, minimum, split, ending, partitions, piece_bytes, chunk, known
):
    layout, rows = log
    if minimum is not None:
        config = MiningConfig(**vars(config) | {"min_value": {config.signals[-1]: minimum}})
    if layout is not TIMED:
        split = SplitConfig(**vars(split) | {"val_from": "", "test_from": ""})
    if layout is UNORDERED:
        config = MiningConfig(**vars(config) | {"rule": "cooccurrence"})
    items = {f"song {i}" for i in range(8)}
    (folder / "items.txt").write_text("\n".join(sorted(items)))
    out = folder / "out"
    shutil.rmtree(out, ignore_errors=True)
    path = write_log(folder / f"log.{ending}", rows)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(readers, "PIECE_BYTES", piece_bytes)
        patch.setattr(readers, "PIECE_ROWS", 50)
        patch.setattr(mining, "_CHUNK_EVENTS", chunk)
        latest = LATEST if layout is TIMED else None
        phases = phases_of(
            [path], out, layout, config, split, latest, str(folder / "items.txt") if known else "", partitions
        )
        expected = reference.mine(rows, layout, config, split, latest, items if known else None)
        if not expected.used:
            with pytest.raises(DataError, match="could be used"):
                run(phases)
            return
        summary = run(phases)
    assert summary["rows"] == len(rows) == summary["used"] + sum(summary["left_out"].values())
    assert summary["left_out"] == expected.left_out
    assert {name: number for name, number in summary["interactions"].items() if number} == expected.used
    pairs = {(row["split"], row["trigger"], row["item"]): row for row in pairs_of(out)}
    assert {key: row["support"] for key, row in pairs.items()} == {k: v[0] for k, v in expected.pairs.items()}
    for key, (_, weight) in expected.pairs.items():
        assert pairs[key]["weight"] == pytest.approx(weight, rel=1e-6)
    counted = Counter(row["split"] for row in pairs.values())
    assert {name: number for name, number in summary["pairs"].items() if number} == counted


# --- What it means, on logs that one can read ---


def test_a_like_after_a_play(tmp_path):
    rows = [
        ("ann", "a", START, "play"),
        ("ann", "b", START + 60, "play"),
        ("ann", "b", START + 90, "like"),
        ("bob", "a", START, "play"),
        ("bob", "b", START + 1800, "like"),
        ("cid", "a", START, "play"),
        ("cid", "b", START + 1801, "like"),  # too late
        ("eve", "b", START, "like"),
        ("eve", "a", START + 5, "play"),  # the other way round
    ]
    path = write_log(tmp_path / "log.tsv", [(u, i, str(t), s, "") for u, i, t, s in rows])
    config = MiningConfig("explicit", signals=("like",), triggers=("play",), popularity=1.0)
    run(phases_of([path], tmp_path / "out", TIMED, config))
    (pair,) = pairs_of(tmp_path / "out")
    # a was played by four, b liked by four, two of them after a.
    assert pair == {"trigger": "a", "item": "b", "weight": 2 / 16, "support": 2, "split": "train"}
    assert items_of(tmp_path / "out")["b"] == {
        "item": "b",
        "split": "train",
        "triggers_train": 1,
        "preferences_train": 4,
    }


def test_of_repeats_the_one_that_counts_stays(tmp_path):
    """A play that is too short to be a preference is a trigger all the same, and no reason to forget the long one."""
    rows = [("ann", "a", START, "90"), ("ann", "b", START + 9, "10"), ("ann", "b", START + 9, "90")]
    config = MiningConfig("explicit", ("play",), ("play",), {"play": 50}, min_support=1)
    for number, order in enumerate(([0, 1, 2], [2, 1, 0])):
        cells = [(user, item, str(time), "play", value) for user, item, time, value in (rows[i] for i in order)]
        path = write_log(tmp_path / "log.tsv", cells)
        summary = run(phases_of([path], tmp_path / str(number), TIMED, config))
        assert summary["left_out"] == {"exact repeat": 1}
        assert [(row["trigger"], row["item"]) for row in pairs_of(tmp_path / str(number))] == [("a", "b")]


def test_playlists_pair_neighbours_in_both_directions(tmp_path):
    path = tmp_path / "playlists.jsonl"
    path.write_text('{"id": 1, "songs": ["a", "b", "c"]}\n{"id": 2, "songs": ["b", "a"]}\n{"id": 3, "songs": []}\n')
    layout = LogLayout("id", ("songs",), lists=True)
    summary = run(phases_of([path], tmp_path / "out", layout, MiningConfig(window=1, min_support=1)))
    found = {(row["trigger"], row["item"]): (row["support"], row["weight"]) for row in pairs_of(tmp_path / "out")}
    assert found.keys() == {("a", "b"), ("b", "a"), ("b", "c"), ("c", "b")}
    assert found["a", "b"] == found["b", "a"] == (2, 1.0)
    assert found["b", "c"] == pytest.approx((1, 0.5**0.5))
    assert (summary["rows"], summary["left_out"]) == (6, {"empty history": 1})
    assert summary["users"] == summary["users_with_pairs"] == {"train": 2}


def test_a_user_with_a_million_plays_counts_once_and_is_bounded():
    """Times that repeat, items that repeat, and one ordinary user beside."""
    generator = np.random.default_rng(0)
    plays = 1_000_000
    table = pa.table(
        [
            np.append(np.full(plays, 7, np.uint64), np.full(2, 8, np.uint64)),
            np.append(generator.integers(0, 50, plays), [3, 4]).astype(np.uint64),
            np.append(START + np.arange(plays), [START, START + 1]),
            np.zeros(plays + 2, np.int8),
            np.full(plays + 2, 2, np.int8),
        ],
        schema=INTERACTIONS,
    )
    mined = mine(table, MiningConfig(max_events=200_000), SplitConfig(), ordered=True)
    assert mined.reasons == {"beyond max_events": 800_000}
    assert mined.used == {"train": 200_002} and mined.users == {"train": 2}
    added = mined.supports.group_by(["trigger", "item"]).aggregate([("support", "sum")]).to_pylist()
    supports = {(row["trigger"], row["item"]): row["support_sum"] for row in added}
    assert len(supports) == 50 * 49 and supports.pop((3, 4)) == supports.pop((4, 3)) == 2
    assert set(supports.values()) == {1}


def test_two_items_of_one_hash_are_an_error():
    names = pa.table([[1, 2, 2], ["a", "b", "c"]], schema=NAMES)
    with pytest.raises(DataError, match="'b' and 'c' have the same hash"):
        reduce_items(names, mining.COUNTS.empty_table(), SplitConfig())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"signals": ()}, "mining.signals is empty"),
        ({"rule": "explicit", "triggers": ()}, "mining.triggers is empty"),
        ({"partners": 0}, "mining.partners is 0"),
        ({"window": -1}, "mining.window is -1"),
        ({"popularity": 1.5}, "mining.popularity is 1.5"),
        ({"min_value": {"like": 1.0}}, "'like' is not among mining.signals"),
    ],
)
def test_settings_that_cannot_be(change, message):
    with pytest.raises(ConfigError, match=message):
        MiningConfig(**change)


def test_settings_that_the_log_cannot_give(tmp_path: Path):
    path = write_log(tmp_path / "log.tsv", [("ann", "a", "1", "play", "")])
    with pytest.raises(ConfigError, match="needs to know what came first"):
        phases_of([path], tmp_path / "out", UNORDERED, MiningConfig("explicit"))
    with pytest.raises(ConfigError, match="need times"):
        phases_of([path], tmp_path / "out", PLAYLISTS, split=SplitConfig(val_from="2000-01-01"))
    with pytest.raises(ConfigError, match="power of two"):
        phases_of([path], tmp_path / "out", TIMED, partitions=3)
