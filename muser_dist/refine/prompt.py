"""What a language model is asked about an item, and the name under which its answer is kept."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from string import Template
from typing import Any

from muser_dist.errors import DataError, require
from muser_dist.refine.languages import NAMES

ENGLISH, OTHER = "summary_en", "summary_nen"
"""Metadata fields of a refined item, named as CLaMP 2's: the English description, and {language: description}."""

TEMPLATE = """\
Below is the metadata of a piece of music, as JSON. Describe the piece in English and in $language.

Each description is one paragraph of two to five sentences about what the metadata says of the music: its style, mood,
instruments, key, metre, pace, origin and use. Do not invent anything that it does not say. Do not mention the metadata.
Both descriptions say the same.

Answer with one JSON object and nothing else:
{"en": "the description in English", "$code": "the description in $language"}

Metadata:
$metadata
"""
"""$metadata is the item's, as JSON; $language is the other language's English name, and $code its code."""

PARAMETERS: dict[str, Any] = {"max_tokens": 1000, "temperature": 0.7, "response_format": {"type": "json_object"}}
"""Of the request, by default."""

MAX_METADATA_BYTES = 16 << 10
"""An item with more is not asked about: its price would be that of dozens of others."""

_LIMITS = ("max_tokens", "max_completion_tokens")

# They would change what a request is, or how many answers are paid for.
_FORBIDDEN = ("messages", "model", "n", "stream", "best_of")

# Tokens that chat templates put around the messages. No tokenizer makes more tokens of a text than it has bytes.
_AROUND = 256


@dataclass(frozen=True)
class Request:
    """What is asked about an item.

    Attributes:
        digest: SHA-256 of the body, in hexadecimal: its answer is kept under this name.
        body: the request's body, JSON.
        most_input: most tokens that the prompt may have.
        most_output: most tokens that the answer may have.
        language: code of the other language.
    """

    digest: str
    body: str
    most_input: int
    most_output: int
    language: str


@dataclass(frozen=True)
class Prompt:
    """How items become requests.

    Attributes:
        model: its name at the endpoint.
        languages: codes of the languages of which each item gets one, besides English.
        template: the prompt; see `TEMPLATE`.
        parameters: of the request, beside model and messages.
        fields: metadata fields that the model sees; all when empty.
    """

    model: str
    languages: tuple[str, ...]
    template: str = TEMPLATE
    parameters: dict[str, Any] = field(default_factory=lambda: dict(PARAMETERS))
    fields: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        require(bool(self.model), "--model is empty; give the model's name at the endpoint")
        require(len(self.languages) > 0, "--languages is empty; name at least one besides English, such as fr")
        require(len(set(self.languages)) == len(self.languages), "--languages names a language twice")
        for code in self.languages:
            near = get_close_matches(code, NAMES, n=1, cutoff=0.5)
            hint = f" ({near[0]}?)" if near else ""
            require(code in NAMES, f"--languages: {code!r}{hint} is none of {' '.join(NAMES)}")
            require(code != "en", "--languages: English is always there; name the others")
        template = Template(self.template)
        valid = template.is_valid()
        require(valid, "--template: a $ that begins no name; write $$ for one that shall be read")
        names = set(template.get_identifiers())
        require(
            {"metadata", "language"} <= names <= {"metadata", "language", "code"},
            "--template: needs $metadata and $language, may have $code, and knows no other name; it has "
            f"{', '.join(f'${name}' for name in sorted(names)) or 'none'}",
        )
        forbidden = [name for name in _FORBIDDEN if name in self.parameters]
        require(not forbidden, f"--parameters: {', '.join(forbidden)} cannot be given there")
        limits = [self.parameters[name] for name in _LIMITS if name in self.parameters]
        require(
            len(limits) == 1 and type(limits[0]) is int and 1 <= limits[0] <= 1_000_000,
            f"--parameters: needs one of {' and '.join(_LIMITS)}, a number of tokens: it bounds what an answer costs",
        )

    def language(self, key: str) -> str:
        """The other language of an item: by a hash of its key, so that all languages get their share."""
        digest = hashlib.blake2b(key.encode(errors="replace"), digest_size=8).digest()
        return self.languages[int.from_bytes(digest, "big") % len(self.languages)]

    def request(self, key: str, metadata: Mapping[str, Any]) -> Request:
        """The request about an item.

        Args:
            key: the item's.
            metadata: its fields, as `read_fields` gives them. Descriptions that are there already are not shown.

        Raises:
            DataError: there is nothing to describe, or too much of it.
        """
        chosen = self.fields or tuple(metadata)
        shown = {name: metadata[name] for name in chosen if name in metadata and name not in (ENGLISH, OTHER)}
        if not shown:
            raise DataError("no metadata to describe" + (f": none of {', '.join(self.fields)}" if self.fields else ""))
        # Names of fields may hold half a surrogate pair, which no request takes.
        text = json.dumps(shown, ensure_ascii=False, indent=1).encode(errors="replace").decode()
        if len(text.encode()) > MAX_METADATA_BYTES:
            raise DataError(
                f"metadata of {len(text.encode()):,} bytes, more than {MAX_METADATA_BYTES:,}; choose with --fields"
            )
        code = self.language(key)
        prompt = Template(self.template).substitute(metadata=text, language=NAMES[code], code=code)
        body = json.dumps(
            {"model": self.model, "messages": [{"role": "user", "content": prompt}], **self.parameters},
            ensure_ascii=False,
            sort_keys=True,
        )
        return Request(
            digest=hashlib.sha256(body.encode()).hexdigest(),
            body=body,
            most_input=len(prompt.encode()) + _AROUND,
            most_output=next(self.parameters[name] for name in _LIMITS if name in self.parameters),
            language=code,
        )
