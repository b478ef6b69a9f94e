from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context

import torch

from muser_dist.config import EvaluateConfig
from muser_dist.evaluate.evaluator import evaluate
from muser_dist.evaluate.validation import CLASSES, RETRIEVAL, TAGS, lower_is_better, score_names, validate
from muser_dist.models.model import MultimodalModel
from muser_dist.muser import Muser, save_model
from tests.shardmaker import write_shards
from tests.small import LOCAL, index_of, small_config


def test_a_snapshot_has_the_scores_of_its_evaluation_in_any_process(tmp_path):
    """In a fresh process, as in a task of the cluster: everything it needs is in its arguments and the folder."""
    config = replace(small_config(), evaluate=EvaluateConfig(fields=("instrument", "absent")))
    save_model(tmp_path / "snapshot", MultimodalModel(config).state_dict(), config)
    index = index_of(write_shards(tmp_path, [12, 6]))
    with ProcessPoolExecutor(1, get_context("spawn")) as elsewhere:
        found = elsewhere.submit(validate, tmp_path / "snapshot", config, index, LOCAL).result()
    scores = evaluate(Muser.from_pretrained(tmp_path / "snapshot"), config, index, LOCAL)
    assert found["val_R@10/text->audio"] == scores["retrieval"]["text->audio"]["R@10"]
    assert found["val_MRR/spectrogram->text"] == scores["retrieval"]["spectrogram->text"]["MRR"]
    accuracy = scores["zero_shot"]["instrument"]["spectrogram"]["accuracy"]
    assert found["val_accuracy/instrument by spectrogram"] == accuracy
    accuracies = [scores["zero_shot"]["instrument"][name]["accuracy"] for name in ("audio", "spectrogram")]
    assert found["val_accuracy"] == sum(accuracies) / 2
    with_text = [s["MRR"] for direction, s in scores["retrieval"].items() if "text" in direction]
    assert found["val_MRR"] == sum(with_text) / 4
    assert len(found) == 6 * (6 + 1) + 2 * (2 + 1)  # no score of the field that the data lacks
    assert found.keys() < set(score_names(config))
    lacking = {name for name in score_names(config) if name not in found}
    fields = {f"{field} by {name}" for field in ("instrument", "absent") for name in ("audio", "spectrogram")}
    of_tags = {f"val_{metric}" for metric in TAGS} | {f"val_{metric}/{field}" for metric in TAGS for field in fields}
    assert lacking == of_tags | {f"val_{m}/absent by {x}" for m in CLASSES for x in ("audio", "spectrogram")}


def test_it_takes_no_gpu_that_it_was_not_given(tmp_path, monkeypatch):
    """A task without a GPU sees those of others."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    config = small_config()
    save_model(tmp_path / "snapshot", MultimodalModel(config).state_dict(), config)
    scores = validate(tmp_path / "snapshot", config, index_of(write_shards(tmp_path, [12])), LOCAL)
    assert 0 < scores["val_MRR"] <= 1


def test_the_first_dimensions_are_scored_by_themselves(tmp_path):
    config = replace(small_config(), evaluate=EvaluateConfig())
    config = replace(config, objective=replace(config.objective, dims=(2, 8)))
    save_model(tmp_path, MultimodalModel(config).state_dict(), config)
    index = index_of(write_shards(tmp_path, [12, 6]))
    scores = validate(tmp_path, config, index, LOCAL)
    assert scores.keys() == set(score_names(config))
    for metric in RETRIEVAL:
        assert scores[f"val_{metric}@8"] == scores[f"val_{metric}"]  # all of them
    assert scores["val_MRR@2"] != scores["val_MRR"]
    assert lower_is_better("val_median_rank@2") and not lower_is_better("val_R@10@2")
