"""Requests: what the model is shown, and the name under which its answer is kept."""

import json
import math
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from muser_dist.data.text import read_fields
from muser_dist.errors import ConfigError, DataError
from muser_dist.refine.languages import NAMES, script_share
from muser_dist.refine.prompt import MAX_METADATA_BYTES, PARAMETERS, Prompt
from tests.refine.stand_in import TEXTS

PROMPT = Prompt("m", ("fr", "ru", "ja"))


def test_a_request_shows_the_metadata_and_asks_for_both_languages():
    request = PROMPT.request("a/1", {"title": "Зима", "tags": ["slow", "$cold"], "year": "1801"})
    body = json.loads(request.body)
    assert body["model"] == "m" and {**PARAMETERS, "model": "m", "messages": body["messages"]} == body
    (message,) = body["messages"]
    assert message["role"] == "user"
    shown = message["content"].partition("Metadata:\n")[2]
    assert json.loads(shown) == {"title": "Зима", "tags": ["slow", "$cold"], "year": "1801"}
    assert f"in English and in {NAMES[request.language]}." in message["content"]
    assert request.most_output == 1000 and request.most_input > len(message["content"].encode())
    assert PROMPT.request("a/1", {"title": "Зима", "tags": ["slow", "$cold"], "year": "1801"}) == request


def test_whatever_changes_the_question_changes_its_name():
    fields = {"title": "x"}
    prompts = [
        PROMPT,
        replace(PROMPT, model="n"),
        replace(PROMPT, languages=("fi",)),
        replace(PROMPT, template="$metadata $language"),
        replace(PROMPT, parameters={"max_tokens": 9}),
    ]
    digests = [prompt.request("k", fields).digest for prompt in prompts] + [PROMPT.request("k", {"title": "y"}).digest]
    assert len(set(digests)) == len(digests)
    # Descriptions that are there already change nothing: refined shards can be refined again, at no cost.
    refined = fields | {"summary_en": "A text.", "summary_nen": {"fr": "Un texte."}}
    assert PROMPT.request("k", refined) == PROMPT.request("k", fields)
    chosen = replace(PROMPT, fields=("title",))
    assert chosen.request("k", fields | {"secret": "z"}) == chosen.request("k", fields)


def test_languages_get_their_shares():
    counts = Counter(PROMPT.language(f"piece{i}") for i in range(3000))
    assert set(counts) == {"fr", "ru", "ja"}
    assert all(abs(count - 1000) < 5 * math.sqrt(3000 * 2 / 9) for count in counts.values())


def test_items_about_which_nothing_can_be_asked():
    with pytest.raises(DataError, match=r"no metadata to describe$"):
        PROMPT.request("k", {"summary_en": "A text."})
    with pytest.raises(DataError, match="none of genre"):
        replace(PROMPT, fields=("genre",)).request("k", {"title": "x"})
    with pytest.raises(DataError, match="choose with --fields"):
        PROMPT.request("k", {"lyrics": "la " * MAX_METADATA_BYTES})


@given(st.dictionaries(st.text(), st.text() | st.lists(st.text()) | st.dictionaries(st.text(), st.text())))
def test_any_metadata_makes_a_request_that_can_be_sent(values):
    try:
        fields = read_fields(json.dumps(values).encode(), None)
        request = PROMPT.request("k", fields)
    except DataError:
        return
    assert json.loads(request.body.encode().decode())["model"] == "m"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model": ""}, "--model is empty"),
        ({"languages": ()}, "name at least one"),
        ({"languages": ("fr", "fr")}, "twice"),
        ({"languages": ("en",)}, "English is always there"),
        ({"languages": ("rus",)}, r"'rus' \(ru\?\) is none of"),
        ({"template": "$metadata"}, "needs .* it has \\$metadata"),
        ({"template": "$metadata $language $key"}, "knows no other name"),
        ({"template": "$metadata $language costs 5 $"}, "begins no name"),
        ({"parameters": {}}, "needs one of max_tokens and max_completion_tokens"),
        ({"parameters": {"max_tokens": 5, "max_completion_tokens": 5}}, "needs one of"),
        ({"parameters": {"max_tokens": "5"}}, "a number of tokens"),
        ({"parameters": {"max_tokens": True}}, "a number of tokens"),
        ({"parameters": {"max_tokens": 5, "n": 2}}, "n cannot be given"),
    ],
)
def test_wrong_settings(settings, message):
    with pytest.raises(ConfigError, match=message):
        replace(PROMPT, **settings)


def test_scripts():
    assert len(NAMES) > 85
    for code, text in TEXTS.items():
        assert script_share(text.format("x"), code) > 0.9
        others = (
            {"fr", "ru", "el", "ar", "hi", "ko", "th", "zh"}
            - {code}
            - ({"fr"} if code in ("en", "es", "de", "pt") else set())
        )
        assert all(script_share(text.format(""), other) < 0.5 for other in others)
    assert script_share("1801, ♪ — !", "ru") == 0
    assert script_share("", "fr") == 0
