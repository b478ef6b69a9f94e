"""The charts of pages, as SVG: metrics.jsonl over samples, scores over the share of labels."""

import io
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import matplotlib
from markupsafe import Markup, escape
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FuncFormatter, MaxNLocator

from muser_dist.evaluate.formats import amount, number, percent

COLOURS = ("#2b62b5", "#c2570c", "#1f7a4d", "#8a3fa0", "#a8323e", "#5b6470")  # also --series-0.. in the template

_POINTS = 1_000  # drawn of each curve; more cannot be told apart at the size of a chart

# What an SVG file has and SVG inside a page must not: prolog, namespaces, a size that does not follow the page,
# a style sheet, and ids such as figure_1 that every chart has.
_OF_A_DOCUMENT = re.compile(
    r'^.*?(?=<svg)| xmlns(:\w+)?="[^"]*"| (width|height)="[\d.]+pt"|<style.*?</style>| id="[A-Za-z0-9.]+_\d+"', re.S
)


@dataclass(frozen=True)
class _Chart:
    """A chart: its title, what its values are, the fields it shows by their labels, and how."""

    title: str
    unit: str
    fields: dict[str, str]
    from_zero: bool = True
    show: Callable[[Any], str] = amount


def draw_charts(metrics: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Charts over samples: title, unit, legend and SVG of each whose values were recorded.

    Args:
        metrics: the lines of metrics.jsonl.
    """
    thin = metrics[:: -(math.ceil(len(metrics) / _POINTS) or 1)][::-1]  # counted from the last line, so it stays
    samples = [float(line["samples"]) for line in thin]
    drawn = []
    for chart in _charts(list(dict.fromkeys(key for line in metrics for key in line))):
        curves = {label: [number(line.get(key)) for line in thin] for label, key in chart.fields.items()}
        curves = {label: curve for label, curve in curves.items() if any(map(math.isfinite, curve))}
        if curves:
            legend = [
                (label, chart.show([v for v in curve if math.isfinite(v)][-1])) for label, curve in curves.items()
            ]
            svg = _svg(chart.title, samples, list(curves.values()), chart.from_zero, percent=chart.show is percent)
            drawn.append({"title": chart.title, "unit": chart.unit, "legend": legend, "svg": svg})
    return drawn


def draw_few_shot(few_shot: dict[str, Any]) -> list[dict[str, Any]]:
    """A chart for each field: title, unit, legend, notes and SVG.

    Args:
        few_shot: that of an evaluation.
    """
    drawn: list[dict[str, Any]] = []
    for field, by_modality in few_shot.items():
        shares: list[float] = []
        curves, bands, legend, notes = [], [], [], []
        name = "accuracy"
        for modality, curve in by_modality.items():
            name = "roc_auc" if any("roc_auc" in point for point in curve["points"]) else name
            points = [point for point in curve["points"] if number(point.get(name, {}).get("mean")) >= 0]
            missing = [percent(point["share"]) for point in curve["points"] if "impossible" in point]
            if missing:
                notes.append(f"{modality}: {', '.join(missing)} of the labels are too few for a row of each class")
            shares = [100 * point["share"] for point in curve["points"]]
            means = {point["share"]: point[name]["mean"] for point in points}
            ends = {point["share"]: point[name]["interval"] or [math.nan] * 2 for point in points}
            curves.append([means.get(point["share"], math.nan) for point in curve["points"]])
            bands.append([ends.get(point["share"], [math.nan] * 2) for point in curve["points"]])
            if points:
                legend.append((f"{modality}, {percent(points[-1]['share'])}", percent(points[-1][name]["mean"])))
        if legend:
            svg = _svg(
                f"Scores by share of labels, {len(drawn) + 1}",
                shares,
                curves,
                False,
                True,
                label="% of labels",
                bands=bands,
            )
            unit = f"{'ROC-AUC' if name == 'roc_auc' else name} over the share of labels"
            drawn.append({"title": field, "unit": unit, "legend": legend, "notes": notes, "svg": svg})
    return drawn


def _charts(recorded: list[str]) -> list[_Chart]:
    """What may be drawn, in the page's order, given the names of all fields that were recorded."""

    def parts(kind: str) -> dict[str, str]:
        return {key.removeprefix(f"{kind}/"): key for key in recorded if key.startswith(f"{kind}/")}

    whole = {"loss": "loss", "loss minus the entropy of its targets": "loss_minus_entropy"}
    towers = parts("grad_norm")
    waits = {"data": "decode_wait_share", "copies to the device": "transfer_share", "other workers": "rank_wait_share"}
    if waits["data"] in recorded:
        waiting = _Chart("Waiting", "share of all workers' time, by what for", waits, show=percent)
    else:
        waiting = _Chart("Waiting for data", "share of time", {"": "wait_share"}, show=percent)
    return [
        _Chart("Loss", "nats; 0 is perfect where the entropy is taken off", whole),
        _Chart("Loss by pair or field", "nats", parts("loss")),
        _Chart(
            "Temperature",
            "similarities are divided by it",
            parts("temperature") or {"": "temperature"},
            from_zero=False,
        ),
        _Chart("Throughput", "samples per second, all workers", {"": "samples_per_second"}),
        waiting,
        _Chart("Gradient norm", "before clipping", {"all" if towers else "": "grad_norm"} | towers),
        _Chart("Learning rate", "", {"": "lr"}),
        _Chart("Variance of embeddings", "of a dimension; 0 is collapse, 1/D an even spread", parts("variance")),
        _Chart("Dimensions of embeddings", "in how many they vary, by participation ratio", parts("dimensions")),
        _Chart("Alignment", "squared distance of a pair; 0 is perfect, 2 unrelated", parts("alignment")),
        _Chart("Duplicates", "share of rows whose text another in the batch has", {"": "duplicates"}, show=percent),
    ]


def _svg(
    title: str,
    places: list[float],
    curves: list[list[float]],
    from_zero: bool,
    percent: bool,
    label: str = "samples",
    bands: list[list[list[float]]] | None = None,
) -> Markup:
    """Curves as SVG whose colours are the page's, so that they follow light and dark. It holds no text from data.

    With `bands`, [low, high] for each point of each curve, places are few and spread evenly by their logarithm.
    """
    with matplotlib.rc_context({"font.size": 10}):
        figure = Figure(figsize=(3.9, 2.3), layout="constrained")
        axes = figure.subplots()
        marker = "o" if len(places) == 1 or bands else None
        for i, curve in enumerate(curves):
            colour = COLOURS[i % len(COLOURS)]
            axes.plot(places, curve, color=colour, linewidth=1.6, marker=marker, markersize=4)
            if bands:
                low, high = zip(*bands[i], strict=True)
                axes.fill_between(places, low, high, color=colour, alpha=0.18, linewidth=0)
        if from_zero:
            finite = [v for curve in curves for v in curve if math.isfinite(v)]
            axes.set_ylim(min(0.0, 1.06 * min(finite)), max(1.06 * max(finite), 0.05 if percent else 1e-12))
        axes.set_xlabel(label)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]))
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        if bands:
            bottom, top = axes.get_ylim()
            axes.set_ylim(max(0.0, bottom), min(1.0, top))  # few draws make intervals that no share can reach
            axes.set_xscale("log")
            axes.set_xticks(places, [f"{place:g}" for place in places], minor=False)
            axes.set_xticks([], minor=True)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{100 * v:g} %" if percent else f"{v:g}"))
        axes.grid(linewidth=0.5, alpha=0.25, color="#000000")
        axes.tick_params(bottom=False, left=False)
        axes.spines[["top", "right", "left"]].set_visible(False)
        return svg_of(figure, title)


def svg_of(figure: Figure, title: str) -> Markup:
    """A figure as SVG for a page, with COLOURS and black as the page's own."""
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": title}):
        text = io.StringIO()
        no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(text, format="svg", transparent=True, metadata=no_metadata)
    svg = _OF_A_DOCUMENT.sub("", text.getvalue())
    for i, colour in enumerate(COLOURS):
        svg = svg.replace(colour, f"var(--series-{i})")
    # Text has no fill of its own and takes the page's from the style sheet.
    label = f'<svg role="img" aria-label="{escape(title)}"'
    return Markup(svg.replace("#000000", "currentColor").replace("<svg", label, 1))
