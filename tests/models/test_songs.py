"""The modality `features` in the model: configs, evaluation, a trial of the largest chunk, and the model in use."""

from dataclasses import replace
from itertools import permutations

import numpy as np
import pytest
import torch

from muser_dist import Muser
from muser_dist.config import ModelConfig, ObjectiveConfig, PairConfig, TowerConfig, from_dict, to_dict
from muser_dist.data.config import FeaturesConfig
from muser_dist.data.features import read_song
from muser_dist.errors import ConfigError, DataError
from muser_dist.evaluate.embedding import embed
from muser_dist.evaluate.evaluator import evaluate
from muser_dist.evaluate.validation import flat_scores, score_names
from muser_dist.models.model import MultimodalModel
from muser_dist.muser import save_model
from muser_dist.recipes.finetune import finetune
from muser_dist.train.dry_run import dry_run
from muser_dist.train.find_chunk import _chunk
from muser_dist.train.preflight import check_settings
from muser_dist.train.step import to_device
from tests.small import LOCAL, index_of, small_config
from tests.songs import FEATURES, MOST, features_config, npy, song, write_songs

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def muser() -> Muser:
    config = features_config()
    return Muser(MultimodalModel(config), config)


def test_a_config_comes_back_and_says_what_is_missing(tmp_path):
    config = features_config()
    assert from_dict(to_dict(config), "here") == config
    assert config.features == config.evaluated == ("features", "text")
    with pytest.raises(ConfigError, match=r"contrasts features with text, but model\.features is None"):
        replace(config, model=replace(small_config().model, audio=None, spectrogram=None))
    trial = replace(config, data=replace(config.data, train=("train.tar",)))
    assert check_settings(trial)[0] > 0
    few = replace(FEATURES, options=FEATURES.options | {"positions": 4})
    with pytest.raises(ConfigError, match=r"model\.features\.options\.positions: 6 windows .* do not fit into 4"):
        check_settings(replace(trial, model=replace(trial.model, features=few)))
    odd = replace(FEATURES, options=FEATURES.options | {"heads": 3})
    with pytest.raises(ConfigError, match=r"model\.features\.options"):
        check_settings(replace(trial, model=replace(trial.model, features=odd)))
    # A tower in the place of another modality's.
    wrong = small_config(
        model=ModelConfig(audio=TowerConfig("features", FEATURES.options), text=config.model.text, projection_dim=8),
        objective=ObjectiveConfig(pairs=(PairConfig("audio", "text"),)),
        data={"train": ("train.tar",)},
    )
    with pytest.raises(ConfigError, match=r"a tower reads 'features'.*`build` must fit"):
        check_settings(wrong)


def test_a_step_of_the_largest_chunk_can_be_tried():
    config = features_config()
    chunk = to_device(_chunk(config, 4, 0), config.features, CPU)
    out = MultimodalModel(config)(chunk.tensors(), chunk.moment)
    assert out["features"].shape == (4, 8) and chunk.tensors().keys() == {
        "features",
        "features_length",
        "text_ids",
        "text_length",
    }


def test_a_dry_run_reads_a_chunk_and_counts_its_bytes(tmp_path):
    config = features_config(train={"workers": 2})
    data = replace(config.data, train=(write_songs(tmp_path, 8),), buffer_mib=1)
    text = dry_run(replace(config, data=data))
    assert "Decoding: " in text and "8 rows" in text
    lacking = replace(data, train=(write_songs(tmp_path, 8, "flac", name="other"),))
    assert "Decoding: " in dry_run(replace(config, data=lacking))  # rows without are told when it runs


def test_each_direction_is_scored_and_named_beforehand(tmp_path, muser):
    config, index = muser.config, index_of(write_songs(tmp_path, 16))
    config = replace(config, evaluate=replace(config.evaluate, fields=("instrument",)))
    scores = evaluate(muser, config, index, LOCAL)
    assert set(scores["retrieval"]) == {f"{a}->{b}" for a, b in permutations(("features", "text"))}
    assert set(scores["zero_shot"]["instrument"]) == {"features"}
    assert flat_scores(scores).keys() <= set(score_names(config))
    rows = embed(muser, config, index, LOCAL)
    short = [i for i in range(16) if len(song(i)) <= MOST]
    np.testing.assert_allclose(
        rows.joint["features"][short], muser.encode_features([song(i) for i in short]), atol=1e-5
    )
    kept = embed(muser, config, index, LOCAL, keep=tmp_path / "kept")
    again = embed(muser, config, index, LOCAL, keep=tmp_path / "kept")
    np.testing.assert_array_equal(kept.joint["features"], again.joint["features"])


def test_songs_by_array_path_or_bytes(muser, tmp_path):
    songs = [song(i, windows) for i, windows in enumerate((1, MOST, MOST + 1, 3 * MOST + 2))]
    for i, values in enumerate(songs):
        (tmp_path / f"{i}.npy").write_bytes(npy(values))
    by_array = muser.encode_features(songs)
    assert by_array.shape == (4, muser.dim) and by_array.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(by_array, axis=1), 1.0, atol=1e-6)
    np.testing.assert_array_equal(by_array, muser.encode_features([npy(values) for values in songs]))
    np.testing.assert_array_equal(by_array, muser.encode_features([tmp_path / f"{i}.npy" for i in range(4)]))
    assert muser.encode_features([]).shape == (0, muser.dim)


def test_a_long_song_is_the_weighted_mean_of_its_runs(muser):
    values = song(0, 2 * MOST + 1)
    runs = list(read_song(values, muser.config.data.features))
    assert [new for *_, new in runs] == [MOST, MOST, 1]
    batch = {
        "features": torch.from_numpy(np.stack([run for run, *_ in runs])),
        "features_length": torch.tensor([MOST] * 3),
    }
    with torch.inference_mode():
        each = torch.nn.functional.normalize(muser.model.encode("features", batch), dim=1).numpy()
    mean = (np.array([MOST, MOST, 1])[:, None] * each).sum(axis=0)
    np.testing.assert_allclose(muser.encode_features([values])[0], mean / np.linalg.norm(mean), atol=1e-5)


def test_what_is_wrong_with_a_song_is_named(muser, tmp_path):
    with pytest.raises(DataError, match=r"features given as ndarray: .*data\.features\.size"):
        muser.encode_features([song(1)[:, :3]])
    with pytest.raises(DataError, match=r"gone\.npy: there is no such file"):
        muser.encode_features([tmp_path / "gone.npy"])
    with pytest.raises(TypeError, match=r"encode_features takes a list; wrap the one you have in \[ \]"):
        muser.encode_features(song(1))
    with pytest.raises(ConfigError, match="no symbolic tower; it has features, text"):
        muser.encode_symbolic([b"X:1\nK:C\nCDEF|\n"])


def test_a_tower_of_features_can_be_fine_tuned_and_classifies_songs(tmp_path):
    config = features_config()
    save_model(tmp_path / "run" / "model", MultimodalModel(config).state_dict(), config)
    tuned = finetune(str(tmp_path / "run"), "features")
    data = replace(tuned.data, classes=("instrument",), label_values={"instrument": ("flute", "horn")})
    tuned = replace(tuned, data=data)
    assert tuned.data.features == FeaturesConfig(config.data.features.size, MOST)
    classifier = Muser(MultimodalModel(tuned), tuned)
    assert classifier.classify([song(1), npy(song(2))])["instrument"].shape == (2, 2)
