"""Scores a model on validation shards: retrieval in both directions, zero-shot classification, its own heads."""

import json
from collections import Counter, defaultdict
from typing import Any

import numpy as np

from muser_dist.config import RunConfig
from muser_dist.data.labels import LABEL
from muser_dist.data.pipeline import evaluation_chunks
from muser_dist.data.shards import ShardIndex
from muser_dist.data.storage import Storage
from muser_dist.data.text import normal_form, render
from muser_dist.errors import DataError
from muser_dist.evaluate.formats import number
from muser_dist.evaluate.labels import classification, tagging
from muser_dist.evaluate.retrieval import text_audio_retrieval, unit_rows
from muser_dist.evaluate.zero_shot import zero_shot
from muser_dist.muser import Muser


def evaluate(muser: Muser, config: RunConfig, index: ShardIndex, storage: Storage) -> dict[str, Any]:
    """Scores every modality against text, and the heads of a model that has learned labels.

    Queries of text→x are the different texts, and right are all clips whose text states the
    same facts; texts are made from the first template. Classes of a field are the values that
    occur in the data; a class is the mean embedding of what the templates say of its value alone.

    Args:
        muser: the model.
        config: the run's config; its `data` must suit the model, `evaluate` says what to score.
        index: the shards.
        storage: where they are read from.

    Returns:
        what evaluation.json holds: "rows", "rows_without" (by modality, rows that could not be
        used), "retrieval", "zero_shot", "skipped_fields" (why there is no score); and "labels", where the model has
        learned some: by field what `classification` or `tagging` gives.

    Raises:
        DataError: the shards hold no usable row.
    """
    reads = "text" in muser.modalities
    kept: dict[str, list[Any]] = {"row": [], "text_id": [], "fields": []}
    embeddings: dict[str, list[np.ndarray]] = {name: [] for name in muser.modalities}
    valid: dict[str, list[np.ndarray]] = {name: [] for name in muser.modalities}
    said: dict[str, list[np.ndarray]] = {name: [] for name in muser.label_values}
    truth: dict[str, list[np.ndarray]] = {name: [] for name in muser.label_values}
    reasons: list[str] = []
    for chunk in evaluation_chunks(config, index, storage):
        for name in muser.modalities:
            if reads:
                embeddings[name].append(muser.encode_chunks(name, [chunk]))
            valid[name].append(chunk[f"valid_{name}"])
        for field, probabilities in (muser.classify_chunk(chunk) if said else {}).items():
            said[field].append(probabilities)
            truth[field].append(chunk[LABEL + field])
        for key, column in kept.items():
            column.extend(chunk[key])
        reasons.extend(json.loads(problem)["reason"] for problem in chunk["problems"])
    real = np.array(kept["row"]) >= 0
    joined = {name: np.concatenate(parts) for name, parts in embeddings.items() if parts}
    usable = {name: np.concatenate(parts) for name, parts in valid.items()}
    text_ids = np.array(kept["text_id"])
    fields = [json.loads(values) for values in kept["fields"]]
    others = [name for name in muser.modalities if name != "text"] if reads else []
    if not any((usable[name] & usable["text"]).any() if reads else usable[name].any() for name in others or usable):
        raise DataError(f"evaluation: none of {real.sum()} rows can be used; the first says: {(reasons or ['?'])[0]}")

    retrieval: dict[str, Any] = {}
    for name in others:
        both = usable[name] & usable["text"]
        if both.any():
            retrieval |= text_audio_retrieval(joined[name], joined["text"], text_ids, both, audio_name=name)
    scores: dict[str, Any] = {}
    skipped: dict[str, str] = {}
    for field in config.evaluate.fields if reads else ():
        labels = same_spelling([values.get(field) for values in fields])
        classes = sorted({label for label in labels if label is not None})
        prompts = {value: prompts_for(config.data.templates, field, value) for value in classes}
        if len(classes) < 2:
            skipped[field] = f"{len(classes)} different values in the data"
        elif not all(prompts.values()):
            skipped[field] = "no template can say it alone"
        else:
            means = np.stack([muser.encode_text(prompts[value]).mean(axis=0) for value in classes])
            scores[field] = {
                name: zero_shot(
                    joined[name][usable[name]],
                    unit_rows(means, f"class of {field}"),
                    classes,
                    [label for label, use in zip(labels, usable[name], strict=True) if use],
                )
                for name in others
                if any(label is not None and use for label, use in zip(labels, usable[name], strict=True))
            }
    if not reads:
        skipped = dict.fromkeys(("retrieval", *config.evaluate.fields), "the model has no text tower")
    heads = {}
    for field, values in muser.label_values.items():
        score = classification if muser.config.data.label_kinds()[field] == "class" else tagging
        use = usable[muser.modalities[0]]
        heads[field] = score(np.concatenate(said[field])[use], np.concatenate(truth[field])[use], values)
    return {
        "rows": int(real.sum()),
        "rows_without": {name: int((real & ~flags).sum()) for name, flags in usable.items()},
        "retrieval": retrieval,
        "zero_shot": scores,
        "skipped_fields": skipped,
    } | ({"labels": heads} if heads else {})


def same_spelling(labels: list[str | None]) -> list[str | None]:
    """The labels, each in the most frequent spelling of what means the same ("Rock" and "rock")."""
    spellings: dict[str, Counter[str]] = defaultdict(Counter)
    for label in labels:
        if label is not None:
            spellings[normal_form(label)][label] += 1
    usual = {form: min(counts, key=lambda s: (-counts[s], s)) for form, counts in spellings.items()}
    return [None if label is None else usual[normal_form(label)] for label in labels]


def prompts_for(templates: tuple[str, ...], field: str, value: str) -> list[str]:
    """What each template says of one field alone; templates that cannot are left out."""
    return [sentence for sentence, facts in (render(t, {field: value}) for t in templates) if facts]


def describe(evaluation: dict[str, Any]) -> str:
    """The scores as text for a terminal, with chance beside them."""
    lines = []
    if evaluation["retrieval"]:
        lines.append(f"{'retrieval':<24}{'R@1':>8}{'R@5':>8}{'R@10':>8}{'chance':>8}{'MRR':>8}{'median rank':>13}")
    for name, s in evaluation["retrieval"].items():
        lines.append(
            f"{name:<24}{s['R@1']:>8.3f}{s['R@5']:>8.3f}{s['R@10']:>8.3f}{s['chance_R@10']:>8.3f}"
            f"{s['MRR']:>8.3f}{s['median_rank']:>8.0f} of {s['candidates']}"
        )
    zero_shot = [
        (f"{field} by {modality}", scores)
        for field, by_modality in evaluation["zero_shot"].items()
        for modality, scores in by_modality.items()
    ]
    heads = evaluation.get("labels", {})
    classes = [(name, scores) for name, scores in heads.items() if "confusion" in scores]
    for title, table in (("zero-shot", zero_shot), ("classes", classes)):
        if table:
            lines.append(f"{title:<24}{'accuracy':>10}{'macro F1':>10}{'majority':>10}{'chance':>8}{'classes':>9}")
        for name, s in table:
            lines.append(
                f"{name:<24}{number(s['accuracy']):>10.3f}{number(s['macro_f1']):>10.3f}"
                f"{number(s['majority']):>10.3f}{s['chance']:>8.3f}{len(s['classes']):>9}"
            )
    if heads:
        lines.append(f"{'heads, macro':<24}{'ROC-AUC':>10}{'chance':>10}{'PR-AUC':>10}{'chance':>8}{'rows':>9}")
    for name, s in heads.items():
        lines.append(
            f"{name:<24}{number(s['roc_auc']):>10.3f}{0.5:>10.3f}"
            f"{number(s['pr_auc']):>10.3f}{number(s['chance_pr_auc']):>8.3f}{s['rows']:>9}"
        )
    lines.extend(f"not scored: {field} ({reason})" for field, reason in evaluation["skipped_fields"].items())
    return "\n".join(lines)
