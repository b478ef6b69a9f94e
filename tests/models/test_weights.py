"""Weights to start from: published names against their own implementations, and what becomes of every key."""

import json

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import ClapAudioConfig, ClapAudioModel, HubertConfig, HubertModel

from muser_dist.config import RunConfig
from muser_dist.errors import ConfigError
from muser_dist.models.model import MultimodalModel
from muser_dist.models.weights import as_json, load_weights, match_weights, report_weights
from muser_dist.muser import save_model
from tests.distributed.engine_cells import config_for
from tests.models.test_frozen import with_towers
from tests.models.test_huggingface import BODY, HTSAT, SPEECH, config_with
from tests.models.test_model import batch_of


def started(config: RunConfig) -> tuple[MultimodalModel, dict]:
    """A model in evaluation mode that started from its weights, and its reports by modality."""
    model = MultimodalModel(config)
    matches = load_weights(model, config)
    assert [str(match) for match in report_weights(config)] == [str(match) for match in matches]
    return model.eval(), {match.modality: match for match in matches}


def test_clips_weights_give_clips_embeddings(tmp_path):
    open_clip = pytest.importorskip("open_clip")
    text = {"context_length": 12, "vocab_size": 64, "width": 16, "heads": 2, "layers": 2}
    vision = {"layers": [3, 4, 6, 3], "width": 64, "image_size": 224, "patch_size": None}
    theirs = open_clip.model.CLIP(1024, vision_cfg=vision, text_cfg=text, quick_gelu=True).eval()
    for module in theirs.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.1, 0.1)
            nn.init.uniform_(module.weight, 0.5, 1.0)
    torch.save(theirs.state_dict(), tmp_path / "clip.pt")

    sizes = BODY | {"intermediate_size": 64, "max_position_embeddings": 12, "hidden_act": "quick_gelu"}
    network = {"model_type": "clip_text_model", "vocab_size": 64} | sizes
    weights = str(tmp_path / "clip.pt")
    config = with_towers(
        config_for("sigmoid", 1, 2),
        spectrogram={
            "options": {"model": "resnet50_clip", "kind": "cropped_linear", "outputs": 1024},
            "weights": weights,
        },
        text={
            "build": "hf_text",
            "options": {"model": network, "pooling": "eos", "projection": 1024},
            "weights": weights,
        },
    )
    model, matches = started(config)
    for match in matches.values():
        assert not match.missing and not match.other_shape
        assert match.naming.startswith("CLIP's names")
    image = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    ids = torch.randint(2, 60, (3, 12), generator=torch.Generator().manual_seed(0))
    ids[:, -1] = 63  # the highest id is the last token
    with torch.inference_mode():
        expected = theirs.encode_image(image)
        got = model.towers["spectrogram"].encoder(image)
        assert (got - expected).norm() < 1e-4 * expected.norm()
        got = model.towers["text"]({"text_ids": ids, "text_length": torch.full((3,), 12)})
        torch.testing.assert_close(got, theirs.encode_text(ids), rtol=1e-4, atol=1e-5)


def test_audioclips_names(tmp_path):
    config = config_with("ESResNeXt")
    torch.manual_seed(1)
    source = MultimodalModel(config_with("ESResNeXt")).towers["audio"]
    file = {}
    for name, value in source.state_dict().items():
        published = name.removeprefix("encoder.")
        if name.startswith("attention."):
            published = f"att{int(name.split('.')[1]) + 1}.{name.split('.', 2)[2]}"
        file[f"audio.{published}"] = value + 1.0
    file |= {
        "audio.window": torch.ones(100),
        "visual.conv1.weight": torch.ones(64, 3, 7, 7),
        "logit_scale": torch.ones(1),
    }
    save_file(file, tmp_path / "audioclip.safetensors")
    model, matches = started(with_towers(config, audio={"weights": str(tmp_path / "audioclip.safetensors")}))
    match = matches["audio"]
    assert not match.missing and set(match.left_over) == {"audio.window", "visual.conv1.weight", "logit_scale"}
    assert match.matched["attention.2.conv_point.bias"] == "audio.att3.conv_point.bias"
    for name, value in model.towers["audio"].state_dict().items():
        torch.testing.assert_close(value, source.state_dict()[name] + 1.0)


def test_musers_own_image_network_is_taken_before_clips(tmp_path):
    options = {"options": {"model": "resnet10t", "outputs": 12, "mels": 32, "window": 256, "hop": 80}}
    config = with_towers(config_for("sigmoid", 1, 2), spectrogram=options)
    tower = MultimodalModel(config).towers["spectrogram"]
    state = {n.removeprefix("encoder."): v for n, v in tower.state_dict().items() if n.startswith("encoder.")}
    save_file(
        {f"{part}.{n}": v.clone() for part in ("spec", "visual") for n, v in state.items()}, tmp_path / "m.safetensors"
    )
    match, _ = match_weights("spectrogram", tower, str(tmp_path / "m.safetensors"))
    assert all(name.startswith("spec.") for name in match.matched.values())


def test_timms_names(tmp_path):
    sizes = {"depths": [1, 1, 1, 1], "dims": [8, 8, 8, 16]}
    theirs = timm.create_model("convnext_atto", in_chans=1, **sizes)
    save_file(theirs.state_dict(), tmp_path / "convnext.safetensors")
    options = sizes | {"mels": 32, "window": 256, "hop": 80}
    config = config_for("sigmoid", 1, 2)
    tower = {"options": options, "weights": str(tmp_path / "convnext.safetensors")}
    model, matches = started(with_towers(config, spectrogram=tower))
    match = matches["spectrogram"]
    assert match.missing == ["norm.weight", "norm.bias"]  # ours, after the pooling
    assert all(name.startswith("head.") for name in match.left_over)
    mine = model.towers["spectrogram"].encoder.state_dict()
    torch.testing.assert_close(mine["stages_3.blocks.0.norm.weight"], theirs.stages[3].blocks[0].norm.weight.data)


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("HuBERT", lambda: HubertModel(HubertConfig(feat_extract_norm="layer", mask_time_prob=0.0, **SPEECH))),
        ("HTS-AT", lambda: ClapAudioModel(ClapAudioConfig(num_mel_bins=32, **{**HTSAT, "model_type": None}))),
    ],
)
def test_folders_of_hugging_face(tmp_path, name, make):
    theirs = make().eval()
    theirs.save_pretrained(tmp_path)
    config = config_with(name)
    modality = "audio" if name == "HuBERT" else "spectrogram"
    model, matches = started(with_towers(config, **{modality: {"weights": str(tmp_path)}}))
    match = matches[modality]
    assert not match.missing and not match.left_over, str(match)
    mine = model.towers[modality].encoder.state_dict()
    for key, value in theirs.state_dict().items():
        assert key in mine or "num_batches_tracked" in key or "position_ids" in key
        if key in mine:
            torch.testing.assert_close(mine[key], value)


def test_names_of_weight_norms_before_torch_2(tmp_path):
    tower = MultimodalModel(config_with("HuBERT")).towers["audio"]
    rename = {"parametrizations.weight.original0": "weight_g", "parametrizations.weight.original1": "weight_v"}
    file = {}
    for name, value in tower.state_dict().items():
        for new, old in rename.items():
            name = name.replace(new, old)
        file[name.replace("encoder.", "hubert.", 1)] = value.clone()
    assert any(name.endswith("weight_g") for name in file)
    torch.save({"model": file, "epoch": 3}, tmp_path / "hubert.pt")
    match, _ = match_weights("audio", tower, str(tmp_path / "hubert.pt"))
    assert not match.missing and not match.left_over and "hubert." in match.naming


def test_a_run_of_ones_own_gives_the_tower_of_the_same_modality(tmp_path):
    source = config_for("sigmoid", 1, 2)
    torch.manual_seed(3)
    weights = {name: value + 1.0 for name, value in MultimodalModel(source).state_dict().items()}
    save_model(tmp_path / "run" / "model", weights, source)
    model, matches = started(with_towers(source, text={"weights": str(tmp_path / "run")}))
    for name, value in model.state_dict().items():
        changed = torch.equal(value, weights[name])
        assert changed == name.startswith("towers.text."), name
    match = matches["text"]
    assert not match.missing and not match.left_over
    keys = f"{len(match.matched)} of {len(match.matched)} keys"
    assert str(match).startswith(f"Weights of model.text: {keys} from {tmp_path / 'run'} (its own names")
    listed = json.loads(as_json([match]))["text"]
    assert listed["matched"]["encoder.embeddings.LayerNorm.bias"] == "towers.text.encoder.embeddings.LayerNorm.bias"
    alone = {**weights}
    save_file(
        {n: v for n, v in alone.items() if "towers.text" not in n}, tmp_path / "run" / "model" / "model.safetensors"
    )
    with pytest.raises(ConfigError, match=r"no key of .* fits the tower: the file has none"):
        report_weights(with_towers(source, text={"weights": str(tmp_path / "run")}))


def test_of_another_shape_only_ones_own_head_may_be(tmp_path):
    config = config_with("CLIP text")
    tower = MultimodalModel(config).towers["text"]
    state = dict(tower.state_dict())
    state["projection.weight"] = torch.ones(5, 16)
    del state["encoder.final_layer_norm.bias"]
    torch.save({"state_dict": state}, tmp_path / "w.pt")
    model, matches = started(with_towers(config, text={"weights": str(tmp_path / "w.pt")}))
    assert matches["text"].other_shape == ["projection.weight"]
    assert matches["text"].missing == ["encoder.final_layer_norm.bias"]
    assert "1 missing, 1 of another shape, 0 left over" in str(matches["text"])
    assert torch.isfinite(model.encode("text", batch_of(config))).all()
    name = "encoder.embeddings.position_embedding.weight"
    torch.save(state | {name: torch.ones(9, 16)}, tmp_path / "w.pt")
    with pytest.raises(ConfigError, match=rf"{name} of .* is \(9, 16\), where the tower has \(77, 16\)"):
        report_weights(with_towers(config, text={"weights": str(tmp_path / "w.pt")}))


class Harmful:
    def __reduce__(self):
        return print, ("unpickled",)


def test_files_that_cannot_be_used_say_why(tmp_path, capsys):
    config = config_with("BERT")

    def message(source: object) -> str:
        with pytest.raises(ConfigError, match=r"^model\.text\.weights: ") as raised:
            report_weights(with_towers(config, text={"weights": str(source)}))
        return str(raised.value)

    torch.save({"state_dict": {"a": torch.ones(1)}, "other": Harmful()}, tmp_path / "object.pt")
    assert "only tensors are read" in message(tmp_path / "object.pt")
    assert "unpickled" not in capsys.readouterr().out
    torch.jit.script(nn.Linear(2, 2)).save(str(tmp_path / "script.pt"))
    assert "torch.jit.load(FILE).state_dict()" in message(tmp_path / "script.pt")
    (tmp_path / "cut.safetensors").write_bytes(b"\x00" * 20)
    assert "cannot be read" in message(tmp_path / "cut.safetensors")
    (tmp_path / "empty").mkdir()
    assert "holds neither" in message(tmp_path / "empty")
    assert "is no file, no folder, and no name on the Hugging Face hub" in message(tmp_path / "absent.pt")
    save_file({"other.weight": torch.ones(3)}, tmp_path / "other.safetensors")
    assert "the file has other.weight, the tower encoder.embeddings" in message(tmp_path / "other.safetensors")
