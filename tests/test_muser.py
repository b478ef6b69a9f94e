"""The library in use: loading an exported model, encoding, and what goes wrong there."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from muser_dist import Muser
from muser_dist.errors import CheckpointError, ConfigError, DataError
from muser_dist.evaluate.evaluator import evaluate
from muser_dist.evaluate.fields import same_spelling
from muser_dist.evaluate.summary import describe
from muser_dist.evaluate.zero_shot import prompts_for
from muser_dist.models.model import MultimodalModel
from muser_dist.muser import save_model
from tests.shardmaker import INSTRUMENTS, encode, tone, write_shards
from tests.small import LOCAL, index_of, small_config


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    config = small_config(data={"train": ("s3://secret/train.tar",)})
    save_model(folder, MultimodalModel(config).state_dict(), config)
    return folder


@pytest.fixture(scope="module")
def muser(folder):
    return Muser.from_pretrained(folder)


def test_a_saved_model_comes_back(folder, muser):
    want = MultimodalModel(small_config()).state_dict()
    for name, value in muser.model.state_dict().items():
        torch.testing.assert_close(value, want[name], rtol=0, atol=0)
    assert "secret" not in (folder / "config.json").read_text()


def test_paths_bytes_and_arrays_are_heard_alike(muser, tmp_path):
    waveform = tone(5, seconds=0.5, rate=8000)
    data = encode(waveform, 8000)
    (tmp_path / "a.flac").write_bytes(data)
    by_kind = muser.encode_audio([tmp_path / "a.flac", str(tmp_path / "a.flac"), data, waveform])
    assert by_kind.shape == (4, muser.dim)
    np.testing.assert_allclose(np.linalg.norm(by_kind, axis=1), 1, rtol=1e-5)
    np.testing.assert_allclose(by_kind[1:], by_kind[:1].repeat(3, axis=0), atol=1e-3)
    assert muser.encode_spectrogram([data]).shape == (1, muser.dim)


def test_arrays_at_another_rate_and_in_stereo(muser):
    fast = tone(5, seconds=0.5, rate=44_100)
    one, two = muser.encode_audio([fast, np.stack([fast, fast], axis=1)], sample_rate=44_100)
    np.testing.assert_allclose(one, two, atol=1e-4)
    assert one @ muser.encode_audio([tone(5, seconds=0.5, rate=8000)])[0] > 0.9


def test_the_middle_of_a_long_clip_is_heard(muser):
    long = np.concatenate([np.zeros(8000, np.float32), tone(3, 0.5, 8000), np.zeros(8000, np.float32)])
    np.testing.assert_allclose(muser.encode_audio([long]), muser.encode_audio([tone(3, 0.5, 8000)]), atol=1e-5)


def test_batches_do_not_change_embeddings_and_nothing_gives_nothing(muser):
    sentences = [f"a piece for {name}" for name in INSTRUMENTS]
    together = muser.encode_text(sentences)
    np.testing.assert_allclose(together[2:3], muser.encode_text(sentences[2:3]), atol=1e-5)
    assert muser.encode_text([]).shape == muser.encode_audio([]).shape == (0, muser.dim)


def test_wrong_clips_say_which_and_why(muser, tmp_path):
    with pytest.raises(DataError, match=r"absent\.mp3: there is no such file"):
        muser.encode_audio([tmp_path / "absent.mp3"])
    for windows in ("all", "middle"):
        with pytest.raises(DataError, match=f"{tmp_path}: cannot be read: Is a directory"):
            muser.encode_audio([tmp_path], windows=windows)
    (tmp_path / "broken.mp3").write_bytes(b"nothing to hear")
    with pytest.raises(DataError, match=r"broken\.mp3: cannot be decoded"):
        muser.encode_audio([tmp_path / "broken.mp3"])
    with pytest.raises(DataError, match="a clip given as ndarray: silent"):
        muser.encode_audio([np.zeros(8000, np.float32)])
    with pytest.raises(TypeError, match=r"wrap the one you have in \[ \]"):
        muser.encode_audio("a.mp3")
    with pytest.raises(TypeError, match=r"wrap the one you have in \[ \]"):
        muser.encode_text("a waltz")


def test_a_modality_that_the_model_lacks(muser):
    with pytest.raises(ConfigError, match="no symbolic tower; it has audio, spectrogram, text"):
        muser._forward("symbolic", {})


def test_folders_that_hold_no_model_say_so(folder, tmp_path):
    with pytest.raises(CheckpointError, match=r"no model\.safetensors"):
        Muser.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:100])
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        Muser.from_pretrained(tmp_path)
    content = json.loads((folder / "config.json").read_text())
    for change, message in (
        ("{", "cannot be loaded"),
        ("[]", "not an exported model of format 3"),
        (json.dumps({**content, "format": 9}), "not an exported model of format 3"),
        (json.dumps({**content, "config": {"model": 3}}), r"config\.json: model"),
        (json.dumps(content), "cannot be loaded"),  # the weights are cut short
    ):
        (tmp_path / "config.json").write_text(change)
        with pytest.raises((CheckpointError, ConfigError), match=message):
            Muser.from_pretrained(tmp_path)


def test_labels_that_differ_in_letter_case_are_one_class():
    labels = ["Rock", "rock", "Rock", None, "folk", "FOLK"]
    assert same_spelling(labels) == ["Rock", "Rock", "Rock", None, "FOLK", "FOLK"]


def test_a_tokenizer_with_files_travels_with_the_model(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.WordLevel({"[UNK]": 0, "slow": 1, "waltz": 2, "[EOS]": 3}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    own = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="[UNK]", eos_token="[EOS]")  # no padding token
    own.save_pretrained(tmp_path / "mine")
    config = small_config(data={"tokenizer": str(tmp_path / "mine")})
    before = MultimodalModel(config)
    save_model(tmp_path / "model", before.state_dict(), config)
    shutil.rmtree(tmp_path / "mine")
    assert Muser.from_pretrained(tmp_path / "model").encode_text(["slow waltz"]).shape == (1, 8)


def test_prompts_are_what_templates_say_of_one_field_alone():
    templates = ("A piece for {instrument}, in a {mode} key", "{caption}", "{instrument} and {mode}")
    assert prompts_for(templates, "instrument", "flute") == ["A piece for flute"]
    assert prompts_for(templates, "mode", "minor") == ["in a minor key"]
    assert prompts_for(templates, "tempo", "slow") == []


def test_evaluation_never_trains(muser, tmp_path):
    index = index_of(write_shards(tmp_path, [10, 5]))
    first, second = (evaluate(muser, small_config(), index, LOCAL) for _ in range(2))
    assert first == second
    assert first["rows"] == 15
    assert first["rows_without"] == {"audio": 0, "spectrogram": 0, "text": 0}
    assert first["skipped_fields"] == {"absent": "0 different values in the data"}
    assert first["zero_shot"]["instrument"]["audio"]["rows"] == 15
    assert "text->audio" in describe(first)


def test_evaluation_of_rows_that_cannot_be_used(muser, tmp_path):
    index = index_of(write_shards(tmp_path, [3]))
    config = small_config(data={"templates": ("{composer}",)})
    with pytest.raises(DataError, match=r"none of 3 rows can be used; the first says: no text"):
        evaluate(muser, config, index, LOCAL)


def test_a_whole_song_is_the_mean_of_its_windows(muser):
    song = np.concatenate([tone(i, 0.5, 8000) for i in range(5)] + [tone(9, 0.2, 8000)])
    windows = [song[i : i + 4000] for i in range(0, 20_000, 4000)] + [song[-4000:]]
    for hop, expected in ((None, windows), (1.0, [*windows[::2], windows[-1]])):
        mean = muser.encode_audio(expected).mean(axis=0)
        np.testing.assert_allclose(
            muser.encode_audio([song], hop_seconds=hop)[0], mean / np.linalg.norm(mean), atol=1e-5
        )
    middle = muser.encode_audio([song], windows="middle")
    np.testing.assert_allclose(middle, muser.encode_audio([song[8800:12_800]]), atol=1e-5)
    together = muser.encode_audio([windows[0], song, encode(song, 8000), windows[1]])
    for one, alone in zip(together, [windows[0], song, song, windows[1]], strict=True):
        np.testing.assert_allclose(one, muser.encode_audio([alone])[0], atol=1e-3)
    with pytest.raises(ConfigError, match="windows must move on"):
        muser.encode_audio([song], hop_seconds=0.0)


def test_a_model_is_its_weights_and_what_computes_with_them(folder, muser, tmp_path):
    shutil.copytree(folder, tmp_path / "elsewhere")
    assert Muser.from_pretrained(tmp_path / "elsewhere").sha256 == muser.sha256
    config = muser.config
    for changes in (
        {"objective": replace(config.objective, normalise=False)},
        {"model": replace(config.model, projection_activation="relu")},
        {"data": replace(config.data, crop_seconds=0.4)},
    ):
        assert Muser(muser.model, replace(config, **changes)).sha256 != muser.sha256
    trained_elsewhere = replace(config, data=replace(config.data, decode_slots=9), storage="runs")
    assert Muser(muser.model, trained_elsewhere).sha256 == muser.sha256
    other = Muser(MultimodalModel(small_config(seed=1)), config)
    assert other.sha256 != muser.sha256
