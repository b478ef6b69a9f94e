"""What happens between the stages of a recipe. Training is a stand-in that leaves a model as it was drawn: no Ray."""

from dataclasses import replace
from pathlib import Path

import pytest

from muser_dist.config import RunConfig, Stage, Stages
from muser_dist.errors import ScoringError
from muser_dist.models.model import MultimodalModel
from muser_dist.models.weights import load_weights
from muser_dist.muser import Muser, save_model
from muser_dist.train import launch
from muser_dist.train.runlog import EVENTS, read_lines
from muser_dist.train.stages import pretrain_stages
from tests.scores import TEXT, symbolic_config, write_scores
from tests.shardmaker import write_shards
from tests.small import small_config


@pytest.fixture
def trained(monkeypatch) -> list[str]:
    """Names of the stages that are trained, in order."""
    names: list[str] = []

    def train(config: RunConfig, *_) -> None:
        names.append(config.name)
        model = MultimodalModel(config)
        load_weights(model, config)
        save_model(config.folder / "model", model.state_dict(), config)

    monkeypatch.setattr(launch, "train", train)
    return names


def sound_after_notation(folder: Path, val: str, last_val: str = "") -> tuple[RunConfig, ...]:
    """A stage of notation, then one of sound, neither of which can be scored on the other's rows."""
    notation = symbolic_config(TEXT)
    sound = small_config()
    notation, sound = (
        replace(config, storage=str(folder), name="both", data=replace(config.data, train=(train,), val=(shards,)))
        for config, train, shards in (
            (notation, write_scores(folder / "scores", 8), val),
            (sound, write_shards(folder / "sounds", [8]), last_val or val),
        )
    )
    return Stages((Stage("notation", notation), Stage("sound", sound, "towers"))).chained("both")


def test_a_stage_that_cannot_be_scored_does_not_stop_the_next(tmp_path, trained, capsys):
    runs = sound_after_notation(tmp_path, write_shards(tmp_path, [6], "val"))
    for _ in range(2):  # the same command again trains nothing and ends as well
        assert pretrain_stages(runs, ["test"]) == tmp_path / "both"
    assert trained == ["notation", "sound"]
    told = capsys.readouterr().out
    assert "Warning: " in told and "no member with notation" in told and "=== Stage 2 of 2: sound ===" in told
    assert f"jobs/evaluate.py {tmp_path}/both/notation --val" in told
    (event, _) = read_lines(tmp_path / "both" / "notation" / EVENTS)
    assert event["event"] == "not scored" and "no member with notation" in event["error"]
    assert (tmp_path / "both" / "sound" / "evaluation.json").exists()


def test_a_last_stage_that_cannot_be_scored_is_an_error_and_leaves_its_model(tmp_path, trained):
    runs = sound_after_notation(tmp_path, write_scores(tmp_path / "val", 6))
    with pytest.raises(
        ScoringError, match=r"(?s)both/sound/model is trained, .* python jobs/evaluate\.py .*both/sound "
    ):
        pretrain_stages(runs, ["test"])
    assert trained == ["notation", "sound"]
    assert set(Muser.from_pretrained(tmp_path / "both").config.model.towers()) == {"audio", "spectrogram", "text"}
