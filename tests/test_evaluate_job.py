"""jobs/evaluate.py as it is run, on a model of ours and on one of others."""

import json
import runpy
from pathlib import Path

import pytest

from muser_dist.errors import ConfigError, MuserError
from muser_dist.models.model import MultimodalModel
from muser_dist.muser import save_model
from tests.shardmaker import write_shards
from tests.small import small_config

MINE = """
import numpy as np

class Mine:
    sample_rate, seconds = 8_000, 0.5

    def encode_audio(self, clips, sample_rate):
        return np.stack([np.abs(np.fft.rfft(clip, 256))[:8] for clip in clips])

    def encode_text(self, sentences):
        return np.array([[len(s), s.count("f"), s.count("h"), 1, 0, 0, 0, 0] for s in sentences], float)

def load(weights):
    return Mine()
"""


job = runpy.run_path(str(Path(__file__).parents[1] / "jobs" / "evaluate.py"))["job"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    save_model(folder, MultimodalModel(small_config()).state_dict(), small_config())
    return folder


def test_two_models_are_scored_and_compared(model, tmp_path, capsys, monkeypatch):
    val, train = write_shards(tmp_path, [16], "val"), write_shards(tmp_path, [20], "train")
    (tmp_path / "mine.py").write_text(MINE)
    monkeypatch.syspath_prepend(tmp_path)
    out = tmp_path / "made" / "when missing"
    rows, numbers, page = (out / name for name in ("a.npz", "scores.json", "scores.html"))
    common = ["--val", val, "--train", train, "--fields", "instrument", "--probes", "linear"]
    job([str(model), *common, "--seeds", "2", "--json", str(numbers), "--html", str(page), "--per-row", str(rows)])
    shown = capsys.readouterr()
    assert "16 of 16 rows embedded" in shown.err and "20 of 20 training rows embedded" in shown.err
    for name in ("text->spectrogram", "audio->spectrogram", "instrument by audio", "linear probe", "effective rank"):
        assert name in shown.out
    scores = json.loads(numbers.read_text())
    assert scores["model"] == str(model) and scores["train_rows"] == 20
    assert scores["probes"]["instrument"]["spectrogram"]["linear"]["rows"] == 16
    assert "text → spectrogram" in page.read_text()

    other = ["--templates", "for {instrument}", "{instrument}", "--probe-on", "joint", "--seeds", "0"]
    job(["mine:load", "--weights", "w", *common, *other, "--against", str(rows)])
    shown = capsys.readouterr().out
    for name in ("linear probe instrument by audio: accuracy", "zero-shot instrument by audio: macro F1"):
        assert name in shown
    assert "not compared: retrieval text->spectrogram (only one model has it)" in shown


def test_mistakes_are_one_line_that_says_the_mend(model, tmp_path, monkeypatch):
    (tmp_path / "mine_too.py").write_text(MINE)
    monkeypatch.syspath_prepend(tmp_path)
    val = write_shards(tmp_path, [4], "val")
    (tmp_path / "not.npz").write_text("nothing")
    for arguments, said in (
        ([str(model), "--val", val, "--against", str(tmp_path / "not.npz")], "--per-row writes them"),
        ([str(model), "--val", f"{tmp_path}/none-*.tar"], r"none-\*\.tar"),
        ([str(tmp_path), "--val", val], r"no model\.safetensors"),
        ([str(model), "--val", val, "--templates", "no field"], "--templates: 'no field' names no field"),
        (["mine_too:load", "--weights", "w", "--val", val, "--train", val], "give --probe-on joint"),
        ([str(model), "--val", val, "--seeds", "1"], "--seeds 1 gives no interval"),
        ([str(model), "--val", val, "--device", "cuda:99"], "--device cuda:99 cannot be used here .*give --device cpu"),
        ([str(model), "--val", val, "--device", "gpu"], "--device gpu cannot be used here .*give --device cpu"),
    ):
        with pytest.raises(MuserError, match=said):
            job(arguments)


@pytest.mark.parametrize("option", ["--json", "--html", "--per-row"])
def test_a_file_that_cannot_be_written_is_told_before_the_work(model, tmp_path, option):
    val = write_shards(tmp_path, [4], "val")
    (tmp_path / "file").touch()
    for path in (tmp_path, tmp_path / "file" / "scores"):
        with pytest.raises(ConfigError, match=f"{option}: cannot write {path} .*give another file"):
            job([str(model), "--val", val, option, str(path), "--keep", str(tmp_path / "kept")])
    assert not (tmp_path / "kept").exists()
