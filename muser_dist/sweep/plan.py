"""A sweep before it starts: its checks, what its trials have in common, how many there is room for."""

import hashlib
import json
import os
from dataclasses import asdict, dataclass, replace
from difflib import get_close_matches

from muser_dist.cli import Progress
from muser_dist.config import OPERATIONAL, RunConfig, leaves, to_dict
from muser_dist.data.shards import index_shards
from muser_dist.data.storage import Storage
from muser_dist.errors import ConfigError, require
from muser_dist.evaluate.evaluator import skipped_fields
from muser_dist.evaluate.validation import CLASSES, TAGS, lower_is_better, score_names
from muser_dist.sweep.config import SweepConfig
from muser_dist.sweep.record import Record, Trial
from muser_dist.sweep.search import Optuna, Plan
from muser_dist.sweep.space import Check, Space, apply, check_space, draws, load_space, named
from muser_dist.train.dry_run import dry_run
from muser_dist.train.preflight import VAL, check_model, check_settings, find_shards


@dataclass(frozen=True)
class Planned:
    """What is known of a sweep before it starts.

    Attributes:
        base: what all trials have in common; named after the sweep.
        space: what varies.
        record: of its trials, perhaps from an earlier driver.
        source: of new ones.
    """

    base: RunConfig
    space: Space
    record: Record
    source: Plan | Optuna

    @property
    def total(self) -> int:
        """Trials of the whole sweep."""
        return self.source.count


def plan(recipe: str, base: RunConfig, options: SweepConfig) -> Planned:
    """Checks everything that can be checked before anything starts.

    Raises:
        MuserError: as `sweep`.
    """
    space = load_space(options.space)
    check_space(space, base)
    for field in _LENGTHS:
        require(
            options.early_stopping == "none" or field not in space,
            f"space: {field} gives trials different lengths, and ASHA stops all where the recipe's own ends; give "
            "--early-stopping none",
        )
    least, most = base.train.worker_range
    require(least == most, f"train.workers is {base.train.workers!r}; trials share the cluster: give one number")
    require("://" not in base.storage, f"storage: {base.storage!r} is a URL; give a folder that every node sees")
    require(bool(base.data.val), "a sweep compares scores: give --data.val 'FOLDER/val-*.tar'")
    names = score_names(base)
    near = get_close_matches(options.metric, names, n=1)
    require(
        options.metric in names,
        f"metric: there is no {options.metric!r}{f'; did you mean {near[0]}?' if near else '.'} There are "
        f"{', '.join(names)}",
    )
    check = check_once()
    check(base)
    storage = Storage.of(base.data)
    shards = find_shards(base, storage)
    score = options.metric.partition("/")[0].removeprefix("val_")
    if score in (*CLASSES, *TAGS) and not base.data.label_kinds():  # what heads learn is in the config
        index = index_shards(storage, shards[VAL.name], "data.val")
        skipped = skipped_fields(base, index, storage, tags=score in TAGS)
        field = options.metric.partition("/")[2].rpartition(" by ")[0]
        require(
            field not in skipped and len(skipped) < len(base.evaluate.fields),
            f"metric: the validation data give no {options.metric} "
            f"({'; '.join(f'{name}: {reason}' for name, reason in skipped.items())})",
        )
    base = _with_scores(_absolute(base), options)
    settings = {name: value for name, value in leaves(to_dict(base)) if name not in OPERATIONAL and name != "name"}
    definition = json.loads(
        json.dumps(
            {
                "space": {field: asdict(dimension) for field, dimension in space.items()},
                "rules": {name: value for name, value in asdict(options).items() if name not in _NOT_RULES},
                "config": settings,
            }
        )
    )
    digest = hashlib.sha256(json.dumps(definition, sort_keys=True).encode()).hexdigest()[:8]
    name = base.name or f"{recipe.replace(':', '.')}-sweep-{digest}"
    base = replace(base, name=name)
    lower = lower_is_better(options.metric)
    record = Record(base.folder, definition, lower)
    if options.search == "optuna":
        return Planned(base, space, record, Optuna(space, base, options, check, lower))
    source = Plan(space, base, options, check, Progress("valid points", every=2.0))
    if source.points.refused:
        print(f"{source.points.refused} points of the space are left out; the first: {source.points.first}", flush=True)
    return Planned(base, space, record, source)


def check_once() -> Check:
    """`check_settings` that tries a model once, however many points have it: a large one takes a minute."""
    tried: dict[str, tuple[int, int] | ConfigError] = {}

    def try_model(config: RunConfig) -> tuple[int, int]:
        values = to_dict(config)
        del values["objective"]["temperature"]  # which no tower sees
        key = json.dumps([values["model"], values["data"], values["objective"], config.train.precision])
        if key not in tried:
            try:
                tried[key] = check_model(config)
            except ConfigError as error:
                tried[key] = error
        found = tried[key]
        if isinstance(found, ConfigError):
            raise found
        return found

    return lambda config: check_settings(config, try_model)


_LENGTHS = ("train", "train.samples", "train.global_batch")
"""Fields that say how many samples a trial sees."""

_NOT_RULES = ("space", "trials", "concurrent")
"""Options that may differ when a sweep goes on; the space is compared by what it holds."""


def _with_scores(base: RunConfig, options: SweepConfig) -> RunConfig:
    """The base with scores during training where early stopping goes by them.

    Raises:
        ConfigError: they would come too late.
    """
    if options.early_stopping == "none":
        return base
    every, grace = base.evaluate.every_samples, grace_samples(base, options)
    require(
        every <= grace,
        f"evaluate.every_samples ({every}) is more than ASHA's first comparison waits for ({grace} samples); lower it, "
        "give --grace-samples, or --early-stopping none",
    )
    most = base.train.steps * base.train.global_batch
    require(
        grace <= most,
        f"--grace-samples {grace}: a trial ends after {most} samples, before its first comparison; give less, or "
        "--early-stopping none",
    )
    return replace(base, evaluate=replace(base.evaluate, every_samples=every or grace))


def grace_samples(base: RunConfig, options: SweepConfig) -> int:
    """Samples of a trial before ASHA compares it: by default there are two comparisons before the end."""
    return options.grace_samples or max(base.train.global_batch, base.train.samples // options.reduction**2)


def _absolute(base: RunConfig) -> RunConfig:
    """The base with paths that mean the same in the actors of trials, which have another working directory."""

    def of(path: str) -> str:
        return os.path.abspath(path) if path and "://" not in path else path

    data = replace(
        base.data.with_absolute_paths(),
        train=tuple(map(of, base.data.train)),
        val=tuple(map(of, base.data.val)),
        sources=tuple(replace(source, shards=tuple(map(of, source.shards))) for source in base.data.sources),
        pairs=of(base.data.pairs),
    )
    train = replace(base.train, checkpoint_storage=of(base.train.checkpoint_storage))
    model = base.model.with_absolute_paths()
    return replace(base, data=data, model=model, train=train, storage=of(base.storage))


def config_of(base: RunConfig, trial: Trial, slots: int = 0) -> RunConfig:
    """A trial's config.

    Args:
        base: the sweep's.
        trial: whose.
        slots: CPUs that may decode for it; 0 takes what the base says.
    """
    config = apply(base, trial.overrides)
    if place := config.train.checkpoint_storage:
        config = replace(config, train=replace(config.train, checkpoint_storage=f"{place}/{base.name}"))
    data = replace(config.data, max_decode_slots=slots) if slots else config.data
    return replace(config, data=data, storage=str(base.folder / "trials"), name=trial.name)


def cpus_of_trial(base: RunConfig) -> float:
    """Logical CPUs that a trial takes: for its workers, and to decode."""
    return base.train.worker_range[0] * base.train.cpus_per_worker + base.data.decode_slots


def room(base: RunConfig, resources: dict[str, float], most: int = 0) -> tuple[int, int]:
    """How many trials there is room for at a time, and how many CPUs can decode for each.

    All that run at a time have their CPUs, for workers and to decode: so none holds some and waits for another's.

    Args:
        base: what trials have in common.
        resources: of the cluster.
        most: trials at a time that are wanted; 0 is no bound.
    """
    train, workers = base.train, base.train.worker_range[0]
    cpus = resources.get("CPU", 0.0)
    limits = [cpus / cpus_of_trial(base)]
    if train.gpu:
        limits.append(resources.get("GPU", 0.0) / (workers * train.gpu_share))
    if train.resource:
        limits.append(resources.get(train.resource, 0.0) / workers)
    at_once = max(1, int(min(limits) + 1e-9))
    at_once = min(at_once, most or at_once)
    return at_once, max(1, int(cpus / at_once - workers * train.cpus_per_worker + 1e-9))


def dry_run_of(planned: Planned, options: SweepConfig) -> str:
    """What a sweep would try and need, on a cluster that just has the CPUs of this machine. Starts nothing."""
    base, train, need = planned.base, planned.base.train, cpus_of_trial(planned.base)
    if isinstance(planned.source, Plan):
        lines = [f"trial {number:03d}  {named(point)}" for number, point in enumerate(planned.source.points.found)]
    else:
        lines = [f"{planned.total} trials that Optuna proposes one after the other; the first may be"]
        lines += [f"  {named(point)}" for point in draws(planned.space, base, 3).found]
    cores = os.cpu_count() or 1
    lines += [
        "",
        f"Each trial takes {need:g} CPUs, {train.worker_range[0]} workers and {base.data.decode_slots} decoding slots"
        + (f", and {train.worker_range[0] * train.gpu_share:g} GPUs" if train.gpu else "")
        + f". {cores} cores have room for {max(1, int(cores // need))} at a time; a cluster for as many as it has "
        f"CPUs, {planned.total} at most.",
        f"In all at most {planned.total * train.steps * train.global_batch:,} samples"
        + (
            f"; ASHA compares trials from {grace_samples(base, options):,} samples on, and lets one of "
            f"{options.reduction} go on each time"
            if options.early_stopping == "asha"
            else ""
        ),
        f"Clips: {'decoded once and kept' if base.data.keep_clips else 'decoded by each trial and pass'}"
        + (f", up to {base.data.clip_cache_gib:g} GiB on each node" if base.data.keep_clips else ""),
        "",
        "A trial with the recipe's own values:",
        dry_run(base),
    ]
    return "\n".join(lines)
