"""The benchmark of the training step: operations by hand, phases, and a trial without Ray."""

import importlib
import json
import time
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from muser_dist.config import (
    DataConfig,
    ModelConfig,
    ObjectiveConfig,
    PairConfig,
    RunConfig,
    TowerConfig,
    to_dict,
)
from tests.small import small_config

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Imports a module of the benchmarks' folder."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module


class Grouped(nn.Module):
    """A tower of a matrix and a convolution each of whose four channels sees itself alone."""

    width = 20

    def __init__(self, data: DataConfig) -> None:
        super().__init__()
        self.layer = nn.Linear(data.crop_samples, self.width)
        self.convolution = nn.Conv1d(4, 4, 3, padding=1, groups=4)

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        hidden = self.layer(batch["audio"].to(self.layer.weight.dtype))
        return self.convolution(hidden.view(-1, 4, 5)).flatten(1)


def recipe() -> RunConfig:
    """Small enough for a trial; named by --recipe."""
    return small_config({"workers": 1, "global_batch": 8, "chunk": 4, "cache_gradients": True, "samples": 8_000})


def test_counts_what_a_pencil_counts(benchmark) -> None:
    tokens, width, depth, samples, joint = 10, 16, 3, 400, 8
    config = RunConfig(
        data=DataConfig(sample_rate=1_000, crop_seconds=samples / 1_000, vocabulary=64, max_tokens=tokens),
        model=ModelConfig(
            audio=TowerConfig(f"{__name__}:Grouped"),
            text=TowerConfig("text", {"width": width, "depth": depth, "heads": 2}),
            projection_dim=joint,
        ),
        objective=ObjectiveConfig(pairs=(PairConfig("audio", "text"),)),
    )
    layer = 4 * 2 * tokens * width**2 + 2 * 2 * tokens * width * 4 * width + 2 * 2 * tokens**2 * width
    text = depth * layer + 2 * tokens * width + 2 * width * joint  # the layers, the mean over tokens, the head
    first = 2 * samples * Grouped.width
    then = 2 * 5 * 3 * 4 + 2 * Grouped.width * joint  # five positions, kernels of three, four channels; the head
    counts = benchmark("flops").of_towers(config)
    assert counts.forward == text + first + then
    # Twice the forward pass, but where no gradient goes on: to the waveform, and to the mask of the mean.
    assert counts.backward == 2 * (text + then) - 2 * tokens * width + first
    assert counts.hardware(forwards=2) == counts.model + counts.forward


@pytest.mark.parametrize(
    ("cached", "order"),
    (
        (True, "copy forward copy forward objective copy replay backward copy replay backward optimizer"),
        (False, "copy forward copy forward objective backward optimizer"),
    ),
)
def test_phases_in_order_fill_the_step(benchmark, monkeypatch, cached: bool, order: str) -> None:
    measure = benchmark("step_measure")
    entered: list[str] = []
    enter = measure.PhaseClock.enter

    def noted(clock: Any, phase: str) -> None:
        entered.append(phase)
        enter(clock, phase)

    monkeypatch.setattr(measure.PhaseClock, "enter", noted)
    config = replace(recipe(), train=replace(recipe().train, cache_gradients=cached))
    start = time.perf_counter()
    seconds = measure.phases({"config": to_dict(config), "warmup": 0, "steps": 1}, torch.device("cpu"))
    assert 0 < sum(seconds.values()) < time.perf_counter() - start
    assert [phase for phase, _ in groupby(filter(None, entered))] == order.split()
    assert {phase for phase, value in seconds.items() if value > 0} == set(order.split())


def test_medians_of_paired_rounds(benchmark) -> None:
    rates = {"ray": [90.0, 300.0, 99.0], "torchrun": [100.0, 200.0, 100.0], "none": [50.0, 100.0, 400.0]}
    rows = [
        {"task": "speed", "launcher": name, "world": 1, "round": round_, "samples_per_second": rate}
        for name, of_rounds in rates.items()
        for round_, rate in enumerate(of_rounds)
    ]
    step = benchmark("step")
    assert step.ratios(rows, step.ratios_by_round(rows)) == {"ray_over_torchrun": 0.99, "torchrun_over_none": 2.0}


@pytest.fixture
def no_ray(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes that a test starts cannot import Ray."""
    (tmp_path / "ray.py").write_text('raise ImportError("the benchmark must run without Ray")')
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{BENCHMARKS.parent}")


def test_torchrun_needs_no_ray(benchmark, no_ray) -> None:
    setting = {"config": to_dict(recipe()), "warmup": 1, "steps": 2}
    check_speed(benchmark("launchers").run("torchrun", 1, "step_measure:speed", setting))


def check_speed(measured: dict[str, Any]) -> None:
    """Of a rank on a CPU, measured over two steps."""
    assert len(measured["step_seconds"]) == 2
    (rank,) = measured["ranks"]
    assert 0 < rank["cpu_seconds"] < 60
    assert rank["peak_bytes"] > measured["bytes_before"] > 1e7
    assert 1e8 < measured["matrix_rate"] < 1e13
    assert measured["gpu"] is None


def test_writes_json_and_page(benchmark, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole benchmark, but that the one process without a launcher is this one."""
    step, measure = benchmark("step"), benchmark("step_measure")

    def run(launcher: str, world: int, function: str, setting: dict[str, Any], gpu: bool) -> Any:
        return getattr(measure, function.removeprefix("step_measure:"))(setting, torch.device("cpu"))

    monkeypatch.setattr(step, "run", run)
    check_results(step, tmp_path / "step.json", ["none"])


@pytest.mark.slow  # five processes, whose imports take a minute
def test_trial_without_ray(benchmark, no_ray, tmp_path: Path) -> None:
    results = check_results(benchmark("step"), tmp_path / "step.json", ["none", "torchrun"])
    assert 0.1 < results["ratios"]["torchrun_over_none"] < 10


def check_results(step: Any, out: Path, launchers: list[str]) -> dict[str, Any]:
    """Runs the benchmark with one process; checks and returns what it wrote."""
    options = ["--workers", "1", "--rounds", "1", "--steps", "2", "--warmup", "1", "--launchers", *launchers]
    step.main(["--json", str(out), "--recipe", f"{__name__}:recipe", *options])
    results = json.loads(out.read_text())
    assert {"command", "commit", "cpu", "gpu", "versions", "rows", "ratios"} <= set(results)
    cases = [(task, name) for task in ("speed", "phases") for name in launchers]
    assert [(row["task"], row["launcher"]) for row in results["rows"]] == cases
    for row in results["rows"][: len(launchers)]:
        assert row["samples_per_second"] == pytest.approx(2 * 8 / sum(row["step_seconds"]))
        assert 0 < row["cpu_seconds_per_sample"] < 10
        assert 0 < row["share_of_matrix_rate"] < 1
    assert all(f"| 1 | {name} |" in out.with_suffix(".md").read_text() for name in launchers)
    return results


def test_says_what_failed(benchmark) -> None:
    with pytest.raises(RuntimeError, match=r"under none with 1 ranks failed:(.|\n)*No module named 'absent'"):
        benchmark("launchers").run("none", 1, "absent:function", {})
