"""Recipes in stages: options, folders, and what a stage takes over from the one before."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from muser_dist.cli import parse_runs
from muser_dist.config import (
    ModelConfig,
    ObjectiveConfig,
    PairConfig,
    RunConfig,
    Stage,
    Stages,
    TemperatureConfig,
    TowerConfig,
)
from muser_dist.data.config import DataConfig
from muser_dist.errors import ConfigError
from muser_dist.models.model import MultimodalModel
from muser_dist.models.weights import load_weights, report_weights
from muser_dist.muser import save_model
from muser_dist.recipes import find_recipe, load_recipe
from muser_dist.recipes.finetune import finetune
from muser_dist.train.store import CheckpointStore
from tests.small import LOCAL, small_config


def two_stages() -> Stages:
    """Audio against text, then spectrograms besides."""
    second = small_config()
    pairs = (PairConfig("audio", "text"),)
    first = replace(
        small_config(), model=replace(second.model, spectrogram=None), objective=ObjectiveConfig(pairs=pairs)
    )
    return Stages((Stage("alone", first), Stage("together", second, "towers")))


ME = "tests.train.test_stages:two_stages"


def test_options_are_of_all_stages_or_of_one():
    arguments = ["--train.lr", "0.5", "--together.train.lr", "0.25", "--together.data.templates", "{a}", "{b}"]
    first, second = parse_runs([ME, *arguments, "--train.clip-norm", "2"], "jobs/pretrain.py")
    assert (first.train.lr, second.train.lr) == (0.5, 0.25)
    assert (first.train.clip_norm, second.train.clip_norm) == (2.0, 2.0)
    assert second.data.templates == ("{a}", "{b}") != first.data.templates


def test_a_misspelt_option_is_an_error_that_names_the_stage(capsys):
    with pytest.raises(SystemExit):
        parse_runs([ME, "--together.train.lrr", "1"], "jobs/pretrain.py")
    assert "stage together" in " ".join(capsys.readouterr().err.split())


def test_stages_lie_in_one_folder_named_by_all_their_settings():
    first, second = parse_runs([ME], "jobs/pretrain.py")
    assert (first.name, second.name) == ("alone", "together")
    assert first.storage == second.storage and Path(first.storage).parent == Path("runs")
    changed = parse_runs([ME, "--together.train.lr", "0.25"], "jobs/pretrain.py")
    assert changed[0].storage != first.storage
    operational = parse_runs([ME, "--train.workers", "1"], "jobs/pretrain.py")
    assert operational[0].storage == first.storage
    named = parse_runs([ME, "--name", "mine", "--storage", "elsewhere"], "jobs/pretrain.py")
    assert named[1].folder == Path("elsewhere/mine/together")


def test_a_stage_starts_from_the_one_before():
    first, second = parse_runs([ME], "jobs/pretrain.py")
    assert not first.model.start
    # Of "towers" those that are there.
    assert second.model.audio.weights == second.model.text.weights == str(first.folder)
    assert second.model.spectrogram.weights == "" == second.model.start
    whole = Stages((Stage("a", small_config()), Stage("b", small_config()))).chained("x")
    assert whole[1].model.start == str(whole[0].folder)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--together.model.text.weights", "X"], r"together\.model\.text\.weights: 'X' would not be used"),
        (["--together.name", "mine"], r"name is '' of stage alone and 'mine' of together.*give --name without"),
        (["--together.storage", "there"], r"storage is 'runs' of stage alone and 'there' of together"),
    ],
)
def test_options_of_a_stage_that_would_do_nothing_are_refused(arguments, message):
    with pytest.raises(ConfigError, match=message):
        parse_runs([ME, *arguments], "jobs/pretrain.py")


def test_a_start_of_a_stage_that_goes_on_from_another_is_refused():
    config = small_config()
    with pytest.raises(ConfigError, match=r"b\.model\.start: 'X' would not be used, for stage b goes on from stage a"):
        Stages((Stage("a", config), Stage("b", replace(config, model=replace(config.model, start="X"))))).chained("x")


def test_weights_that_the_first_stage_starts_from_are_no_contradiction():
    first, second = parse_runs([ME, "--model.text.weights", "X"], "jobs/pretrain.py")  # of all stages
    assert (first.model.text.weights, second.model.text.weights) == ("X", str(first.folder))
    first, second = parse_runs(["htcl", "--semantic.model.text.weights", "X"], "jobs/pretrain.py")
    assert (first.model.text.weights, second.model.text.weights) == ("X", str(first.folder))


def test_names_that_options_could_not_tell_apart_are_refused():
    config = small_config()
    with pytest.raises(ConfigError, match="names must differ"):
        Stages((Stage("a", config), Stage("a", config)))
    for name in ("train", "two words", ""):
        with pytest.raises(ConfigError, match="must be a word"):
            Stages((Stage(name, config),))


def test_other_jobs_say_that_a_recipe_has_stages():
    assert find_recipe(ME) == two_stages()
    with pytest.raises(ConfigError, match=r"has stages \(alone, together\), which only jobs/pretrain.py trains"):
        load_recipe(ME)


# --- model.start ---


def exported(folder: Path, config: RunConfig) -> dict[str, torch.Tensor]:
    model = MultimodalModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.5
    save_model(folder / "model", model.state_dict(), config)
    return model.state_dict()


def test_a_model_goes_on_with_all_weights_that_have_a_place(tmp_path):
    pairs = (PairConfig("spectrogram", "text"), PairConfig("audio", "text"))
    before = small_config(objective=ObjectiveConfig(pairs=pairs, temperature=TemperatureConfig(init=0.3)))
    weights = exported(tmp_path, before)
    spectrogram = before.model.spectrogram
    other = TowerConfig("spectrogram", spectrogram.options | {"dims": [8, 8, 8, 24]})
    config = small_config(
        model=replace(before.model, start=str(tmp_path), spectrogram=other),
        objective=ObjectiveConfig(pairs=(PairConfig("text", "audio"), PairConfig("spectrogram", "audio"))),
    )
    model = MultimodalModel(config)
    drawn = {name: value.clone() for name, value in model.state_dict().items()}
    (match,) = load_weights(model, config)
    now = model.state_dict()
    for name, value in now.items():
        if name.startswith(("towers.audio.", "towers.text.", "heads.audio.", "heads.text.")):
            torch.testing.assert_close(value, weights[name])
    # Temperatures by their pairs: text-audio was the second, and spectrogram-audio is new.
    torch.testing.assert_close(now["logits.log_scale.0"], weights["logits.log_scale.1"])
    torch.testing.assert_close(now["logits.log_scale.1"], drawn["logits.log_scale.1"])
    assert "heads.spectrogram.0.weight" in match.other_shape
    torch.testing.assert_close(now["heads.spectrogram.0.weight"], drawn["heads.spectrogram.0.weight"])
    assert "logits.log_scale.1" in match.missing
    assert str(match).startswith("Weights of model.start: ")
    assert [str(m) for m in report_weights(config)] == [str(match)]


def test_a_start_that_is_not_there_is_named(tmp_path):
    config = small_config(model=replace(small_config().model, start=str(tmp_path / "gone")))
    with pytest.raises(ConfigError, match=r"model.start: .*gone"):
        report_weights(config)


def test_a_start_is_an_absolute_path_for_workers(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = replace(small_config().model, start="runs/x")
    assert model.with_absolute_paths().start == str(tmp_path / "runs/x")
    assert ModelConfig(audio=model.audio).with_absolute_paths().start == ""


def test_networks_and_tokenizers_out_of_folders_are_absolute_paths_for_workers(tmp_path, monkeypatch):
    """Ray Train's workers run in folders of their own."""
    monkeypatch.chdir(tmp_path)
    for name in ("bert", "words"):
        (tmp_path / name).mkdir()
    text = TowerConfig("hf_text", {"model": "bert"}, weights="bert")
    model = ModelConfig(text=text, audio=TowerConfig("hf_waveform", {"model": "on/the-hub"})).with_absolute_paths()
    assert model.text.options["model"] == model.text.weights == str(tmp_path / "bert")
    assert model.audio.options["model"] == "on/the-hub"
    data = DataConfig(tokenizer="bert", storage_options="key.json", cache_folder="cache").with_absolute_paths()
    assert (data.tokenizer, data.storage_options) == (str(tmp_path / "bert"), str(tmp_path / "key.json"))
    assert data.cache_folder == str(tmp_path / "cache")
    assert DataConfig(tokenizer="words").with_absolute_paths() == DataConfig(tokenizer="words")  # which is no folder


def test_runs_in_stages_have_checkpoints_of_their_own_in_one_place():
    def places(name: str) -> list[str]:
        config = small_config(train={"checkpoint_storage": "s3://bucket/checkpoints/"}, name=name)
        stages = Stages((Stage("first", config), Stage("second", config)))
        return [CheckpointStore(run, LOCAL).url for run in stages.chained("small")]

    assert places("a") == ["s3://bucket/checkpoints/a/first", "s3://bucket/checkpoints/a/second"]
    assert places("b")[0] == "s3://bucket/checkpoints/b/first"


def test_an_exported_model_names_no_place_and_can_be_fine_tuned(tmp_path):
    """Neither where it started nor the pairs it learned of, without which no other objective would take its config."""
    pairs = (PairConfig("audio", "text"), PairConfig("audio", "partner"))
    before = small_config(model=replace(small_config().model, spectrogram=None), objective=ObjectiveConfig(pairs=pairs))
    config = replace(
        before,
        model=replace(before.model, start=str(tmp_path / "first")),
        data=replace(before.data, pairs=str(tmp_path / "pairs.parquet")),
    )
    save_model(tmp_path / "model", MultimodalModel(config).state_dict(), config)
    assert str(tmp_path) not in (tmp_path / "model" / "config.json").read_text()
    assert finetune(str(tmp_path / "model")).objective.name == "supervised"
