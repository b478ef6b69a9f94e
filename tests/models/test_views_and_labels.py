"""A second view goes through the audio tower and its head; heads for fields read a tower's output; towers start from
another model's weights."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from muser_dist import Muser
from muser_dist.config import ModelConfig, ObjectiveConfig, PairConfig, RunConfig, to_dict
from muser_dist.errors import ConfigError
from muser_dist.evaluate.evaluator import evaluate
from muser_dist.evaluate.summary import describe
from muser_dist.evaluate.validation import validate
from muser_dist.models.model import MultimodalModel
from muser_dist.models.weights import load_weights
from muser_dist.muser import save_model
from muser_dist.recipes import load_recipe
from muser_dist.recipes.finetune import TOWER_LR, finetune
from muser_dist.train.preflight import check_settings, load_label_values
from tests.models.test_model import batch_of
from tests.shardmaker import tone, write_shards
from tests.small import LOCAL, index_of, small_config

VALUES = {"instrument": ("bell", "fiddle", "flute", "horn"), "mode": ("major", "minor")}


def views_config(**tower) -> RunConfig:
    config = small_config()
    pairs = (*config.objective.pairs, PairConfig("audio", "view"))
    model = replace(config.model, audio=replace(config.model.audio, **tower))
    return replace(config, model=model, objective=replace(config.objective, pairs=pairs))


def labelled_config(tower: str = "audio", **data) -> RunConfig:
    config = small_config()
    fields = {"classes": ("instrument",), "tags": ("mode",), "label_values": VALUES}
    return replace(
        config,
        data=replace(config.data, **(fields | data)),
        model=ModelConfig(**{tower: config.model.towers()[tower]}),
        objective=ObjectiveConfig("supervised", pairs=()),
    )


def with_view(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    view = batch["audio"].flip(1)
    length = batch["audio_length"].clone()
    length[1] = length[1] // 2
    return batch | {"view": view, "view_length": length}


@pytest.mark.parametrize("freeze", [False, True])
def test_both_views_go_through_the_same_tower_and_head(freeze):
    config = views_config(freeze=freeze)
    model = MultimodalModel(config)
    assert {name.split(".")[1] for name, _ in model.named_parameters() if name.startswith("towers.")} == set(
        config.model.towers()
    )
    batch = with_view(batch_of(config))
    out = model(batch, (0, 0))
    alone = {"audio": batch["view"], "audio_length": batch["view_length"]}
    torch.testing.assert_close(out["view"], model.encode("audio", alone), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(out["audio"], model.encode("audio", batch), rtol=1e-4, atol=1e-6)
    assert out["scale"].shape == (3,)


@pytest.mark.parametrize("tower", ["audio", "spectrogram", "text"])
def test_every_parameter_of_a_labelled_tower_gets_a_gradient(tower):
    config = labelled_config(tower)
    model = MultimodalModel(config)
    out = model(batch_of(config), (0, 0))
    assert out["label/instrument"].shape == (4, 4) and out["label/mode"].shape == (4, 2)
    assert out[tower].shape == (4, model.dim) == (4, model.towers[tower].width)
    sum(out[name].square().sum() for name in ("label/instrument", "label/mode")).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_probabilities_of_classes_sum_to_one_and_of_tags_do_not():
    config = labelled_config()
    model, batch = MultimodalModel(config).eval(), batch_of(config)
    out = model(batch)
    probabilities = model.label_probabilities(model.encode_with_features("audio", batch)[1])
    torch.testing.assert_close(probabilities["instrument"], out["label/instrument"].softmax(dim=1))
    torch.testing.assert_close(probabilities["mode"], out["label/mode"].sigmoid())


def test_an_exported_classifier_names_its_values(tmp_path):
    config = labelled_config()
    save_model(tmp_path, MultimodalModel(config).state_dict(), config)
    muser = Muser.from_pretrained(tmp_path)
    assert muser.label_values == VALUES
    clips = [tone(i, 0.5, 8000) for i in range(3)]
    together, alone = muser.classify(clips), muser.classify(clips[1:2])
    assert together["instrument"].shape == (3, 4) and together["mode"].shape == (3, 2)
    np.testing.assert_allclose(together["instrument"].sum(axis=1), 1, rtol=1e-5)
    np.testing.assert_allclose(together["mode"][1:2], alone["mode"], atol=1e-5)
    assert {name: p.shape for name, p in muser.classify([]).items()} == {"instrument": (0, 4), "mode": (0, 2)}
    assert muser.encode_audio(clips).shape == (3, muser.dim)
    with pytest.raises(TypeError, match=r"wrap the one you have in \[ \]"):
        muser.classify(clips[0])
    with pytest.raises(ConfigError, match="tells no labels apart"):
        Muser(MultimodalModel(small_config()), small_config()).classify(clips)


def test_models_without_text_are_scored_by_what_they_have(tmp_path):
    index = index_of(write_shards(tmp_path, [10, 5]))
    config = labelled_config()
    save_model(tmp_path / "model", MultimodalModel(config).state_dict(), config)
    scores = evaluate(Muser.from_pretrained(tmp_path), config, index, LOCAL)
    assert (scores["rows"], scores["retrieval"], scores["zero_shot"]) == (15, {}, {})
    heads = {field: by_modality["audio"]["head"] for field, by_modality in scores["probes"].items()}
    assert heads["instrument"]["rows"] == 15 and heads["instrument"]["counts"] == [3, 4, 4, 4]
    assert 0 <= heads["mode"]["roc_auc"] <= 1
    assert {"instrument", "head", "mode"} <= set(describe(scores).split())
    while_training = validate(tmp_path, config, index, LOCAL)
    assert while_training["val_accuracy/instrument by audio"] == heads["instrument"]["accuracy"]
    assert while_training["val_pr_auc/mode by audio"] == heads["mode"]["pr_auc"]
    config = small_config()
    config = replace(
        config,
        model=ModelConfig(audio=config.model.audio),
        objective=ObjectiveConfig(pairs=(PairConfig("audio", "view"),)),
    )
    scores = evaluate(Muser(MultimodalModel(config), config), config, index, LOCAL)
    assert "probes" not in scores and not scores["retrieval"]


def test_a_tower_starts_from_another_models_weights(tmp_path):
    pretrained = replace(small_config(), seed=7)
    weights = MultimodalModel(pretrained).state_dict()
    save_model(tmp_path / "run" / "model", weights, pretrained)
    config = finetune(str(tmp_path / "run"))
    assert tuple(config.model.towers()) == ("audio",) and config.model.audio.lr == TOWER_LR
    config = replace(
        config, data=replace(config.data, classes=("instrument",), label_values={"instrument": ("a", "b")})
    )
    model = MultimodalModel(config)
    (match,) = load_weights(model, config)
    assert not match.missing and not match.other_shape
    for name, value in model.towers["audio"].state_dict().items():
        assert torch.equal(value, weights[f"towers.audio.{name}"])
    save_model(tmp_path / "tuned", model.state_dict(), config)
    assert str(tmp_path) not in (tmp_path / "tuned" / "config.json").read_text()
    spectrogram = finetune(str(tmp_path / "run" / "model"), "spectrogram")
    assert tuple(spectrogram.model.towers()) == ("spectrogram",)
    with pytest.raises(ConfigError, match=r"--tower text: .* has audio"):
        finetune(str(tmp_path / "tuned"), "text")


def test_from_scratch_a_recipe_gives_its_tower():
    config = finetune("tiny")
    assert config.model.audio == load_recipe("tiny").model.audio
    assert finetune("muser_audio_only") == load_recipe("muser_audio_only")


@pytest.mark.parametrize("name", ["clmr", "muser_audio_only"])
def test_recipes_without_texts_can_be_tried(name):
    config = load_recipe(name)
    config = replace(config, data=replace(config.data, train=("train.tar",), val=("val.tar",)))
    assert 100_000 < check_settings(config)[0] < 10_000_000
    assert to_dict(config)["model"]


def test_values_of_fields_stay_those_that_a_run_began_with(tmp_path, capsys):
    shards = [index_of(write_shards(tmp_path / f"{rows}", [rows])) for rows in (8, 2)]
    config = replace(labelled_config(label_values={}), storage=str(tmp_path), name="run")
    config.folder.mkdir()
    found = load_label_values(config, shards[:1], LOCAL)
    assert found.data.label_values == VALUES and json.loads((config.folder / "labels.json").read_text()) == {
        name: list(values) for name, values in VALUES.items()
    }
    assert "instrument: 4 values; mode: 2 values" in capsys.readouterr().out
    # Before there is a checkpoint or a model, what was wrong with the data can still be mended.
    assert load_label_values(config, shards[1:], LOCAL).data.label_values["mode"] == ("major",)
    load_label_values(config, shards[:1], LOCAL)
    save_model(config.folder / "model", {}, config)
    assert load_label_values(config, shards[1:], LOCAL) == found
    assert load_label_values(small_config(), shards, LOCAL) == small_config()


def test_what_cannot_be_learned_together_is_refused():
    config = small_config()
    with pytest.raises(ConfigError, match=r"contrasts audio with view, but model\.audio is None"):
        replace(
            config,
            model=ModelConfig(text=config.model.text),
            objective=ObjectiveConfig(pairs=(PairConfig("audio", "view"),)),
        )
    with pytest.raises(ConfigError, match="sigmoid loss does not contrast audio with its view"):
        ObjectiveConfig("sigmoid", pairs=(PairConfig("audio", "view"),), bias=-10.0)
    with pytest.raises(ConfigError, match="contrasts nothing"):
        ObjectiveConfig("supervised")
    with pytest.raises(ConfigError, match="trains one tower, and the model has audio, spectrogram, text"):
        replace(config, objective=ObjectiveConfig("supervised", pairs=()))
    with pytest.raises(ConfigError, match='learned by the objective "supervised"'):
        small_config(data={"classes": ("genre",)})
    with pytest.raises(ConfigError, match="name a field twice"):
        labelled_config(classes=("mode",))
    with pytest.raises(ConfigError, match="nothing to learn"):
        check_settings(replace(labelled_config(classes=(), tags=(), label_values={})))
