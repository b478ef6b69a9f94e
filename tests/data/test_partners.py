"""Pairs of songs: from a file to row numbers, through the plan, to chunks."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from muser_dist.config import ObjectiveConfig, PairConfig
from muser_dist.data.config import SourceConfig
from muser_dist.data.partners import Found, Partners, find_partners
from muser_dist.data.pipeline import training_reader
from muser_dist.data.plan import Plan
from muser_dist.data.shards import ShardIndex
from muser_dist.errors import ConfigError, DataError
from muser_dist.train.preflight import check_settings
from tests.shardmaker import sample, write_shard, write_shards
from tests.small import LOCAL, index_of, small_config

SONGS = (PairConfig("audio", "text"), PairConfig("audio", "partner"), PairConfig("audio", "fused"))

MODEL = replace(small_config().model, spectrogram=None)


def write_pairs(path: Path, pairs: list[tuple[str, str, float]]) -> Path:
    columns = zip(*pairs, strict=True) if pairs else ((), (), ())
    names = ("trigger", "item", "weight")
    pq.write_table(pa.table({name: pa.array(list(values)) for name, values in zip(names, columns, strict=True)}), path)
    return path


def silent(done: int, of: int) -> None:
    pass


def partners_of(folder: Path, rows: list[int], pairs: list[tuple[int, int, float]]) -> Partners:
    """Of shards that hold "0", "1", ... as keys; nothing of them but the headers is read."""
    start = 0
    for number, count in enumerate(rows):
        write_shard(folder / f"s-{number}.tar", [(str(i), {"json": b"{}"}) for i in range(start, start + count)])
        start += count
    path = write_pairs(folder / "pairs.parquet", [(str(a), str(b), w) for a, b, w in pairs])
    find_partners(str(path), index_of(f"{folder}/s-*.tar"), LOCAL, folder / "partners", silent)
    return Partners(folder / "partners")


def test_pairs_that_come_again_count_the_same_in_every_order(tmp_path):
    write_shard(tmp_path / "a-0.tar", [(str(i), {"json": b"{}"}) for i in range(20)])
    rng, drawn = np.random.default_rng(0), []
    pairs = [(str(i % 7), str(7 + i % 11), float(10.0 ** rng.uniform(-8, 8))) for i in range(2000)]
    for again in range(3):
        path = write_pairs(tmp_path / f"{again}.parquet", [pairs[i] for i in rng.permutation(len(pairs))])
        find_partners(str(path), index_of(f"{tmp_path}/a-*.tar"), LOCAL, tmp_path / f"p{again}", silent)
        drawn.append((tmp_path / f"p{again}" / "cumulative.npy").read_bytes())
    assert drawn[0] == drawn[1] == drawn[2]


def test_every_pair_is_counted(tmp_path):
    write_shard(tmp_path / "a-0.tar", [(key, {"json": b"{}"}) for key in ("x", "y", "z", "y")])
    pairs = [("x", "y", 1.0), ("x", "z", 3.0), ("x", "y", 1.0), ("y", "gone", 1.0), ("gone", "x", 1.0)]
    pairs += [("z", "z", 1.0), ("z", "x", float("nan")), ("z", "x", 0.0), ("y", "x", -1.0)]
    path = write_pairs(tmp_path / "pairs.parquet", pairs)
    found = find_partners(str(path), index_of(f"{tmp_path}/a-*.tar"), LOCAL, tmp_path / "p", silent)
    assert found == Found(pairs=2, triggers=1, unknown=2, broken=4, repeated_keys=1)
    partners = Partners(tmp_path / "p")
    assert partners.triggers.tolist() == [1]
    assert partners.with_partner(0, 4).tolist() == [0]
    assert partners.likeliest(0, 4).tolist() == [2, 1, -1, -1]  # z weighs 3, y 1 + 1
    assert partners.likeliest(3, 2).tolist() == [-1, -1]
    drawn = [partners.draw(0, u) for u in (np.arange(1000) + 0.5) / 1000]
    assert drawn.count(2) == 600 and drawn.count(1) == 400


def test_pairs_that_are_held_out_are_not_trained_on(tmp_path):
    index = index_of(write_shards(tmp_path / "shards", [3]))
    names = [f"piece{i:05d}" for i in range(3)]
    columns = {"trigger": names, "item": names[1:] + names[:1], "weight": [1.0] * 3, "split": ["train", "val", "test"]}
    pq.write_table(pa.table(columns), tmp_path / "pairs.parquet")
    found = find_partners(str(tmp_path / "pairs.parquet"), index, LOCAL, tmp_path / "p", silent)
    assert (found.pairs, found.triggers, found.unknown) == (1, 1, 0)


def test_pairs_do_not_depend_on_an_outage(tmp_path):
    for number in range(2):
        write_shard(tmp_path / f"s-{number}.tar", [(str(number), {"json": b"{}"})])
    path, index = write_pairs(tmp_path / "pairs.parquet", [("0", "1", 1.0)]), index_of(f"{tmp_path}/s-*.tar")
    (tmp_path / "s-1.tar").unlink()
    with pytest.raises(DataError, match=r"s-1\.tar cannot be read"):
        find_partners(str(path), index, LOCAL, tmp_path / "partners", silent)


def test_files_that_are_no_pairs_say_so(tmp_path):
    index = index_of(write_shards(tmp_path / "shards", [3]))
    with pytest.raises(DataError, match=r"data.pairs: .*none.parquet"):
        find_partners(str(tmp_path / "none.parquet"), index, LOCAL, tmp_path / "p", silent)
    pq.write_table(pa.table({"trigger": ["a"], "other": ["b"]}), tmp_path / "wrong.parquet")
    with pytest.raises(DataError, match=r"wrong.parquet.*item.*jobs/mine_pairs.py"):
        find_partners(str(tmp_path / "wrong.parquet"), index, LOCAL, tmp_path / "p", silent)
    path = write_pairs(tmp_path / "strange.parquet", [("a", "b", 1.0)])
    with pytest.raises(DataError, match="none of its 1 pairs is of two songs of the training shards"):
        find_partners(str(path), index, LOCAL, tmp_path / "p", silent)


@given(st.lists(st.integers(0, 6), min_size=2, max_size=5).filter(lambda rows: sum(rows) >= 2), st.data())
@settings(max_examples=25)
def test_each_song_with_a_partner_comes_once_a_pass_beside_one(tmp_path_factory, rows, data):
    total = sum(rows)
    some = st.tuples(st.integers(0, total - 1), st.integers(0, total - 1), st.sampled_from([0.5, 1.0, 4.0]))
    pairs = data.draw(st.lists(some.filter(lambda pair: pair[0] != pair[1]), min_size=1, max_size=12))
    partners = partners_of(tmp_path_factory.mktemp("pairs"), rows, pairs)
    likes = {trigger: {b for a, b, _ in pairs if a == trigger} for trigger, _, _ in pairs}
    sources = [np.array(rows)]
    cut = data.draw(st.integers(1, len(rows) - 1))
    if sum(map(bool, (set(range(sum(rows[:cut]))) & set(likes), set(range(sum(rows[:cut]), total)) & set(likes)))) == 2:
        sources = data.draw(st.sampled_from([sources, [np.array(rows[:cut]), np.array(rows[cut:])]]))
    plan = Plan(sources, [1.0] * len(sources), 8, 5, 2, shuffle=True, partners=partners)
    part = plan.rows(0, 48)
    for trigger, partner in zip(part.index[::2].tolist(), part.index[1::2].tolist(), strict=True):
        assert partner in likes[trigger]
    np.testing.assert_array_equal(plan.first[part.shard] + part.row, part.index)
    np.testing.assert_array_equal(part.source, np.searchsorted(plan._first_of_source, part.index, side="right") - 1)
    if len(sources) == 1:
        triggers = part.index[::2].tolist()
        whole = len(triggers) // len(likes) * len(likes)
        for start in range(0, whole, len(likes)):
            assert sorted(triggers[start : start + len(likes)]) == sorted(likes)
    start = 2 * data.draw(st.integers(0, 20))
    np.testing.assert_array_equal(plan.rows(start, 48).index, part.index[start:])


def test_chunks_hold_a_song_beside_its_partner_with_flags_of_the_other(tmp_path):
    # Song 1 cannot be decoded, song 2 has no text.
    members = [sample(i) for i in range(6)]
    members[1]["flac"] = b"fLaC broken"
    del members[2]["json"]
    pattern = str(write_shard(tmp_path / "train-0.tar", [(f"song{i}", member) for i, member in enumerate(members)]))
    path = write_pairs(tmp_path / "pairs.parquet", [(f"song{i}", f"song{(i + 1) % 6}", 1.0) for i in range(6)])
    objective = ObjectiveConfig(pairs=SONGS, exclude_liked=True)
    config = small_config(
        data={"train": (pattern,), "pairs": str(path), "partners_known": 2},
        train={"chunk": 4},
        objective=objective,
        model=MODEL,
    )
    indices = [index_of(pattern)]
    find_partners(str(path), indices[0], LOCAL, tmp_path / "partners", silent)
    reader = training_reader(config, indices, LOCAL, partners=Partners(tmp_path / "partners"))
    seen = set()
    for chunk in reader.read(range(3)):  # 12 rows: a whole pass of six songs
        for i in range(0, 4, 2):
            song, partner = chunk["row"][i : i + 2].tolist()
            seen.add(song)
            assert partner == (song + 1) % 6
            assert chunk["key"][i : i + 2] == [f"song{song}", f"song{partner}"]
            assert chunk["valid_partner"][i : i + 2].tolist() == [partner != 1, song != 1]
            assert chunk["valid_fused"][i : i + 2].tolist() == [partner not in (1, 2), song not in (1, 2)]
            assert chunk["liked"][i].tolist() == [partner, -1]
    assert seen == set(range(6))


def test_a_source_without_pairs_is_named(tmp_path):
    sources = [SourceConfig(name, (write_shards(tmp_path / name, [4]),)) for name in ("heard", "unheard")]
    write_shard(tmp_path / "unheard" / "train-00000.tar", [(f"other{i}", sample(i)) for i in range(4)])
    path = write_pairs(tmp_path / "pairs.parquet", [("piece00000", "piece00001", 1.0), ("piece00001", "other1", 1.0)])
    config = small_config(
        data={"sources": sources, "pairs": str(path)}, objective=ObjectiveConfig(pairs=SONGS), model=MODEL
    )
    indices = [index_of(source.shards[0]) for source in sources]
    find_partners(str(path), ShardIndex.join(indices), LOCAL, tmp_path / "partners", silent)
    with pytest.raises(DataError, match=r"data\.pairs: no song of the source unheard is the trigger of a pair"):
        training_reader(config, indices, LOCAL, partners=Partners(tmp_path / "partners"))


def test_what_pairs_need_is_said_before_anything_starts():
    of_songs = {"objective": ObjectiveConfig(pairs=SONGS), "model": MODEL}
    with pytest.raises(ConfigError, match=r"give --data.pairs PAIRS.parquet"):
        check_settings(small_config(**of_songs))
    with pytest.raises(ConfigError, match=r"data.pairs: no pair of objective.pairs names partner or fused"):
        small_config(data={"pairs": "pairs.parquet"})
    with pytest.raises(ConfigError, match=r"train.chunk must be even, not 3"):
        small_config(train={"chunk": 3, "global_batch": 9}, data={"pairs": "x.parquet"}, **of_songs)
    with pytest.raises(ConfigError, match=r"objective.exclude_liked: no pair"):
        ObjectiveConfig(exclude_liked=True)
    with pytest.raises(ConfigError, match=r"give audio or spectrogram first"):
        ObjectiveConfig(pairs=(PairConfig("partner", "audio"),))
