"""Retrieval by texts in each language alone: by brute force, over rows that lack some of them."""

import json
from dataclasses import replace

import numpy as np
import pytest

from muser_dist.config import EvaluateConfig
from muser_dist.data.text import normal_form
from muser_dist.errors import ConfigError
from muser_dist.evaluate.comparison import PerRow
from muser_dist.evaluate.embedding import Embedded, embed
from muser_dist.evaluate.evaluator import score
from muser_dist.evaluate.languages import directions_in
from muser_dist.evaluate.scores_page import write_evaluation
from muser_dist.evaluate.summary import describe
from muser_dist.models.model import MultimodalModel
from muser_dist.muser import Muser
from tests.scores import piece, symbolic_config
from tests.shardmaker import write_shard
from tests.small import LOCAL, index_of

LANGUAGES = {
    "en": ("A slow waltz", "A quick jig", "A march", "An air"),
    "ru": ("Медленный вальс", "Быстрая жига", "Марш", "Напев"),
    "zh": ("慢 华尔兹", "快 吉格", "进行曲", "小曲"),
    "ar": ("فالس بطيء", "رقصة سريعة", "مسيرة", "لحن"),
    "hi": ("धीमा वाल्ट्ज", "तेज़ जिग", "मार्च", "धुन"),
    "el": ("Αργό βαλς", "Γρήγορη τζιγκ", "Εμβατήριο", "Σκοπός"),
    "ko": ("느린 왈츠", "빠른 지그", "행진곡", "가락"),
}
ROWS = 20
CONFIG = replace(
    symbolic_config(),
    evaluate=EvaluateConfig(languages=(*LANGUAGES, "fi")),
    data=replace(symbolic_config().data, templates=("{caption}", "{summary}, by {artist}"), vocabulary=4096),
)


def texts_of(i: int) -> dict[str, str]:
    """A row's summary: one of four, in the languages whose number does not divide the row's."""
    return {name: texts[i % 4] for n, (name, texts) in enumerate(LANGUAGES.items(), start=3) if i % n}


@pytest.fixture(scope="module")
def muser() -> Muser:
    return Muser(MultimodalModel(CONFIG), CONFIG)


@pytest.fixture(scope="module")
def rows(muser, tmp_path_factory) -> Embedded:
    """Rows with a caption each, and an artist; the last has no notation, the one before no metadata but a caption."""
    folder = tmp_path_factory.mktemp("shards")
    samples = []
    for i in range(ROWS):
        fields = {"caption": f"Tune {i}", "artist": "Ann", "summary": texts_of(i)}
        samples.append((f"piece{i:02d}", piece(i, "abc") | {"json": json.dumps(fields).encode()}))
    samples[-1][1]["abc"] = b"no notes"
    samples[-2][1]["json"] = b'{"caption": "A waltz"}'
    write_shard(folder / "val-0.tar", samples)
    return embed(muser, CONFIG, index_of(f"{folder}/val-*.tar"), LOCAL)


def by_brute_force(muser: Muser, rows: Embedded, language: str) -> dict[str, list[int]]:
    """The rank of each query's best answer, ties against it: one query, one candidate at a time."""
    said = {
        i: texts_of(i)[language]
        for i in range(ROWS - 2)
        if language in texts_of(i)  # the last two say or hear nothing
    }
    sentences = list(dict.fromkeys(said.values()))
    encoded = dict(zip(sentences, muser.encode_text(sentences), strict=True))
    tunes = {i: rows.joint["symbolic"][i].astype(np.float64) for i in said}

    def rank(right: dict, wrong: dict, query: np.ndarray) -> int:
        best = max(float(query @ vector) for vector in right.values())
        return 1 + sum(float(query @ vector) >= best - 1e-6 for vector in wrong.values())

    to_tunes = []
    for sentence in sentences:
        right = {i: v for i, v in tunes.items() if said[i] == sentence}
        to_tunes.append(rank(right, {i: v for i, v in tunes.items() if i not in right}, encoded[sentence]))
    to_texts = [rank({0: encoded[said[i]]}, {s: v for s, v in encoded.items() if s != said[i]}, tunes[i]) for i in said]
    return {"text->symbolic": sorted(to_tunes), "symbolic->text": sorted(to_texts)}


@pytest.mark.parametrize("language", LANGUAGES)
def test_ranks_are_those_of_brute_force(muser, rows, language):
    per_row: PerRow = {}
    result = score(muser, CONFIG, rows, per_row=per_row)
    expected = by_brute_force(muser, rows, language)
    found = result["retrieval_by_language"][language]
    assert set(found) == set(expected)
    for direction, ranks in expected.items():
        _, values = per_row[f"retrieval {direction} in {language}"]
        assert sorted(values[:, 0].tolist()) == ranks
        assert found[direction]["MRR"] == pytest.approx(np.mean([1 / rank for rank in ranks]))
        for k in (1, 10, 100):
            assert found[direction][f"R@{k}"] == pytest.approx(np.mean([rank <= k for rank in ranks]))
        assert found[direction]["queries"] == len(ranks)


def test_texts_are_of_the_language_alone(muser, rows):
    """A row that lacks it has no text, though a template could say its caption; equal texts are one."""

    class Listening:
        def __init__(self):
            self.modalities, self.encode_chunk = muser.modalities, muser.encode_chunk
            self.said: list[str] = []

        def encode_text(self, sentences):
            self.said += sentences
            return muser.encode_text(sentences)

    model = Listening()
    asked = dict(directions_in("ru", model, CONFIG.data, rows))
    assert model.said == [texts_of(i)["ru"] for i in range(ROWS) if "ru" in texts_of(i) and i != ROWS - 2]
    queries, candidates, query_ids, candidate_ids = asked["text->symbolic"]
    assert len(queries) == len(set(query_ids.tolist())) == len(set(model.said))
    assert len(candidates) == len(model.said) - 1  # but that of the row without notation
    assert set(query_ids.tolist()) == set(candidate_ids.tolist())
    assert not any(normal_form(caption) in map(normal_form, model.said) for caption in ("A waltz", "Tune 3"))


def test_what_is_shown(muser, rows, tmp_path):
    result = score(muser, CONFIG, rows)
    json.dumps(result, allow_nan=False)
    assert set(result["retrieval_by_language"]) == set(LANGUAGES)
    text = describe(result)
    assert "not scored: language fi (no usable row has a text in it that a template can say)" in text
    page = write_evaluation(tmp_path / "page.html", result | {"model": "m"}).read_text()
    for language in LANGUAGES:
        assert f"text->symbolic in {language} " in text and f"text → symbolic in {language}<" in page
    assert "By language" in page
    plain = score(muser, replace(CONFIG, evaluate=EvaluateConfig()), rows)
    assert plain["retrieval_by_language"] == {} and "by language" not in describe(plain)
    assert "By language" not in write_evaluation(tmp_path / "plain.html", plain | {"model": "m"}).read_text()
    assert plain["retrieval"] == result["retrieval"]


def test_rows_that_are_kept_keep_their_languages(rows, tmp_path):
    rows.save(tmp_path / "rows.npz")
    back = Embedded.load(tmp_path / "rows.npz")
    assert back.translations == rows.translations and back.fields == rows.fields
    assert rows.translations[1] == {"summary": texts_of(1)} and rows.fields[1] == {"caption": "Tune 1", "artist": "Ann"}


def test_a_language_is_named_once():
    with pytest.raises(ConfigError, match=r"evaluate\.languages names one twice"):
        EvaluateConfig(languages=("en", "en"))
