"""Towers of Hugging Face and of published systems: every parameter trained, rows apart, padding unseen, in every way
that training runs them."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import (
    BertConfig,
    BertModel,
    ClapConfig,
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    Wav2Vec2FeatureExtractor,
)

from muser_dist.config import RunConfig, TowerConfig
from muser_dist.errors import ConfigError
from muser_dist.models.huggingface import architecture
from muser_dist.models.model import MultimodalModel
from muser_dist.muser import Muser, save_model
from tests.distributed.engine_cells import config_for
from tests.distributed.loss_cells import errors
from tests.distributed.test_gradients import plain
from tests.models.test_frozen import with_towers
from tests.models.test_model import batch_of
from tests.models.test_recompute import recomputed

BODY = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
SPEECH = BODY | {"conv_dim": (8, 8), "conv_kernel": (10, 4), "conv_stride": (5, 4), "num_conv_pos_embeddings": 8}
SPEECH |= {"num_conv_pos_embedding_groups": 2, "num_feat_extract_layers": 2}
MELS = {"mels": 32, "window": 256, "hop": 80}
HTSAT = {
    "model_type": "clap_audio_model",
    "spec_size": 128,
    "window_size": 4,
    "patch_size": 4,
    "patch_embeds_hidden_size": 8,
    "hidden_size": 64,
    "depths": [1, 1, 1, 1],
    "num_attention_heads": [1, 2, 2, 2],
}

TOWERS: dict[str, tuple[str, str, dict]] = {
    "BERT": ("text", "hf_text", {"model": {"model_type": "bert"} | BODY}),
    "RoBERTa": ("text", "hf_text", {"model": {"model_type": "roberta"} | BODY, "pooling": "cls"}),
    "XLM-R": ("text", "hf_text", {"model": {"model_type": "xlm-roberta"} | BODY}),
    "MPNet": ("text", "hf_text", {"model": {"model_type": "mpnet"} | BODY}),
    "CLIP text": (
        "text",
        "hf_text",
        {"model": {"model_type": "clip_text_model"} | BODY, "pooling": "eos", "projection": 12},
    ),
    "wav2vec 2.0": ("audio", "hf_waveform", {"model": {"model_type": "wav2vec2"} | SPEECH}),
    "HuBERT": ("audio", "hf_waveform", {"model": {"model_type": "hubert", "feat_extract_norm": "layer"} | SPEECH}),
    "WavLM": ("audio", "hf_waveform", {"model": {"model_type": "wavlm"} | SPEECH}),
    "AST": ("spectrogram", "hf_spectrogram", {"model": {"model_type": "audio-spectrogram-transformer"} | BODY} | MELS),
    "HTS-AT": ("spectrogram", "hf_spectrogram", {"model": HTSAT} | MELS),
    "HTCL": (
        "spectrogram",
        "htcl_audio",
        {"width": 16, "depth": 2, "heads": 2, "channels": 8, "dropout": 0.3} | MELS,
    ),
    "CLIP ResNet": ("spectrogram", "spectrogram", {"model": "resnet10t", "outputs": 12} | MELS),
    "ESResNeXt": (
        "audio",
        "esresnext_fbsp",
        {"outputs": 8, "model": "resnet10t", "n_fft": 128, "hop": 50, "window": 100},
    ),
}


def config_with(name: str, **train: object) -> RunConfig:
    modality, build, options = TOWERS[name]
    return with_towers(
        config_for("InfoNCE, same text", 1, 2, **train), **{modality: {"build": build, "options": options}}
    )


@pytest.mark.parametrize("name", TOWERS)
def test_rows_are_apart_and_every_parameter_has_a_gradient(name):
    config, modality = config_with(name), TOWERS[name][0]
    model, batch = MultimodalModel(config), batch_of(config)
    batch["text_length"][2], batch["audio_length"][2] = 5, config.data.crop_samples // 2
    batch["audio"][2, config.data.crop_samples // 2 :] = 0
    model(batch, (0, 0))[modality].square().sum().backward()
    model.eval()
    unused = [n for n, p in model.towers[modality].named_parameters() if p.grad is None and p.requires_grad]
    assert not unused
    whole = model.encode(modality, batch)
    for row in range(4):
        alone = {name: x[row : row + 1] for name, x in batch.items()}
        torch.testing.assert_close(model.encode(modality, alone)[0], whole[row], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", [name for name, (modality, *_) in TOWERS.items() if modality == "text"])
def test_padding_of_texts_is_not_seen(name):
    config = config_with(name)
    model, batch = MultimodalModel(config).eval(), batch_of(config)
    batch["text_length"][:] = torch.tensor([5, 1, 12, 0])
    before = model.encode("text", batch)
    inside = torch.arange(batch["text_ids"].shape[1]) < batch["text_length"].clamp(min=1)[:, None]
    batch["text_ids"][~inside] = 7
    torch.testing.assert_close(model.encode("text", batch), before)


@pytest.mark.parametrize("name", ["BERT", "CLIP text", "HuBERT", "AST", "HTS-AT", "HTCL", "CLIP ResNet", "ESResNeXt"])
def test_gradients_cached_and_recomputed_are_those_of_one_encoding(name):
    (value, got), (exact, want) = plain(recomputed(config_with(name))), plain(config_with(name, cache_gradients=False))
    assert value == pytest.approx(exact, rel=1e-5)
    # Sums of chunks in another order; statistics of the few rows of a chunk enlarge rounding.
    worst = max(errors(got, {part: g.double() for part, g in want.items()}).items(), key=lambda item: item[1])
    assert worst[1] <= 1e-4, worst


def test_eos_pooling_and_projection_are_clips():
    sizes = BODY | {"vocab_size": 64, "max_position_embeddings": 12, "projection_dim": 12, "eos_token_id": 63}
    theirs = CLIPTextModelWithProjection(CLIPTextConfig(**sizes)).eval()
    config = config_with("CLIP text")
    options = {"model": {"model_type": "clip_text_model"} | sizes, "pooling": "eos", "projection": 12}
    config = with_towers(config, text={"options": options})
    tower = MultimodalModel(config).towers["text"].eval()
    state = {name.removeprefix("text_model."): value for name, value in theirs.text_model.state_dict().items()}
    tower.encoder.load_state_dict(state)
    tower.projection.weight.data.copy_(theirs.text_projection.weight)
    ids = torch.randint(2, 60, (3, 12), generator=torch.Generator().manual_seed(0))
    lengths = torch.tensor([12, 4, 7])
    ids[torch.arange(3), lengths - 1] = 63
    torch.testing.assert_close(
        tower({"text_ids": ids, "text_length": lengths}), theirs(ids).text_embeds, rtol=1e-4, atol=1e-5
    )


def test_padding_of_sound_is_not_heard():
    """A short clip is what it is without padding, where no norm is over time."""
    config = config_with("HuBERT")
    tower, batch = MultimodalModel(config).eval().towers["audio"], batch_of(config)
    lengths = batch["audio_length"][:] = torch.tensor([2999, 1, 1600, config.data.crop_samples], dtype=torch.int32)
    batch["audio"] += 3000  # no mean of 0
    padded = tower(batch)
    for row, length in enumerate(lengths.tolist()):
        short = max(length, 400)  # for which the network has a frame
        alone = {"audio": batch["audio"][row : row + 1, :short], "audio_length": lengths[row : row + 1]}
        torch.testing.assert_close(tower(alone)[0], padded[row], rtol=1e-4, atol=1e-5)


def test_sound_is_normalised_as_by_their_feature_extractor():
    config = config_with("wav2vec 2.0")
    tower, batch = MultimodalModel(config).eval().towers["audio"], batch_of(config)
    batch["audio"] += 3000
    lengths = batch["audio_length"][:] = torch.tensor([2999, 800, 1600, config.data.crop_samples], dtype=torch.int32)
    given = []
    tower.encoder.register_forward_pre_hook(lambda _, arguments: given.append(arguments[0]))
    tower(batch)
    clips = [clip[:length].double().numpy() for clip, length in zip(batch["audio"], lengths.tolist(), strict=True)]
    want = Wav2Vec2FeatureExtractor(return_attention_mask=True)(clips, padding=True, sampling_rate=16_000)
    got = given[0].numpy()
    for mine, theirs in zip(got, want["input_values"], strict=True):
        np.testing.assert_allclose(mine[: len(theirs)], theirs, atol=1e-3)
        assert not mine[len(theirs) :].any()


@pytest.mark.parametrize("kind", ["wav2vec 2.0", "HuBERT", "WavLM"])
def test_the_mean_over_layers_is_of_all_of_them(kind):
    config = config_with(kind)
    every = with_towers(config, audio={"options": config.model.audio.options | {"layers": "mean"}})
    model, batch = MultimodalModel(every).eval(), batch_of(every)
    encoder, tower = model.towers["audio"].encoder, model.towers["audio"]
    states = []
    for layer in (encoder.encoder.layers[0], encoder.encoder.layers[-1]):
        layer.register_forward_hook(
            lambda _layer, given, made: states.append((given[0], made if isinstance(made, torch.Tensor) else made[0]))
        )
    got = tower(batch)
    (first, middle), (_, last) = states
    mean = torch.stack([first, middle, last]).mean(dim=0)  # the input and the output of each of two layers
    torch.testing.assert_close(got, mean.mean(dim=1), rtol=1e-4, atol=1e-5)
    assert (got - last.mean(dim=1)).abs().max() > 1e-3
    with pytest.raises(ConfigError, match=r'layers is .all.; give "last" or "mean"'):
        MultimodalModel(with_towers(config, audio={"options": config.model.audio.options | {"layers": "all"}}))


def test_an_exported_model_needs_no_folder_of_hugging_face(tmp_path):
    BertModel(BertConfig(vocab_size=64, max_position_embeddings=40, **BODY)).save_pretrained(tmp_path / "bert")
    config = with_towers(
        config_with("BERT"),
        text={"options": {"model": str(tmp_path / "bert")}, "weights": str(tmp_path / "bert")},
    )
    model = MultimodalModel(config)
    save_model(tmp_path / "model", model.state_dict(), config)
    (tmp_path / "bert").rename(tmp_path / "gone")
    assert str(tmp_path) not in (tmp_path / "model" / "config.json").read_text()
    exported = json.loads((tmp_path / "model" / "config.json").read_text())["config"]["model"]["text"]["options"]
    assert exported["model"]["max_position_embeddings"] == 40
    batch = batch_of(config)
    loaded = Muser.from_pretrained(tmp_path / "model").model
    torch.testing.assert_close(loaded.encode("text", batch), model.eval().encode("text", batch))


def test_of_a_config_of_several_networks_the_modalitys_is_taken(tmp_path):
    ClapConfig(text_config=BODY, audio_config=HTSAT).save_pretrained(tmp_path)
    assert architecture(str(tmp_path), "text", {}).hidden_size == 16
    assert architecture(str(tmp_path), "spectrogram", {}).patch_embeds_hidden_size == 8


def test_code_that_comes_with_a_checkpoint_is_not_run(tmp_path):
    config = {"model_type": "mert_model", "auto_map": {"AutoConfig": "code.Config"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "code.py").write_text("raise SystemExit('it was run')")
    with pytest.raises(ConfigError, match=r"model\.audio\.options\.model: .*custom code"):
        architecture(str(tmp_path), "audio", {})


@pytest.mark.parametrize(
    ("modality", "build", "options", "message"),
    [
        ("text", "hf_text", {"model": {"hidden_size": 3}}, r"model\.text\.options\.model: .*\"model_type\""),
        ("text", "hf_text", {"model": {"model_type": "brt"}}, r"model\.text\.options\.model: .*brt"),
        ("text", "hf_text", {"model": "/not/there"}, r"model\.text\.options\.model: '/not/there'"),
        ("text", "hf_text", {"model": {"model_type": "bert"} | BODY, "pooling": "max"}, "mean, cls or eos"),
        ("text", "hf_text", {"model": {"model_type": "bert", "vocab_size": 9} | BODY}, r"data\.tokenizer: .*64 tokens"),
        ("audio", "hf_waveform", {"model": {"model_type": "bert"} | BODY}, "does not hear waveforms"),
        ("spectrogram", "hf_spectrogram", {"model": {"model_type": "vit"} | BODY}, "no 'vit' here"),
        ("spectrogram", "hf_spectrogram", {"model": HTSAT, "kind": "cropped_linear"}, "take log_mel"),
    ],
)
def test_what_cannot_be_built_says_why(modality, build, options, message):
    config = with_towers(config_for("sigmoid", 1, 2), **{modality: {"build": build, "options": options}})
    with pytest.raises(ConfigError, match=message):
        MultimodalModel(config)


def test_a_tower_without_a_head_has_the_joint_space_as_its_output():
    config = with_towers(config_for("sigmoid", 1, 2), text={"head": False})
    with pytest.raises(ConfigError, match=r"model\.text: without a head the tower's 16 outputs .*\(8\)"):
        MultimodalModel(config)
    options = {"model": {"model_type": "bert"} | BODY, "projection": 8}
    model = MultimodalModel(with_towers(config, text={"build": "hf_text", "options": options})).eval()
    batch = batch_of(config)
    assert torch.equal(model.encode("text", batch), model.towers["text"](batch))
    assert replace(config.model.text, build="hf_text") == TowerConfig("hf_text", config.model.text.options, head=False)
