"""The benchmark of scaling: the cost model against numbers by hand and against costs that are known, and a trial."""

import importlib
import json
from dataclasses import astuple, replace
from pathlib import Path
from typing import Any

import pytest

from tests.small import small_config

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
STAGES = (0, 1, 2, 3)


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Imports a module of the benchmarks' folder."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module


@pytest.fixture
def work(benchmark) -> Any:
    """Three modalities in two pairs, 64 rows in chunks of 8."""
    return benchmark("scaling_model").Work(
        forward=1e9,
        backward=2e9,
        parameters=1_000_000,
        modalities=3,
        pairs=2,
        dim=128,
        feature_bytes=4,
        global_batch=64,
        chunk=8,
        cache_gradients=True,
        zero_stage=2,
    )


def recipe() -> Any:
    """Small enough for a trial; named by --recipe."""
    return small_config({"chunk": 4, "global_batch": 8, "samples": 8_000})


def test_work_by_hand(work) -> None:
    alone, four = work.step(1), work.step(4)
    assert alone.towers == 64 * (1e9 + 1e9 + 2e9)
    assert four.towers == alone.towers / 4
    assert alone.loss == 2 * 4 * 2 * 64 * 64 * 128
    assert four.loss == 2 * (5 - 1 / 4) * 2 * 16 * 64 * 128
    assert (alone.features, alone.gradients, alone.hops) == (0, 0, 0)
    assert four.features == 3 / 4 * 64 * (3 * 128 * 4 + 2 * 11 * 4 + 6 * 8)
    assert four.updated == 250_000
    by_stage = [replace(work, zero_stage=stage).step(4).gradients / (3 / 4 * 4e6) for stage in STAGES]
    # Three passes over each of two chunks, and as many reductions as chunks.
    assert by_stage == [2, 3, 3, 3 * 2 + 2]


def test_one_chunk_a_rank_is_encoded_once(work) -> None:
    assert work.step(8).towers == 8 * (1e9 + 2e9)
    assert replace(work, cache_gradients=False).step(1).towers == 64 * (1e9 + 2e9)
    assert work.step(16).towers == work.step(8).towers  # an all-masked chunk costs as much


def test_finds_the_costs_that_made_the_measurements(benchmark, work) -> None:
    model = benchmark("scaling_model")
    scaling = benchmark("scaling")
    true = model.Costs(2e-11, 5e-11, 3e-8, 4e-10, 2e-4, 0.01)
    shapes = [{"kind": "step", "rows": n} for n in (64, 128, 256)] + [{"kind": "loss", "rows": n} for n in (512, 1024)]
    shapes += [{"kind": kind, "bytes": size} for kind in ("all_gather", "all_reduce") for size in (1e4, 1e7)]
    rows = [shape | {"world": world} for world in (1, 2, 4) for shape in shapes if world > 1 or "rows" in shape]
    for row in rows:
        row["seconds"] = true.seconds(model.crowd(scaling.demand_of(row, work), row["world"], cores=2))
    found = scaling.compare(rows, work, 2, (1, 2))
    assert astuple(found) == pytest.approx(astuple(true), rel=1e-6)
    assert [row["predicted_seconds"] for row in rows] == pytest.approx([row["seconds"] for row in rows], rel=1e-6)
    assert max(row["world"] for row in rows) == 4  # which the fit has not seen


def test_what_was_not_measured_costs_nothing(benchmark) -> None:
    model = benchmark("scaling_model")
    costs = model.fit([model.Demand(towers=2e9, steps=1), model.Demand(towers=4e9, steps=1)], [0.3, 0.5])
    assert astuple(costs) == pytest.approx((1e-10, 0, 0, 0, 0, 0.1))


def test_prediction_and_knee(benchmark, work) -> None:
    model = benchmark("scaling_model")
    cluster = model.Cluster(peak=1e15, utilisation=0.5, latency=0.0, step=0.0, memory=1e30, node=8)
    works = {gpus: replace(work, global_batch=64 * gpus) for gpus in (1, 8, 16, 1024)}
    found, knee = model.predict(cluster, works, decode_seconds=0.005)
    alone, node, two_nodes, many = found
    assert alone.efficiency == 1
    towers = 64 * 4e9 / 0.5e15
    assert alone.parts["towers"] == node.parts["towers"] == pytest.approx(towers)
    assert node.parts["gradients"] == pytest.approx(3 * 7 / 8 * 4e6 / (450e9 * 0.8))
    assert two_nodes.parts["gradients"] == pytest.approx(3 * 15 / 16 * 4e6 / (50e9 * 0.8))
    assert 1 > node.efficiency > two_nodes.efficiency > many.efficiency > 0
    assert many.samples_per_second == pytest.approx(64 * 1024 / sum(many.parts.values()))
    assert many.decode_cpus == pytest.approx(0.005 * many.samples_per_second)
    assert many.held == 3 * 64 * 1024 * 128 * 4
    assert knee == max([row.world for row in found if row.efficiency >= 0.8])
    hidden = replace(cluster, overlap=1.0).parts(works[16], 16)
    assert hidden["gradients"] == 0
    assert hidden["features"] == two_nodes.parts["features"]


@pytest.mark.slow  # a minute, nearly all of it imports
def test_trial(benchmark, tmp_path: Path) -> None:
    out = tmp_path / "scaling.json"
    options = ["--workers", "1", "2", "--chunks", "1", "2", "--loss-rows", "64", "--megabytes", "4", "--rounds", "2"]
    options += ["--recipe", f"{__name__}:recipe", "--predict", f"{__name__}:recipe"]
    benchmark("scaling").main(["--json", str(out), *options])
    results = json.loads(out.read_text())
    assert {"command", "commit", "cpu", "gpu", "versions", "rows", "ratios"} <= set(results)
    assert [row["kind"] for row in results["rows"]] == ["step", "step", "loss"] * 2 + ["all_reduce", "all_gather"]
    for row in results["rows"]:
        assert row["seconds"] > 0
        # The counters see headers, barriers and other programs too, so there can be more but never less.
        assert row["received_bytes"] > 0.95 * row["predicted_bytes"] or row["world"] == 1
        if "bytes" in row:
            assert row["received_bytes"] < 1.3 * row["predicted_bytes"]
    assert len(results["predictions"]["growing"]["rows"]) == 9
    assert "| 1,024 |" in out.with_suffix(".md").read_text()
