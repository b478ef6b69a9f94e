"""The page about one run, drawn from the files in its folder.

The page is one HTML file without scripts or links to anything outside. Text from the data is
put in by the template alone, which escapes it; the charts, which go in as they are, hold only
numbers. A run that died leaves files behind that are missing or end in half a line: the page
then shows what there is and says what there is not.
"""

import io
import json
import math
import re
from collections import Counter
from collections.abc import Iterator
from importlib.resources import files
from itertools import islice
from pathlib import Path
from typing import Any

import matplotlib
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FuncFormatter, MaxNLocator

from muser_dist.errors import CheckpointError
from muser_dist.files import write_whole

_POINTS = 1_000  # drawn of each curve; more cannot be told apart at the size of a chart
_CLASSES = 24  # shown of a confusion matrix; the rarer ones are put together
_CONFUSION_FIELDS = 2
_REASONS, _EXAMPLES = 20, 3
_COLOURS = ("#2b62b5", "#c2570c", "#1f7a4d", "#8a3fa0", "#a8323e", "#5b6470")  # also --series-0.. in the template

# What an SVG file has and SVG inside a page must not: prolog, namespaces, a size that does not follow the page,
# a style sheet, and ids such as figure_1 that every chart has.
_OF_A_DOCUMENT = re.compile(
    r'^.*?(?=<svg)| xmlns(:\w+)?="[^"]*"| (width|height)="[\d.]+pt"|<style.*?</style>| id="[a-z0-9.]+_\d+"', re.S
)

Values = dict[str, Any]


def write_report(folder: Path) -> Path:
    """Draw `report.html` in a run's folder; it replaces an earlier one.

    Args:
        folder: the run's folder. Read, where they exist: config.json, run.json, metrics.jsonl,
            evaluation.json and quarantine.jsonl.

    Returns:
        Path of the page.

    Raises:
        CheckpointError: there is no such folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder; give the folder of a run")
    notes: list[str] = []
    config, run, evaluation = (_read_json(folder / f"{name}.json", notes) for name in ("config", "run", "evaluation"))
    metrics = _read_lines(folder / "metrics.jsonl", notes)
    page = _environment().from_string(files("muser_dist.evaluate").joinpath("report.html.j2").read_text("utf-8"))
    html = page.render(
        name=config.get("name") or folder.resolve().name,
        state=_state(config, metrics, evaluation),
        run={key: run.get(key) for key in ("command", "commit", "started")},
        versions=_mapping(run.get("versions")),
        machine=list(_flat(_mapping(run.get("machine")))),
        notes=notes,
        facts=_facts(config, metrics),
        charts=_charts(metrics),
        scored={key: evaluation.get(key) for key in ("data", "rows")}
        | {"without": _mapping(evaluation.get("rows_without"))},
        tiles=_tiles(evaluation),
        retrieval=_retrieval(evaluation),
        zero_shot=_zero_shot(evaluation),
        confusions=_confusions(evaluation),
        skipped_fields=_mapping(evaluation.get("skipped_fields")),
        quarantine=_quarantine(_read_lines(folder / "quarantine.jsonl", notes)),
        config=list(_flat(config)),
        colours=_COLOURS,
    )
    path = folder / "report.html"
    write_whole(path, html)
    return path


# Files of the run


def _read_json(path: Path, notes: list[str]) -> Values:
    """The file's object; empty, with a note, where it is none."""
    if not path.exists():
        return {}
    try:
        values = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        notes.append(f"{path.name} cannot be read and is left out: {error}")
        return {}
    if not isinstance(values, dict):
        notes.append(f"{path.name} holds no JSON object and is left out")
        return {}
    return values


def _read_lines(path: Path, notes: list[str]) -> list[Values]:
    """The objects of a file with one a line; a line that is none is left out, with a note."""
    if not path.exists():
        return []
    entries, broken = [], 0
    with path.open(encoding="utf-8", errors="replace") as lines:
        for line in filter(str.strip, lines):
            try:
                entry = json.loads(line)
            except ValueError:
                entry = None
            if isinstance(entry, dict):
                entries.append(entry)
            else:
                broken += 1
    if broken:
        notes.append(f"{path.name}: {broken} of {broken + len(entries)} lines cannot be read and are left out")
    return entries


def _number(value: Any) -> float:
    """The value as a float; NaN where it is no number."""
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else math.nan


def _mapping(value: Any) -> Values:
    return value if isinstance(value, dict) else {}


def _flat(values: Values, path: str = "") -> Iterator[tuple[str, str]]:
    """Dotted names, as the command line has them, and values as JSON."""
    for key, value in values.items():
        name = f"{path}.{key}" if path else str(key)
        if isinstance(value, dict) and value:
            yield from _flat(value, name)
        else:
            yield name, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


# Headline


def _planned(config: Values) -> tuple[float, float]:
    """Samples that the run is to see, and those between two lines of metrics.jsonl; NaN where unknown."""
    train = _mapping(config.get("train"))
    samples, batch, log_steps = (_number(train.get(key)) for key in ("samples", "global_batch", "log_steps"))
    return samples // batch * batch if batch else math.nan, log_steps * batch


def _state(config: Values, metrics: list[Values], evaluation: Values) -> str:
    scored = "evaluated" if evaluation else "not evaluated"
    if not metrics:
        return f"{scored}; no training recorded"
    (planned, between), done = _planned(config), _number(metrics[-1]["samples"])
    # The last steps may have no line of their own, and the plan may be unknown.
    return f"{int(100 * done / planned)} % trained, {scored}" if done + between <= planned else f"trained, {scored}"


def _facts(config: Values, metrics: list[Values]) -> list[tuple[str, str]]:
    """Names and values of the list below the headline."""
    if not metrics:
        return []
    last, (planned, _) = metrics[-1], _planned(config)
    speeds = sorted(v for line in metrics if math.isfinite(v := _number(line.get("samples_per_second"))))
    waits = [v for line in metrics if math.isfinite(v := _number(line.get("wait_share")))]
    samples = _amount(last["samples"]) + (f" of {_amount(planned)}" if math.isfinite(planned) else "")
    facts = [("Samples", samples), ("Steps", _amount(last.get("step")))]
    facts.append(("Loss above its floor", _amount(last.get("loss_minus_entropy"))))
    if speeds:
        facts.append(("Samples per second, median", _amount(speeds[len(speeds) // 2])))
    if waits:
        facts.append(("Time waiting for data, mean", _percent(sum(waits) / len(waits))))
    counts = {
        "rows_read": "Rows read",
        "rows_used": "Rows used",
        "rows_quarantined": "Rows quarantined",
        "rows_surplus": "Samples beyond the shards' index",
        "rows_in_val": "Rows read that validation holds too",
    }
    return facts + [(label, _amount(last[key])) for key, label in counts.items() if key in last]


def _tiles(evaluation: Values) -> list[Values]:
    """Key scores: the widest R@k of each direction, and the accuracy of the first fields."""
    tiles = []
    for direction, scores in _directions(evaluation):
        name = max((key for key in scores if re.fullmatch(r"R@\d+", key)), key=lambda key: int(key[2:]), default=None)
        if name:
            baselines = [("chance", scores.get(f"chance_{name}"))]
            tiles.append({"title": direction, "metric": name, "value": scores[name], "baselines": baselines})
    for field, modality, scores in list(_by_field(evaluation))[:4]:
        baselines = [("majority", scores.get("majority")), ("chance", scores.get("chance"))]
        value = scores.get("accuracy")
        tiles.append({"title": f"{field} by {modality}", "metric": "accuracy", "value": value, "baselines": baselines})
    return tiles


# Scores


def _directions(evaluation: Values) -> Iterator[tuple[str, Values]]:
    for direction, scores in _mapping(evaluation.get("retrieval")).items():
        yield direction.replace("->", " → "), _mapping(scores)


def _by_field(evaluation: Values) -> Iterator[tuple[str, str, Values]]:
    for field, by_modality in _mapping(evaluation.get("zero_shot")).items():
        for modality, scores in _mapping(by_modality).items():
            yield field, modality, _mapping(scores)


def _retrieval(evaluation: Values) -> Values:
    """Metrics in their order, and for each direction (score, chance) of each, already as text."""
    table = list(_directions(evaluation))
    metrics = list(dict.fromkeys(key for _, scores in table for key in scores if f"chance_{key}" in scores))
    rows = []
    for direction, scores in table:
        cells = []
        for metric in metrics:
            show = _percent if metric.startswith("R@") else _amount
            cells.append((show(scores.get(metric)), show(scores.get(f"chance_{metric}"))))
        counts = [scores.get(key) for key in ("queries", "candidates", "queries_without_answer")]
        rows.append({"direction": direction, "cells": cells, "counts": counts})
    return {"metrics": [metric.replace("_", " ") for metric in metrics], "rows": rows}


def _zero_shot(evaluation: Values) -> list[Values]:
    keys = ("accuracy", "macro_f1", "majority", "majority_macro_f1", "majority_class", "chance", "rows")
    return [
        {key: scores.get(key) for key in (*keys, "without_label")}
        | {"field": field, "modality": modality, "n_classes": len(scores.get("classes") or ())}
        | {"interval": scores.get("accuracy_interval") or (None, None)}
        for field, modality, scores in _by_field(evaluation)
    ]


def _confusions(evaluation: Values) -> list[Values]:
    """Confusion matrices of the first fields: counts, and each row's shares for the shade."""
    first = list(_mapping(evaluation.get("zero_shot")))[:_CONFUSION_FIELDS]
    pictures = []
    for field, modality, scores in _by_field(evaluation):
        classes, matrix = list(scores.get("classes") or ()), scores.get("confusion") or []
        if field not in first or not classes:
            continue
        matrix, kept = _fold([list(row) for row in matrix], _CLASSES)
        names = [classes[i] for i in kept]
        if len(names) < len(classes):
            names.append(f"{len(classes) - len(names)} others")
        rows = [
            {"name": name, "total": sum(row), "cells": [(count, count / max(1, sum(row))) for count in row]}
            for name, row in zip(names, matrix, strict=True)
        ]
        pictures.append({"field": field, "modality": modality, "classes": names, "rows": rows})
    return pictures


def _fold(matrix: list[list[int]], most: int) -> tuple[list[list[int]], list[int]]:
    """The matrix with all but the most frequent true classes put together in a last one.

    Returns:
        The counts, and the indices of the classes that are kept, in their old order.
    """
    if len(matrix) <= most:
        return matrix, list(range(len(matrix)))
    kept = sorted(sorted(range(len(matrix)), key=lambda i: -sum(matrix[i]))[: most - 1])
    place = {old: new for new, old in enumerate(kept)}
    folded = [[0] * most for _ in range(most)]
    for i, row in enumerate(matrix):
        for j, count in enumerate(row):
            folded[place.get(i, most - 1)][place.get(j, most - 1)] += count
    return folded, kept


def _quarantine(entries: list[Values]) -> Values:
    """Entries by reason, the most frequent first, with a few examples of each."""
    reasons = Counter(str(entry.get("reason")) for entry in entries)
    whole = dict.fromkeys(("shard", "key", "member", "offset", "epoch", "row"))
    groups, shown = [], 0
    for reason, count in reasons.most_common(_REASONS):
        examples = islice((whole | entry for entry in entries if str(entry.get("reason")) == reason), _EXAMPLES)
        shown += count
        groups.append({"reason": reason, "count": count, "examples": list(examples)})
    distinct = len({(str(entry.get("shard")), str(entry.get("key"))) for entry in entries})
    return {"total": len(entries), "distinct": distinct, "groups": groups, "rest": len(entries) - shown}


# Charts


def _charts(metrics: list[Values]) -> list[Values]:
    """Charts over samples: title, legend and SVG of each whose values were recorded."""
    pairs: dict[str, dict[str, str]] = {"loss": {}, "temperature": {}}
    for key in dict.fromkeys(key for line in metrics for key in line):
        kind, slash, pair = key.partition("/")
        if slash and kind in pairs:
            pairs[kind][pair] = key
    whole = {"loss": "loss", "loss minus the entropy of its targets": "loss_minus_entropy"}
    specs: list[tuple[str, str, dict[str, str], bool]] = [  # title, unit, key by label, whether from zero
        ("Loss", "nats; 0 is perfect where the entropy is taken off", whole, True),
        ("Loss by pair", "nats", pairs["loss"], True),
        ("Temperature", "similarities are divided by it", pairs["temperature"] or {"": "temperature"}, False),
        ("Throughput", "samples per second, all workers", {"": "samples_per_second"}, True),
        ("Waiting for data", "share of time", {"": "wait_share"}, True),
        ("Gradient norm", "before clipping", {"": "grad_norm"}, True),
        ("Learning rate", "", {"": "lr"}, True),
    ]
    thin = metrics[:: -(math.ceil(len(metrics) / _POINTS) or 1)][::-1]  # counted from the last line, so it stays
    samples = [float(line["samples"]) for line in thin]
    charts = []
    for title, unit, keys, from_zero in specs:
        curves = {label: [_number(line.get(key)) for line in thin] for label, key in keys.items()}
        curves = {label: curve for label, curve in curves.items() if any(map(math.isfinite, curve))}
        if curves:
            show = _percent if title == "Waiting for data" else _amount
            legend = [(label, show([v for v in curve if math.isfinite(v)][-1])) for label, curve in curves.items()]
            svg = _svg(title, samples, list(curves.values()), from_zero, percent=show is _percent)
            charts.append({"title": title, "unit": unit, "legend": legend, "svg": svg})
    return charts


def _svg(title: str, samples: list[float], curves: list[list[float]], from_zero: bool, percent: bool) -> Markup:
    """Curves as SVG whose colours are the page's, so that they follow light and dark. It holds no text from data."""
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": title, "font.size": 10}):
        figure = Figure(figsize=(3.9, 2.3), layout="constrained")
        axes = figure.subplots()
        marker = "o" if len(samples) == 1 else None
        for curve, colour in zip(curves, _COLOURS * len(curves), strict=False):
            axes.plot(samples, curve, color=colour, linewidth=1.6, marker=marker, markersize=4)
        if from_zero:
            finite = [v for curve in curves for v in curve if math.isfinite(v)]
            axes.set_ylim(min(0.0, 1.06 * min(finite)), max(1.06 * max(finite), 0.05 if percent else 1e-12))
        axes.set_xlabel("samples")
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{100 * v:g} %" if percent else f"{v:g}"))
        axes.grid(linewidth=0.5, alpha=0.25, color="#000000")
        axes.tick_params(bottom=False, left=False)
        axes.spines[["top", "right", "left"]].set_visible(False)
        text = io.StringIO()
        no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(text, format="svg", transparent=True, metadata=no_metadata)
    svg = _OF_A_DOCUMENT.sub("", text.getvalue())
    for i, colour in enumerate(_COLOURS):
        svg = svg.replace(colour, f"var(--series-{i})")
    # Text has no fill of its own and takes the page's from the style sheet.
    return Markup(svg.replace("#000000", "currentColor").replace("<svg", f'<svg role="img" aria-label="{title}"', 1))


# Text


def _environment() -> Environment:
    """Autoescape is on for every name: all that the template shows comes from data."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"percent": _percent, "amount": _amount, "fraction": _fraction}
    return environment


def _amount(value: Any) -> str:
    """A count or a measured value, for people: thin spaces between thousands, three digits of a fraction."""
    number = _number(value)
    if not math.isfinite(number):
        return "–" if value is None else "not finite" if isinstance(value, float) else str(value)
    if number == int(number) or abs(number) >= 1000:
        return f"{round(number):,}".replace(",", "\u202f")
    return f"{number:.3g}"


def _percent(value: Any) -> str:
    number = _number(value)
    if not math.isfinite(number):
        return _amount(value)
    return f"{100 * number:.{1 if number >= 0.01 or number == 0 else 2}f}\u202f%"


def _fraction(value: Any) -> float:
    """A number from 0 to 1 for style sheets."""
    number = _number(value)
    return round(min(1.0, max(0.0, number)), 4) if math.isfinite(number) else 0.0
