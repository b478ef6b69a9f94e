"""One evaluator for a model of ours and for models of others, from shards to scores."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from muser_dist.config import EvaluateConfig
from muser_dist.errors import CheckpointError, ConfigError, DataError
from muser_dist.evaluate.comparison import PerRow
from muser_dist.evaluate.embedding import embed
from muser_dist.evaluate.evaluator import Probing, evaluate, score
from muser_dist.evaluate.external import External, load_model
from muser_dist.evaluate.fields import TAGS, read_labels
from muser_dist.evaluate.summary import describe
from muser_dist.models.model import MultimodalModel
from muser_dist.muser import Muser
from tests.shardmaker import INSTRUMENTS, sample, tone, write_shard, write_shards
from tests.small import LOCAL, index_of, small_config

TEMPLATES = ("A piece for {instrument}", "{instrument}", "about {themes}")


def tagged(folder, rows: int, name: str, first: int = 0) -> str:
    """Shards whose rows also have tags, every fifth none."""
    samples = []
    for i in range(first, first + rows):
        themes = [tag for tag, period in (("sea", 2), ("war", 3), ("Love", 4)) if i % period == 0]
        samples.append((f"piece{i:05d}", sample(i, **({"themes": themes} if i % 5 else {}))))
    write_shard(folder / f"{name}-0.tar", samples)
    return f"{folder}/{name}-*.tar"


def ideal(weights: str = "", device: str = "cpu"):
    """A model of two functions that hears the pitch and reads the instrument, which tones and pieces share."""

    class Ideal:
        sample_rate, seconds = 8_000, 0.5

        def encode_audio(self, clips, sample_rate):
            assert sample_rate == 8_000 and all(clip.dtype == np.float32 and len(clip) == 4_000 for clip in clips)
            pitches = []
            for clip in clips:
                peak = np.abs(np.fft.rfft(clip)).argmax() * 2.0
                pitches.append(round(12 * np.log2(peak / 220)) % 4)
            return np.eye(4)[pitches] * 3

        def encode_text(self, sentences):
            named = [[name in sentence for name in INSTRUMENTS] for sentence in sentences]
            return np.array(named) + 1e-3

    return Ideal()


@pytest.fixture(scope="module")
def muser():
    return Muser(MultimodalModel(small_config()), small_config())


def test_a_model_of_others_is_scored_as_ours_are(tmp_path):
    external, config = load_model(f"{__name__}:ideal")
    config = replace(
        config,
        data=replace(config.data, templates=TEMPLATES),
        evaluate=EvaluateConfig(fields=("instrument",)),
    )
    test, train = index_of(write_shards(tmp_path / "val", [24])), index_of(write_shards(tmp_path / "train", [30]))
    per_row: PerRow = {}
    found = evaluate(
        external, config, test, LOCAL, train_index=train, probing=Probing("joint", seeds=2), per_row=per_row
    )
    json.dumps(found, allow_nan=False)
    assert set(found["retrieval"]) == {"audio->text", "text->audio"}
    assert found["retrieval"]["text->audio"]["mAP@10"] == found["retrieval"]["audio->text"]["R@1"] == 1
    assert found["retrieval"]["text->audio"]["queries"] == 4
    assert found["zero_shot"]["instrument"]["audio"]["accuracy"] == 1
    assert found["robustness"]["instrument"]["audio"]["agreement"] == 1
    probes = found["probes"]["instrument"]["audio"]
    assert probes["linear"]["accuracy"] == probes["mlp"]["accuracy"] == 1
    points = found["few_shot"]["instrument"]["audio"]["points"]
    assert "classes need 4" in points[0]["impossible"] and points[-1]["accuracy"]["mean"] == 1
    assert found["geometry"]["pairs"]["audio-text"]["alignment"] < 0.01
    assert per_row["zero-shot instrument by audio"][1].shape == (24, 2)
    np.testing.assert_array_equal(per_row["retrieval text->audio"][1], np.ones((4, 2)))
    for shown in ("text->audio", "mlp probe", "told apart by a plane", "by labels"):
        assert shown in describe(found)
    with pytest.raises(ConfigError, match="give --probe-on joint"):
        evaluate(external, config, test, LOCAL, train_index=train)


def test_chunks_of_which_nothing_can_be_used_have_the_same_width(tmp_path):
    bad = [(f"bad{i:03d}", {"flac": b"no sound", "json": b"[1, 2]"}) for i in range(70)]
    write_shard(tmp_path / "all.tar", [*bad, *((f"good{i}", sample(i)) for i in range(3))])
    external, config = load_model(f"{__name__}:ideal")
    config = replace(config, data=replace(config.data, templates=TEMPLATES), train=replace(config.train, chunk=32))
    rows = embed(external, config, index_of(f"{tmp_path}/all.tar"), LOCAL)
    assert rows.joint["audio"].shape == rows.joint["text"].shape == (73, 4)
    assert rows.valid["audio"].sum() == rows.valid["text"].sum() == 3
    assert len(rows.problems) == 140 and any("cannot be decoded" in problem for problem in rows.problems)


def test_fields_of_lists_are_tags(muser, tmp_path):
    config = replace(
        small_config(data={"templates": TEMPLATES}), evaluate=EvaluateConfig(fields=("themes", "instrument", "absent"))
    )
    sets = [index_of(tagged(tmp_path, *args)) for args in ((30, "val"), (40, "train", 30))]
    per_row: PerRow = {}
    settings = Probing(kinds=("linear",), seeds=0)
    found = evaluate(muser, config, sets[0], LOCAL, train_index=sets[1], probing=settings, per_row=per_row)
    json.dumps(found, allow_nan=False)
    for name in ("audio", "spectrogram"):
        tagging = found["tagging"]["themes"][name]
        assert (tagging["tags"], tagging["without_label"], tagging["tags_left_out"]) == (3, 14, 0)
        assert tagging["rows"] == 16  # of 24 with the field, 8 have none of the tags: an empty list says nothing
        assert set(tagging["by_tag"]) == {"sea", "war", "Love"}
        assert found["probes"]["themes"][name]["linear"]["tags"] == 3
        assert per_row[f"linear probe themes by {name}"][1].shape == (16, 2, 3)
    assert "themes" not in found["zero_shot"] and "themes" not in found["robustness"]
    assert found["few_shot"] == {}
    assert found["skipped_fields"] == {"absent": "0 different values in the data"}
    # Probes see the towers' output, unless told otherwise.
    rows = embed(muser, config, sets[0], LOCAL)
    assert rows.tower["audio"].shape[1] == 16 and rows.joint["audio"].shape[1] == 8
    assert found["probes_on"] == "tower" and found["train_rows"] == 40


def test_features_are_what_the_head_projects(muser, tmp_path):
    rows = embed(muser, small_config(), index_of(write_shards(tmp_path, [3])), LOCAL)
    for name in muser.modalities:
        projected = rows.tower[name] @ muser.model.heads[name][0].weight.detach().numpy().T
        projected /= np.linalg.norm(projected, axis=1, keepdims=True)
        np.testing.assert_allclose(rows.joint[name], projected, atol=1e-5)
    np.testing.assert_allclose(
        rows.joint["audio"], muser.encode_audio([tone(i) for i in range(3)], 16_000, windows="middle"), atol=1e-4
    )


def test_what_is_embedded_may_be_kept(muser, tmp_path, monkeypatch):
    """An interruption costs what its part had done; another model, another crop or other shards begin anew."""
    monkeypatch.setattr("muser_dist.evaluate.embedding._PART_ROWS", 4)  # two chunks
    config, index = small_config(), index_of(write_shards(tmp_path, [5, 6]))
    whole = embed(muser, config, index, LOCAL)
    calls: list[str] = []

    class Watched:
        modalities, encode_text = muser.modalities, staticmethod(muser.encode_text)

        def __init__(self, after: int = 100):
            self.after = after

        def encode_chunk(self, modality, chunk):
            if len(chunk["row"]) > 1:  # no trial
                calls.append(modality)
                if len(calls) > self.after:
                    raise KeyboardInterrupt
            return muser.encode_chunk(modality, chunk)

    with pytest.raises(KeyboardInterrupt):
        embed(Watched(after=3 * 3), config, index, LOCAL, keep=tmp_path / "kept")  # in the second part
    assert len(list((tmp_path / "kept").iterdir())) == 1
    calls.clear()
    told: list[tuple[int, int]] = []
    again = embed(Watched(), config, index, LOCAL, lambda *numbers: told.append(numbers), tmp_path / "kept")
    assert len(calls) == 3 * 4 and told[0] == (4, 11) and told[-1] == (11, 11)
    assert (again.keys, again.fields, again.problems) == (whole.keys, whole.fields, whole.problems)
    for kind in ("joint", "tower", "valid"):
        for name in muser.modalities:
            np.testing.assert_array_equal(getattr(again, kind)[name], getattr(whole, kind)[name])
    calls.clear()
    embed(Watched(), config, index, LOCAL, keep=tmp_path / "kept")
    assert calls == []
    other = Muser(MultimodalModel(replace(config, seed=1)), config)
    for changed in (
        (other, config, index),
        (muser, small_config(data={"crop_seconds": 0.4}), index),
        (muser, config, index_of(f"{tmp_path}/train-00000.tar")),
    ):
        before = len(list((tmp_path / "kept").iterdir()))
        embed(*changed, LOCAL, keep=tmp_path / "kept")
        assert len(list((tmp_path / "kept").iterdir())) > before
    broken = min((tmp_path / "kept").iterdir())
    broken.write_bytes(broken.read_bytes()[:100])
    with pytest.raises(DataError, match="delete the file"):
        for changed in ((muser, config, index), (other, config, index)):
            embed(*changed, LOCAL, keep=tmp_path / "kept")
        embed(muser, small_config(data={"crop_seconds": 0.4}), index, LOCAL, keep=tmp_path / "kept")
        embed(muser, config, index_of(f"{tmp_path}/train-00000.tar"), LOCAL, keep=tmp_path / "kept")


def test_of_what_is_kept_as_many_rows_are_scored_as_are_asked_for(muser, tmp_path):
    """Also where the number ends amid a chunk; a part that is whole is made once for all numbers."""
    config, index = small_config(train={"chunk": 8}), index_of(write_shards(tmp_path, [7]))
    for rows in (3, 6, 2):
        asked = replace(config, evaluate=EvaluateConfig(rows=rows))
        assert len(embed(muser, asked, index, LOCAL, keep=tmp_path / "kept")) == rows

    config, kept = small_config(), tmp_path / "of-two"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("muser_dist.evaluate.embedding._PART_ROWS", 2)
        for rows in (3, 5):
            embed(muser, replace(config, evaluate=EvaluateConfig(rows=rows)), index, LOCAL, keep=kept)
    assert [path.stem[-17:] for path in sorted(kept.iterdir())] == [
        "00000000-00000002",
        "00000002-00000003",
        "00000002-00000004",
        "00000004-00000005",
    ]


def test_embeddings_that_are_not_finite_are_an_error_and_collapse_scores_chance(muser, tmp_path):
    index = index_of(write_shards(tmp_path, [40]))
    config = replace(small_config(data={"templates": TEMPLATES}), evaluate=EvaluateConfig(fields=("instrument",)))
    rows = embed(muser, config, index, LOCAL)
    constant = {name: np.ones_like(values) for name, values in rows.joint.items()}

    class Constant:
        modalities = muser.modalities

        def encode_text(self, sentences):
            return np.ones((len(sentences), 8), np.float32)

    found = score(Constant(), config, replace(rows, joint=constant, tower=constant), replace(rows, tower=constant))
    for scores in found["retrieval"].values():
        assert scores["R@10"] <= scores["chance_R@10"] and scores["mAP@10"] <= scores["chance_mAP@10"]
    assert found["zero_shot"]["instrument"]["audio"]["accuracy"] == 0
    assert found["robustness"]["instrument"]["audio"]["agreement"] == 0
    for by_kind in found["probes"]["instrument"].values():
        assert all(scores["accuracy"] <= scores["majority"] for scores in by_kind.values())
    assert found["geometry"]["pairs"]["audio-text"]["separability"] == 0.5
    assert found["geometry"]["modalities"]["audio"]["effective_rank"] == pytest.approx(1)

    constant["audio"][7, 3] = np.nan
    with pytest.raises(DataError, match="not finite"):
        score(Constant(), config, replace(rows, joint=constant))


def test_a_model_that_reads_no_text_is_scored_by_what_needs_none(muser, tmp_path):
    class Deaf:
        modalities = ("text",)

    class Wordless:
        modalities = ("audio", "spectrogram")
        encode_chunk = staticmethod(muser.encode_chunk)

    index = index_of(write_shards(tmp_path, [16]))
    config = replace(small_config(), evaluate=EvaluateConfig(fields=("instrument",)))
    rows = embed(Wordless(), config, index, LOCAL, keep=tmp_path / "kept")
    found = score(Wordless(), config, rows, rows, Probing(kinds=("linear",), seeds=0))
    json.dumps(found, allow_nan=False)
    assert set(found["retrieval"]) == {"audio->spectrogram", "spectrogram->audio"}
    assert set(found["geometry"]["modalities"]) == set(found["probes"]["instrument"]) == {"audio", "spectrogram"}
    assert found["zero_shot"] == {}
    assert found["skipped_fields"] == {"instrument, zero-shot": "the model has no text tower"}
    assert "linear probe" in describe(found)
    with pytest.raises(DataError, match="no tower besides that of texts"):
        score(Deaf(), config, rows)


def test_labels_are_the_most_frequent_tags_in_their_usual_spelling():
    rows = [{"genre": "Rock"}, {"genre": "rock"}, {"genre": "Rock"}, {}]
    labels = read_labels("genre", rows, [{"genre": "Jazz"}])
    assert labels.classes == ["Jazz", "Rock"] and not labels.tags
    assert [part.tolist() for part in labels.sets] == [[1, 1, 1, -1], [0]]
    assert [part.tolist() for part in labels.known] == [[True, True, True, False], [True]]
    many = [{"tags": [f"tag {i:02d}" for i in range(j, 60)]} for j in range(60)] + [{"tags": "tag 59"}, {}]
    labels = read_labels("tags", many)
    assert labels.classes == [f"tag {i:02d}" for i in range(60 - TAGS, 60)] and labels.left_out == 60 - TAGS
    assert labels.sets[0][59].tolist() == labels.sets[0][60].tolist() == [False] * (TAGS - 1) + [True]
    assert not labels.known[0][61] and labels.known[0][:61].all()


def clap_folder(folder, fusion: bool):
    """A tiny ClapModel of random weights, its feature extractor and a tokenizer, as `save_pretrained` writes them."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import ClapConfig, ClapFeatureExtractor, ClapModel, PreTrainedTokenizerFast

    text = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    text |= {"vocab_size": 16, "max_position_embeddings": 40}
    audio = {"spec_size": 64, "num_mel_bins": 16, "depths": [1, 1], "num_attention_heads": [1, 2], "window_size": 4}
    audio |= {"enable_fusion": True, "fusion_type": "aff_2d", "aff_block_r": 2} if fusion else {}
    audio |= {"patch_embeds_hidden_size": 8, "hidden_size": 16, "num_hidden_layers": 2}
    ClapModel(ClapConfig(text_config=text, audio_config=audio, projection_dim=12)).save_pretrained(folder)
    truncation = "fusion" if fusion else "rand_trunc"  # as published checkpoints of either kind have it
    extractor = ClapFeatureExtractor(
        16, 8_000, hop_length=80, max_length_s=1, fft_window_size=256, frequency_max=4_000, truncation=truncation
    )
    extractor.save_pretrained(folder)
    words = ["<s>", "<pad>", "</s>", "<unk>", "A", "piece", "for", *INSTRUMENTS]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="<unk>", pad_token="<pad>", model_max_length=32
    )
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("fusion", [False, True])
def test_a_clap_checkpoint_of_transformers_is_scored(tmp_path, fusion):
    folder = clap_folder(tmp_path / "clap", fusion)
    external, config = load_model("clap", str(folder))
    assert (config.data.sample_rate, config.data.crop_seconds) == (8_000, 1)
    config = replace(
        config, data=replace(config.data, templates=TEMPLATES), evaluate=EvaluateConfig(fields=("instrument",))
    )
    test, train = index_of(write_shards(tmp_path / "val", [12])), index_of(write_shards(tmp_path / "train", [16]))
    found = evaluate(external, config, test, LOCAL, train_index=train, probing=Probing(kinds=("linear",), seeds=0))
    json.dumps(found, allow_nan=False)
    assert found["rows"] == 12 and found["rows_without"] == {"audio": 0, "text": 0}
    assert 0 < found["retrieval"]["text->audio"]["MRR"] <= 1
    assert found["zero_shot"]["instrument"]["audio"]["rows"] == 12
    assert found["probes"]["instrument"]["audio"]["linear"]["probe"]["train_rows"] == 16
    # As transformers' own processing gives it, alone and in a batch.
    from transformers import ClapFeatureExtractor, ClapModel

    clips = [tone(i, rate=8_000) for i in range(3)]
    together = external.model.encode_audio(clips, 8_000)
    inputs = ClapFeatureExtractor.from_pretrained(folder)(clips[1], sampling_rate=8_000, return_tensors="pt")
    model = ClapModel.from_pretrained(folder).eval()
    # Alone, a clip would be called longer by the extractor with fusion, though it is not.
    alone = model.get_audio_features(inputs["input_features"], is_longer=torch.zeros(1, 1, dtype=torch.bool))
    alone = getattr(alone, "pooler_output", alone)[0].detach().numpy()
    np.testing.assert_allclose(together[1] / np.linalg.norm(together[1]), alone / np.linalg.norm(alone), atol=1e-5)
    texts = external.encode_text(["A piece for flute", "flute"])
    np.testing.assert_allclose(texts[1], external.encode_text(["flute"])[0], atol=1e-5)  # padding does not matter
    assert np.abs(texts[0] - texts[1]).max() > 1e-4


def nothing():
    return object()


def wrong():
    model = ideal()
    model.encode_text = lambda sentences: np.zeros(len(sentences))
    return model


def test_models_that_cannot_be_scored_say_why(tmp_path):
    with pytest.raises(ConfigError, match="has no encode_audio, encode_text, sample_rate, seconds"):
        External(f"{__name__}:nothing")
    with pytest.raises(ConfigError, match="cannot be called"):
        External(f"{__name__}:nothing", "weights")
    with pytest.raises(ConfigError, match=r"encode_text returned shape \(2,\) for 2; give \(n, D\)"):
        External(f"{__name__}:wrong").encode_text(["a", "b"])
    with pytest.raises(ConfigError, match="is the folder that holds it on PYTHONPATH"):
        load_model("no_such_package:load")
    with pytest.raises(ConfigError, match="--weights FOLDER"):
        load_model("clap")
    with pytest.raises(CheckpointError, match="no CLAP checkpoint"):
        load_model("clap", str(tmp_path))
    with pytest.raises(CheckpointError, match=r"no model\.safetensors"):
        load_model(str(tmp_path))
    with pytest.raises(ConfigError, match="which has its own"):
        load_model(str(tmp_path), "weights")
