"""Scores a snapshot of a model during training: a function of picklable arguments, for a Ray task or in place.

In a task it takes nothing of the trainers' time; in place the trainers wait for it. Either way the
snapshot is an exported model (`muser_dist.muser.save_model`), so what is scored is what would be shipped.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from muser_dist.config import RunConfig
from muser_dist.data.shards import ShardIndex
from muser_dist.data.storage import Storage
from muser_dist.evaluate.evaluator import evaluate
from muser_dist.muser import Muser


def validate(folder: Path, config: RunConfig, index: ShardIndex, storage: Storage) -> dict[str, float]:
    """Scores an exported model on the GPU that this process has, or on its CPUs.

    Args:
        folder: holds model.safetensors and config.json.
        config: the run's config; `evaluate.rows` bounds the time this takes.
        index: the validation shards.
        storage: where they are read from.

    Returns:
        fields for metrics.jsonl: "val_R@10/text->audio" and "val_MRR/text->audio" for each direction,
        "val_accuracy/genre by audio", or of tags "val_roc_auc/tags by audio" and "val_pr_auc/tags by audio", for each
        field and modality, by prompts or else by the model's own head; those without a row to score are left out.

    Raises:
        CheckpointError: the folder holds no whole model.
        DataError: the shards hold no usable row.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    evaluation = evaluate(Muser.from_pretrained(folder, device), config, index, storage)
    return {name: value for name, value in _scores(evaluation) if value is not None}


def _scores(evaluation: dict[str, Any]) -> Iterator[tuple[str, float | None]]:
    for direction, scores in evaluation["retrieval"].items():
        for metric in ("R@10", "MRR"):
            yield f"val_{metric}/{direction}", scores[metric]
    for field, by_modality in evaluation["zero_shot"].items():
        for modality, scores in by_modality.items():
            yield f"val_accuracy/{field} by {modality}", scores["accuracy"]
    for field, by_modality in (evaluation["tagging"]).items():
        for modality, scores in by_modality.items():
            for metric in ("roc_auc", "pr_auc"):
                yield f"val_{metric}/{field} by {modality}", scores[metric]
    for field, by_modality in evaluation.get("probes", {}).items():
        for modality, by_kind in by_modality.items():
            for metric in ("accuracy", "macro_f1", "roc_auc", "pr_auc"):
                yield f"val_{metric}/{field} by {modality}", by_kind["head"].get(metric)
