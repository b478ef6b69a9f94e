"""What the model may answer, and why answers are quarantined."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from muser_dist.data.config import DataConfig
from muser_dist.data.text import TextPolicy, read_fields
from muser_dist.errors import DataError
from muser_dist.refine.answers import Answer, read_descriptions
from tests.refine.stand_in import TEXTS

ENGLISH = TEXTS["en"].format("Dusk")


def answer(english=ENGLISH, language="ru", other=None, **more):
    other = TEXTS[language].format("Dusk") if other is None else other
    return Answer(json.dumps({"en": english, language: other} | more), "stop")


@pytest.mark.parametrize("language", [code for code in TEXTS if code != "en"])
def test_descriptions_in_all_scripts_become_fields_that_templates_draw(language):
    text = TEXTS[language].format("Dusk")
    fields = read_descriptions(answer(f" {ENGLISH}\n", language), language)
    assert fields == {"summary_en": ENGLISH, "summary_nen": {language: text}}
    read = read_fields(json.dumps(fields).encode(), None)
    for template, sentence in (("{summary_en}", ENGLISH), ("{summary_nen}", text)):
        assert TextPolicy(DataConfig(), (template,)).say(read, None)[0] == sentence


def test_a_fence_around_the_json_is_no_matter():
    plain = answer()
    for fence in ("```json\n{}\n```", "\n```\n{}```\n"):
        assert read_descriptions(Answer(fence.format(plain.content), ""), "ru") == read_descriptions(plain, "ru")


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (Answer("", "stop"), "empty"),
        (Answer(" \n", "stop"), "empty"),
        (Answer(answer().content, "length"), "cut off"),
        (Answer("", "content_filter"), "the model refused"),
        (Answer("", "refusal"), "the model refused"),
        (Answer("I'm sorry, but I can't assist with that.", "stop"), "the model refused"),
        (Answer("la la la", "stop"), "no JSON"),
        (Answer('{"en": "A calm', "stop"), "no JSON"),
        (Answer("[" * 100_000, "stop"), "no JSON"),
        (Answer('["en", "ru"]', "stop"), 'no object of "en" and "ru"'),
        (Answer(json.dumps({"en": ENGLISH}), "stop"), "no object of"),
        (answer(language="fr"), "no object of"),
        (answer(note="as you wished"), "no object of"),
        (answer(english=["A calm tune."]), '"en" is no text'),
        (answer(other=""), '"ru" is empty'),
        (answer(english="A tune."), '"en" has 7 characters'),
        (answer(other="Да " * 1000), "characters, not 8 to 2,000"),
        (answer(english="As an AI language model, I do not hear this music."), "the model refused"),
        (answer(english="I cannot describe this piece without hearing it."), "the model refused"),
        (answer(english="- **Sorry**, I do not know this tune, and cannot describe it."), "the model refused"),
        (answer(english="the description in English"), "placeholder"),
        (answer(other=ENGLISH), "not in the script of Russian: 0% of its letters"),
        (answer(english=TEXTS["ru"]), "not in the script of English"),
        (answer(other="Спокойная мелодия \ud83d для флейты"), "characters that are none"),
        (answer(other="Спокойная мелодия \x00 для флейты"), "characters that are none"),
        (answer(other="Спокойная мелодия \ufffd для флейты"), "characters that are none"),
    ],
)
def test_nonsense_has_a_reason(given, reason):
    with pytest.raises(DataError, match=reason):
        read_descriptions(given, "ru")


def test_the_english_text_again_is_no_translation():
    with pytest.raises(DataError, match='"fr" repeats the English text'):
        read_descriptions(answer(language="fr", other=ENGLISH.upper() + "!"), "fr")


def test_a_title_in_front_is_no_refusal_in_any_script():
    text = "《Sorry》是一首轻快的流行歌曲。"
    assert read_descriptions(answer(language="zh", other=text), "zh")["summary_nen"] == {"zh": text}


def test_words_that_refusals_are_made_of_are_no_refusal():
    for text in (
        "A sorry tale of a sailor who cannot return, sung slowly to the fiddle.",
        'The song "I Cannot Stay" is a lively reel from the north of Ireland.',
        '"Sorry" is an upbeat pop song in a major key, for voice and drums.',
        "“I Can’t Help Falling in Love” is a slow waltz for voice and strings.",
        "‘I Won’t Back Down’ is a steady rock song with an acoustic guitar.",
        "«I'm Sorry» is a ballad for voice and strings, in a slow four.",
        "Composed as an aid to dancers, it keeps a steady beat throughout.",
    ):
        assert read_descriptions(answer(english=text), "ru")["summary_en"] == text


@given(
    st.text() | st.fixed_dictionaries({"en": st.text(), "ru": st.text() | st.none() | st.integers()}).map(json.dumps)
)
def test_no_answer_breaks_the_reader(content):
    with pytest.raises(DataError):
        read_descriptions(Answer(content, "stop"), "ru")
