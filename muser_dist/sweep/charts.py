"""The pictures of a sweep's page: parallel coordinates, the score by each field, learning curves."""

import json
import math
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, NullFormatter
from scipy import stats

from muser_dist.evaluate.charts import COLOURS, svg_of
from muser_dist.sweep.record import Record, Trial
from muser_dist.sweep.space import Choice, Range, Space

_BEST, _OTHER, _LEADING = COLOURS[0], COLOURS[5], COLOURS[1]

_BINS = 3
"""Parts of a range over which scores are averaged."""


def draw_charts(space: Space, record: Record, metric: str) -> dict[str, list[dict[str, Any]]]:
    """Title, note and SVG of each picture, by part of the page; what needs a finished trial is left out without one.

    Args:
        space: what varied.
        record: what came of it.
        metric: the score's name.
    """
    finished = record.ranked()
    curves = [trial for trial in record.trials if trial.curve]
    parts: dict[str, list[dict[str, Any]]] = {"parallel": [], "fields": [], "curves": []}
    with matplotlib.rc_context({"font.size": 10, "svg.fonttype": "none"}):
        if finished:
            note = "A line is a finished trial; the best one stands out, and the better of the others are darker."
            parts["parallel"].append(_picture("Parallel coordinates", note, _parallel(space, finished, metric)))
            for field, dimension in space.items():
                note = "Finished trials; bars: means and their 95 % intervals (Student's t) where there are several"
                if field == "model.projection_dim" and by_leading_dims(dimension, finished, metric):
                    note += "; crosses: the same sizes as the first dimensions of larger runs (objective.dims)"
                parts["fields"].append(_picture(field, note, _by_field(field, dimension, finished, metric)))
        if curves:
            note = "Solid to the end: finished. Dashed: stopped early, diverged or failed"
            best = finished[0] if finished else None
            parts["curves"].append(_picture("Learning curves", note, _curves(curves, best, metric)))
    return parts


def by_value(field: str, dimension: Choice | Range, trials: list[Trial]) -> list[tuple[float, float, float, int]]:
    """Means of the last scores at each value of a choice, or in each part of a range.

    Returns:
        of each that has trials: its place on the axis, the mean, half of its 95 % interval (NaN for one trial; by
        Student's t, as if scores were normal), and the number of trials.
    """
    places = np.array([place(dimension, trial.overrides[field]) for trial in trials])
    scores = np.array([trial.curve[-1][1] for trial in trials])
    if isinstance(dimension, Choice):
        bins, middles = places, dict(zip(places, places, strict=True))
    else:
        bins = np.minimum((places * _BINS).astype(int), _BINS - 1).astype(float)
        middles = {number: (number + 0.5) / _BINS for number in bins}
    found = []
    for number in sorted(set(bins.tolist())):
        values = scores[bins == number]
        n, half = len(values), math.nan
        if n > 1:
            half = float(stats.t.ppf(0.975, n - 1) * values.std(ddof=1) / math.sqrt(n))
        found.append((float(middles[number]), float(values.mean()), half, n))
    return found


def by_leading_dims(dimension: Choice | Range, trials: list[Trial], metric: str) -> list[tuple[float, float]]:
    """Place on the axis of model.projection_dim, and score, of sizes that Matryoshka runs have besides their own."""
    found = []
    for trial in trials:
        for name, score in trial.scores.items():
            whole, _, size = name.rpartition("@")
            if whole == metric and (isinstance(dimension, Range) or int(size) in dimension.values):
                found.append((place(dimension, int(size)), score))
    return found


def place(dimension: Choice | Range, value: Any) -> float:
    """Where a value lies on an axis from 0 to 1."""
    if isinstance(dimension, Choice):
        return dimension.values.index(value) / max(1, len(dimension.values) - 1)
    low, high = dimension.low, dimension.high
    if dimension.log:
        low, high, value = math.log(low), math.log(high), math.log(value)
    return min(1.0, max(0.0, (value - low) / (high - low)))


def _picture(title: str, note: str, figure: Figure) -> dict[str, Any]:
    return {"title": title, "note": note, "svg": svg_of(figure, title)}


def _ticks(dimension: Choice | Range) -> list[tuple[float, str]]:
    values = dimension.values if isinstance(dimension, Choice) else dimension.points()
    return [
        (place(dimension, v), f"{v:.3g}" if isinstance(v, float) else v if isinstance(v, str) else json.dumps(v))
        for v in values
    ]


def _parallel(space: Space, finished: list[Trial], metric: str) -> Figure:
    figure = Figure(figsize=(2.2 * (len(space) + 1), 3.2), layout="constrained")
    axes = figure.subplots()
    scores = [trial.curve[-1][1] for trial in finished]
    low, high = min(scores), max(scores)
    span = (high - low) or 1.0
    for rank in reversed(range(len(finished))):
        trial = finished[rank]
        heights = [place(dimension, trial.overrides[field]) for field, dimension in space.items()]
        heights.append((scores[rank] - low) / span)
        shade = 0.75 - 0.6 * rank / len(finished)
        line: dict[str, Any] = (
            {"color": _BEST, "linewidth": 2.4} if rank == 0 else {"color": _OTHER, "linewidth": 1.2, "alpha": shade}
        )
        axes.plot(range(len(heights)), heights, **line)
    for x, dimension in enumerate(space.values()):
        _axis(axes, x, _ticks(dimension))
    _axis(axes, len(space), [(share, f"{low + share * span:.3g}") for share in (0.0, 0.5, 1.0)])
    axes.set_xticks(range(len(space) + 1), [*(field.rpartition(".")[2] for field in space), metric])
    axes.set_yticks([])
    axes.tick_params(bottom=False)
    axes.set_xlim(-0.25, len(space) + 0.45)
    axes.spines[:].set_visible(False)
    return figure


def _axis(axes: Axes, x: int, ticks: list[tuple[float, str]]) -> None:
    axes.plot([x, x], [0, 1], color="#000000", linewidth=0.8)
    for height, label in ticks:
        axes.annotate(label, (x, height), (4, 0), textcoords="offset points", va="center", fontsize=8)


def _by_field(field: str, dimension: Choice | Range, finished: list[Trial], metric: str) -> Figure:
    figure = Figure(figsize=(3.9, 2.5), layout="constrained")
    axes = figure.subplots()
    places = [place(dimension, trial.overrides[field]) for trial in finished]
    axes.plot(places, [trial.curve[-1][1] for trial in finished], "o", color=_OTHER, markersize=4, alpha=0.7)
    for middle, mean, half, _ in by_value(field, dimension, finished):
        bars = None if math.isnan(half) else half
        axes.errorbar([middle], [mean], yerr=bars, fmt="D", color=_BEST, capsize=4, markersize=5, linewidth=1.6)
    if field == "model.projection_dim":
        sizes = by_leading_dims(dimension, finished, metric)
        axes.plot([x for x, _ in sizes], [score for _, score in sizes], "x", color=_LEADING, markersize=6)
    ticks = _ticks(dimension)
    axes.set_xticks([position for position, _ in ticks], [label for _, label in ticks])
    axes.set_xlim(-0.1, 1.1)
    _plain(axes, field, metric)
    return figure


def _curves(trials: list[Trial], best: Trial | None, metric: str) -> Figure:
    figure = Figure(figsize=(7.8, 2.8), layout="constrained")
    axes = figure.subplots()
    for trial in trials:
        colour, width = (_BEST, 2.4) if trial is best else (_OTHER, 1.2)
        style = "-" if trial.state == "finished" else "--"
        samples, scores = zip(*trial.curve, strict=True)
        marker = "o" if len(samples) == 1 else None
        axes.plot(samples, scores, style, color=colour, linewidth=width, marker=marker, markersize=4)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    _plain(axes, "samples", metric)
    return figure


def _plain(axes: Axes, x: str, y: str) -> None:
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.grid(linewidth=0.5, alpha=0.25, color="#000000")
    axes.tick_params(bottom=False, left=False)
    axes.spines[["top", "right", "left"]].set_visible(False)
