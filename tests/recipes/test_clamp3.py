"""CLaMP 3's recipe: published sizes, what each stage trains, and that all else comes through to the bit."""

import io
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import HubertConfig, HubertModel

from muser_dist import Muser
from muser_dist.cli import parse_runs
from muser_dist.config import EvaluateConfig, ModelConfig, RunConfig, Stage, Stages
from muser_dist.data.config import FeaturesConfig
from muser_dist.data.text import TextPolicy, check_templates
from muser_dist.embed.features import Source, write_features
from muser_dist.evaluate.evaluator import evaluate
from muser_dist.models.model import MultimodalModel, build_tower
from muser_dist.models.weights import load_weights
from muser_dist.muser import save_model
from muser_dist.objectives.registry import load_objective
from muser_dist.recipes import find_recipe
from muser_dist.recipes.clamp3 import clamp3, mert
from muser_dist.train.engine import PlainEngine
from muser_dist.train.preflight import check_settings
from muser_dist.train.step import to_device, train_step
from tests.recipes.test_clamp import offline
from tests.scores import M3
from tests.shardmaker import encode, tone, write_shard
from tests.small import LOCAL, index_of, reader_of, small_config
from tests.songs import FEATURES, MOST, SIZE, song, write_songs

CPU = torch.device("cpu")
NAMES = ("m3", "symbolic", "audio", "joint", "repair")


def configs(recipe: Stages) -> dict[str, RunConfig]:
    return {stage.name: stage.config for stage in recipe.stages}


@pytest.mark.parametrize("name", ["clamp3", "clamp3_tiny"])
def test_each_stage_trains_what_it_says_and_keeps_the_rest(name):
    recipe = find_recipe(name)
    stages = configs(recipe)
    assert tuple(stages) == NAMES
    assert [stage.takes for stage in recipe.stages[1:]] == ["towers", "model", "model", "model"]
    trains = {"symbolic": "symbolic text", "audio": "features", "joint": "features text", "repair": "symbolic"}
    pairs = {"symbolic": "symbolic", "audio": "features", "joint": "features", "repair": "symbolic"}
    for stage, trained in trains.items():
        towers = stages[stage].model.towers()
        assert set(towers) == {"symbolic", "text"} | ({"features"} if stage != "symbolic" else set())
        assert {tower for tower, of in towers.items() if not of.freeze} == set(trained.split())
        assert all(of.freeze == of.freeze_head for of in towers.values())
        (pair,) = stages[stage].objective.pairs
        assert (pair.first, pair.second) == (pairs[stage], "text")
        assert set(stages[stage].features) == {pairs[stage], "text"}  # all else is neither read nor encoded
    # Else published weights would come back in the place of the stage before's.
    assert not any(tower.weights for name in NAMES[2:] for tower in stages[name].model.towers().values())


def test_the_published_sizes():
    stages = configs(clamp3())
    assert stages["symbolic"].data.features == FeaturesConfig(768, 126)
    assert [stages[name].train.global_batch for name in NAMES] == [128, 1024, 2048, 2048, 1024]
    assert [stages[name].train.lr for name in NAMES] == [1e-4, 5e-5, 1e-5, 1e-5, 5e-5]
    for name in NAMES[1:]:
        assert stages[name].train.warmup_samples == 1000 * stages[name].train.global_batch
        assert not stages[name].objective.normalise and not stages[name].objective.temperature.learnable
        assert stages[name].objective.temperature.init == 1.0 and stages[name].model.projection_dim == 768
    with torch.device("meta"):
        model = MultimodalModel(offline(stages["audio"]))
    sizes = {name: sum(p.numel() for p in tower.parameters()) for name, tower in model.towers.items()}
    assert sizes["features"] == 85_155_840 and sizes["symbolic"] == 91_742_976
    assert model.towers["features"].positions == 128


def test_half_of_the_texts_are_metadata_and_half_translations():
    data = configs(clamp3())["symbolic"].data
    check_templates(data.templates)
    values = {
        "title": "Mairi's Wedding",
        "genres": ["Folk", "Dance"],
        "scene": "A village.",
        "translations": {"Chinese": "婚礼\n村庄", "Russian": "свадьба\nдеревня"},
    }
    raw = {"Mairi's Wedding", "Folk", "Dance", "A village."}
    said = [TextPolicy(data, data.templates).say(values, np.random.default_rng(i))[0] for i in range(1000)]
    of_lines = [set(text.replace("\n", " | ").split(" | ")) for text in said]
    assert np.mean([lines <= raw for lines in of_lines]) == pytest.approx(0.5, abs=0.05)
    assert {len(lines) for lines in of_lines if lines <= raw} == {1, 2, 3, 4}


def test_small_ones_can_be_tried():
    for config in configs(clamp3("tiny")).values():
        config = replace(config, data=replace(config.data, train=("train.tar",), val=("val.tar",)))
        assert 500_000 < check_settings(config)[0] < 10_000_000


def test_stages_take_their_options_and_start_from_each_other(tmp_path):
    of_one, of_all = ["--audio.data.train", "songs.tar"], ["--data.features.size", "9"]
    arguments = ["clamp3_tiny", "--storage", str(tmp_path), *of_one, *of_all]
    runs = parse_runs(arguments, "jobs/pretrain.py")
    assert [config.name for config in runs] == list(NAMES)
    assert runs[1].model.symbolic.weights == str(runs[0].folder)
    assert [config.model.start for config in runs[2:]] == [str(config.folder) for config in runs[1:4]]
    assert runs[2].data.train == ("songs.tar",) and runs[3].data.train == ()
    assert {config.data.features.size for config in runs} == {9}


def test_mert_is_heard_in_windows_of_five_seconds():
    config = mert("folder")
    assert (config.data.sample_rate, config.data.crop_seconds) == (24_000, 5.0)
    with torch.device("meta"):
        tower = build_tower("audio", config.model.audio, config.data)
    assert tower.width == 768 and tower.layers == "mean"
    assert sum(p.numel() for p in tower.parameters()) == pytest.approx(94.4e6, rel=0.01)


# --- All stages, with the plain engine ---


def small_stages(folder: Path, pattern: str, name: str = "", val: tuple[str, ...] = ()) -> tuple[RunConfig, ...]:
    """The recipe with towers of a few thousand parameters, chained."""
    small = small_config()
    towers = {"symbolic": M3, "features": FEATURES, "text": small.model.text}
    made = []
    for stage in clamp3("tiny").stages:
        model = {
            name: replace(towers[name], build=of.build, freeze=of.freeze, freeze_head=of.freeze_head)
            for name, of in stage.config.model.towers().items()
        }
        if stage.name == "m3":
            model["symbolic"] = replace(model["symbolic"], options=M3.options | {"decoder_depth": 1})
        data = replace(small.data, train=(pattern,), val=val, features=FeaturesConfig(SIZE, MOST))
        data = replace(data, symbolic=replace(data.symbolic, max_patches=24))
        config = replace(
            stage.config,
            data=data,
            model=ModelConfig(projection_dim=8, **model),
            train=small.train,
            evaluate=EvaluateConfig(fields=("instrument",)),
            storage=str(folder),
            name=name,
        )
        made.append(Stage(stage.name, config, stage.takes))
    return Stages(tuple(made)).chained("clamp3")


def trained(config: RunConfig, pattern: str, steps: int = 2) -> MultimodalModel:
    """The model of a stage after some steps, begun from the stage before and exported."""
    model = MultimodalModel(config)
    load_weights(model, config)
    engine, reader = PlainEngine(model, config, CPU), reader_of(config, pattern)
    for step in range(steps):
        chunks = reader.read(range(step * reader.slots_per_step, (step + 1) * reader.slots_per_step))
        mine = [to_device(chunk, config.features, CPU) for chunk in chunks]
        assert train_step(engine, load_objective(config.objective), config, mine, 1.0).applied
    save_model(config.folder / "model", model.state_dict(), config)
    return model


def test_what_a_stage_does_not_train_comes_through_to_the_bit(tmp_path):
    pattern = write_songs(tmp_path / "shards", 16, "abc", "mid", "npy")
    runs = small_stages(tmp_path, pattern)
    left = []
    for config in runs:
        trained(config, pattern)
        left.append(load_file(config.folder / "model" / "model.safetensors"))
    changes = {"audio": set(), "joint": {"features", "text"}, "repair": {"symbolic"}}  # the first one's tower is new
    for config, before, after in zip(runs[2:], left[1:], left[2:], strict=False):
        changed = {tuple(name.split(".")[:2]) for name in before if not torch.equal(before[name], after[name])}
        parts = {part for part in changed if part[0] != "logits"}
        assert parts == {(of, name) for of in ("towers", "heads") for name in changes[config.name]}, config.name
    drawn = MultimodalModel(runs[2]).state_dict()
    assert not torch.equal(left[2]["heads.features.0.weight"], drawn["heads.features.0.weight"])

    # One model of all three, in which notation and sound, which never met, are asked for each other.
    muser = Muser.from_pretrained(runs[-1].folder)
    scores = evaluate(muser, runs[-1], index_of(pattern), LOCAL)
    assert {"features->symbolic", "symbolic->features", "features->notation", "text->features"} <= set(
        scores["retrieval"]
    )
    assert set(scores["zero_shot"]["instrument"]) == {"symbolic", "notation", "features"}
    assert muser.encode_features([song(1), song(2)]).shape == (2, 8)


def test_a_stage_reads_only_what_it_needs(tmp_path):
    """Rows with features alone do for audio, and rows with notation alone for repair."""
    songs = write_songs(tmp_path / "songs", 8, "npy")
    tunes = write_songs(tmp_path / "tunes", 8, "abc")
    runs = {config.name: config for config in small_stages(tmp_path, songs)}
    for name, pattern, lacking in (("audio", songs, tunes), ("repair", tunes, songs)):
        (chunk, *_) = reader_of(runs[name], pattern).read([0])
        assert chunk["problems"] == [] and chunk["text_length"].all()
        (chunk, *_) = reader_of(runs[name], lacking).read([0])
        assert len(chunk["problems"]) == len(chunk["key"])


def test_a_saved_mert_gives_features(tmp_path):
    """As the page makes it, of a small network in Hugging Face's folder."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    sizes |= {"conv_dim": (8, 8), "conv_kernel": (10, 4), "conv_stride": (5, 4), "num_feat_extract_layers": 2}
    sizes |= {"num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2}
    theirs = HubertModel(HubertConfig(**sizes))
    theirs.save_pretrained(tmp_path / "hub")
    config = mert(str(tmp_path / "hub"))
    tower = replace(config.model.audio, options={"model": {"model_type": "hubert"} | sizes, "layers": "mean"})
    config = replace(config, model=replace(config.model, audio=tower))
    model = MultimodalModel(config)
    (match,) = load_weights(model, config)
    assert not match.missing and not match.other_shape
    save_model(tmp_path / "model", model.state_dict(), config)
    muser = Muser.from_pretrained(tmp_path / "model")
    write_shard(tmp_path / "a-0.tar", [("song", {"flac": encode(tone(1, 12.0, 24_000), 24_000)})])
    index = index_of(f"{tmp_path}/a-0.tar")
    source = Source.of(muser, "audio", index)
    assert (source.size, source.seconds) == (16, 5.0)
    (tmp_path / "out").mkdir()
    record = write_features(lambda: muser, source, LOCAL, index.url(0), 1, tmp_path / "out")
    assert record.made == 1 and record.problems == []
    with tarfile.open(tmp_path / "out" / "a-0.tar") as tar:
        assert np.load(io.BytesIO(tar.extractfile("song.npy").read())).shape == (2, 16)  # 2 s are less than half
