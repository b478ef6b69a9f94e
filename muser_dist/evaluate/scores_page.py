"""What a page shows of an evaluation: tables and pictures, as text where text can come from the data."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from muser_dist.evaluate.charts import COLOURS, draw_few_shot
from muser_dist.evaluate.formats import amount, fraction, interval, percent, share
from muser_dist.evaluate.summary import by_field, in_languages
from muser_dist.files import write_whole

_CLASSES = 24  # shown of a confusion matrix; the rarer ones are put together
_CONFUSION_FIELDS = 2
_TAGS = 8  # shown of those that are told best, and worst

Values = dict[str, Any]


def write_evaluation(path: Path, evaluation: Values) -> Path:
    """Draws a page about an evaluation alone: one HTML file without scripts or links to anything outside.

    Args:
        path: where to; it is replaced.
        evaluation: what `muser_dist.evaluate.evaluator.score` returns, with "model", its name.

    Returns:
        The path.
    """
    write_whole(
        path, page("evaluate/evaluation.html.j2", name=str(evaluation.get("model")), **scores_shown(evaluation))
    )
    return path


def page(template: str, **values: Any) -> str:
    """A template of this package as HTML. Autoescape is on for every name: all that it shows comes from data."""
    loader = PackageLoader("muser_dist", "")
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "percent": percent,
        "amount": amount,
        "fraction": fraction,
        "interval": interval,
        "share": share,
    }
    return environment.get_template(template).render(colours=COLOURS, **values)


def scores_shown(evaluation: Values) -> Values:
    """The variables of scores.html.j2. An evaluation may lack anything: runs that died leave halves behind."""
    return {
        "scored": {key: evaluation.get(key) for key in ("data", "rows", "probes_on", "train_rows")}
        | {"without": mapping(evaluation.get("rows_without"))},
        "tiles": _tiles(evaluation),
        "retrieval": _retrieval(mapping(evaluation.get("retrieval"))),
        "by_language": _retrieval(in_languages(evaluation)),
        "classified": _classified(evaluation),
        "tagged": _tagged(evaluation),
        "few_shot": draw_few_shot(mapping(evaluation.get("few_shot"))),
        "robustness": [(f"{field} by {name}", s) for field, name, s in _nested(evaluation, "robustness")],
        "geometry": {key: mapping(mapping(evaluation.get("geometry")).get(key)) for key in ("modalities", "pairs")},
        "confusions": _confusions(evaluation),
        "skipped_fields": mapping(evaluation.get("skipped_fields")),
    }


def mapping(value: Any) -> Values:
    """The value where it is an object; an empty one otherwise."""
    return value if isinstance(value, dict) else {}


def _tiles(evaluation: Values) -> list[Values]:
    """Key scores: R@10 of each direction, and the accuracy of the first fields."""
    tiles = []
    for direction, scores in _directions(mapping(evaluation.get("retrieval"))):
        if "R@10" in scores:
            baselines = [("chance", scores.get("chance_R@10"))]
            tiles.append({"title": direction, "metric": "R@10", "value": scores["R@10"], "baselines": baselines})
    for field, modality, scores in list(_nested(evaluation, "zero_shot"))[:4]:
        baselines = [("majority", scores.get("majority")), ("chance", scores.get("chance"))]
        value = scores.get("accuracy")
        tiles.append({"title": f"{field} by {modality}", "metric": "accuracy", "value": value, "baselines": baselines})
    return tiles


def _directions(by_direction: Values) -> Iterator[tuple[str, Values]]:
    for direction, scores in by_direction.items():
        yield direction.replace("->", " → "), mapping(scores)


def _nested(evaluation: Values, section: str) -> Iterator[tuple[str, str, Values]]:
    for field, by_modality in mapping(evaluation.get(section)).items():
        for modality, scores in mapping(by_modality).items():
            yield field, modality, mapping(scores)


def _retrieval(by_direction: Values) -> Values:
    """Metrics in their order, and for each direction (score, chance, interval) of each."""
    table = list(_directions(by_direction))
    metrics = list(dict.fromkeys(key for _, scores in table for key in scores if f"chance_{key}" in scores))
    rows = []
    for direction, scores in table:
        cells = []
        for metric in metrics:
            show = percent if metric.startswith("R@") else amount
            ends = scores.get(f"{metric}_interval")
            cells.append((show(scores.get(metric)), show(scores.get(f"chance_{metric}")), ends))
        counts = [scores.get(key) for key in ("queries", "candidates", "queries_without_answer")]
        rows.append({"direction": direction, "cells": cells, "counts": counts})
    return {"metrics": [metric.replace("_", " ") for metric in metrics], "rows": rows}


def _classified(evaluation: Values) -> list[Values]:
    keys = ("accuracy", "accuracy_interval", "macro_f1", "majority", "majority_macro_f1", "majority_class", "chance")
    return [
        {key: scores.get(key) for key in (*keys, "rows", "without_label")}
        | {"name": name, "how": how, "n_classes": len(scores.get("classes") or ())}
        for how, name, scores in by_field(evaluation)
        if "accuracy" in scores
    ]


def _tagged(evaluation: Values) -> list[Values]:
    keys = ("roc_auc", "roc_auc_interval", "pr_auc", "pr_auc_interval", "chance_pr_auc", "rows", "tags", "undefined")
    return [
        {key: scores.get(key) for key in keys}
        | {"name": name, "how": how, "best": ranked[:_TAGS], "worst": ranked[_TAGS:][-_TAGS:]}
        for how, name, scores in by_field(evaluation)
        if "roc_auc" in scores
        for ranked in [sorted(mapping(scores.get("by_tag")).items(), key=lambda tag: -tag[1][0])]
    ]


def _confusions(evaluation: Values) -> list[Values]:
    """Confusion matrices of the first fields: counts, and each row's shares for the shade."""
    first = list(mapping(evaluation.get("zero_shot")))[:_CONFUSION_FIELDS]
    pictures = []
    for field, modality, scores in _nested(evaluation, "zero_shot"):
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
