"""Metadata to a sentence, the sentence to token ids, and an id that says which texts are the same."""

import hashlib
import json
import re
import unicodedata
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from muser_dist.errors import ConfigError, DataError

_FIELD = re.compile(r"\{(\w+)\}")
_WORD = re.compile(r"\w+|[^\w\s]")


def read_fields(metadata: bytes | None, text: bytes | None) -> dict[str, str]:
    """The fields of a sample that templates may use.

    Args:
        metadata: its .json member: one object; lists are joined by ", ", nulls and empty values
            count as missing, nested objects are left out.
        text: its .txt member, which becomes the field "text".

    Raises:
        DataError: the JSON is broken or no object, or a member is not UTF-8.
    """
    fields: dict[str, str] = {}
    try:
        if metadata is not None:
            values = json.loads(metadata)
            if not isinstance(values, dict):
                raise DataError("the JSON is no object")
            for name, value in values.items():
                if (sentence := _value(value)) != "":
                    fields[name] = sentence
        if text is not None and (sentence := _value(text.decode())) != "":
            fields["text"] = sentence
    except (ValueError, RecursionError) as error:  # ValueError also for numbers of thousands of digits
        raise DataError(f"broken JSON or text: {error}") from None
    return fields


def _value(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(filter(None, map(_value, value)))
    if value is None or isinstance(value, dict):
        return ""
    # JSON may hold half a surrogate pair, which no file and no tokenizer takes.
    return " ".join(str(value).encode(errors="replace").decode().split())


def check_templates(templates: tuple[str, ...]) -> None:
    """Raises ConfigError when a template has no {field}, or braces that are no {field}."""
    for template in templates:
        if not _FIELD.search(template):
            raise ConfigError(f"data.templates: {template!r} names no field; write one as {{name}}")
        if re.search(r"[{}]", _FIELD.sub("", template)):
            raise ConfigError(f"data.templates: {template!r} has a brace that is no {{field}}")


def render(template: str, fields: Mapping[str, str]) -> tuple[str, dict[str, str]]:
    """A sentence over the fields that are there.

    A clause, that is what stands between commas of the template, is left out when it needs a
    field that is missing.

    >>> render("A song of {genre}, by {artist}", {"genre": "folk"})
    ('A song of folk', {'genre': 'folk'})

    Returns:
        the sentence and the facts that it states; both empty when nothing can be said.
    """
    clauses, facts = [], {}
    for clause in template.split(","):
        names = _FIELD.findall(clause)
        if all(name in fields for name in names):
            clauses.append(_FIELD.sub(lambda match: fields[match[1]], clause).strip())
            facts.update({name: fields[name] for name in names})
    return (", ".join(clauses), facts) if facts else ("", {})


def text_id(facts: Mapping[str, str]) -> int:
    """A stable id in [0, 2^63) of the facts that a sentence states.

    Two templates over the same facts give the same id; letter case, Unicode form and spacing
    do not matter.
    """
    normal = sorted((name, normal_form(value)) for name, value in facts.items())
    digest = hashlib.blake2b(json.dumps(normal).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def normal_form(value: str) -> str:
    """The value without letter case, Unicode variants and spacing: equal where two mean the same."""
    return " ".join(unicodedata.normalize("NFKC", value).casefold().split())


class Tokenizer(Protocol):
    """Sentences to token ids. `vocabulary` is the number of ids; 0 is padding."""

    vocabulary: int

    def __call__(self, sentences: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """Returns ids (n, max_tokens) int32, padded at the end, and lengths (n,) int32."""
        ...


class WordTokenizer:
    """Feature hashing of words and punctuation marks (Weinberger et al. 2009).

    Needs no vocabulary file and knows every script that separates words by spaces. Id 1 begins
    each sentence; two words share an id with probability 1/vocabulary.
    """

    def __init__(self, vocabulary: int, max_tokens: int) -> None:
        self.vocabulary = vocabulary
        self.max_tokens = max_tokens

    def __call__(self, sentences: list[str]) -> tuple[np.ndarray, np.ndarray]:
        ids = np.zeros((len(sentences), self.max_tokens), np.int32)
        lengths = np.zeros(len(sentences), np.int32)
        for row, sentence in enumerate(sentences):
            words = _WORD.findall(unicodedata.normalize("NFKC", sentence).casefold())
            tokens = [1, *(self._bucket(word) for word in words)][: self.max_tokens]
            ids[row, : len(tokens)] = tokens
            lengths[row] = len(tokens)
        return ids, lengths

    def _bucket(self, word: str) -> int:
        digest = hashlib.blake2b(word.encode(errors="replace"), digest_size=8).digest()
        return 2 + int.from_bytes(digest, "big") % (self.vocabulary - 2)


class HuggingFaceTokenizer:
    """Any tokenizer of transformers, by local path or name."""

    def __init__(self, name: str, max_tokens: int) -> None:
        from transformers import AutoTokenizer

        try:
            self._tokenizer = AutoTokenizer.from_pretrained(name)
        except (OSError, ValueError) as error:
            first = str(error).strip().splitlines()[0]
            raise ConfigError(f'data.tokenizer: {name!r} cannot be loaded: {first} (built in is "words")') from None
        self._tokenizer.padding_side = "right"
        if self._tokenizer.pad_token is None:  # as in GPT-2; lengths tell what is padding
            self._tokenizer.pad_token = self._tokenizer.eos_token
        self.vocabulary = len(self._tokenizer)
        self.max_tokens = max_tokens

    def __call__(self, sentences: list[str]) -> tuple[np.ndarray, np.ndarray]:
        out = self._tokenizer(
            sentences, padding="max_length", truncation=True, max_length=self.max_tokens, return_tensors="np"
        )
        return out["input_ids"].astype(np.int32), out["attention_mask"].sum(axis=1).astype(np.int32)

    def save(self, folder: Path) -> None:
        """Writes it where its constructor can read it."""
        self._tokenizer.save_pretrained(folder)


@lru_cache(maxsize=4)
def load_tokenizer(name: str, vocabulary: int, max_tokens: int) -> Tokenizer:
    """The tokenizer that `data.tokenizer` names.

    Raises:
        ConfigError: a Hugging Face tokenizer cannot be loaded.
    """
    return WordTokenizer(vocabulary, max_tokens) if name == "words" else HuggingFaceTokenizer(name, max_tokens)
