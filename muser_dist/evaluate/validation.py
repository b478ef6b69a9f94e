"""Scores a snapshot of a model during training: a function of picklable arguments, for a Ray task or in place.

In a task it takes nothing of the trainers' time; in place the trainers wait for it. Either way the
snapshot is an exported model (`muser_dist.muser.save_model`), so what is scored is what would be shipped.
"""

import re
from itertools import permutations
from pathlib import Path
from typing import Any

from muser_dist.config import RunConfig
from muser_dist.data.shards import ShardIndex
from muser_dist.data.storage import Storage
from muser_dist.evaluate.evaluator import evaluate
from muser_dist.evaluate.summary import by_field
from muser_dist.muser import Muser

RETRIEVAL = ("R@1", "R@5", "R@10", "MRR", "mAP@10", "median_rank")
CLASSES = ("accuracy", "macro_f1")
TAGS = ("roc_auc", "pr_auc")


def validate(
    folder: Path, config: RunConfig, index: ShardIndex, storage: Storage, device: str = "cpu"
) -> dict[str, float]:
    """Scores an exported model.

    Args:
        folder: holds model.safetensors and config.json.
        config: the run's config; `evaluate.rows` bounds the time this takes.
        index: the validation shards.
        storage: where they are read from.
        device: where it computes. A task that has no GPU may see those of others, so what it sees says nothing.

    Returns:
        what `flat_scores` gives.

    Raises:
        CheckpointError: the folder holds no whole model.
        DataError: the shards hold no usable row.
    """
    evaluation = evaluate(Muser.from_pretrained(folder, device), config, index, storage)
    return flat_scores(evaluation)


def flat_scores(evaluation: dict[str, Any]) -> dict[str, float]:
    """The scores of an evaluation as fields for metrics.jsonl; those without a row to score are left out.

    Args:
        evaluation: what `evaluate` returned.

    Returns:
        "val_MRR/text->audio" for each metric of RETRIEVAL and direction; "val_accuracy/genre by audio" for each of
        CLASSES, or of TAGS, field and modality, by prompts or else by the model's own head. Under "val_MRR" their mean
        over the directions from and to text (between views of sound the right answer has the same recording, which
        says little), and under "val_accuracy" over all; under "val_MRR@64" that by the first 64 dimensions alone, for
        each of objective.dims.
    """
    parts: dict[str, dict[str, float | None]] = {
        metric: {direction: scores[metric] for direction, scores in evaluation["retrieval"].items()}
        for metric in RETRIEVAL
    }
    for how, name, scores in by_field(evaluation):
        for metric in (*CLASSES, *TAGS):
            if how in ("zero-shot", "head") and metric in scores:
                parts.setdefault(metric, {})[name] = scores[metric]
    flat: dict[str, float] = {}
    for metric, by_part in parts.items():
        flat |= _mean(metric, by_part)
        flat |= {f"val_{metric}/{part}": value for part, value in by_part.items() if value is not None}
    for dim, by_direction in evaluation["retrieval_by_leading_dims"].items():
        for metric in RETRIEVAL:
            flat |= _mean(f"{metric}@{dim}", {name: scores[metric] for name, scores in by_direction.items()})
    return flat


def _mean(name: str, by_part: dict[str, float | None]) -> dict[str, float]:
    values = [value for part, value in by_part.items() if _counts(part) and value is not None]
    return {f"val_{name}": sum(values) / len(values)} if values else {}


def _counts(part: str) -> bool:
    """Whether a direction, or a field by a modality, is in the mean."""
    query, arrow, answer = part.partition("->")
    return not arrow or "text" in (query, answer)


def score_names(config: RunConfig) -> list[str]:
    """All that `flat_scores` may hold for a run of this config; the data decide which fields are there, and as what."""
    towers, heads = list(config.evaluated), config.data.label_kinds()
    directions = [f"{query}->{answer}" for query, answer in permutations(towers, 2)]
    asked = config.evaluate.fields if "text" in towers else ()
    by_prompts = [f"{field} by {name}" for field in asked for name in towers if name != "text"]
    found = []
    for kind, metrics in (("direction", RETRIEVAL), ("class", CLASSES), ("tags", TAGS)):
        by_heads = [f"{field} by {towers[0]}" for field in heads if heads[field] == kind]
        parts = directions if kind == "direction" else list(dict.fromkeys(by_prompts + by_heads))
        for metric in metrics:
            found += [f"val_{metric}"] if any(map(_counts, parts)) else []
            found += [f"val_{metric}/{part}" for part in parts]
    with_text = any(map(_counts, directions))
    return found + [f"val_{metric}@{dim}" for dim in config.objective.dims for metric in RETRIEVAL if with_text]


def lower_is_better(score: str) -> bool:
    """Whether the least value of a score is the best; of all but the median rank it is the greatest."""
    return re.split("[/@]", score)[0] == "val_median_rank"
