"""Scores a model on validation shards: retrieval in both directions, zero-shot classification."""

import contextlib
import json
from collections import Counter, defaultdict
from typing import Any

import numpy as np

from muser_dist.config import RunConfig
from muser_dist.data.pipeline import evaluation_chunks
from muser_dist.data.rows import RowReader
from muser_dist.data.shards import ShardIndex
from muser_dist.data.storage import Storage
from muser_dist.data.text import flat, normal_form, read_fields, render
from muser_dist.errors import DataError
from muser_dist.evaluate.retrieval import text_audio_retrieval, unit_rows
from muser_dist.evaluate.zero_shot import zero_shot
from muser_dist.muser import Muser


def evaluate(muser: Muser, config: RunConfig, index: ShardIndex, storage: Storage) -> dict[str, Any]:
    """Scores every modality against text.

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
        used), "retrieval", "retrieval_by_leading_dims" (the same by the first dimensions alone, for each of
        objective.dims), "zero_shot", "skipped_fields".

    Raises:
        DataError: the shards hold no usable row.
    """
    if "text" not in muser.modalities:
        raise DataError(f"nothing to score: the model has no text tower, only {', '.join(muser.modalities)}")
    kept: dict[str, list[Any]] = {"row": [], "text_id": [], "fields": []}
    embeddings: dict[str, list[np.ndarray]] = {name: [] for name in muser.modalities}
    valid: dict[str, list[np.ndarray]] = {name: [] for name in muser.modalities}
    reasons: list[str] = []
    for chunk in evaluation_chunks(config, index, storage):
        for name in muser.modalities:
            embeddings[name].append(muser.encode_chunks(name, [chunk]))
            valid[name].append(chunk[f"valid_{name}"])
        for key, values in kept.items():
            values.extend(chunk[key])
        reasons.extend(json.loads(problem)["reason"] for problem in chunk["problems"])
    real = np.array(kept["row"]) >= 0
    joined = {name: np.concatenate(parts) for name, parts in embeddings.items()}
    usable = {name: np.concatenate(parts) for name, parts in valid.items()}
    text_ids = np.array(kept["text_id"])
    fields = [json.loads(values) for values in kept["fields"]]
    others = [name for name in muser.modalities if name != "text"]
    if not any((usable[name] & usable["text"]).any() for name in others):
        raise DataError(f"evaluation: none of {real.sum()} rows can be used; the first says: {(reasons or ['?'])[0]}")

    retrieval: dict[str, Any] = {}
    for name in others:
        both = usable[name] & usable["text"]
        if both.any():
            retrieval |= text_audio_retrieval(joined[name], joined["text"], text_ids, both, audio_name=name)
    leading: dict[str, Any] = {str(dim): {} for dim in config.objective.dims}
    for dim in config.objective.dims:
        for name in others:
            both = usable[name] & usable["text"]
            if both.any():
                first, text = joined[name][:, :dim], joined["text"][:, :dim]
                leading[str(dim)] |= text_audio_retrieval(first, text, text_ids, both, audio_name=name)
    scores: dict[str, Any] = {}
    skipped: dict[str, str] = {}
    for field in config.evaluate.fields:
        labels = same_spelling([values.get(field) for values in fields])
        classes, prompts, reason = _classes(field, labels, config)
        if reason:
            skipped[field] = reason
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
    return {
        "rows": int(real.sum()),
        "rows_without": {name: int((real & ~flags).sum()) for name, flags in usable.items()},
        "retrieval": retrieval,
        "retrieval_by_leading_dims": leading,
        "zero_shot": scores,
        "skipped_fields": skipped,
    }


def _classes(field: str, labels: list[str | None], config: RunConfig) -> tuple[list[str], dict[str, list[str]], str]:
    """The values of a field, what templates say of each alone, and why the field cannot be scored, if so."""
    classes = sorted({label for label in labels if label is not None})
    prompts = {value: prompts_for(config.data.templates, field, value) for value in classes}
    reason = ""
    if len(classes) < 2:
        reason = f"{len(classes)} different values in the data"
    elif not all(prompts.values()):
        reason = "no template can say it alone"
    return classes, prompts, reason


def skipped_fields(config: RunConfig, index: ShardIndex, storage: Storage) -> dict[str, str]:
    """Fields of evaluate.fields that `evaluate` will leave out, and why, by the metadata: nothing is decoded."""
    reader, left = RowReader(index, storage), config.evaluate.rows
    fields = []
    for shard, count in enumerate(index.rows.tolist()):
        for number in range(min(count, left)):
            row = reader.row(shard, number)
            with contextlib.suppress(DataError, OSError):  # evaluation says what is wrong with it
                fields.append(flat(read_fields(row.read("json"), row.read("txt"))))
        left -= min(count, left)
    reasons = {}
    for field in config.evaluate.fields:
        *_, reasons[field] = _classes(field, same_spelling([values.get(field) for values in fields]), config)
    return {field: reason for field, reason in reasons.items() if reason}


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
    lines = [f"{'retrieval':<24}{'R@1':>8}{'R@5':>8}{'R@10':>8}{'chance':>8}{'MRR':>8}{'median rank':>13}"]
    for name, s in evaluation["retrieval"].items():
        lines.append(
            f"{name:<24}{s['R@1']:>8.3f}{s['R@5']:>8.3f}{s['R@10']:>8.3f}{s['chance_R@10']:>8.3f}"
            f"{s['MRR']:>8.3f}{s['median_rank']:>8.0f} of {s['candidates']}"
        )
    lines.append(f"{'zero-shot':<24}{'accuracy':>10}{'macro F1':>10}{'majority':>10}{'chance':>8}{'classes':>9}")
    for field, by_modality in evaluation["zero_shot"].items():
        for modality, s in by_modality.items():
            lines.append(
                f"{f'{field} by {modality}':<24}{s['accuracy']:>10.3f}{s['macro_f1']:>10.3f}"
                f"{s['majority']:>10.3f}{s['chance']:>8.3f}{len(s['classes']):>9}"
            )
    lines.extend(f"not scored: {field} ({reason})" for field, reason in evaluation["skipped_fields"].items())
    return "\n".join(lines)
