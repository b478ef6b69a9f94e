"""Sweeps on a real Ray cluster: what fails, diverges, is stopped or killed gives back what it held."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import ray

from muser_dist import Muser
from muser_dist.config import from_dict
from muser_dist.data.shards import ShardIndex
from muser_dist.evaluate.evaluator import evaluate
from muser_dist.evaluate.validation import flat_scores
from muser_dist.sweep.plan import config_of, plan
from muser_dist.sweep.record import RECORD
from muser_dist.train.launch import pretrain
from muser_dist.train.runlog import EVENTS, METRICS, read_lines
from tests.cluster.conftest import CPUS
from tests.cluster.sweep_of import RECIPE, base_config, options_of
from tests.small import LOCAL

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


class Driver:
    """A sweep's driver in a process of its own, whose lines are kept with the time at which they came."""

    def __init__(self, kind: str, corpus: Path, storage: Path, address: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.cluster.sweep_of", kind, str(corpus), str(storage)],
            cwd=ROOT,
            env=os.environ | {"RAY_ADDRESS": address},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.lines: list[tuple[float, str]] = []

    def follow(self, until: Callable[[str], bool] = lambda line: False) -> Iterator[str]:
        """Its lines, up to its end or the one that is waited for."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self.lines.append((time.monotonic(), line))
            yield line
            if until(line):
                return
        assert self._process.wait(60) == 0, "".join(text for _, text in self.lines)

    def kill(self) -> None:
        self._process.send_signal(signal.SIGKILL)
        self._process.wait()

    def time_of(self, words: str) -> float:
        """When the first line with these words came."""
        return next(moment for moment, line in self.lines if words in line)


def wait_for_all_cpus() -> None:
    end = time.monotonic() + 30
    while ray.available_resources().get("CPU", 0) < CPUS:
        assert time.monotonic() < end, f"CPUs are still held: {ray.available_resources()}"
        time.sleep(0.2)


@pytest.fixture(scope="module")
def storage(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("sweeps")


@pytest.fixture(scope="module")
def swept(cluster, corpus, storage) -> tuple[Path, Driver]:
    """The folder of a sweep whose driver was killed during its second trial, and the driver that went on."""
    address = ray.get_runtime_context().gcs_address
    first = Driver("four", corpus, storage, address)
    list(first.follow(lambda line: "trial 001 running" in line))
    first.kill()
    wait_for_all_cpus()
    assert states(storage / "four") == ["finished", "running"]
    second = Driver("four", corpus, storage, address)
    list(second.follow())
    wait_for_all_cpus()
    return storage / "four", second


def states(folder: Path) -> list[str]:
    return [trial["state"] for trial in json.loads((folder / RECORD).read_text())["trials"]]


def test_each_trial_ends_as_it_should_and_none_that_is_over_is_repeated(swept):
    folder, driver = swept
    assert states(folder) == ["finished", "failed", "diverged", "stopped"]
    for number in ("000", "002", "003"):
        events = read_lines(folder / "trials" / number / EVENTS)
        assert sum(event["event"] == "start" for event in events) == 1
    assert not any("trial 000" in line for _, line in driver.lines if "running" in line.split("[")[0])
    last = read_lines(folder / "trials" / "003" / METRICS)[-1]
    assert last["step"] < 20  # it was stopped
    errors = [trial["error"] for trial in json.loads((folder / RECORD).read_text())["trials"]]
    assert errors[0] is None and "this objective always fails" in errors[1] and "not finite at step 1" in errors[2]
    page = (folder / "sweep.html").read_text()
    assert "Trials: 1 finished, 1 stopped, 1 diverged, 1 failed" in " ".join(page.split())


def test_the_next_trial_starts_at_once(swept):
    _, driver = swept
    for number, ended in ((2, "trial 001 failed"), (3, "trial 002 diverged")):
        assert driver.time_of(f"trial 00{number} running") - driver.time_of(ended) < 10


def test_a_trial_is_what_the_same_config_gives_alone(swept, cluster, corpus, storage):
    planned = plan(RECIPE, base_config(corpus, storage, "four"), options_of(storage))
    config = config_of(planned.base, planned.record.trials[0])
    alone = pretrain(replace(config, name="alone"), ["test"])
    losses = [[line["loss"] for line in read_lines(run / METRICS)] for run in (config.folder, alone)]
    assert len(losses[0]) == 20
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_the_best_model_has_the_scores_of_the_table(swept):
    folder, _ = swept
    row = pq.read_table(folder / "sweep.parquet").to_pylist()[0]
    run = folder / "trials" / "000"
    config = from_dict(json.loads((run / "config.json").read_text()), "config.json")
    scores = evaluate(Muser.from_pretrained(run), config, ShardIndex.load(run / "val-index.json"), LOCAL)
    for name, value in flat_scores(scores).items():
        assert row[name] == pytest.approx(value, abs=1e-6)


def test_two_trials_at_a_time_on_two_cpus(corpus, storage):
    driver = Driver("two-at-once", corpus, storage, "local")
    list(driver.follow())
    assert states(storage / "two-at-once") == ["finished", "finished"]
    assert driver.time_of("trial 001 running") < driver.time_of("trial 000 finished")


def test_a_stopped_trial_gives_its_cpus_to_the_next_one_on_a_ray_of_the_job(corpus, storage):
    driver = Driver("after-a-stopped-one", corpus, storage, "local")
    list(driver.follow())
    assert states(storage / "after-a-stopped-one") == ["finished", "stopped", "diverged"]
