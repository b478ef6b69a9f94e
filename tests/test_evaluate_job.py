"""jobs/evaluate.py as it is run, on a model of ours and on one of others."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from muser_dist.models.model import MultimodalModel
from muser_dist.muser import save_model
from tests.shardmaker import write_shards
from tests.small import small_config

ROOT = Path(__file__).parents[1]

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


def run(*arguments: str, path: Path | None = None) -> subprocess.CompletedProcess:
    found = os.pathsep.join(map(str, filter(None, (path, os.environ.get("PYTHONPATH")))))
    return subprocess.run(
        [sys.executable, "jobs/evaluate.py", *arguments],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": found},
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    save_model(folder, MultimodalModel(small_config()).state_dict(), small_config())
    return folder


def test_two_models_are_scored_and_compared(model, tmp_path):
    val, train = write_shards(tmp_path, [16], "val"), write_shards(tmp_path, [20], "train")
    (tmp_path / "mine.py").write_text(MINE)
    rows, numbers, page = (tmp_path / name for name in ("a.npz", "scores.json", "scores.html"))
    common = ("--val", val, "--train", train, "--fields", "instrument", "--probes", "linear", "--seeds", "2")
    done = run(str(model), *common, "--json", str(numbers), "--html", str(page), "--per-row", str(rows))
    assert done.returncode == 0, done.stderr
    assert "16 of 16 rows embedded" in done.stderr and "20 of 20 training rows embedded" in done.stderr
    for shown in ("text->spectrogram", "audio->spectrogram", "instrument by audio", "linear probe", "effective rank"):
        assert shown in done.stdout
    scores = json.loads(numbers.read_text())
    assert scores["model"] == str(model) and scores["train_rows"] == 20
    assert scores["probes"]["instrument"]["spectrogram"]["linear"]["rows"] == 16
    assert "text → spectrogram" in page.read_text()

    templates = ("--templates", "for {instrument}", "{instrument}", "--probe-on", "joint")
    done = run("mine:load", "--weights", "w", *common, *templates, "--against", str(rows), path=tmp_path)
    assert done.returncode == 0, done.stderr
    for shown in (
        "linear probe instrument by audio: accuracy",
        "zero-shot instrument by audio: macro F1",
        "95 % interval",
    ):
        assert shown in done.stdout


def test_mistakes_are_one_line_that_says_the_mend(model, tmp_path):
    val = write_shards(tmp_path, [4], "val")
    (tmp_path / "not.npz").write_text("nothing")
    for arguments, said in (
        ((str(model), "--val", val, "--against", str(tmp_path / "not.npz")), "--per-row writes them"),
        ((str(model), "--val", f"{tmp_path}/none-*.tar"), "none-*.tar"),
        ((str(tmp_path), "--val", val), "no model.safetensors"),
        ((str(model), "--val", val, "--templates", "no field"), "--templates: 'no field' names no field"),
    ):
        done = run(*arguments)
        assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr
