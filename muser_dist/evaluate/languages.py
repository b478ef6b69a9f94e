"""Retrieval by texts of one language, out of fields that are objects {language: text}."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from muser_dist.data.config import DataConfig
from muser_dist.data.text import TextPolicy, text_id
from muser_dist.errors import DataError
from muser_dist.evaluate.embedding import Embedded, Encoder
from muser_dist.evaluate.retrieval import directions


def directions_in(
    language: str, model: Encoder, data: DataConfig, rows: Embedded
) -> Iterator[tuple[str, tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]]]:
    """What is asked of rows by their texts in a language, as of `retrieval.directions`, and nothing between others.

    Texts state that language's part of the fields which have one, and no other field: a row without has no text. The
    first template that then has something to say makes it.

    Args:
        language: as the objects of the data call it.
        model: encodes the texts.
        data: its templates.
        rows: embedded; their other modalities are taken as they are.
    """
    policy = TextPolicy(data, data.templates)
    valid, ids = np.zeros(len(rows), bool), np.full(len(rows), -1, np.int64)
    sentences: list[str] = []
    for i, fields in enumerate(rows.translations):
        values: dict[str, Any] = {name: texts[language] for name, texts in fields.items() if language in texts}
        try:
            sentence, facts = policy.say(values, None)
        except DataError:  # no template has anything to say
            continue
        valid[i], ids[i] = True, text_id(facts)
        sentences.append(sentence)
    if not sentences:
        return
    encoded = model.encode_text(sentences)
    texts = np.zeros((len(rows), encoded.shape[1]), encoded.dtype)
    texts[valid] = encoded
    for direction, asked in directions(rows.joint | {"text": texts}, rows.valid | {"text": valid}, ids):
        if "text" in direction.split("->"):
            yield direction, asked
