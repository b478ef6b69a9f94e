"""The table of a recommender, on simulated listeners whose tastes some embeddings know and others do not."""

import json
import sys

import numpy as np
import pytest

from muser_dist.data.corpora.listeners import Population, simulate
from muser_dist.errors import ConfigError, DataError
from muser_dist.evaluate.recommend import CANDIDATES
from muser_dist.evaluate.recommend_table import BASELINES, describe_recommendation, recommendation
from tests.data.corpora.test_listeners import made_clips


@pytest.fixture(scope="module")
def world():
    """A log, its split, cold items, the truth, and two tables: one says what tastes are over, one is noise."""
    population = Population(listeners=60, median_listens=100)
    clips = made_clips(240)
    log, truth = simulate(clips, population)
    late = log.column("time").to_numpy() >= population.test_start
    cold = {item for item, is_cold in zip(truth.items, truth.cold, strict=True) if is_cold}
    said = np.zeros((len(clips.keys), len(clips.vocabulary) + 1))
    np.put_along_axis(said, clips.values, 1, axis=1)
    said -= said.mean(axis=0)
    noise = np.random.default_rng(0).normal(size=(len(clips.keys), 8))
    tables = {
        "stage 1": dict(zip(clips.keys, noise, strict=True)),
        "stage 2": dict(zip(clips.keys[:-2], said[:-2, :-1], strict=True)),
    }
    return log, late, cold, tables, truth


@pytest.fixture(scope="module")
def result(world):
    log, late, cold, tables, truth = world
    return recommendation(log, late, cold, tables, truth=truth, ks=(5, 10))


def of(result, method, query="history", candidates="cold"):
    (row,) = [
        row
        for row in result["rows"]
        if (row["method"], row["query"], row["candidates_are"]) == (method, query, candidates)
    ]
    return row


def test_every_row_is_there(result):
    json.dumps(result, allow_nan=False)
    history = [*BASELINES[:-2], "stage 1", "stage 2", *BASELINES[-2:]]
    expected = [(name, "history", c) for name in history for c in CANDIDATES]
    expected += [(name, "last item", c) for name in ("co-occurrence", "stage 1", "stage 2") for c in CANDIDATES]
    assert [(row["method"], row["query"], row["candidates_are"]) for row in result["rows"]] == expected
    assert "SIMULATED" in result["simulated"]["note"] and result["left_out"] == {}
    assert result["counts"]["items_not_in_all_tables"] == 2 and result["counts"]["items"] == 238
    assert len({row["users"] for row in result["rows"] if row["candidates_are"] == "warm"}) == 1
    for row in result["rows"]:
        low, high = row["NDCG@5_interval"]
        assert low <= row["NDCG@5"] <= high


def test_who_knows_the_tastes_is_above_who_does_not(result):
    oracle, knows, noise, chance = (of(result, name)["AUC"] for name in ("oracle", "stage 2", "stage 1", "random"))
    assert oracle > knows > 0.6 and knows > max(noise, chance) + 0.1
    assert of(result, "popularity")["AUC"] == of(result, "co-occurrence")["AUC"] == 0.5
    assert of(result, "popularity", candidates="warm")["AUC"] > 0.55
    bound = of(result, "oracle with popularity", candidates="warm")["NDCG@5"]
    assert bound > of(result, "oracle", candidates="warm")["NDCG@5"]
    assert bound > of(result, "popularity", candidates="warm")["NDCG@5"]
    assert of(result, "popularity", candidates="warm")["popularity_lift@5"] > 0.5


def test_the_way_to_the_oracle_is_that_of_the_figures(result):
    (gap,) = [gap for gap in result["gap_closed"] if gap["query"] == "history"]
    assert (gap["method"], gap["base"], gap["metric"]) == ("stage 2", "stage 1", "NDCG@5")
    first, base, oracle = (of(result, name)["NDCG@5"] for name in ("stage 2", "stage 1", "oracle"))
    assert gap["value"] == pytest.approx((first - base) / (oracle - base))
    assert gap["interval"][0] < gap["value"] < gap["interval"][1]


def test_it_reads_as_tables(result):
    text = describe_recommendation(result)
    lines = text.splitlines()
    assert lines[0].startswith("SIMULATED listeners")
    row = of(result, "oracle")
    low, high = row["NDCG@5_interval"]
    place = lines.index(f"by history, cold items ({row['users']} users, {row['candidates']} items)")
    assert lines[place + 1].split()[:4] == ["NDCG@5", "95", "%", "interval"]
    (line,) = [line for line in lines[place : place + 9] if line.startswith("oracle ") and "with" not in line]
    assert line.removeprefix("oracle").split()[:5] == [
        f"{row['NDCG@5']:.3f}",
        f"{low:.3f}",
        "to",
        f"{high:.3f}",
        f"{row['HR@5']:.3f}",
    ]
    assert line.endswith("–")  # among cold items there is no popularity
    assert "NDCG@5 of cold items, of the way from stage 1 to the oracle" in text
    assert all(len(line) <= 120 for line in lines)


def test_without_a_truth_and_without_the_library(world, monkeypatch):
    log, late, cold, tables, _ = world
    for name in ("implicit", "implicit.als"):
        monkeypatch.setitem(sys.modules, name, None)
    people = log.replace_schema_metadata(None)
    result = recommendation(people, late, cold, {"text": tables["stage 2"]}, ks=(5,))
    assert result["simulated"] is None and result["gap_closed"] == []
    assert not {"oracle", "matrix factorisation"} & {row["method"] for row in result["rows"]}
    assert "pip install 'muser_dist[recommend]'" in result["left_out"]["matrix factorisation"]
    text = describe_recommendation(result)
    assert "not computed: matrix factorisation" in text and "simulated" not in text.lower()


def test_errors_name_the_trouble(world):
    log, late, cold, tables, _ = world
    one = {"mine": tables["stage 1"]}
    with pytest.raises(DataError, match="no table"):
        recommendation(log, late, cold, {})
    with pytest.raises(ConfigError, match="base: 'yours' is none of the tables mine"):
        recommendation(log, late, cold, one, base="yours")
    with pytest.raises(ConfigError, match="called 'oracle', as a baseline is"):
        recommendation(log, late, cold, {"oracle": tables["stage 1"]})
    with pytest.raises(DataError, match="mine, b have no item in common"):
        recommendation(log, late, cold, one | {"b": {"z": np.ones(2)}})
    with pytest.raises(DataError, match="none of 60 users has both"):
        recommendation(log, np.ones(len(late), bool), cold, one)
    first = min(tables["stage 1"])
    for wrong, message in ((np.ones(3), r"shape \(8,\), that of .* \(3,\)"), (np.full(8, np.nan), "is not finite")):
        with pytest.raises(DataError, match=f"mine: the embedding of .*{message}"):
            recommendation(log, late, cold, {"mine": tables["stage 1"] | {first: wrong}})
