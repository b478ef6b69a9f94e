"""Metadata to a sentence, the sentence to token ids, and an id that says which texts are the same."""

import hashlib
import json
import math
import re
import unicodedata
from collections.abc import Mapping
from functools import lru_cache
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from muser_dist.data.config import DataConfig
from muser_dist.errors import ConfigError, DataError

_FIELD = re.compile(r"\{(\w+)(:one)?\}")

# To \w, vowel signs of Indic scripts, of Thai and of Hebrew are no part of a word, and would break it apart.
_MARKS = "".join(letter for letter in map(chr, range(0x300, 0x12000)) if unicodedata.category(letter)[0] == "M")
_WORD = re.compile(rf"\w[\w{_MARKS}]*|[^\w\s]")

Value = str | list[str]
"""Of a metadata field: a sentence, or a list (of tags, or of captions)."""


class TextPolicy:
    """How the fields of a row become its sentence, in one pass over the data.

    Args:
        config: dropout and languages.
        templates: sentences over the fields.
    """

    def __init__(self, config: DataConfig, templates: tuple[str, ...]) -> None:
        self.config = config
        self.templates = templates
        self._names = sorted({name for template in templates for name, _ in _FIELD.findall(template)})

    def say(self, values: Mapping[str, Any], rng: np.random.Generator | None) -> tuple[str, dict[str, Value]]:
        """A sentence and the facts that it states, out of the fields that `read_fields` gives.

        Args:
            values: the fields.
            rng: draws the template, languages, entries and what is dropped; None takes the
                first of each and drops nothing.

        Raises:
            DataError: no template has anything to say.
        """
        chosen = int(rng.integers(len(self.templates))) if rng else 0
        apart = "|" in self.templates[chosen]
        named = [name for name in self._names if name in values]
        fields = {name: resolved for name in named if (resolved := self._resolve(values[name], rng, apart))}
        if rng and self.config.field_dropout:
            kept = rng.random(len(fields)) >= self.config.field_dropout
            some = {name: fields[name] for name, keep in zip(fields, kept, strict=True) if keep}
        else:
            some = fields
        # Where dropout leaves nothing to say, nothing is dropped.
        for left in (some, fields):
            for template in (self.templates[chosen], *self.templates):
                sentence, facts = render(template, left, rng, self.config.line_dropout)
                if facts:
                    return sentence, facts
        raise DataError("no text: it has none of the fields that the templates name")

    def _resolve(self, value: Any, rng: np.random.Generator | None, apart: bool) -> Value:
        """A field's value in one of its languages; in one line, without its dropped lines, or the lines apart."""
        if isinstance(value, dict):
            languages = [name for name in self.config.languages or sorted(value) if name in value]
            if not languages:
                return ""
            value = value[languages[int(rng.integers(len(languages))) if rng else 0]]
        if isinstance(value, list):
            return [sentence for entry in value if (sentence := one_line(str(entry)))]
        lines = [line for line in str(value).splitlines() if line.strip()]
        if apart and len(lines) > 1:
            return [one_line(line) for line in lines]
        if rng and self.config.line_dropout and len(lines) > 1:
            kept = rng.random(len(lines)) >= self.config.line_dropout
            lines = [line for line, keep in zip(lines, kept, strict=True) if keep] or lines
        return one_line(" ".join(lines))


def read_fields(metadata: bytes | None, text: bytes | None) -> dict[str, Any]:
    """The fields of a sample that templates may use.

    Args:
        metadata: its .json member: one object. A value is text or a number, a list of those, or
            an object {language: such a value}; what is null, empty or something else is missing.
        text: its .txt member, which becomes the field "text".

    Raises:
        DataError: the JSON is broken or no object, or a member is not UTF-8.
    """
    fields: dict[str, Any] = {}
    try:
        if metadata is not None:
            values = json.loads(metadata)
            if not isinstance(values, dict):
                raise DataError("the JSON is no object")
            for name, value in values.items():
                if isinstance(value, dict):
                    value = {str(key): plain for key, inner in value.items() if (plain := _plain(inner))}
                else:
                    value = _plain(value)
                if value:
                    fields[name] = value
        if text is not None and (plain := _plain(text.decode())):
            fields["text"] = plain
    except (ValueError, RecursionError) as error:  # ValueError also for numbers of thousands of digits
        raise DataError(f"broken JSON or text: {error}") from None
    return fields


def _plain(value: Any) -> Value:
    if isinstance(value, list):
        return [plain for entry in value if isinstance(plain := _plain(entry), str) and plain]
    if value is None or isinstance(value, dict) or (isinstance(value, float) and not math.isfinite(value)):
        return ""  # Python's json writes a table's empty cells as NaN
    # JSON may hold half a surrogate pair, which no file and no tokenizer takes.
    plain = str(value).encode(errors="replace").decode()
    return plain if plain.strip() else ""


def one_line(value: str) -> str:
    """The value without line breaks and repeated spaces."""
    return " ".join(value.split())


def flat(values: Mapping[str, Any]) -> dict[str, Value]:
    """The fields with each value, or each entry of a list, as one line; without those that differ by language."""
    lines: dict[str, Value] = {}
    for name, value in values.items():
        if isinstance(value, list):
            lines[name] = [line for entry in value if (line := one_line(entry))]
        elif not isinstance(value, dict):
            lines[name] = one_line(value)
    return {name: line for name, line in lines.items() if line}


def by_language(values: Mapping[str, Any]) -> dict[str, dict[str, Value]]:
    """The fields that differ by language, which `flat` leaves out."""
    return {name: value for name, value in values.items() if isinstance(value, dict)}


def joined(values: Mapping[str, Any]) -> dict[str, str]:
    """As `flat`, with lists joined."""
    return {n: value if isinstance(value, str) else ", ".join(value) for n, value in flat(values).items()}


def check_templates(templates: tuple[str, ...], setting: str = "data.templates") -> None:
    """Raises ConfigError when a template has no {field}, or braces that are no {field}."""
    for template in templates:
        if not _FIELD.search(template):
            raise ConfigError(f"{setting}: {template!r} names no field; write one as {{name}}")
        if re.search(r"[{}]", _FIELD.sub("", template)):
            raise ConfigError(f"{setting}: {template!r} has a brace that is no {{field}} and no {{field:one}}")


def render(
    template: str, fields: Mapping[str, Value], rng: np.random.Generator | None = None, line_dropout: float = 0.0
) -> tuple[str, dict[str, Value]]:
    """A sentence over the fields that are there.

    A clause, that is what stands between commas of the template, is left out when it needs a
    field that is missing. A list is joined by commas; {name:one} draws one of its entries.

    A template with bars is one of lines, as metadata are: what stands between two bars, and each entry of a list that
    stands there alone, is one. Where something is drawn, each is left out with a probability, and they come in any
    order; equal ones come once. As CLaMP 2 drops out texts (arXiv 2410.13267, section 3.2).

    >>> render("A song of {genre}, by {artist}", {"genre": ["folk", "ska"]})
    ('A song of folk, ska', {'genre': ['folk', 'ska']})

    Args:
        template: the sentence.
        fields: not empty each.
        rng: draws for {name:one}, and which lines stay in which order; None takes the first entry, and all lines as
            they are.
        line_dropout: probability of leaving a line out; all stay where none would.

    Returns:
        the sentence and the facts that it states; both empty when nothing can be said.
    """
    if "|" not in template:
        return _render_clauses(template, fields, rng)
    of_lines: dict[str, dict[str, Value]] = {}
    for part in template.split("|"):
        for sentence, stated in _lines(part.strip(), fields, rng):
            of_lines.setdefault(sentence, stated)
    lines = list(of_lines.items())
    if rng:
        kept = [line for line in lines if rng.random() >= line_dropout] or lines
        lines = [kept[i] for i in rng.permutation(len(kept))]
    facts: dict[str, Value] = {}
    for _, stated in lines:
        for name, value in stated.items():
            before = facts.get(name)
            facts[name] = value if before is None else [*_entries(before), *_entries(value)]
    return " | ".join(sentence for sentence, _ in lines), facts


def _lines(
    part: str, fields: Mapping[str, Value], rng: np.random.Generator | None
) -> list[tuple[str, dict[str, Value]]]:
    """The lines that a part of a template makes, each with its facts."""
    alone = _FIELD.fullmatch(part)
    if alone and not alone[2] and isinstance(value := fields.get(alone[1]), list):
        return [(entry, {alone[1]: [entry]}) for entry in value]
    sentence, facts = _render_clauses(part, fields, rng)
    return [(sentence, facts)] if facts else []


def _entries(value: Value) -> list[str]:
    return [value] if isinstance(value, str) else value


def _render_clauses(
    template: str, fields: Mapping[str, Value], rng: np.random.Generator | None
) -> tuple[str, dict[str, Value]]:
    clauses: list[str] = []
    facts: dict[str, Value] = {}
    for words, needed in _clauses(template):
        if all(name in fields for name, _ in needed):
            stated = {name: _state(fields[name], one, rng) for name, one in needed}
            said = (value if isinstance(value := stated[name], str) else ", ".join(value) for name, _ in needed)
            clauses.append("".join(chain.from_iterable(zip_longest(words, said, fillvalue=""))).strip())
            facts.update(stated)
    return (", ".join(clauses), facts) if facts else ("", {})


@lru_cache
def _clauses(template: str) -> list[tuple[list[str], list[tuple[str, bool]]]]:
    """Of each clause, the words around its fields, and the fields with whether one entry is drawn."""
    clauses = []
    for clause in template.split(","):
        parts = _FIELD.split(clause)  # words, name, one or None, words, ...
        clauses.append((parts[::3], [(name, bool(one)) for name, one in zip(parts[1::3], parts[2::3], strict=True)]))
    return clauses


def _state(value: Value, one: bool, rng: np.random.Generator | None) -> Value:
    return value[int(rng.integers(len(value))) if rng else 0] if one and isinstance(value, list) else value


def text_id(facts: Mapping[str, Value]) -> int:
    """A stable id in [0, 2^63) of the facts that a sentence states.

    Two templates over the same facts give the same id; letter case, Unicode form, spacing and the
    order of a list do not matter, and one value is the same alone and in a list.
    """
    normal = []
    for name, value in sorted(facts.items()):
        forms = sorted({normal_form(entry) for entry in ([value] if isinstance(value, str) else value)})
        normal.append((name, forms[0] if len(forms) == 1 else forms))
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
            tokens = [1, *(2 + _hash(word) % (self.vocabulary - 2) for word in words)][: self.max_tokens]
            ids[row, : len(tokens)] = tokens
            lengths[row] = len(tokens)
        return ids, lengths


@lru_cache(maxsize=1 << 16)
def _hash(word: str) -> int:
    return int.from_bytes(hashlib.blake2b(word.encode(errors="replace"), digest_size=8).digest(), "big")


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
