"""Simulated listeners: what the log says follows the model that the module states, and the truth ranks by it."""

import json
import runpy
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from muser_dist.data.config import DataConfig
from muser_dist.data.corpora.listeners import (
    GAP,
    LISTEN,
    LOG,
    SCHEMA,
    SIMULATED,
    START,
    TRUTH,
    Population,
    simulate,
    write_listeners,
)
from muser_dist.data.corpora.tastes import FIELDS, Clips, Truth, read_clips
from muser_dist.data.shards import index_shards
from muser_dist.data.storage import Storage
from muser_dist.errors import ConfigError, DataError
from tests.shardmaker import sample, write_shard

JOB = Path(__file__).parents[3] / "jobs" / "make_listeners.py"
LISTENS = ("play", "skip")


def made_clips(count: int, seed: int = 0) -> Clips:
    rng = np.random.default_rng(seed)
    sizes = dict(zip(FIELDS, (6, 4, 2, 8, 3), strict=True))
    return Clips.of(
        {
            f"clip{i:04d}": {name: f"{name} {rng.integers(size)}" for name, size in sizes.items() if rng.random() < 0.9}
            for i in range(count)
        }
    )


def columns(log) -> dict[str, np.ndarray]:
    return {name: log.column(name).to_numpy() for name in log.column_names}


def read(pattern: str) -> Clips:
    storage = Storage.of(DataConfig())
    return read_clips(storage, index_shards(storage, storage.expand((pattern,), "--shards"), "--shards"))


def listens_of(log, truth: Truth, user: str, late: bool, population: Population) -> np.ndarray:
    """(clips,) how often somebody listened to each, before the test period or in it."""
    of = columns(log)
    mine = (of["user"] == user) & np.isin(of["signal"], LISTENS) & ((of["time"] >= population.test_start) == late)
    return np.bincount(np.searchsorted(truth.items, of["item"][mine]), minlength=len(truth.items))


def chi_square(seen: np.ndarray, expected: np.ndarray) -> float:
    """Pearson's statistic over its degrees of freedom, of the clips that should be heard five times at least."""
    expected = expected / expected.sum() * seen.sum()
    often = expected >= 5
    assert often.sum() >= 10
    return float(((seen - expected)[often] ** 2 / expected[often]).mean())


def test_the_log_is_a_log():
    population = Population(listeners=40, seed=3)
    clips = made_clips(200)
    log, truth = simulate(clips, population)
    assert log.schema.equals(SCHEMA) and not any(log.column(name).null_count for name in log.column_names)
    of = columns(log)
    assert (np.diff(of["time"]) >= 0).all()
    assert of["time"].min() >= START and of["time"].max() <= START + population.days * 86_400
    assert set(of["signal"]) == {"play", "skip", "like"}
    assert set(of["user"]) == set(truth.users) and set(of["item"]) <= set(clips.keys)
    assert (of["value"][of["signal"] == "play"] == LISTEN).all()
    assert (of["value"][of["signal"] == "skip"] < LISTEN).all() and (of["value"][of["signal"] == "like"] == 1).all()
    note = json.loads(log.schema.metadata[SIMULATED])
    assert "SIMULATED" in note["note"] and all(user.startswith("simulated-") for user in truth.users)
    assert note["test_start"] == population.test_start and note["settings"]["seed"] == 3
    assert note["cold_clips"] == truth.cold.sum()


def test_sessions_are_apart_and_everything_liked_was_just_played():
    log, truth = simulate(made_clips(60), Population(listeners=5, median_listens=400, activity_sigma=0.1))
    of = columns(log)
    for user in truth.users:
        mine = of["user"] == user
        listens, likes = mine & np.isin(of["signal"], LISTENS), mine & (of["signal"] == "like")
        begun, heard = of["time"][listens], of["value"][listens]
        silence = np.diff(begun) - heard[:-1]
        # Whole seconds: a listen may seem to begin one before the last one ended.
        assert ((np.abs(silence) <= 1) | (silence >= GAP - 1)).all()
        assert 5 < listens.sum() / ((silence >= GAP - 1).sum() + 1) < 12
        ends = {
            (item, time + int(LISTEN))
            for item, time, kind in zip(*(of[c][listens] for c in ("item", "time", "signal")), strict=True)
            if kind == "play"
        }
        assert likes.any() and set(zip(of["item"][likes], of["time"][likes], strict=True)) <= ends


def test_the_same_settings_and_clips_make_the_same_log_in_any_order_of_the_clips():
    clips = made_clips(50)
    fields = [
        {clips.vocabulary[v][0]: clips.vocabulary[v][1].upper() for v in row if v < len(clips.vocabulary)}
        for row in clips.values.tolist()
    ]
    again = Clips.of(dict(reversed(list(zip(clips.keys, fields, strict=True)))))
    first, truth = simulate(clips, Population(listeners=10))
    second, other = simulate(again, Population(listeners=10))
    assert first.equals(second)
    np.testing.assert_array_equal(truth.tastes, other.tastes)
    more, _ = simulate(clips, Population(listeners=12))
    heard = [[tuple(v for k, v in row.items() if k != "user") for row in log.to_pylist()] for log in (first, more)]
    assert set(heard[0]) < set(heard[1])  # a listener is the same among others
    assert not simulate(clips, Population(listeners=10, seed=8))[0].equals(first)


def test_cold_clips_are_heard_in_the_test_period_only():
    population = Population(listeners=60)
    log, truth = simulate(made_clips(300), population)
    of = columns(log)
    cold = np.isin(of["item"], np.array(truth.items)[truth.cold])
    assert 0.05 < truth.cold.mean() < 0.15
    assert (of["time"][cold] >= population.test_start).all()
    # Sessions go over the border; none of their clips was released.
    assert len(set(of["item"][cold])) > 0.9 * truth.cold.sum()
    assert truth.cold.tolist() == simulate(made_clips(300, seed=1), population)[1].cold.tolist()  # of the key alone


def test_noise_is_popularity():
    population = Population(listeners=1, median_listens=9000, activity_sigma=0, noise=1, cold_share=0.3)
    log, truth = simulate(made_clips(80), population)
    early = listens_of(log, truth, truth.users[0], False, population)
    assert chi_square(early, np.where(truth.cold, 0, truth.popularity)) < 1.6
    assert chi_square(listens_of(log, truth, truth.users[0], True, population), truth.popularity) < 1.6
    ranks = np.sort(truth.popularity)[::-1]
    np.testing.assert_allclose(ranks, np.arange(1, 81) ** -0.8)


@pytest.mark.parametrize("noise", [0.0, 0.5])
def test_listens_follow_the_truth(noise):
    """Without drift the truth is exact: popularity times the affinity, and noise."""
    population = Population(
        listeners=1, median_listens=9900, activity_sigma=0, noise=noise, drift=0, session_listens=1, test_share=0.5
    )
    log, truth = simulate(made_clips(60), population)
    chosen = truth.popularity * np.exp(truth.affinity(np.array([0]))[0])
    assert chosen.sum() == pytest.approx(1)
    expected = (1 - noise) * chosen + noise * truth.popularity / truth.popularity.sum()
    assert chi_square(listens_of(log, truth, truth.users[0], True, population), expected) < 1.6
    if noise == 0.5:  # so far from the truth without its taste that the test would have noticed
        assert chi_square(listens_of(log, truth, truth.users[0], True, population), chosen) > 5


def test_tastes_turn_and_the_truth_is_that_of_the_test_period():
    """What the truth says of late listens fits better than of early ones, and without drift of both alike."""

    def likelihoods(drift: float) -> list[float]:
        population = Population(listeners=30, median_listens=1000, noise=0, drift=drift, cold_share=0, test_share=0.2)
        log, truth = simulate(made_clips(150), population)
        affinity = truth.affinity(np.arange(30))
        counts = [
            np.stack([listens_of(log, truth, user, late, population) for user in truth.users]) for late in (False, True)
        ]
        return [float((affinity * seen).sum() / seen.sum()) for seen in counts]

    early, late = likelihoods(2.0)
    assert late - early > 0.5
    early, late = likelihoods(0.0)
    assert abs(late - early) < 0.15


def test_disliked_clips_are_skipped_and_suitable_ones_liked():
    population = Population(listeners=20, median_listens=800, noise=0.5, drift=0)
    log, truth = simulate(made_clips(150), population)
    of = columns(log)
    affinity = truth.affinity(np.arange(20))
    mean = {
        kind: np.mean(
            [
                affinity[
                    i, np.searchsorted(truth.items, of["item"][(of["user"] == user) & (of["signal"] == kind)])
                ].mean()
                for i, user in enumerate(truth.users)
            ]
        )
        for kind in ("play", "skip", "like")
    }
    assert mean["skip"] < mean["play"] - 0.3 and mean["play"] < mean["like"] - 0.1


def test_affinity_by_its_definition():
    clips = made_clips(7)
    _, truth = simulate(clips, Population(listeners=3))
    for user in range(3):
        expected = np.zeros(7)
        for share, weights in zip(truth.shares[user], truth.tastes[user], strict=True):
            appeal = [sum(weights[v] for v in row if v < len(clips.vocabulary)) for row in clips.values]
            expected += share * np.exp(appeal) / (truth.popularity @ np.exp(appeal))
        np.testing.assert_allclose(truth.affinity(np.array([user]))[0], np.log(expected))


def test_files_and_what_is_wrong_with_them(tmp_path: Path):
    log, truth = simulate(made_clips(20), Population(listeners=4))
    write_listeners(tmp_path / "new", log, truth)
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == sorted([LOG, TRUTH])
    kept = pq.read_table(tmp_path / "new" / LOG)
    assert kept.equals(log) and json.loads(kept.schema.metadata[SIMULATED])["clips"] == 20
    loaded = Truth.load(tmp_path / "new" / TRUTH)
    assert loaded.users == truth.users and loaded.items == truth.items
    np.testing.assert_array_equal(loaded.affinity(np.arange(4)), truth.affinity(np.arange(4)))
    (tmp_path / "new" / TRUTH).write_bytes(b"PK nothing")
    with pytest.raises(DataError, match=r"simulated-truth.npz: no truth of simulated listeners"):
        Truth.load(tmp_path / "new" / TRUTH)
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"cannot write simulated listeners to .*file"):
        write_listeners(tmp_path / "file", log, truth)


def test_clips_are_read_from_shards(tmp_path: Path):
    rows = [(f"a{i}", sample(i, type="Jig " if i % 2 else "jig", meter=None)) for i in range(6)]
    write_shard(tmp_path / "train-00000.tar", [*rows, ("broken", {"json": b"{"}), ("bare", {"flac": b"x"})])
    write_shard(tmp_path / "train-00001.tar", [(f"b{i}", sample(i, mode=["major", "minor"])) for i in range(3)])
    clips = read(f"{tmp_path}/train-*.tar")
    assert clips.keys == [f"a{i}" for i in range(6)] + [f"b{i}" for i in range(3)]
    assert [value for name, value in clips.vocabulary if name == "type"] == ["jig"]
    none = len(clips.vocabulary)
    meter, mode = (FIELDS.index(name) for name in ("meter", "mode"))
    assert (clips.values[:, meter] == none).all() and (clips.values[6:, mode] == none).all()
    assert clips.vocabulary[clips.values[5, mode]] == ("mode", "minor")
    assert [problem.split(": ")[1] for problem in clips.problems] == ["broken", "bare"]
    assert "broken JSON" in clips.problems[0] and "no .json member" in clips.problems[1]


def test_what_cannot_be_simulated(tmp_path: Path):
    write_shard(tmp_path / "train-00000.tar", [("same", sample(0))])
    write_shard(tmp_path / "train-00001.tar", [("same", sample(1))])
    with pytest.raises(DataError, match=r"00001.tar holds the key 'same', as .*00000.tar does"):
        read(f"{tmp_path}/train-*.tar")
    with pytest.raises(DataError, match=r"none of the 1 clips has any of .*\(type, meter.*holds genre"):
        Clips.of({"a": {"genre": "folk"}})
    with pytest.raises(DataError, match="all of 20 clips are cold"):
        simulate(made_clips(20), Population(listeners=1, cold_share=1))
    for wrong in ({"listeners": 0}, {"seed": -1}, {"noise": 1.5}, {"days": 10}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            Population(**wrong)


def test_the_job(tmp_path: Path, monkeypatch, capsys):
    rows = [*((f"a{i}", sample(i)) for i in range(12)), ("bro\x1bken", {"json": b"["})]
    write_shard(tmp_path / "train-00000.tar", rows)

    def make(out: str) -> str:
        arguments = ["--shards", f"{tmp_path}/train-*.tar", "--out", f"{tmp_path}/{out}", "--listeners", "6"]
        monkeypatch.setattr("sys.argv", [str(JOB), *arguments])
        runpy.run_path(str(JOB), run_name="__main__")
        return capsys.readouterr().out

    said = make("one")
    assert said.startswith("SIMULATED") and "6 listeners, 12 clips" in said
    assert "rows that are no clips: 1; the first is" in said and "\x1b" not in said
    make("two")
    for name in (LOG, TRUTH):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
