"""Zero-shot classification: the class whose text is nearest to the clip, scored next to chance."""

from collections.abc import Callable, Sequence
from itertools import combinations
from typing import Any

import numpy as np

from muser_dist.data.text import render
from muser_dist.evaluate.classification import TIE, multi_label, single_label
from muser_dist.evaluate.retrieval import unit_rows


def prompts_for(templates: Sequence[str], field: str, value: str) -> list[str]:
    """What each template says of one field alone; templates that cannot, or say the same again, are left out."""
    return list(dict.fromkeys(sentence for sentence, facts in (render(t, {field: value}) for t in templates) if facts))


def embed_prompts(
    encode_text: Callable[[list[str]], np.ndarray], templates: Sequence[str], field: str, values: Sequence[str]
) -> np.ndarray:
    """Each template's texts of a field's values.

    Args:
        encode_text: (n) sentences to (n, D).
        templates: sentences over fields.
        field: that they are to speak of.
        values: of the field, one at least.

    Returns:
        (templates that can say the field alone, values, D) float64 of unit length; nothing when no template can.
    """
    prompts = [prompts_for(templates, field, value) for value in values]
    count = min(map(len, prompts))  # which templates can depends on the field alone, unless two say the same
    sentences = [prompt for of_value in prompts for prompt in of_value[:count]]
    if not count:
        return np.zeros((0, len(values), 0))
    return unit_rows(encode_text(sentences), f"prompts of {field}").reshape(len(values), count, -1).swapaxes(0, 1)


def class_scores(embeddings: np.ndarray, class_embeddings: np.ndarray, tags: bool) -> np.ndarray:
    """(n, C) cosines of (n, D) clips and (C, D) classes; of tags in steps of TIE, as what is less is rounding."""
    cosines = unit_rows(embeddings, "clip") @ unit_rows(class_embeddings, "class").T
    return np.round(cosines / TIE) * TIE if tags else cosines


def zero_shot(
    embeddings: np.ndarray,
    class_embeddings: np.ndarray,
    classes: Sequence[str],
    labels: np.ndarray,
) -> dict[str, Any]:
    """Scores of naming each clip's class, or its tags, by the nearest of their texts.

    Args:
        embeddings: (n, D) of the clips.
        class_embeddings: (C, D), one text for each class or tag; for an ensemble of templates, the mean of the unit
            vectors of what they say.
        classes: C different names.
        labels: (n,) integer classes, -1 where a clip has none: it is left out and counted; or (n, C) bool tags.

    Returns:
        What `single_label` or `multi_label` returns.

    Raises:
        DataError: an embedding is not finite, or a label is none of the classes.
        ValueError: shapes do not fit together, there are no classes, or one has two texts.
    """
    embeddings, class_embeddings, labels = map(np.asarray, (embeddings, class_embeddings, labels))
    if not classes or len(set(classes)) != len(classes) or len(class_embeddings) != len(classes):
        raise ValueError(
            f"{len(classes)} classes, {len(set(classes))} of them different, have {len(class_embeddings)} texts"
        )
    if len(labels) != len(embeddings):
        raise ValueError(f"{len(embeddings)} embeddings have {len(labels)} labels")
    if labels.ndim == 2:
        return multi_label(class_scores(embeddings, class_embeddings, True), labels, classes)
    scored = labels >= 0
    scores = single_label(class_scores(embeddings[scored], class_embeddings, False), labels[scored], classes)
    return scores | {"without_label": int((~scored).sum())}


def robustness(embeddings: np.ndarray, prompts: np.ndarray, labels: np.ndarray) -> dict[str, Any] | None:
    """How much the wording matters: each template alone.

    Args:
        embeddings: (n, D) of clips that have a label.
        prompts: (T, C, D): what `embed_prompts` returns.
        labels: (n,) classes, or (n, C) bool tags.

    Returns:
        None for fewer than two templates. Otherwise JSON values: "score" ("accuracy", or "roc_auc" of tags),
        "values" (of each template; None where undefined), their "mean", "lowest", "highest" and "deviation" (standard,
        n - 1), and "agreement": share of clips of which two templates name the same class first, mean over all pairs
        of templates; where a template has two first classes the clip counts as a disagreement.

    Raises:
        DataError: an embedding is not finite.
    """
    if len(prompts) < 2 or not len(embeddings):
        return None
    name = "roc_auc" if labels.ndim == 2 else "accuracy"
    values, first = [], []
    for classes in prompts:
        scores = class_scores(embeddings, classes, labels.ndim == 2)
        values.append((multi_label if labels.ndim == 2 else single_label)(scores, labels, replicates=0)[name])
        top = scores.argmax(axis=1)
        alone = (scores >= scores.max(axis=1, keepdims=True) - TIE).sum(axis=1) == 1
        first.append(np.where(alone, top, -1))
    pairs = [float(((one == other) & (one >= 0)).mean()) for one, other in combinations(first, 2)]
    known = [value for value in values if value is not None]
    return {
        "score": name,
        "values": values,
        "mean": float(np.mean(known)) if known else None,
        "lowest": min(known, default=None),
        "highest": max(known, default=None),
        "deviation": float(np.std(known, ddof=1)) if len(known) > 1 else None,
        "agreement": float(np.mean(pairs)),
    }
