"""The page of muser_table.py."""

import statistics
from typing import Any

from record import head, table

Rows = list[dict[str, Any]]

TOWERS = ("audio", "spectrogram", "symbolic")


def page(results: dict[str, Any], name: str) -> str:
    """The results in Markdown."""
    by_recipe: dict[str, Rows] = {}
    for row in results["rows"]:
        by_recipe.setdefault(row["recipe"], []).append(row)
    minutes = sum(row["seconds"] for row in results["rows"]) / 60
    parts = [
        head("MUSER's recipes on real music", results, name),
        f"Each run trains on {results['samples']:,} clips of PDTunes-Audio in steps of {results['global_batch']}, with "
        "towers of a few million parameters from random weights, AdamW and one schedule; recipes differ in objective, "
        "pairs, targets, picture, augmentation and crops. The audio tower is a Transformer over log-mel frames "
        "(`htcl_audio`) in place of the recipes' own, and half of the facts are left out of texts. "
        f"{minutes:.0f} minutes of training in all, one thread each. Where there are several seeds: the mean, and "
        "least to greatest. *untrained* is muser before its first step, *floor* a linear probe on mean and standard "
        "deviation of 128 log-mel bands. Probes see the tower's output, are fitted on the training shards and "
        "scored on the validation shards, which share no melody with them.",
        "## Linear probe, accuracy",
        _probes(by_recipe, results["floor"]),
        "## Zero-shot, accuracy",
        _zero_shot(by_recipe),
        "## Retrieval, mAP@10",
        _retrieval(by_recipe),
        "## Few-shot: linear probe of the audio tower by share of the labels",
        _few_shot(by_recipe),
        "## muser minus muser_audio_text, row by row",
        differences(results["comparison"]),
        "## muser_symbolic minus muser, row by row",
        differences(results["with_notation"]),
        "## Loss",
        _curves(by_recipe),
    ]
    return "\n\n".join(parts) + "\n"


def spread(values: list[float]) -> str:
    """Mean, and least to greatest of several."""
    if not values:
        return ""
    mean = f"{statistics.mean(values):.3f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.3f} to {max(values):.3f})"


def _probes(by_recipe: dict[str, Rows], floor: dict[str, Any]) -> str:
    fields = list(floor)
    lines = [["floor", "", *(_with_interval(floor[field]) for field in fields)]]
    lines.append(["majority", "", *(f"{floor[field]['majority']:.3f}" for field in fields)])
    for recipe, rows in by_recipe.items():
        for modality in TOWERS:
            if modality in rows[0]["probes"][fields[0]]:
                found = [[row["probes"][field][modality]["linear"] for row in rows] for field in fields]
                cells = [
                    _with_interval(of[0]) if len(of) == 1 else spread([scores["accuracy"] for scores in of])
                    for of in found
                ]
                lines.append([recipe, modality, *cells])
    return table(["recipe", "tower", *fields], lines)


def _with_interval(scores: dict[str, Any]) -> str:
    low, high = scores["accuracy_interval"]
    return f"{scores['accuracy']:.3f} [{low:.3f}, {high:.3f}]"


def _zero_shot(by_recipe: dict[str, Rows]) -> str:
    lines, fields = [], list(next(iter(by_recipe.values()))[0]["zero_shot"])
    for recipe, rows in by_recipe.items():
        for modality in TOWERS:
            values = [
                [row["zero_shot"][field][modality]["accuracy"] for row in rows if field in row["zero_shot"]]
                for field in fields
                if modality in row_modalities(rows[0])
            ]
            if any(values):
                lines.append([recipe, modality, *map(spread, values)])
    return table(["recipe", "tower", *fields], lines)


def row_modalities(row: dict[str, Any]) -> set[str]:
    """The modalities that a run was scored zero-shot by."""
    return {name for by_modality in row["zero_shot"].values() for name in by_modality}


def _retrieval(by_recipe: dict[str, Rows]) -> str:
    directions = list(dict.fromkeys(direction for rows in by_recipe.values() for direction in rows[0]["retrieval"]))
    lines = []
    for recipe, rows in by_recipe.items():
        if rows[0]["retrieval"]:
            values = [
                [row["retrieval"][direction]["mAP@10"] for row in rows if direction in row["retrieval"]]
                for direction in directions
            ]
            lines.append([recipe, *map(spread, values)])
    return table(["recipe", *directions], lines)


def _few_shot(by_recipe: dict[str, Rows]) -> str:
    lines: list[list[str]] = []
    shares: list[str] = []
    for field in next(iter(by_recipe.values()))[0]["few_shot"]:
        for recipe, rows in by_recipe.items():
            if "audio" not in rows[0]["few_shot"][field]:
                continue
            curves = [row["few_shot"][field]["audio"]["points"] for row in rows]
            shares = [f"{point['share']:.0%}" for point in curves[0]]
            cells = []
            for points in zip(*curves, strict=True):
                means = [point["accuracy"]["mean"] for point in points if "accuracy" in point]
                cells.append(spread(means) or "too few rows")
            lines.append([field, recipe, *cells])
    return table(["field", "recipe", *shares], lines)


def differences(comparison: list[dict[str, Any]]) -> str:
    """A line for each figure of `compare_rows`, a column for each seed."""
    if not comparison:
        return "Not both were run."
    lines = []
    for name in comparison[0]["figures"]:
        cells = []
        for of_seed in comparison:
            found = of_seed["figures"][name]
            low, high = found["interval"]
            cells.append(f"{found['difference']:+.3f} [{low:+.3f}, {high:+.3f}]")
        lines.append([name, *cells])
    return table(["figure", *(f"seed {of_seed['seed']}" for of_seed in comparison)], lines)


def _curves(by_recipe: dict[str, Rows]) -> str:
    lines: list[list[str]] = []
    places = [1, 2, 4, 8, 16]
    for recipe, rows in by_recipe.items():
        curve = rows[0]["curve"]
        if curve:
            at = [round(len(curve) * place / 16) for place in places]
            lines.append([recipe, *(f"{curve[n - 1]['loss']:.3f}" if n else "" for n in at)])  # none so early
    return table(["recipe, seed 0", *(f"{place}/16 of the samples" for place in places)], lines)
