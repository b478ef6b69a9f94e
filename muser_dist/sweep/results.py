"""What is left of a sweep: its page, its table as Parquet, its trials for TensorBoard's HParams."""

import json
import math
import shlex
import shutil
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet

from muser_dist.config import OPERATIONAL, RunConfig, leaves, to_dict
from muser_dist.evaluate.scores_page import page
from muser_dist.files import write_whole
from muser_dist.recipes import load_recipe
from muser_dist.sweep.charts import draw_charts
from muser_dist.sweep.config import SweepConfig
from muser_dist.sweep.plan import Planned, config_of
from muser_dist.sweep.record import Trial
from muser_dist.sweep.space import apply, named

PAGE, TABLE, HPARAMS = "sweep.html", "sweep.parquet", "hparams"


def write_results(recipe: str, planned: Planned, options: SweepConfig, command: list[str]) -> Path:
    """Writes the page, the table and, where TensorBoard is installed, its event files; returns the page's path.

    Args:
        recipe: name of the recipe.
        planned: the sweep.
        options: its rules.
        command: the command line.
    """
    record, folder = planned.record, planned.record.folder
    pa.parquet.write_table(table(record.trials), folder / TABLE)
    _write_hparams(record.trials, options.metric, folder / HPARAMS)
    ranked = record.ranked()
    best = ranked[0] if ranked else None
    order = [*ranked, *(trial for trial in record.trials if trial not in ranked)]
    html = page(
        "sweep/sweep.html.j2",
        name=folder.name,
        metric=options.metric,
        lower=record.lower,
        counts={
            state: count
            for state in ("finished", "stopped", "diverged", "failed", "running", "waiting")
            if (count := sum(trial.state == state for trial in record.trials))
        },
        best=best,
        best_command=command_of(recipe, apply(planned.base, best.overrides)) if best else "",
        best_folder=str(config_of(planned.base, best).folder) if best else "",
        charts=draw_charts(planned.space, record, options.metric),
        fields=list(planned.space),
        trials=[
            {
                "name": trial.name,
                "state": trial.state,
                "values": [json.dumps(trial.overrides[field]) for field in planned.space],
                "samples": trial.curve[-1][0] if trial.curve else None,
                "score": trial.curve[-1][1] if trial.curve else None,
                "seconds": trial.seconds,
                "error": trial.error,
            }
            for trial in order
        ],
        rules=[(name, json.dumps(value)) for name, value in asdict(options).items()],
        command=shlex.join(command),
    )
    write_whole(folder / PAGE, html)
    return folder / PAGE


def table(trials: list[Trial]) -> pa.Table:
    """A row for each trial: number, state, samples, seconds, its fields (lists as JSON) and all its scores."""
    rows = []
    for trial in trials:
        values = {
            field: json.dumps(value) if isinstance(value, (list, dict)) else value
            for field, value in trial.overrides.items()
        }
        row = {"trial": trial.number, "state": trial.state, "samples": trial.curve[-1][0] if trial.curve else None}
        rows.append(row | {"seconds": trial.seconds} | values | trial.scores)
    names = list(dict.fromkeys(name for row in rows for name in row))
    columns = {name: [row.get(name) for row in rows] for name in names}
    for name, column in columns.items():  # Arrow takes one type in a column
        kinds = {type(value) for value in column if value is not None}
        if len(kinds) > 1:
            columns[name] = [
                value if value is None else float(value) if kinds <= {int, float} else json.dumps(value)
                for value in column
            ]
    return pa.table(columns)


_OF_SWEEP = ("name", "evaluate.every_samples")
"""What trials have for the sweep's sake: a run by itself has its own name, and scores when it ends."""


def command_of(recipe: str, config: RunConfig) -> str:
    """The command line that trains a config: the recipe with what differs from it, where and with what it runs too.

    What no option says (a part that the recipe lacks, or has in its place, lists of parts) follows as a comment.
    """
    given, own = dict(leaves(to_dict(config))), dict(leaves(to_dict(load_recipe(recipe))))
    words, pairs, beyond = ["python", "jobs/pretrain.py", recipe], list[str](), list[str]()
    for name, value in given.items():
        same = name in own and own[name] == value
        if name in _OF_SWEEP or same or (name in OPERATIONAL and name not in own):
            continue
        option, dashed = name.partition(".options.")[2], f"--{name.replace('_', '-')}"
        if name.startswith("objective.options.") and not any(key.startswith("objective.options.") for key in own):
            pairs += [option, _word(value)]  # a dict that the recipe leaves empty is given whole
        elif name not in own or (isinstance(value, list) and any(isinstance(entry, dict) for entry in value)):
            beyond.append(f"{name} {json.dumps(value)}")
        elif isinstance(value, bool):
            parent, _, last = dashed.rpartition(".")
            words.append(dashed if value else f"{parent}.no-{last}")
        else:
            words += [dashed, *map(_word, value if isinstance(value, list) else [value])]
    if pairs:
        words += ["--objective.options", *pairs]
    return shlex.join(words) + (f"  # and, in a recipe of your own: {', '.join(beyond)}" if beyond else "")


def _word(value: Any) -> str:
    return value if isinstance(value, str) else str(value)


def describe(recipe: str, planned: Planned, options: SweepConfig) -> str:
    """The result as text for a terminal."""
    ranked = planned.record.ranked()
    lines = [
        f"{trial.curve[-1][1]:>9.4f}  trial {trial.name}  {named(trial.overrides)}"
        for trial in ranked[: 1 if len(ranked) < 2 else 5]
    ]
    for trial in planned.record.trials:
        if trial.state in ("diverged", "failed"):
            lines.append(f"{trial.state:>9}  trial {trial.name}  {named(trial.overrides)}: {trial.error}")
    if not ranked:
        return "\n".join(["No trial was finished; there is no best one.", *lines])
    best = ranked[0]
    head = f"{options.metric} ({'less' if planned.record.lower else 'more'} is better), the best finished trials:"
    folder, again = config_of(planned.base, best).folder, command_of(recipe, apply(planned.base, best.overrides))
    return "\n".join([head, *lines, "", f"Best    {folder}", f"Again   {again}"])


def _write_hparams(trials: list[Trial], metric: str, folder: Path) -> None:
    """TensorBoard's HParams: a session for each trial that has scores."""
    if find_spec("tensorboard") is None:
        print("No HParams for TensorBoard: pip install 'muser_dist[tensorboard]' brings it", flush=True)
        return
    from torch.utils.tensorboard import SummaryWriter
    from torch.utils.tensorboard.summary import hparams

    shutil.rmtree(folder, ignore_errors=True)  # an earlier driver's: a trial that had failed may have been finished
    for trial in trials:
        if not trial.curve:
            continue
        values = {
            field: value if isinstance(value, (bool, int, float, str)) else json.dumps(value)
            for field, value in trial.overrides.items()
        }
        writer = SummaryWriter(str(folder / trial.name))
        for summary in hparams(values | {"state": trial.state}, {metric: trial.curve[-1][1]}):
            writer._get_file_writer().add_summary(summary)
        for samples, score in trial.curve:
            if math.isfinite(score):
                writer.add_scalar(metric, score, samples)
        writer.close()
