"""Zero-shot classification: the class whose text is nearest to the clip, scored next to chance."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from muser_dist.errors import DataError
from muser_dist.evaluate.classification import single_label
from muser_dist.evaluate.retrieval import unit_rows


def zero_shot(
    embeddings: np.ndarray,
    class_embeddings: np.ndarray,
    classes: Sequence[str],
    labels: Sequence[str | None],
) -> dict[str, Any]:
    """Scores of naming each clip's class by the nearest of the classes' texts.

    Args:
        embeddings: (n, D) of the clips.
        class_embeddings: (C, D), one text for each class.
        classes: C different names.
        labels: n true classes; None where the clip has none: it is left out and counted.

    Returns:
        What `single_label` returns.

    Raises:
        DataError: an embedding is not finite, or a label is none of the classes.
        ValueError: shapes do not fit together, there are no classes, or one has two texts.
    """
    embeddings, class_embeddings = np.asarray(embeddings), np.asarray(class_embeddings)
    index: dict[str | None, int] = {name: i for i, name in enumerate(classes)}
    if not classes or len(index) != len(classes) or len(class_embeddings) != len(classes):
        raise ValueError(f"{len(classes)} classes, {len(index)} of them different, have {len(class_embeddings)} texts")
    if len(labels) != len(embeddings):
        raise ValueError(f"{len(embeddings)} embeddings have {len(labels)} labels")
    labelled = [i for i, label in enumerate(labels) if label is not None]
    unknown = sorted({str(labels[i]) for i in labelled if labels[i] not in index})
    if unknown:
        raise DataError(f"labels {', '.join(map(repr, unknown[:5]))} are none of the {len(classes)} classes")

    cosines = unit_rows(embeddings[labelled], "clip") @ unit_rows(class_embeddings, "class").T
    scores = single_label(cosines, np.array([index[labels[i]] for i in labelled], np.int64), classes)
    return scores | {"without_label": len(labels) - len(labelled)}
