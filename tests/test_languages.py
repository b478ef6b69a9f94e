"""Words in many scripts, from metadata to an embedding and back in a search; tunes that are found in each language.

A stand-in for a multilingual text tower learns, in seconds, what some words of each language say of small tunes.
"""

import itertools
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from muser_dist import Muser
from muser_dist.cli import print_hits
from muser_dist.config import EvaluateConfig, RunConfig, TowerConfig
from muser_dist.data.decoder import decoder
from muser_dist.data.rows import RowReader
from muser_dist.evaluate.evaluator import evaluate
from muser_dist.models.model import MultimodalModel
from muser_dist.muser import save_model
from muser_dist.objectives.registry import load_objective
from muser_dist.search import Index
from muser_dist.train.engine import PlainEngine
from muser_dist.train.step import to_device, train_step
from tests.embed.test_embed import embed, parts_of
from tests.scores import symbolic_config
from tests.shardmaker import write_shard
from tests.small import LOCAL, index_of, reader_of

WORDS = {
    "English": (("a slow", "a quick"), ("waltz", "march", "jig"), ("low", "high")),
    "Russian": (("медленный", "быстрый"), ("вальс", "марш", "джиг"), ("низкий", "высокий")),
    "Greek": (("αργό", "γρήγορο"), ("βαλς", "εμβατήριο", "τζιγκ"), ("χαμηλό", "ψηλό")),
    "Arabic": (("بطيء", "سريع"), ("فالس", "مارش", "جيغ"), ("منخفض", "عال")),
    "Hindi": (("धीमा", "तेज़"), ("वाल्ट्ज", "मार्च", "जिग"), ("नीचा", "ऊँचा")),
    "Chinese": (("慢", "快"), ("圆舞曲", "进行曲", "吉格舞曲"), ("低音", "高音")),
    "Korean": (("느린", "빠른"), ("왈츠", "행진곡", "지그"), ("낮은", "높은")),
    "Persian": (("آهسته", "تند"), ("والس", "مارش", "جیگ"), ("نغمه\u200cی بم", "نغمه\u200cی زیر")),
    "Georgian": (("ნელი", "სწრაფი"), ("ვალსი", "მარში", "ჯიგი"), ("დაბალი", "მაღალი")),
}
LEARNED = tuple(name for name in WORDS if name != "Georgian")
KINDS = list(itertools.product(range(2), range(3), range(2)))
"""Slow or quick; waltz, march or jig; low or high."""


def text_of(kind: tuple[int, int, int], language: str) -> str:
    return " ".join(words[i] for words, i in zip(WORDS[language], kind, strict=True))


def tune(kind: tuple[int, int, int], seed: int) -> bytes:
    """Three bars of a kind; what the notes are besides, the seed decides."""
    speed, dance, high = kind
    meter, beats = (("3/4", 6), ("4/4", 8), ("6/8", 6))[dance]
    notes = np.random.default_rng(seed).choice(list("cdefgab" if high else "CDEFGAB"), 3)
    bars = "|".join(f"{note}{beats}" if speed == 0 else note * beats for note in notes)
    return f"X:1\nT:no word\nM:{meter}\nL:1/8\nK:C\n{bars}|]\n".encode()


def write_tunes(folder: Path, name: str, seeds: range) -> str:
    """A row for each kind and seed, with its summary in all languages, and the title in one."""
    rows = []
    for seed in seeds:
        for number, kind in enumerate(KINDS):
            language = list(WORDS)[(seed + number) % len(WORDS)]
            fields = {"title": text_of(kind, language), "summary": {name: text_of(kind, name) for name in WORDS}}
            members = {"abc": tune(kind, 100 * seed + number), "json": json.dumps(fields).encode()}
            rows.append((f"{name}-{seed}-{'-'.join(map(str, kind))}", members))
    write_shard(folder / f"{name}-0.tar", rows)
    return f"{folder}/{name}-*.tar"


def make_tokenizer(folder: Path) -> str:
    """Pairs of bytes, learned from these words: no script is unknown to it."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=["[PAD]"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    inner.train_from_iterator([text_of(kind, name) for kind in KINDS for name in LEARNED], trainer)
    PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="[PAD]").save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[Muser, RunConfig, Path]:
    """A model that was trained here on tunes with words in the languages of `LEARNED`, of which one is drawn."""
    folder = tmp_path_factory.mktemp("languages")
    pattern = write_tunes(folder, "train", range(6))
    train = {"samples": 48 * 120, "global_batch": 48, "chunk": 48, "warmup_samples": 480, "lr": 4e-3}
    config = symbolic_config(train=train, max_patches=12)
    tower = TowerConfig("text", {"width": 32, "depth": 1, "heads": 2})
    config = replace(
        config,
        data=replace(
            config.data,
            templates=("{summary}",),
            languages=LEARNED,
            tokenizer=make_tokenizer(folder / "tokenizer"),
            max_tokens=32,
        ),
        model=replace(
            config.model,
            text=tower,
            symbolic=replace(config.model.symbolic, options={"width": 32, "depth": 1, "heads": 2}),
        ),
        evaluate=EvaluateConfig(languages=tuple(WORDS)),
    )
    config = replace(config, model=replace(config.model, projection_dim=32))
    torch.manual_seed(0)
    engine, reader = PlainEngine(MultimodalModel(config), config, torch.device("cpu")), reader_of(config, pattern)
    objective = load_objective(config.objective)
    for step in range(config.train.steps):
        chunks = reader.read(range(step * reader.slots_per_step, (step + 1) * reader.slots_per_step))
        train_step(engine, objective, config, [to_device(c, config.features, engine.device) for c in chunks], 1.0)
    decoder(config.data).close()
    save_model(folder / "model", engine.state_dict(), config)
    return Muser.from_pretrained(folder / "model"), config, folder


@pytest.fixture(scope="module")
def index(trained) -> Index:
    """One new tune of each kind, embedded as jobs/embed.py does it."""
    muser, _, folder = trained
    rows = RowReader(index_of(write_tunes(folder, "new", range(50, 51))), LOCAL)
    songs, parts = parts_of(muser, rows, folder / "index", modalities=("symbolic",), fields=("title",))
    assert embed(muser, songs, parts) == (len(KINDS), 0)
    decoder(muser.config.data).close()
    return Index.open(folder / "index")


@pytest.mark.parametrize("language", LEARNED)
def test_a_sentence_in_any_language_finds_its_tune(trained, index, language):
    muser, *_ = trained
    found = [muser.search(text_of(kind, language), index, k=1)[0].key for kind in KINDS]
    right = [f"new-50-{'-'.join(map(str, kind))}" for kind in KINDS]
    assert sum(key == wanted for key, wanted in zip(found, right, strict=True)) >= 11, found


def test_each_language_is_scored_by_itself(trained, index):
    """Those that were learned are known, the one that was kept back is not."""
    muser, config, folder = trained
    result = evaluate(muser, config, index_of(f"{folder}/new-*.tar"), LOCAL)
    found = {name: scores["text->symbolic"] for name, scores in result["retrieval_by_language"].items()}
    assert set(found) == set(WORDS)
    assert all(found[name]["MRR"] > 0.9 and found[name]["queries"] == len(KINDS) for name in LEARNED), found
    assert found["Georgian"]["MRR"] < 0.7, found
    decoder(config.data).close()


def test_titles_come_back_in_their_script(trained, index, capsys):
    muser, *_ = trained
    hits = muser.search("a slow waltz low", index, k=len(KINDS))
    scripts = {
        name: text_of(kind, name) for kind, name in zip(KINDS, list(WORDS)[50 % 9 :] + list(WORDS), strict=False)
    }
    assert {hit.metadata["title"] for hit in hits} >= set(scripts.values())
    print_hits(hits, ("title",))
    out = capsys.readouterr().out
    assert all(f"title: {title}\n" in out for title in scripts.values()) and "�" not in out
