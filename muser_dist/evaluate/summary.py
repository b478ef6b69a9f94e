"""An evaluation as text for a terminal, with chance beside the scores."""

from collections.abc import Iterator
from typing import Any

from muser_dist.evaluate.formats import amount, interval, percent, share, table

Values = dict[str, Any]


def describe(evaluation: Values) -> str:
    """The scores as tables; what an evaluation does not hold is left out.

    Args:
        evaluation: what `muser_dist.evaluate.evaluator.score` returns.
    """
    tables = [_retrieval("retrieval", evaluation["retrieval"]), _by_language(evaluation)]
    tables += [_classified(evaluation), _tagged(evaluation), _few_shot(evaluation), _robustness(evaluation)]
    tables += [_modalities(evaluation), _pairs(evaluation)]
    lines = [f"not scored: {name} ({reason})" for name, reason in evaluation["skipped_fields"].items()]
    return "\n\n".join("\n".join(part) for part in (*tables, lines) if part)


def by_field(evaluation: Values) -> Iterator[tuple[str, str, Values]]:
    """How a field was classified (zero-shot, or by which probe), its name with the modality, and the scores."""
    for section in ("zero_shot", "tagging"):
        for field, by_modality in evaluation.get(section, {}).items():
            for modality, scores in by_modality.items():
                yield "zero-shot", f"{field} by {modality}", scores
    for field, by_modality in evaluation.get("probes", {}).items():
        for modality, by_kind in by_modality.items():
            for kind, scores in by_kind.items():
                yield "head" if kind == "head" else f"{kind} probe", f"{field} by {modality}", scores


def in_languages(evaluation: Values) -> dict[str, Values]:
    """Scores of retrieval by direction and language, a row of a table each."""
    by_language = evaluation.get("retrieval_by_language") or {}
    named = {
        f"{direction} in {language}": s for language, found in by_language.items() for direction, s in found.items()
    }
    return dict(sorted(named.items(), key=lambda row: row[0].partition(" in ")[0]))


def _by_language(evaluation: Values) -> list[str]:
    return _retrieval("by language", in_languages(evaluation))


def _retrieval(heading: str, by_direction: Values) -> list[str]:
    names = ("R@1", "R@5", "R@10", "chance_R@10", "R@100", "MRR", "mAP@10")
    columns = [heading, "R@1", "R@5", "R@10", "chance", "R@100", "MRR", "mAP@10", "95 % interval", "median rank"]
    rows = [
        [
            direction,
            *(share(scores[name]) for name in names),
            interval(scores["mAP@10_interval"]),
            f"{amount(scores['median_rank'])} of {scores['candidates']}",
        ]
        for direction, scores in by_direction.items()
    ]
    return table(columns, rows)


def _classified(evaluation: Values) -> list[str]:
    columns = ["classes", "", "accuracy", "95 % interval", "majority", "macro F1", "95 % interval", "chance", "classes"]
    rows = [
        [
            name,
            how,
            share(s["accuracy"]),
            interval(s["accuracy_interval"]),
            share(s["majority"]),
            share(s["macro_f1"]),
            interval(s["macro_f1_interval"]),
            share(s["chance"]),
            str(len(s["classes"])),
        ]
        for how, name, s in by_field(evaluation)
        if "accuracy" in s
    ]
    return table(columns, rows)


def _tagged(evaluation: Values) -> list[str]:
    columns = ["tags", "", "ROC-AUC", "95 % interval", "PR-AUC", "95 % interval", "chance", "tags", "undefined"]
    rows = [
        [
            name,
            how,
            share(s["roc_auc"]),
            interval(s["roc_auc_interval"]),
            share(s["pr_auc"]),
            interval(s["pr_auc_interval"]),
            share(s["chance_pr_auc"]),
            str(s["tags"]),
            str(len(s["undefined"])),
        ]
        for how, name, s in by_field(evaluation)
        if "roc_auc" in s
    ]
    return table(columns, rows)


def _few_shot(evaluation: Values) -> list[str]:
    curves = [
        (f"{field} by {modality}", curve["points"])
        for field, by_modality in evaluation.get("few_shot", {}).items()
        for modality, curve in by_modality.items()
    ]
    rows = []
    for name, points in curves:
        score = "roc_auc" if any("roc_auc" in point for point in points) else "accuracy"
        cells = [share(point[score]["mean"]) if score in point else "–" for point in points]
        rows.append([f"{name}, {score.replace('roc_auc', 'ROC-AUC')}", *cells])
    return table(["by labels", *(percent(point["share"]) for point in curves[0][1])], rows) if curves else []


def _robustness(evaluation: Values) -> list[str]:
    rows = [
        [
            f"{field} by {modality}",
            str(len(s["values"])),
            *(share(s[key]) for key in ("lowest", "mean", "highest", "deviation", "agreement")),
        ]
        for field, by_modality in evaluation.get("robustness", {}).items()
        for modality, s in by_modality.items()
    ]
    return table(["wording", "templates", "lowest", "mean", "highest", "deviation", "agreement"], rows)


def _modalities(evaluation: Values) -> list[str]:
    rows = [
        [name, f"{amount(s['effective_rank'])} of {s['dimensions']}", amount(s["uniformity"]), amount(s["rows"])]
        for name, s in evaluation.get("geometry", {}).get("modalities", {}).items()
    ]
    return table(["geometry", "effective rank", "uniformity", "rows"], rows)


def _pairs(evaluation: Values) -> list[str]:
    rows = [
        [name, *(share(s[key]) for key in ("modality_gap", "separability", "alignment"))]
        for name, s in evaluation.get("geometry", {}).get("pairs", {}).items()
    ]
    return table(["pairs", "modality gap", "told apart by a plane", "alignment"], rows)
