"""From a space to its best config: checks, trials under Ray Tune, the page."""

import json
import logging
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ray
from ray import tune
from ray.tune.schedulers import AsyncHyperBandScheduler
from ray.util.state import list_actors
from ray.util.state.exception import RayStateApiException

from muser_dist.config import RunConfig, to_dict
from muser_dist.errors import ClusterError, MuserError
from muser_dist.files import alone_in
from muser_dist.sweep.config import SweepConfig
from muser_dist.sweep.following import Following
from muser_dist.sweep.plan import Planned, config_of, cpus_of_trial, grace_samples, plan, room
from muser_dist.sweep.record import Record
from muser_dist.sweep.results import describe, write_results
from muser_dist.sweep.search import Trials, left
from muser_dist.train.cluster import connect

_TUNE = "tune"
"""Folder in the sweep's folder for Ray Tune's own files, which nothing reads again."""


def sweep(recipe: str, base: RunConfig, options: SweepConfig, command: list[str]) -> Path:
    """Runs a whole sweep, or goes on with it.

    Args:
        recipe: its name, for the sweep's.
        base: what all trials have in common.
        options: what varies, and by which rules.
        command: the command line that asked for it.

    Returns:
        the sweep's folder.

    Raises:
        MuserError: something is wrong that the user can mend; the message says what and how.
    """
    planned = plan(recipe, base, options)
    with alone_in(planned.record.folder, "storage"):
        planned.record.load()  # what another driver wrote since
        return _sweep(recipe, planned, options, command)


def _sweep(recipe: str, planned: Planned, options: SweepConfig, command: list[str]) -> Path:
    record = planned.record
    if len(record.trials) >= planned.total and not list(left(record)):
        print("All trials are over; none is tried again.", flush=True)
    else:
        record.save()
        _run(planned, options, command)
    page = write_results(recipe, planned, options, command)
    print(f"\n{describe(recipe, planned, options)}\nPage    {page}", flush=True)
    if not record.ranked():
        raise MuserError(
            f"no trial of the sweep was finished; {page} says why of each. Mend it and give the same command again, "
            "which tries those that failed; where all diverged, give another --space or another --train.lr"
        )
    return record.folder


# --- Ray ---


def _run(planned: Planned, options: SweepConfig, command: list[str]) -> None:
    base, record = planned.base, planned.record
    wanted = options.concurrent or int((os.cpu_count() or 1) // cpus_of_trial(base))
    connect(base, max(1, wanted), dashboard=True)
    _check_dashboard()
    at_once, slots = room(base, ray.cluster_resources(), options.concurrent)
    full = ", for which there is room" if at_once < options.concurrent else ""
    print(
        f"Sweep {record.folder}: {at_once} trials at a time{full}, each with {base.train.workers} workers and {slots} "
        "decoding slots",
        flush=True,
    )
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # tracebacks of trials, of which a line says what matters
    os.environ |= {name: value for name, value in _TUNE_SETTINGS.items() if name not in os.environ}
    shutil.rmtree(record.folder / _TUNE, ignore_errors=True)
    scheduler = asha(base, options, record) if options.early_stopping == "asha" else None
    source = Trials(record, planned.source, lambda trial: json.dumps(to_dict(config_of(base, trial, slots))))
    # No CPU: it only waits, and a slot of its own would be missing where trials fill the cluster. But Ray Tune wants
    # something, and beside the driver is where a node is least likely to go away.
    head = {"node:__internal_head__": 0.001}

    def trainable(settings: dict[str, Any]) -> None:
        # Not above: models take ten seconds to import, and an actor that does so before it begins holds up Ray Tune.
        from muser_dist.sweep.trial import run_trial

        run_trial(settings, options.metric, command)

    tune.Tuner(
        tune.with_resources(trainable, tune.PlacementGroupFactory([head])),
        tune_config=tune.TuneConfig(
            search_alg=source, scheduler=scheduler, num_samples=-1, max_concurrent_trials=at_once
        ),
        run_config=tune.RunConfig(
            name=_TUNE,
            storage_path=str(record.folder),
            verbose=0,
            callbacks=[Following(planned, options.metric, at_once)],
        ),
    ).fit()
    shutil.rmtree(record.folder / _TUNE, ignore_errors=True)


def _check_dashboard() -> None:
    """Raises ClusterError where there is none.

    Ray Train asks it whether a trial that was stopped is gone, and only then gives back the CPUs of its workers.
    """
    try:
        list_actors(ray.get_runtime_context().gcs_address, limit=1)
    except (RayStateApiException, ConnectionError, ValueError):
        raise ClusterError(
            "the dashboard of the Ray cluster does not answer, and without it trials that are stopped keep their CPUs; "
            "start the head node with --include-dashboard true, and with the port that it serves open to the driver"
        ) from None


_TUNE_SETTINGS = {
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Ctrl-C ends the job as it ends all others
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # a run's folder has its own
    "TUNE_FORCE_TRIAL_CLEANUP_S": "5",  # actors that do not end by themselves are killed
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_AIR_NEW_OUTPUT": "0",  # which has a table for every sweep, whatever is asked for
}


def asha(base: RunConfig, options: SweepConfig, record: Record) -> AsyncHyperBandScheduler:
    """ASHA (Li et al., 2020, arXiv 1810.05934) that remembers the comparisons of earlier drivers."""
    scheduler = AsyncHyperBandScheduler(
        time_attr="samples",
        metric="score",
        mode="min" if record.lower else "max",
        max_t=base.train.steps * base.train.global_batch,
        grace_period=grace_samples(base, options),
        reduction_factor=options.reduction,
    )
    for trial in record.trials:
        if trial.state in ("finished", "stopped"):
            before: Any = SimpleNamespace(trial_id=f"before-{trial.number}")
            nobody: Any = None  # it asks its controller for nothing
            scheduler.on_trial_add(nobody, before)
            for samples, score in trial.curve:
                scheduler.on_trial_result(nobody, before, {"samples": samples, "score": score})
    return scheduler
