"""What came back from the language model: two descriptions, or the reason why it is nonsense."""

import json
import re
import unicodedata
from dataclasses import dataclass
from typing import Any

from muser_dist.data.text import normal_form, one_line
from muser_dist.errors import DataError
from muser_dist.refine.languages import NAMES, script_share
from muser_dist.refine.prompt import ENGLISH, OTHER

LONGEST = 2_000
"""Characters that a description has at most."""

# A sentence in Chinese says in so many characters what takes an English one four times as many.
_SHORTEST_ENGLISH, _SHORTEST = 24, 8

# Titles and names stay as they are, and may be a good part of a short description.
_SCRIPT_SHARE = 0.5

# Translations share names with the English text, not most of its words.
_SAME_WORDS = 0.8

# What stands in quotation marks at the beginning is a title: "Sorry" is an upbeat song.
_BEFORE = r"""^[^\w"'“”„‘’‚«»‹›「『《〈]*"""

_REFUSAL = re.compile(
    r"\bas an? (?:ai|artificial intelligence|(?:large )?language model)\b|\blanguage model (?:developed|trained) by\b"
    rf"|{_BEFORE}(?:i['’]?m|i am|we are) (?:very |so |really )?(?:sorry|unable|not able|afraid)\b"
    rf"|{_BEFORE}(?:sorry|apologies|unfortunately,? i)\b"
    rf"|{_BEFORE}i (?:cannot|can['’]?t|can not|won['’]?t|do not have|don['’]?t have)\b"
)
_UNFILLED = re.compile(r"^\W*(?:the )?description in\b|\blorem ipsum\b")

# Control characters, halves of surrogate pairs, and private use.
_NO_TEXT = ("Cc", "Cs", "Co")


@dataclass(frozen=True)
class Answer:
    """A chat completion's text, and why it ended, as the endpoint said it."""

    content: str
    finish: str


def read_descriptions(answer: Answer, language: str) -> dict[str, Any]:
    """The metadata fields out of an answer.

    Args:
        answer: what came back.
        language: code of the language that was asked for besides English.

    Returns:
        {"summary_en": text, "summary_nen": {language: text}}, each text one line.

    Raises:
        DataError: it cannot be used; the message is the reason.
    """
    if answer.finish == "length":
        raise DataError("answer is cut off at the most tokens that it may have")
    if answer.finish in ("content_filter", "refusal"):
        raise DataError("the model refused")
    fenced = re.fullmatch(r"\s*```\w*\n(.*?)\n?```\s*", answer.content, re.S)
    content = fenced[1] if fenced else answer.content
    if not content.strip():
        raise DataError("answer is empty")
    try:
        values = json.loads(content)
    except (ValueError, RecursionError):
        raise DataError("the model refused" if refuses(content) else "answer is no JSON") from None
    if not isinstance(values, dict) or set(values) != {"en", language}:
        raise DataError(f'answer is no object of "en" and "{language}"')
    for code in ("en", language):
        if not isinstance(values[code], str):
            raise DataError(f'"{code}" is no text')
    english, other = one_line(values["en"]), one_line(values[language])
    for code, text in (("en", english), (language, other)):
        _check(text, code)
    words, others = (set(re.findall(r"\w+", normal_form(text))) for text in (english, other))
    if others and len(words & others) / len(others) > _SAME_WORDS:
        raise DataError(f'"{language}" repeats the English text')
    return {ENGLISH: english, OTHER: {language: other}}


def refuses(text: str) -> bool:
    """Whether a text is the boilerplate with which models refuse, in English."""
    return _REFUSAL.search(text.casefold()) is not None


def _check(text: str, code: str) -> None:
    """Raises DataError when a text is no description in the language."""
    shortest = _SHORTEST_ENGLISH if code == "en" else _SHORTEST
    if not text:
        raise DataError(f'"{code}" is empty')
    if refuses(text):
        raise DataError("the model refused")
    if not shortest <= len(text) <= LONGEST:
        raise DataError(f'"{code}" has {len(text):,} characters, not {shortest} to {LONGEST:,}')
    if _UNFILLED.search(text.casefold()):
        raise DataError(f'"{code}" is a placeholder')
    if "\ufffd" in text or any(unicodedata.category(letter) in _NO_TEXT for letter in text):
        raise DataError(f'"{code}" holds characters that are none')
    if (share := script_share(text, code)) < _SCRIPT_SHARE:
        raise DataError(f'"{code}" is not in the script of {NAMES[code]}: {share:.0%} of its letters are')
