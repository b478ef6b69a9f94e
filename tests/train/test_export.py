"""An exported folder loads, equals what it was made of, says what it is, and holds no address."""

import json
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import save
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from muser_dist import Muser
from muser_dist.config import ModelConfig, ObjectiveConfig, Stages, to_dict
from muser_dist.data.config import FeaturesConfig
from muser_dist.errors import CheckpointError
from muser_dist.models.model import MultimodalModel
from muser_dist.muser import save_model
from muser_dist.recipes import RECIPES, find_recipe
from muser_dist.train.checkpoint import FORMAT
from muser_dist.train.export import export
from muser_dist.train.store import CheckpointStore
from tests.scores import M3, abc
from tests.shardmaker import encode, tone, write_shards
from tests.small import LOCAL, index_of, small_config
from tests.songs import FEATURES, MOST, SIZE, npy, song

SCORES = {
    "rows": 30,
    "retrieval": {"text->audio": {"R@1": 0.25, "R@10": 0.5, "chance_R@10": 0.1, "MRR": 0.3}},
    "zero_shot": {"mode": {"audio": {"accuracy": 0.75, "macro_f1": 0.7, "chance": 0.5}}},
}


@pytest.fixture
def run(tmp_path):
    """A run's folder without weights, whose shards lay at a place that should not be told."""
    config = small_config(
        data={"train": ("s3://vault/train.tar",), "storage_options": "/vault/key.json"},
        train={"checkpoint_storage": str(tmp_path / "vault"), "ema_samples": 8},
        name="trial",
        storage=str(tmp_path / "runs"),
    )
    folder = config.folder
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(
        json.dumps(to_dict(replace(config, data=replace(config.data, storage_options=""))))
    )
    (folder / "run.json").write_text(
        json.dumps({"command": "python jobs/pretrain.py tiny --name trial", "commit": "c0ffee"})
    )
    (folder / "evaluation.json").write_text(json.dumps(SCORES))
    index_of(write_shards(tmp_path / "vault" / "shards", [9, 4])).save(folder / "train-index.json")
    return config


def embedding(model):
    return model.encode_audio([tone(1, 0.5, 8_000)])


def test_the_exported_model_is_the_runs_and_its_card_says_what_it_is(run, tmp_path):
    model = MultimodalModel(replace(run, seed=5))
    save_model(run.folder / "model", model.state_dict(), run)
    assert "end of the run" in export(run.folder, tmp_path / "out")
    mine, theirs = Muser.from_pretrained(tmp_path / "out"), Muser.from_pretrained(run.folder)
    np.testing.assert_array_equal(embedding(mine), embedding(theirs))
    assert mine.sha256 == theirs.sha256
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"model.safetensors", "config.json", "README.md"}
    card = (tmp_path / "out" / "README.md").read_text()
    for part in (
        "license_name: to-be-chosen",
        "recipe `tiny`",
        "24 samples in global batches of 8",
        "| train | 1 | 2 | 13 |",
        "| text->audio | 0.250 | 0.500 | 0.100 | 0.300 |",
        "| mode by audio | 0.750 | 0.700 | 0.500 |",
        "commit c0ffee",
        "Muser.from_pretrained",
    ):
        assert part in card, part
    for path in (tmp_path / "out").iterdir():
        assert b"vault" not in path.read_bytes()


def write_checkpoint(config, step, model, cut=False):
    """A checkpoint of two ranks, each with its half of every parameter; a moving average twice the weights."""
    store = CheckpointStore(config, LOCAL)
    parts = []
    for rank in range(2):
        pieces = {}
        for name, value in model.named_parameters():
            flat = value.detach().flatten()
            middle = len(flat) // 2
            half, start = (flat[:middle], 0) if rank == 0 else (flat[middle:], middle)
            pieces |= {f"weight/{name}@{start}": half.clone(), f"average/{name}@{start}": 2 * half}
        if rank == 0:
            pieces |= {f"buffer/{name}@0": value.flatten() for name, value in model.named_buffers()}
        content = save(pieces)
        parts.append(store.write(step, f"rank-{rank}.safetensors", content))
        if cut:
            store.write(step, f"rank-{rank}.safetensors", content[:-9])
    store.complete(step, {"format": FORMAT, "parts": parts, "loss": None})


def test_without_an_exported_model_it_is_the_last_intact_checkpoints_average(run, tmp_path):
    with pytest.raises(CheckpointError, match="no checkpoint to export"):
        export(run.folder, tmp_path / "out")
    model = MultimodalModel(run)
    for step in (1, 2):
        write_checkpoint(run, step, MultimodalModel(replace(run, seed=step)))
    write_checkpoint(run, 3, model, cut=True)
    assert export(run.folder, tmp_path / "out") == "the checkpoint at step 2, 16 samples"
    want = {name: 2 * p for name, p in MultimodalModel(replace(run, seed=2)).named_parameters()}
    for name, value in Muser.from_pretrained(tmp_path / "out").model.named_parameters():
        torch.testing.assert_close(value, want[name], rtol=0, atol=0)


def test_what_is_there_is_replaced_by_force_alone(run, tmp_path):
    save_model(run.folder / "model", MultimodalModel(run).state_dict(), run)
    out = tmp_path / "out"
    out.mkdir()
    (out / "README.md").write_text("mine")
    with pytest.raises(CheckpointError, match="is not empty; give another --out, or --force"):
        export(run.folder, out)
    assert (out / "README.md").read_text() == "mine"
    export(run.folder, out, force=True)
    assert "Licence" in (out / "README.md").read_text()
    with pytest.raises(CheckpointError, match="is no run's folder"):
        export(tmp_path, tmp_path / "other")
    with pytest.raises(CheckpointError, match=r"is no run's folder .*give the one that jobs/pretrain"):
        export(out, tmp_path / "other")  # an exported model
    before = (run.folder / "config.json").read_text()
    with pytest.raises(CheckpointError, match="is a run's folder"):
        export(run.folder, run.folder, force=True)
    assert (run.folder / "config.json").read_text() == before


def make_tokenizer(folder):
    """A tokenizer with files, of as many ids as the small config's hashed words."""
    words = ("[UNK]", "a", "slow", "waltz", *(f"word{i}" for i in range(60)))
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="[UNK]", pad_token="[UNK]").save_pretrained(folder)
    return str(folder)


def test_force_leaves_nothing_of_the_model_before_and_all_that_is_the_users(run, tmp_path):
    before = replace(run, data=replace(run.data, tokenizer=make_tokenizer(tmp_path / "own")))
    save_model(run.folder / "model", MultimodalModel(before).state_dict(), before)
    out, sentence = tmp_path / "out", ["a slow waltz"]
    export(run.folder, out)
    assert (out / "tokenizer").is_dir()
    (out / "notes.txt").write_text("mine")
    shutil.rmtree(run.folder / "model")
    save_model(run.folder / "model", MultimodalModel(run).state_dict(), run)
    export(run.folder, out, force=True)
    assert {path.name for path in out.iterdir()} == {"model.safetensors", "config.json", "README.md", "notes.txt"}
    want = Muser.from_pretrained(run.folder).encode_text(sentence)
    np.testing.assert_array_equal(Muser.from_pretrained(out).encode_text(sentence), want)
    # A folder that lies there nevertheless is not the model's: words are hashed.
    make_tokenizer(out / "tokenizer")
    np.testing.assert_array_equal(Muser.from_pretrained(out).encode_text(sentence), want)


def test_heads_of_labels_are_sized_by_the_values_that_the_run_found(run, tmp_path):
    """The run's config.json holds what was asked for, in which they are not."""
    supervised = replace(
        run,
        data=replace(run.data, classes=("genre",), storage_options=""),
        model=ModelConfig(audio=run.model.audio),
        objective=ObjectiveConfig("supervised", pairs=()),
    )
    (run.folder / "config.json").write_text(json.dumps(to_dict(supervised)))
    values = {"genre": ("jig", "polka", "reel")}
    (run.folder / "labels.json").write_text(json.dumps(values))
    trained = replace(supervised, data=replace(supervised.data, label_values=values))
    write_checkpoint(trained, 1, MultimodalModel(trained))
    export(run.folder, tmp_path / "out")
    muser = Muser.from_pretrained(tmp_path / "out")
    assert muser.label_values == {"genre": ("jig", "polka", "reel")}
    assert muser.classify([tone(1, 0.5, 8_000)])["genre"].shape == (1, 3)


def small_configs(name):
    """A recipe's config, or those of its stages, with small towers of the same modalities."""
    recipe, small = find_recipe(name), small_config()
    towers = {"symbolic": M3, "features": FEATURES, **small.model.towers()}
    for config in [stage.config for stage in recipe.stages] if isinstance(recipe, Stages) else [recipe]:
        model = {}
        for modality, of in config.model.towers().items():
            tower = towers[modality]
            if of.build == "m3_pretraining":
                tower = replace(tower, build=of.build, options=tower.options | {"decoder_depth": 1})
            model[modality] = replace(of, build=tower.build, options=tower.options, weights="", head=True)
        data = replace(
            small.data,
            classes=config.data.classes,
            label_values={field: ("one", "other") for field in config.data.classes},
            features=FeaturesConfig(SIZE, MOST),
            symbolic=replace(config.data.symbolic, max_patches=24),
        )
        yield replace(config, data=data, model=ModelConfig(projection_dim=8, **model))


def exported(config, folder, command="python jobs/pretrain.py tiny", scores=None):
    """Exports an untrained model as that of a run to folder/out, and returns its card."""
    config = replace(config, name="trial", storage=str(folder / "runs"))
    save_model(config.folder / "model", MultimodalModel(config).state_dict(), config)
    (config.folder / "config.json").write_text(json.dumps(to_dict(config)))
    (config.folder / "run.json").write_text(json.dumps({"command": command}))
    if scores:
        (config.folder / "evaluation.json").write_text(json.dumps(scores))
    export(config.folder, folder / "out")
    return (folder / "out" / "README.md").read_text()


@pytest.mark.parametrize("name", RECIPES)
def test_the_use_on_the_card_runs(name, tmp_path, monkeypatch, capsys):
    for number, config in enumerate(small_configs(name)):
        folder = tmp_path / str(number)
        (code,) = re.findall(r"```python\n(.*?)```", exported(config, folder), re.DOTALL)
        monkeypatch.chdir(folder)
        (folder / "YOUR_SONG.mp3").write_bytes(encode(tone(1, 0.5, 8_000), 8_000))
        (folder / "YOUR_TUNE.abc").write_bytes(abc(1))
        (folder / "YOUR_SONG.npy").write_bytes(npy(song(1)))
        exec(code.replace("FOLDER", "out"), {})
        said = capsys.readouterr().out
        assert all(field in said for field in config.data.classes) and "[" in said
        assert ("encode_text" in code) == ("text" in config.model.towers())


def test_the_card_of_a_fine_tuned_model_names_its_fields_and_no_folder(tmp_path):
    (config,) = small_configs("muser_audio_only")
    for number, start in enumerate(("/home/alice/my secret/runs/base", "/home/alice/my secret/runs/base/model/")):
        command = f"python jobs/finetune.py {start} --data.classes genre --data.train /home/alice/x.tar"
        card = exported(config, tmp_path / str(number), command)
        assert "(fine-tuned from `base`)" in card
        assert "Tells values of instrument, type, meter, mode, pace apart by audio" in card
        for absent in ("alice", "secret", "space of", "contrastive", "over", "Sentences"):
            assert absent not in card, absent


def test_the_card_has_scores_of_heads_and_of_tags_and_dashes_where_there_are_none(tmp_path):
    (config,) = small_configs("muser_audio_only")
    said = {"accuracy": 0.75, "macro_f1": None, "chance": 0.5}
    scores = {
        "rows": 9,
        "retrieval": {},
        "zero_shot": {},
        "tagging": {"tags": {"audio": {"roc_auc": 0.625, "pr_auc": 0.25, "chance_pr_auc": 0.125}}},
        "probes": {"mode": {"audio": {"head": said}}},
    }
    card = exported(config, tmp_path, scores=scores)
    assert "| mode by audio, head | 0.750 | – | 0.500 |" in card
    assert "| tags by audio | 0.625 | 0.250 | 0.125 |" in card
    assert "| retrieval |" not in card
