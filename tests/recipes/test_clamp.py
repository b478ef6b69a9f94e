"""CLaMP 2's recipes: published sizes, losses by hand, what a stage takes over, and texts in many scripts."""

import re
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from muser_dist import Muser
from muser_dist.cli import parse_runs
from muser_dist.config import RunConfig, Stages
from muser_dist.data.text import TextPolicy, check_templates
from muser_dist.models.heads import LogitScale
from muser_dist.models.model import MultimodalModel
from muser_dist.models.weights import load_weights
from muser_dist.muser import save_model
from muser_dist.objectives.batch import Batch, Logits
from muser_dist.objectives.registry import load_objective
from muser_dist.recipes import find_recipe, load_recipe
from muser_dist.recipes.finetune import finetune
from muser_dist.train.preflight import check_settings

PUBLISHED = {
    "model_type": "xlm-roberta",
    "vocab_size": 250_002,
    "max_position_embeddings": 514,
    "type_vocab_size": 1,
    "pad_token_id": 1,
}
"""XLM-R's base, which has BERT's sizes."""


def stages(name: str) -> tuple[RunConfig, RunConfig]:
    recipe = find_recipe(name)
    assert isinstance(recipe, Stages)
    first, second = recipe.stages
    return first.config, second.config


def offline(config: RunConfig) -> RunConfig:
    """Without what is fetched by name."""
    text = replace(config.model.text, options={"model": PUBLISHED, "pooling": "mean"}, weights="")
    return replace(config, data=replace(config.data, tokenizer="words"), model=replace(config.model, text=text))


def test_the_published_sizes():
    first, second = stages("clamp2")
    assert first == load_recipe("m3")
    assert first.data.symbolic == second.data.symbolic and second.data.symbolic.max_patches == 512
    assert second.data.symbolic.drop_instruments == 0.9 and second.data.line_dropout == 0.5
    with torch.device("meta"):
        encoder = MultimodalModel(first).towers["symbolic"]
        aligned = MultimodalModel(offline(second))
    assert sum(p.numel() for p in encoder.parameters()) == 113_253_888
    sizes = {name: sum(p.numel() for p in tower.parameters()) for name, tower in aligned.towers.items()}
    assert sizes["symbolic"] == 91_742_976 and sizes["text"] == pytest.approx(277.5e6, rel=0.002)
    assert {head[0].weight.shape for head in aligned.heads.values()} == {torch.Size([768, 768])}


def test_the_published_loss_is_clips_on_dot_products():
    objective = stages("clamp2")[1].objective
    g = torch.Generator().manual_seed(0)
    x, y = (torch.randn(6, 16, generator=g) for _ in range(2))
    valid = dict.fromkeys(("symbolic", "text"), torch.ones(6, dtype=torch.bool))
    batch = Batch(valid, torch.arange(6), torch.arange(6), torch.full((6,), -1))
    scale = LogitScale(objective)()["scale"]
    got = load_objective(objective)({"symbolic": x, "text": y}, Logits(scale), batch, objective).share
    both = [F.cross_entropy(s, torch.arange(6)) for s in (x @ y.T, y @ x.T)]
    torch.testing.assert_close(got, (both[0] + both[1]) / 2)
    assert not scale.requires_grad


def test_the_published_shares_of_texts():
    data = stages("clamp2")[1].data
    check_templates(data.templates)
    values = {
        "title": "Planxty",
        "genres": ["folk", "dance"],
        "summary_en": "A slow air.",
        "summary": {"Chinese": "慢板", "Russian": "медленно"},
    }
    said = [TextPolicy(data, data.templates).say(values, np.random.default_rng(i))[0] for i in range(1000)]
    assert np.mean([text == "A slow air." for text in said]) == pytest.approx(0.25, abs=0.04)
    assert np.mean([text in values["summary"].values() for text in said]) == pytest.approx(0.25, abs=0.04)
    raw = {line for text in said for line in text.split(" | ")} - {"A slow air.", "慢板", "медленно"}
    assert raw == {"Planxty", "folk", "dance"}


def test_alignment_goes_on_from_the_pretrained_encoder(tmp_path):
    first, second = parse_runs(["clamp2_tiny", "--storage", str(tmp_path)], "jobs/pretrain.py")
    assert second.model.symbolic.weights == str(first.folder) and second.model.text.weights == "" == second.model.start
    pretrained = MultimodalModel(first)
    save_model(first.folder / "model", pretrained.state_dict(), first)
    model = MultimodalModel(second)
    (match,) = load_weights(model, second)
    assert not match.missing and not match.other_shape
    for name, value in pretrained.towers["symbolic"].encoder.state_dict().items():
        assert torch.equal(model.towers["symbolic"].state_dict()[name], value), name


@pytest.mark.parametrize("name", ["m3_tiny", "clamp2_tiny", "muser_symbolic_tiny"])
def test_small_ones_can_be_tried(name):
    recipe = find_recipe(name)
    for config in (stage.config for stage in recipe.stages) if isinstance(recipe, Stages) else (recipe,):
        config = replace(config, data=replace(config.data, train=("train.tar",), val=("val.tar",)))
        assert 500_000 < check_settings(config)[0] < 10_000_000


def test_muser_with_notation_is_muser_and_more():
    plain, config = load_recipe("muser_tiny"), load_recipe("muser_symbolic_tiny")
    assert config.objective.pairs[:2] == plain.objective.pairs
    assert config.features == ("audio", "spectrogram", "symbolic", "text")
    assert replace(config.model, symbolic=None) == plain.model and config.train == plain.train
    assert load_recipe("muser_symbolic").model.symbolic.options["width"] == 256


def test_texts_in_many_scripts_find_themselves():
    """From metadata to an embedding and back in a search; the tower is one of random weights."""
    config = stages("clamp2_tiny")[1]
    muser = Muser(MultimodalModel(config), config)
    titles = ["A slow waltz", "慢板 圆舞曲", "медленный вальс", "αργό βαλς", "أغنية بطيئة", "느린 왈츠", "धीमा वाल्ट्ज"]
    policy = TextPolicy(config.data, ("{caption}",))
    said = [policy.say({"caption": title}, None)[0] for title in titles]
    assert said == titles
    embedded = muser.encode_text(said)
    assert (embedded @ muser.encode_text(titles).T).argmax(axis=1).tolist() == list(range(len(titles)))
    assert (embedded @ embedded.T - 2 * np.eye(len(titles))).max() < 0.999


def test_the_commands_of_the_page_name_recipes_and_options_that_exist(monkeypatch):
    page = (Path(__file__).parents[2] / "docs" / "clamp.md").read_text()
    (own,) = re.findall(r"```python\n((?:(?!```).)*def direct.*?)```", page, re.S)
    module = ModuleType("my_recipes")
    exec(own, module.__dict__)
    monkeypatch.setitem(sys.modules, "my_recipes", module)
    commands = re.findall(r"python jobs/pretrain\.py ([^\n`]*)", page.replace("\\\n", " "))
    runs = [parse_runs(shlex.split(command), "jobs/pretrain.py") for command in commands]
    assert [len(stages) for stages in runs] == [2, 1, 1, 1, 5, 5]
    assert [len(config.objective.pairs) for config in runs[2]] == [2]
    (options,) = re.findall(r"^```\n(--data\.templates .*)\n```", page, re.M)
    (*_, align) = parse_runs(["clamp2", *shlex.split(options)], "jobs/pretrain.py")
    assert len(align.data.templates) == 4
    assert [config.data.train for config in runs[5]] == [("SCORES/*.tar",)] * 2 + [("SONGS/*.tar",)] * 2 + [
        ("SCORES/*.tar",)
    ]
    for option in re.findall(r"`(--[a-z0-9.-]+[^`]*)`", page[: page.index("## Sound: CLaMP 3")]):
        words = shlex.split(option.replace("\n", " "))
        if words[0].startswith("--model.text"):
            continue  # of a tower that is not in the first stage
        assert parse_runs(["clamp2", *words], "jobs/pretrain.py")


def test_m3_can_be_fine_tuned_without_its_decoder(tmp_path):
    config = load_recipe("m3_tiny")
    before = MultimodalModel(config)
    save_model(tmp_path / "run" / "model", before.state_dict(), config)
    tuned = finetune(str(tmp_path / "run"))
    tuned = replace(tuned, data=replace(tuned.data, classes=("mode",), label_values={"mode": ("major", "minor")}))
    model = MultimodalModel(replace(tuned, seed=1))
    load_weights(model, tuned)
    of_encoder = before.towers["symbolic"].encoder.state_dict()
    tower = model.towers["symbolic"].state_dict()
    assert tower.keys() == of_encoder.keys() and all(torch.equal(tower[name], of_encoder[name]) for name in tower)
