import json
import unicodedata

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from muser_dist.data.config import DataConfig
from muser_dist.data.text import (
    TextPolicy,
    WordTokenizer,
    check_templates,
    flat,
    joined,
    load_tokenizer,
    read_fields,
    render,
    text_id,
)
from muser_dist.errors import ConfigError, DataError

TEMPLATE = "A song of {genre}, belongs to {kind} from {place}, whose style is {style}"


def test_clauses_with_missing_fields_are_left_out():
    assert render(TEMPLATE, {"genre": "folk", "style": "calm"})[0] == "A song of folk, whose style is calm"
    assert render(TEMPLATE, {"kind": "dance"}) == ("", {})  # {place} is missing in the same clause
    assert render(TEMPLATE, {}) == ("", {})


def test_a_value_with_commas_and_braces_is_only_text():
    sentence, facts = render("Tags {tags}, by {artist}", {"tags": "slow, {artist}"})
    assert sentence == "Tags slow, {artist}"
    assert facts == {"tags": "slow, {artist}"}


@given(st.dictionaries(st.sampled_from(["genre", "kind", "place", "style"]), st.text(min_size=1)))
def test_a_sentence_states_its_facts_and_no_others(fields):
    sentence, facts = render(TEMPLATE, fields)
    assert facts.items() <= fields.items()
    assert bool(sentence) == bool(facts)
    for value in facts.values():
        assert value.strip() in sentence or not value.strip()


def test_text_id_depends_on_the_facts_alone():
    fields = {"genre": "Folk ", "style": "cafe\u0301"}
    one = render("A {genre} song, {style}", fields)[1]
    other = render("{style} and {genre}", {"genre": "folk", "style": "CAF\u00c9"})[1]
    assert text_id(one) == text_id(other)
    assert text_id(one) != text_id(render("{genre}", fields)[1])
    assert text_id({"a": "x", "b": "y"}) != text_id({"a": "y", "b": "x"})
    assert text_id({"tags": ["Sad"]}) == text_id({"tags": "sad"}) == text_id({"tags": ["sad", " SAD"]})
    assert text_id({"tags": ["sad", "Slow"]}) == text_id({"tags": ["slow", "sad"]}) != text_id({"tags": ["slow"]})
    assert 0 <= text_id({}) < 2**63
    assert text_id({"mode": "minor"}) == 679400274490062550  # stable between versions: ids are stored


def test_fields_come_from_json_and_txt():
    metadata = (
        b'{"a": ["x", " ", "y"], "b": null, "c": "", "d": {"en": 1, "de": null}, "f": 3.5, "g": " two\\n lines "}'
    )
    fields = read_fields(metadata, "hé".encode())
    assert fields == {"a": ["x", "y"], "d": {"en": "1"}, "f": "3.5", "g": " two\n lines ", "text": "hé"}
    assert flat(fields) == {"a": ["x", "y"], "f": "3.5", "g": "two lines", "text": "hé"}
    assert joined(fields) == {"a": "x, y", "f": "3.5", "g": "two lines", "text": "hé"}
    assert read_fields(None, b" ") == {}


def policy(*templates: str, **settings) -> TextPolicy:
    return TextPolicy(DataConfig(**settings), templates)


def spoken(policy: TextPolicy, fields: dict, times: int = 200) -> set[str]:
    return {policy.say(fields, np.random.default_rng(seed))[0] for seed in range(times)}


def test_empty_cells_of_a_table_are_missing():
    cells = {"genre": float("nan"), "tags": [float("nan"), "slow"], "bpm": float("inf"), "title": "A"}
    assert read_fields(json.dumps(cells).encode(), None) == {"tags": ["slow"], "title": "A"}


def test_lists_are_joined_and_one_of_several_captions_drawn():
    fields = {"tags": ["slow", "sad"], "captions": ["One.", "Two.", "Three."]}
    assert spoken(policy("{tags}"), fields) == {"slow, sad"}
    assert spoken(policy("{captions:one}"), fields) == {"One.", "Two.", "Three."}
    assert policy("{captions:one}").say(fields, None) == ("One.", {"captions": "One."})
    assert spoken(policy("{tags}", "{captions:one}"), fields) == {"slow, sad", "One.", "Two.", "Three."}


def test_a_language_is_drawn():
    fields = {"caption": {"en": "a song", "de": "ein Lied", "fr": "une chanson"}}
    assert spoken(policy("{caption}"), fields) == {"a song", "ein Lied", "une chanson"}
    assert spoken(policy("{caption}", languages=("de", "en", "xx")), fields) == {"a song", "ein Lied"}
    assert policy("{caption}", languages=("de", "en")).say(fields, None)[0] == "ein Lied"
    with pytest.raises(DataError, match="none of the fields"):
        policy("{caption}", languages=("xx",)).say(fields, None)


def test_fields_and_lines_are_dropped_but_never_all():
    two = {"a": "1", "b": "2"}
    assert spoken(policy("{a}, {b}", field_dropout=0.5), two) == {"1, 2", "1", "2"}
    assert spoken(policy("{a}, {b}"), two) == {"1, 2"}
    lines = {"text": "first\nsecond"}
    assert spoken(policy("{text}", line_dropout=0.5), lines) == {"first second", "first", "second"}
    assert policy("{text}", line_dropout=0.9).say(lines, None)[0] == "first second"


@pytest.mark.parametrize(
    "metadata", [b"{", b'{"a": ' + b"9" * 5000 + b"}", b'"text"', b"[]", b"\xff\xfe", b"[" * 100_000, b""]
)
def test_broken_json_is_an_error(metadata):
    with pytest.raises(DataError, match="JSON"):
        read_fields(metadata, None)


@pytest.mark.parametrize("template", ["no field", "{a} and {", "{a.b}", "{}"])
def test_templates_that_cannot_work_are_refused(template):
    with pytest.raises(ConfigError, match=r"data\.templates"):
        check_templates((template,))


def test_word_tokens():
    tokenizer = WordTokenizer(1000, 6)
    ids, lengths = tokenizer(["A Slow waltz.", "a  slow WALTZ .", "", "one two three four five six seven"])
    assert ids.shape == (4, 6)
    assert ids.dtype == np.int32
    np.testing.assert_array_equal(ids[0], ids[1])
    assert lengths.tolist() == [5, 5, 1, 6]
    assert (ids[:, 0] == 1).all()
    assert ids.max() < 1000
    assert (ids[2, 1:] == 0).all()


def test_scripts_of_many_kinds_are_tokenised():
    ids, lengths = WordTokenizer(10_000, 8)(["медленный вальс", "أغنية بطيئة", "느린 왈츠", "एक धीमा", "αργό βαλς"])
    assert (lengths >= 3).all()
    assert len(np.unique(ids[:, 1])) == 5


def test_a_tokenizer_from_a_local_folder(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.WordLevel({"[PAD]": 0, "[UNK]": 1, "slow": 2, "waltz": 3}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(tmp_path)
    tokenizer = load_tokenizer(str(tmp_path), 0, 4)
    ids, lengths = tokenizer(["slow waltz", "waltz", "a slow slow slow waltz"])
    assert tokenizer.vocabulary == 4
    assert ids.tolist() == [[2, 3, 0, 0], [3, 0, 0, 0], [1, 2, 2, 2]]
    assert lengths.tolist() == [2, 1, 4]


def test_half_a_surrogate_pair_is_replaced():
    assert read_fields(b'{"a": "x\\ud83d"}', None) == {"a": "x?"}


def test_a_tokenizer_that_is_not_there_names_the_setting(tmp_path):
    with pytest.raises(ConfigError, match=r"data\.tokenizer: .*missing"):
        load_tokenizer(str(tmp_path / "missing"), 0, 4)


SENTENCES = {  # what \w alone breaks apart is among them: vowel signs, points, tone marks
    "Latin": ("Une valse très lente", 4),
    "Cyrillic": ("медленный вальс для скрипки", 4),
    "Greek": ("αργό βαλς για βιολί", 4),
    "Arabic": ("لحنٌ بطيء للكمان", 3),
    "Hebrew": ("ואלס אִטִּי לכינור", 3),
    "Devanagari": ("बाँसुरी की धीमी धुन", 4),
    "Tamil": ("புல்லாங்குழலின் மெதுவான இசை", 3),
    "Thai": ("เพลงช้าสำหรับขลุ่ย", 1),
    "Hangul": ("바이올린을 위한 느린 왈츠", 4),
    "Han": ("笛子独奏，缓慢的圆舞曲", 3),
    "Kana": ("ゆっくりとした、フルートのワルツ", 3),
    "Ethiopic": ("ቀርፋፋ የዋሽንት ዜማ", 3),
}


@pytest.mark.parametrize("script", SENTENCES)
def test_every_script_goes_from_metadata_to_tokens_intact(script):
    sentence, words = SENTENCES[script]
    tokenizer = WordTokenizer(1 << 20, 48)
    for metadata in (json.dumps({"caption": sentence}), json.dumps({"caption": sentence}, ensure_ascii=False)):
        said, facts = policy("{caption}").say(read_fields(metadata.encode(), None), None)
        assert said == sentence and facts == {"caption": sentence}
        (ids,), (length,) = tokenizer([said])
        assert length == 1 + words  # the first says that a sentence begins
    assert len(set(ids[:length].tolist())) == length
    # A word has its id wherever it stands, however its letters are composed: a query finds it.
    for query in (sentence.split()[-1], unicodedata.normalize("NFD", sentence.split()[-1])):
        (found,), (length,) = tokenizer([query])
        assert set(found[1:length].tolist()) <= set(ids.tolist())
    others = {other for other in SENTENCES if other != script}
    assert all(text_id({"caption": SENTENCES[other][0]}) != text_id(facts) for other in others)


LINES = "{title} | by {composer}, a {form} | {tags} | {notes}"


def test_a_template_with_bars_is_one_of_lines():
    fields = {"title": "Reel", "form": "jig", "composer": "Ann", "tags": ["slow", "sad", "Reel"]}
    sentence, facts = render(LINES, fields)
    assert sentence == "Reel | by Ann, a jig | slow | sad"  # equal lines come once
    assert facts == {"title": "Reel", "composer": "Ann", "form": "jig", "tags": ["slow", "sad"]}
    assert render(LINES, {"form": "jig"}) == ("a jig", {"form": "jig"})
    assert render(LINES, {"other": "jig"}) == ("", {})
    policy = TextPolicy(DataConfig(), (LINES, "{title}"))
    assert policy.say({"notes": "one\n\ntwo  lines", "title": "Reel"}, None)[0] == "Reel | one | two lines"
    assert TextPolicy(DataConfig(), ("{notes}",)).say({"notes": "one\ntwo"}, None)[0] == "one two"


TEXTS = st.text("abcdefgh", min_size=1, max_size=3)
VALUES = st.one_of(TEXTS, st.lists(TEXTS, min_size=1, max_size=5))


@given(
    values=st.dictionaries(st.sampled_from(["a", "b", "c", "d"]), VALUES, min_size=1),
    dropout=st.sampled_from([0.0, 0.5, 0.99]),
    seed=st.integers(0, 999),
)
def test_lines_are_some_of_all_in_any_order(values, dropout, seed):
    template = "{a} | {b} | {c} | {d}"
    whole, all_facts = render(template, values)
    said, facts = render(template, values, np.random.default_rng(seed), dropout)
    every, lines = whole.split(" | "), said.split(" | ")
    assert set(lines) <= set(every) and len(lines) == len(set(lines)) >= 1
    assert dropout or sorted(lines) == sorted(every)
    stated = [line for value in facts.values() for line in ([value] if isinstance(value, str) else value)]
    assert sorted(stated) == sorted(lines)
    assert facts.keys() <= all_facts.keys()
    assert (text_id(facts) == text_id(all_facts)) == (sorted(lines) == sorted(every))


def test_each_line_is_dropped_with_its_probability_and_stands_anywhere():
    policy = TextPolicy(DataConfig(line_dropout=0.5), ("{tags} | {notes}",))
    values = {"tags": ["one", "two", "three"], "notes": "four\nfive"}
    said = [policy.say(values, np.random.default_rng(seed))[0].split(" | ") for seed in range(2000)]
    for word in ("one", "two", "three", "four", "five"):
        assert np.mean([word in lines for lines in said]) == pytest.approx(0.5 + 0.5**5, abs=0.04)
        first = [lines[0] == word for lines in said if word in lines]
        assert np.mean(first) == pytest.approx(np.mean([1 / len(lines) for lines in said if word in lines]), abs=0.05)


def test_the_published_shares_of_raw_english_and_translated_texts():
    raw = "{title} | {tags}"
    templates = (raw, raw, "{summary_en}", "{summary}")
    values = {"title": "T", "tags": ["x", "y"], "summary_en": "English", "summary": {"ru": "русский", "el": "ελληνικά"}}
    policy = TextPolicy(DataConfig(line_dropout=0.5), templates)
    said = [policy.say(values, np.random.default_rng(seed))[0] for seed in range(2000)]
    shares = {text: said.count(text) / 2000 for text in ("English", "русский", "ελληνικά")}
    assert shares == pytest.approx({"English": 0.25, "русский": 0.125, "ελληνικά": 0.125}, abs=0.03)
    assert policy.say(values, None)[0] == "T | x | y"


@given(st.dictionaries(st.sampled_from(["genre", "kind"]), st.text(min_size=1)), st.integers(0, 99))
def test_templates_without_bars_draw_as_before(fields, seed):
    with_rng = np.random.default_rng(seed)
    assert render(TEMPLATE, fields, with_rng, 0.9) == render(TEMPLATE, fields)
    assert with_rng.random() == np.random.default_rng(seed).random()
