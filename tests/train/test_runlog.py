"""The files that a run leaves, cut back when it goes on from a checkpoint; what a restart cost; the live line."""

import io

import pytest

from muser_dist.train.runlog import EVENTS, METRICS, QUARANTINE, RunLog, describe, live_line, read_lines
from tests.small import small_config


def line(step: int) -> dict:
    return {
        "step": step,
        "samples": 8 * step,
        "loss": 2.5,
        "temperature/audio-text": 0.07,
        "rows_quarantined": 3,
        "samples_per_second": 4.0,
        "wait_share": 0.25,
    }


@pytest.fixture
def config(tmp_path):
    config = small_config(name="run", storage=str(tmp_path))
    config.folder.mkdir()
    return config


def opened(config, step: int, workers: int = 2) -> RunLog:
    log = RunLog(config, workers)
    log.go_on_from(step)
    return log


def test_going_on_from_a_checkpoint_drops_later_lines(config):
    log = opened(config, 0)
    for step in (1, 2, 3):
        log.quarantine([{"step": step - 1, "row": step}])
        log.metrics(line(step))
    log.close()
    with (config.folder / METRICS).open("a") as file:
        file.write('{"step": 4, "los')  # the process died while it wrote
    log = opened(config, 2)
    log.metrics(line(3))
    log.close()
    assert [entry["step"] for entry in read_lines(config.folder / METRICS)] == [1, 2, 3]
    assert [entry["row"] for entry in read_lines(config.folder / QUARANTINE)] == [1, 2]


def test_a_line_that_a_dying_process_cut_short_is_dropped_from_all_files(config):
    log = opened(config, 0)
    log.metrics(line(1))
    log.close()
    for name in (EVENTS, METRICS):
        with (config.folder / name).open("a") as file:
            file.write('{"time": 1')
    opened(config, 1).event("checkpoint", 2)
    assert [event["event"] for event in read_lines(config.folder / EVENTS)] == ["start", "start", "checkpoint"]
    assert [entry["step"] for entry in read_lines(config.folder / METRICS)] == [1]


def test_a_restart_tells_what_is_done_again_and_what_it_cost(config, monkeypatch):
    clock = [1000.0]
    monkeypatch.setattr("time.time", lambda: clock[0])
    log = opened(config, 0)
    for step in (1, 2, 3):
        log.metrics(line(step))
    log.close()
    clock[0] = 1030.0
    log = opened(config, 1, workers=3)
    for step, clock[0] in ((2, 1032.0), (3, 1034.0), (4, 1037.0)):
        log.metrics(line(step))
    log.close()
    start, caught_up = read_lines(config.folder / EVENTS)[1:]
    assert start == {
        "time": 1030.0, "event": "start", "step": 1, "workers": 3, "steps_repeated": 2, "rows_repeated": 16
    }  # fmt: skip
    # Step 4 came 37 seconds after step 3, of which it took 2 itself.
    assert (caught_up["step"], caught_up["seconds_lost"]) == (4, 35.0)


def test_the_live_line_shows_the_end_of_the_run_and_what_happened(config):
    out = io.StringIO()
    log = opened(config, 0)
    with live_line(config, out):
        log.event("storage", 1, error="no space")
        for step in (1, 2):
            log.metrics(line(step))
    shown = out.getvalue().splitlines()
    assert "-- storage at step 1: error no space" in shown
    assert "samples        16/24" in shown[-1]
    assert "loss 2.5000  temperature 0.070  4.0 samples/s" in shown[-1]
    assert "waiting for data  25%" in shown[-1]
    assert "quarantined 3" in shown[-1]


def test_the_time_left_is_that_of_the_samples_left():
    assert "ETA 0:00:04" in describe(line(1), small_config())  # 24 samples in all, 8 done, 4 a second
