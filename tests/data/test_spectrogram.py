from dataclasses import replace

import numpy as np
import pytest
import torch

from muser_dist.config import TowerConfig
from muser_dist.data.config import DataConfig
from muser_dist.data.pipeline import evaluation_chunks
from muser_dist.data.spectrogram import CroppedLinear, LogMel, front_end, in_tasks
from muser_dist.errors import ConfigError
from muser_dist.models.model import MultimodalModel
from tests.shardmaker import write_shards
from tests.small import LOCAL, index_of, reader_of, small_config


def tone(hertz: float, seconds: float, rate: int = 16_000) -> torch.Tensor:
    time = torch.arange(round(seconds * rate)) / rate
    return (20_000 * torch.sin(2 * torch.pi * hertz * time)).to(torch.int16)[None]


def test_the_log_mel_shows_a_tone_in_its_band():
    image = LogMel(16_000, mels=64, window=1024, hop=320)(tone(1000, 1.0))
    assert image.shape == (1, 1, 64, 51)
    # HTK's mel scale, 64 bands up to 8 kHz: mel(1000 Hz) = 1000, of 2840.
    assert abs(int(image.mean(dim=-1).argmax()) - 1000 / 2840 * 65) < 1.5


def test_musers_picture_keeps_bins_65_to_448_of_513():
    picture = CroppedLinear(16_000)
    heard = picture(tone(3000, 30.0))  # bin 192 of 513, row 192·300/513 − 38 of the crop
    assert heard.shape == (1, 3, 224, 224)
    assert abs(int(heard[0, 0].mean(dim=1).argmax()) - (192 * 300 / 513 - 38)) < 2
    silence = picture(torch.zeros(1, 480_000, dtype=torch.int16))
    deaf = picture(tone(500, 30.0))  # below 1 kHz
    assert (deaf - silence).abs().max() < 1e-2 * (heard - silence).abs().max()
    torch.testing.assert_close(silence[0, :, 0, 0], -picture.mean.flatten() / picture.deviation.flatten())


def test_tasks_make_the_spectrograms_that_the_tower_would(tmp_path):
    pattern = write_shards(tmp_path, [4])
    on_device = small_config()
    on_cpu = small_config(data={"spectrogram_on": "cpu"})
    (made,) = reader_of(on_cpu, pattern).read([0])
    (heard,) = reader_of(on_device, pattern).read([0])
    assert made["spectrogram"].dtype == np.float16
    tower = MultimodalModel(on_device).towers["spectrogram"]
    expected = tower.front_end(torch.from_numpy(heard["audio"]))
    torch.testing.assert_close(torch.from_numpy(made["spectrogram"]).float(), expected, atol=2e-3, rtol=1e-3)
    lengths = {"audio_length": torch.from_numpy(heard["audio_length"])}
    features = [
        tower(lengths | {name: torch.from_numpy(chunk[name])})
        for chunk, name in ((heard, "audio"), (made, "spectrogram"))
    ]
    torch.testing.assert_close(*features, atol=1e-2, rtol=1e-2)
    # Evaluation encodes waveforms, whatever training does.
    assert "spectrogram" not in next(iter(evaluation_chunks(on_cpu, index_of(pattern), LOCAL)))


def test_waveforms_that_nobody_hears_are_not_sent(tmp_path):
    config = small_config(data={"spectrogram_on": "cpu"})
    pairs = tuple(pair for pair in config.objective.pairs if "audio" not in (pair.first, pair.second))
    config = replace(config, model=replace(config.model, audio=None), objective=replace(config.objective, pairs=pairs))
    (chunk,) = reader_of(config, write_shards(tmp_path, [4])).read([0])
    assert "audio" not in chunk and chunk["valid_spectrogram"].all()


def test_kinds_and_options_that_there_are_not():
    with pytest.raises(ConfigError, match="kinds are log_mel, cropped_linear"):
        front_end(DataConfig(), kind="cqt")
    with pytest.raises(ConfigError, match=r"model\.spectrogram\.options"):
        front_end(DataConfig(), kind="cropped_linear", mels=3)
    with pytest.raises(ConfigError, match="overflows float16"):
        in_tasks(DataConfig(), TowerConfig("spectrogram", {"kind": "cropped_linear"}))
