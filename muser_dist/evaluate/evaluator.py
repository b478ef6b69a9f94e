"""Scores any model on shards: retrieval, zero-shot, geometry; with training shards, probes and few-shot curves too."""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from muser_dist.config import RunConfig
from muser_dist.data.config import LABEL
from muser_dist.data.labels import Labels
from muser_dist.data.rows import RowReader
from muser_dist.data.shards import ShardIndex
from muser_dist.data.storage import Storage
from muser_dist.data.text import flat, read_fields
from muser_dist.errors import ConfigError, DataError
from muser_dist.evaluate.classification import multi_label, predict, single_label
from muser_dist.evaluate.comparison import PerRow
from muser_dist.evaluate.embedding import Embedded, Encoder, embed
from muser_dist.evaluate.fields import FieldLabels, read_labels
from muser_dist.evaluate.geometry import geometry
from muser_dist.evaluate.languages import directions_in
from muser_dist.evaluate.probes import Kind, few_shot, probe
from muser_dist.evaluate.retrieval import answers, average_precision, directions, ranks, retrieval, score_ranks
from muser_dist.evaluate.zero_shot import class_scores, embed_prompts, prompts_for, robustness, zero_shot
from muser_dist.muser import Muser


@dataclass(frozen=True)
class Probing:
    """What is probed, and how."""

    on: Literal["tower", "joint"] = "tower"
    """The towers' output before their heads, as is usual, or the joint space."""
    kinds: tuple[Kind, ...] = ("linear", "mlp")
    """Probes to fit."""
    seeds: int = 5
    """Draws of labels for each point of the few-shot curves; 0 leaves them out."""


def evaluate(
    model: Encoder,
    config: RunConfig,
    index: ShardIndex,
    storage: Storage,
    *,
    train_index: ShardIndex | None = None,
    probing: Probing | None = None,
    progress: Callable[[int, int], None] | None = None,
    per_row: PerRow | None = None,
) -> dict[str, Any]:
    """Embeds shards and scores what came out; `score` without the reading.

    Args:
        model: Muser, or a model of others.
        config: the run's config; its `data` must suit the model, `evaluate` says what to score.
        index: the shards to score on.
        storage: where they are read from.
        train_index: shards that probes are fitted on; there are no probes without.
        probing: what is probed.
        progress: called now and then with the rows that are done and all, for each set of shards.
        per_row: filled with the results of each row, for a paired comparison with another model's.

    Returns:
        What `score` returns.

    Raises:
        DataError: the shards hold no usable row.
        ConfigError: the model cannot be scored, or not probed in this way.
    """
    test = embed(model, config, index, storage, progress)
    train = None if train_index is None else embed(model, config, train_index, storage, progress)
    return score(model, config, test, train, probing or Probing(), per_row)


def score(
    model: Encoder,
    config: RunConfig,
    test: Embedded,
    train: Embedded | None = None,
    probing: Probing | None = None,
    per_row: PerRow | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Scores embedded rows.

    A model without a text tower is scored by what needs none. Texts are made from the first template, and taken once
    each. Classes of a field are the values that occur in the data; a class is the mean of the unit vectors of what the
    templates say of its value alone. A field whose values are lists is one of tags.

    Args:
        model: encodes the prompts.
        config: `data.templates`, `evaluate.fields`, `evaluate.languages` and `objective.dims`.
        test: rows to score.
        train: rows that probes are fitted on.
        probing: what is probed.
        per_row: filled with the results of each row, for a paired comparison with another model's.
        progress: called with the number of fields that are probed, and of all.

    Returns:
        What evaluation.json holds. "rows", "rows_without" (by modality, rows that could not be used); "retrieval" by
        direction; "retrieval_by_leading_dims", the same by the first dimensions alone, for each of objective.dims;
        "retrieval_by_language", the same from and to texts in each of evaluate.languages alone;
        "zero_shot" and "tagging", by field and modality; "robustness" to wording likewise, where two
        templates can say the field; "geometry"; "skipped_fields" with reasons. "probes" by field, modality and
        kind: "head" for what a model's own heads say, and with training rows those that were fitted on them. With these
        also "few_shot" by field and modality, "probes_on" and "train_rows".

    Raises:
        DataError: there is no usable row, an embedding is not finite, or the model has a tower of texts alone.
        ConfigError: the model has nothing to probe.
    """
    per_row = {} if per_row is None else per_row
    sounds = [name for name in model.modalities if name != "text"]
    if not sounds:
        raise DataError("nothing to score: the model has no tower besides that of texts")
    everything = np.ones(len(test), bool)
    if not any((test.valid[name] & test.valid.get("text", everything)).any() for name in sounds):
        said = (test.problems or ["?"])[0]
        raise DataError(f"evaluation: none of {len(test)} rows can be used; the first says: {said}")
    result: dict[str, Any] = {
        "rows": len(test),
        "rows_without": {name: int((~flags).sum()) for name, flags in test.valid.items()},
        "retrieval": {},
        "retrieval_by_leading_dims": {
            str(dim): {name: retrieval(*asked) for name, asked in directions(leading, test.valid, test.text_ids)}
            for dim in config.objective.dims
            for leading in [{name: rows[:, :dim] for name, rows in test.joint.items()}]
        },
        "retrieval_by_language": {},
        "zero_shot": {},
        "tagging": {},
        "robustness": {},
        "geometry": geometry(test.joint, test.valid, test.text_ids),
        "skipped_fields": {},
    }
    for direction, asked in directions(test.joint, test.valid, test.text_ids):
        result["retrieval"][direction], per_row[f"retrieval {direction}"] = _retrieved(*asked)
    for language in config.evaluate.languages:
        if "text" not in model.modalities:
            result["skipped_fields"][f"language {language}"] = _NO_TEXT
            continue
        scores = {}
        for direction, asked in directions_in(language, model, config.data, test):
            scores[direction], per_row[f"retrieval {direction} in {language}"] = _retrieved(*asked)
        if scores:
            result["retrieval_by_language"][language] = scores
        else:
            result["skipped_fields"][f"language {language}"] = "no usable row has a text in it that a template can say"
    for field in config.evaluate.fields:
        labels = read_labels(field, test.fields)
        if reason := _unfit(labels):
            result["skipped_fields"][field] = reason
            continue
        if "text" not in model.modalities:
            result["skipped_fields"][f"{field}, zero-shot"] = _NO_TEXT
            continue
        prompts = embed_prompts(model.encode_text, config.data.templates, field, labels.classes)
        if not len(prompts):
            result["skipped_fields"][field] = _UNSAID
            continue
        for name in sounds:
            _zero_shot(result, per_row, field, name, test, labels, prompts)
    if isinstance(model, Muser) and model.label_values:
        _heads(result, per_row, model, test)
    if train is not None:
        _probe(result, per_row, config.evaluate.fields, test, train, probing or Probing(), progress)
    return result


def skipped_fields(config: RunConfig, index: ShardIndex, storage: Storage, tags: bool) -> dict[str, str]:
    """Fields of evaluate.fields that zero-shot will have no such scores of, and why, by the metadata alone.

    Args:
        config: as of `evaluate`.
        index: the shards to score on; no audio is read.
        storage: where they are read from.
        tags: whether scores of tags are meant, or of classes.
    """
    reader, left = RowReader(index, storage), config.evaluate.rows
    rows = []
    for shard, count in enumerate(index.rows.tolist()):
        for number in range(min(count, left)):
            row = reader.row(shard, number)
            with contextlib.suppress(DataError, OSError):  # evaluation says what is wrong with it
                rows.append(flat(read_fields(row.read("json"), row.read("txt"))))
        left -= min(count, left)
    reasons = {}
    for field in config.evaluate.fields:
        labels = read_labels(field, rows)
        if reason := _unfit(labels):
            reasons[field] = reason
        elif labels.tags != tags:
            reasons[field] = f"rows have {'several values' if labels.tags else 'one value'} of it"
        elif not all(prompts_for(config.data.templates, field, value) for value in labels.classes):
            reasons[field] = _UNSAID
    return reasons


def _retrieved(
    queries: np.ndarray, candidates: np.ndarray, query_ids: np.ndarray, candidate_ids: np.ndarray
) -> tuple[dict[str, Any], tuple[np.ndarray, np.ndarray]]:
    """Scores of a direction, and per query the rank of its best answer and average precision."""
    found = ranks(queries, candidates, query_ids, candidate_ids)
    precision = average_precision(found, answers(query_ids, candidate_ids))
    per_query = np.stack([found[:, 0], precision], axis=1)
    return score_ranks(found, query_ids, candidate_ids), (query_ids, per_query)


_UNSAID = "no template can say it alone"
_NO_TEXT = "the model has no text tower"


def _unfit(labels: FieldLabels) -> str | None:
    """Why a field cannot be scored."""
    if len(labels.classes) < (1 if labels.tags else 2):
        return f"{len(labels.classes)} different values in the data"
    return None


def _zero_shot(
    result: dict[str, Any],
    per_row: PerRow,
    field: str,
    name: str,
    test: Embedded,
    labels: FieldLabels,
    prompts: np.ndarray,
) -> None:
    use = test.valid[name] if not labels.tags else test.valid[name] & labels.known[0]
    known = use & labels.known[0]
    if not known.any():
        return
    classes, truth = prompts.mean(axis=0), labels.sets[0]
    scores = zero_shot(test.joint[name][use], classes, labels.classes, truth[use])
    if labels.tags:
        scores |= {"tags_left_out": labels.left_out, "without_label": int((test.valid[name] & ~use).sum())}
    result["tagging" if labels.tags else "zero_shot"].setdefault(field, {})[name] = scores
    if spread := robustness(test.joint[name][known], prompts, truth[known]):
        result["robustness"].setdefault(field, {})[name] = spread
    cosines = class_scores(test.joint[name][known], classes, labels.tags)
    per_row[f"zero-shot {field} by {name}"] = np.flatnonzero(known), _results(cosines, truth[known])


def _probe(
    result: dict[str, Any],
    per_row: PerRow,
    fields: tuple[str, ...],
    test: Embedded,
    train: Embedded,
    probing: Probing,
    progress: Callable[[int, int], None] | None,
) -> None:
    sounds = [name for name in test.joint if name != "text"]
    of_test, of_train = (getattr(rows, probing.on) for rows in (test, train))
    if not all(of_test[name].shape[1] for name in sounds):
        raise ConfigError("the model does not say what its towers put out before their heads; give --probe-on joint")
    result |= {"few_shot": {}, "probes_on": probing.on, "train_rows": len(train)}
    for number, field in enumerate(fields):
        if progress:
            progress(number, len(fields))
        labels = read_labels(field, test.fields, train.fields)
        if reason := _unfit(labels):
            result["skipped_fields"].setdefault(field, reason)
            continue
        for name in sounds:
            scored, seen = test.valid[name] & labels.known[0], train.valid[name] & labels.known[1]
            columns = labels.sets[1][seen].T if labels.tags else [labels.sets[1][seen]]
            if not scored.any() or not any(len(np.unique(column)) > 1 for column in columns):
                reason = "training rows that differ in it" if scored.any() else "rows to score that have it"
                result["skipped_fields"].setdefault(f"probe of {field} by {name}", f"there are no {reason}")
                continue
            arrays = of_train[name][seen], labels.sets[1][seen], of_test[name][scored], labels.sets[0][scored]
            for kind in probing.kinds:
                figures, scores = probe(kind, *arrays, labels.classes)
                result.setdefault("probes", {}).setdefault(field, {}).setdefault(name, {})[kind] = figures
                rows = np.flatnonzero(scored), _results(scores, labels.sets[0][scored])
                per_row[f"{kind} probe {field} by {name}"] = rows
            if probing.seeds:
                curve = few_shot(*arrays, labels.classes, seeds=probing.seeds)
                result["few_shot"].setdefault(field, {})[name] = curve
    if progress:
        progress(len(fields), len(fields))


def _heads(result: dict[str, Any], per_row: PerRow, model: Muser, test: Embedded) -> None:
    """What a model's own heads say, beside the probes."""
    name, labels = model.model.labelled, Labels(model.config.data)
    truth = labels.empty(len(test))
    for row, values in enumerate(test.fields):
        labels.put(truth, row, values)
    said = model.classify_features(test.tower[name])
    for field, classes in model.label_values.items():
        of_field = truth[LABEL + field]
        tags = of_field.ndim == 2
        known = test.valid[name] & (of_field >= 0).reshape(len(test), -1).all(axis=1)
        if not known.any():
            result["skipped_fields"][f"head of {field}"] = "no row to score has one of its values"
            continue
        scores = said[field][known]
        right = of_field[known].astype(bool) if tags else of_field[known]
        figures = (multi_label if tags else single_label)(scores, right, classes)
        figures["without_label"] = int((test.valid[name] & ~known).sum())
        result.setdefault("probes", {}).setdefault(field, {}).setdefault(name, {})["head"] = figures
        per_row[f"head of {field}"] = np.flatnonzero(known), _results(scores, right)


def _results(scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Per row: (true, predicted) class; of tags, which it has and its scores, (rows, 2, tags)."""
    if labels.ndim == 2:
        return np.stack([labels.astype(np.float32), scores.astype(np.float32)], axis=1)
    return np.stack([labels, predict(scores, labels)], axis=1)
