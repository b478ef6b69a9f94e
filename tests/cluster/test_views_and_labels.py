"""From two views of a clip to a classifier, on two workers: pretrain without text, fine-tune, score."""

import json
from dataclasses import replace

import numpy as np
import pytest

from muser_dist import Muser
from muser_dist.config import ModelConfig, ObjectiveConfig, PairConfig
from muser_dist.errors import DataError
from muser_dist.recipes.finetune import finetune
from muser_dist.train.launch import pretrain
from muser_dist.train.runlog import QUARANTINE, read_lines
from tests.shardmaker import INSTRUMENTS, tone
from tests.small import small_config

pytestmark = pytest.mark.slow


def test_two_views_then_a_classifier(cluster, corpus, tmp_path):
    small = small_config(
        train={"workers": 2, "zero_stage": 3, "samples": 128, "global_batch": 16, "chunk": 4},
        data={"train": (f"{corpus}/train-*.tar",), "val": (f"{corpus}/val-*.tar",)},
        name="views",
        storage=str(tmp_path),
    )
    config = replace(
        small,
        model=ModelConfig(audio=small.model.audio, projection_dim=8),
        objective=ObjectiveConfig(pairs=(PairConfig("audio", "view"),), targets="instance"),
    )
    folder = pretrain(config, ["test"])
    last = read_lines(folder / "metrics.jsonl")[-1]
    assert last["rows_read"] == last["rows_used"] + last["rows_quarantined"] == 128
    keys = {entry["key"] for entry in read_lines(folder / QUARANTINE)}
    assert "undecodable" in keys and "notext" not in keys  # nothing reads texts
    assert np.isfinite(last["alignment/audio-view"])
    assert json.loads((folder / "evaluation.json").read_text())["retrieval"] == {}  # one modality

    tuned = finetune(str(folder))
    tuned = replace(
        tuned,
        name="tuned",
        storage=str(tmp_path),
        data=replace(small.data, classes=("instrument",), tags=("mode",), train_share=0.8),
        train=replace(config.train, zero_stage=2, checkpoint_samples=64, lr=1e-2, warmup_samples=16, samples=512),
    )
    tuned_folder = pretrain(tuned, ["test"])
    assert json.loads((tuned_folder / "labels.json").read_text()) == {
        "instrument": sorted(INSTRUMENTS),
        "mode": ["major", "minor"],
    }
    lines = read_lines(tuned_folder / "metrics.jsonl")
    assert all(np.isfinite(line["loss/instrument"]) and "temperature" not in str(line) for line in lines)
    heads = json.loads((tuned_folder / "evaluation.json").read_text())["probes"]
    assert heads["instrument"]["audio"]["head"]["rows"] == 30
    assert 0 <= heads["instrument"]["audio"]["head"]["accuracy"] <= 1
    assert 0 <= heads["mode"]["audio"]["head"]["roc_auc"] <= 1
    page = (tuned_folder / "report.html").read_text()
    assert "PR-AUC" in page and "fiddle" in page
    muser = Muser.from_pretrained(tuned_folder)
    assert muser.classify([tone(3)], 16_000)["instrument"].shape == (1, 4)
    pretrain(tuned, ["test"])  # the same run: trained already

    with pytest.raises(DataError, match=r"data\.classes: composer has 0 different values.*instrument"):
        pretrain(replace(tuned, name="wrong", data=replace(tuned.data, classes=("composer",))), ["test"])
