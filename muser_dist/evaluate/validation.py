"""Scores a snapshot of a model during training: a function of picklable arguments, for a Ray task or in place.

In a task it takes nothing of the trainers' time; in place the trainers wait for it. Either way the
snapshot is an exported model (`muser_dist.muser.save_model`), so what is scored is what would be shipped.
"""

import re
from pathlib import Path
from typing import Any

import torch

from muser_dist.config import RunConfig
from muser_dist.data.shards import ShardIndex
from muser_dist.data.storage import Storage
from muser_dist.evaluate.evaluator import evaluate
from muser_dist.muser import Muser

RETRIEVAL = ("R@1", "R@5", "R@10", "MRR", "median_rank")
ZERO_SHOT = ("accuracy", "macro_f1")


def validate(folder: Path, config: RunConfig, index: ShardIndex, storage: Storage) -> dict[str, float]:
    """Scores an exported model on the GPU that this process has, or on its CPUs.

    Args:
        folder: holds model.safetensors and config.json.
        config: the run's config; `evaluate.rows` bounds the time this takes.
        index: the validation shards.
        storage: where they are read from.

    Returns:
        what `flat_scores` gives.

    Raises:
        CheckpointError: the folder holds no whole model.
        DataError: the shards hold no usable row.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    evaluation = evaluate(Muser.from_pretrained(folder, device), config, index, storage)
    return flat_scores(evaluation)


def flat_scores(evaluation: dict[str, Any]) -> dict[str, float]:
    """The scores of an evaluation as fields for metrics.jsonl; those without a row to score are left out.

    Args:
        evaluation: what `evaluate` returned.

    Returns:
        "val_MRR/text->audio" for each metric of RETRIEVAL and direction, "val_accuracy/genre by audio" for each of
        ZERO_SHOT, field and modality, and under "val_MRR" and "val_accuracy" their means; under "val_MRR@64" that by
        the first 64 dimensions alone, for each of objective.dims.
    """
    parts: dict[str, dict[str, float | None]] = {metric: {} for metric in (*RETRIEVAL, *ZERO_SHOT)}
    for direction, scores in evaluation["retrieval"].items():
        for metric in RETRIEVAL:
            parts[metric][direction] = scores[metric]
    for field, by_modality in evaluation["zero_shot"].items():
        for modality, scores in by_modality.items():
            for metric in ZERO_SHOT:
                parts[metric][f"{field} by {modality}"] = scores[metric]
    flat = {}
    for metric, by_part in parts.items():
        known = {part: value for part, value in by_part.items() if value is not None}
        if known:
            flat[f"val_{metric}"] = sum(known.values()) / len(known)
        flat |= {f"val_{metric}/{part}": value for part, value in known.items()}
    for dim, by_direction in evaluation["retrieval_by_leading_dims"].items():
        for metric in RETRIEVAL if by_direction else ():
            values = [scores[metric] for scores in by_direction.values() if scores[metric] is not None]
            flat |= {f"val_{metric}@{dim}": sum(values) / len(values)} if values else {}
    return flat


def score_names(config: RunConfig) -> list[str]:
    """All that `flat_scores` may hold for a run of this config; fields that the data lacks are left out there."""
    others = [name for name in config.model.towers() if name != "text"]
    directions = [direction for name in others for direction in (f"text->{name}", f"{name}->text")]
    fields = [f"{field} by {name}" for field in config.evaluate.fields for name in others]
    found = []
    for metrics, parts in ((RETRIEVAL, directions), (ZERO_SHOT, fields)):
        for metric in metrics if parts else ():
            found += [f"val_{metric}", *(f"val_{metric}/{part}" for part in parts)]
    return found + [f"val_{metric}@{dim}" for dim in config.objective.dims for metric in RETRIEVAL if directions]


def lower_is_better(score: str) -> bool:
    """Whether the least value of a score is the best; of all but the median rank it is the greatest."""
    return re.split("[/@]", score)[0] == "val_median_rank"
