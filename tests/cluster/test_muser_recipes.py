"""Each of MUSER's recipes through the command line of jobs/pretrain.py, on two workers."""

import json
import runpy
from pathlib import Path

import pytest
import torch

from muser_dist import Muser
from muser_dist.train.runlog import read_lines
from tests.shardmaker import tone

ROOT = Path(__file__).parents[2]
RECIPES = ["muser_tiny", "muser_audio_text_tiny", "tests.recipes.shrunk:muser_paper", "tests.recipes.shrunk:muser_code"]


@pytest.mark.slow
@pytest.mark.timeout(1200)  # five runs
def test_each_recipe_trains_on_two_workers_and_one_starts_from_anothers_weights(cluster, corpus, tmp_path, capsys):
    job = runpy.run_path(str(ROOT / "jobs" / "pretrain.py"))["job"]
    common = ["--data.train", f"{corpus}/train-*.tar", "--data.val", f"{corpus}/val-*.tar", "--storage", str(tmp_path)]
    common += ["--data.templates", "A piece for {instrument}, in a {mode} key", "--data.window-shards", "2"]
    common += ["--train.workers", "2", "--train.samples", "16", "--train.global-batch", "8", "--train.chunk", "2"]
    common += ["--train.log-steps", "1", "--train.warmup-samples", "8"]
    for recipe in RECIPES:
        name = recipe.rpartition(":")[2]
        job([recipe, *common, "--name", name])
        folder = tmp_path / name
        lines = read_lines(folder / "metrics.jsonl")
        assert [line["samples"] for line in lines] == [8, 16]
        assert lines[-1]["rows_read"] == 16
        pairs = {key for key in lines[-1] if key.startswith("temperature/")}
        assert len(pairs) == {"muser_tiny": 2, "muser_audio_text_tiny": 1, "muser_paper": 2, "muser_code": 3}[name]
        assert ("loss/audio/kernel_norm" in lines[-1]) == (name in ("muser_paper", "muser_code"))
        assert json.loads((folder / "evaluation.json").read_text())["rows"] == 30
        muser = Muser.from_pretrained(folder / "model")
        assert muser.encode_audio([tone(1)], 8_000).shape == (1, muser.dim)

    capsys.readouterr()
    weights = ["--model.text.weights", str(tmp_path / "muser_tiny"), "--train.lr", "1e-9"]  # which changes nothing
    job([RECIPES[1], *common, "--name", "started", *weights])
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("Weights of model.text: "))
    assert "0 missing, 0 of another shape, 0 left over" in line
    report = json.loads((tmp_path / "started" / "weights.json").read_text())
    assert report["text"]["source"] == str(tmp_path / "muser_tiny")
    source, started = (Muser.from_pretrained(tmp_path / name).model for name in ("muser_tiny", "started"))
    for name, value in started.towers["text"].state_dict().items():
        torch.testing.assert_close(value, source.towers["text"].state_dict()[name], rtol=0, atol=1e-7)
