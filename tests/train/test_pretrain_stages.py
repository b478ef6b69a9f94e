"""What happens between the stages of a recipe. Training is a stand-in that leaves a model as it was drawn: no Ray."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from muser_dist.config import PairConfig, RunConfig, Stage, Stages
from muser_dist.errors import CheckpointError, ConfigError, MuserError, ScoringError
from muser_dist.models.model import MultimodalModel
from muser_dist.models.weights import load_weights
from muser_dist.muser import Muser, save_model
from muser_dist.train import launch
from muser_dist.train.dry_run import dry_run
from muser_dist.train.launch import pretrain
from muser_dist.train.preflight import prepare_folder
from muser_dist.train.runlog import EVENTS, read_lines
from muser_dist.train.stages import pretrain_stages
from tests.models.test_frozen import with_towers
from tests.scores import TEXT, symbolic_config, write_scores
from tests.shardmaker import write_shards
from tests.small import small_config


@pytest.fixture
def trained(monkeypatch) -> dict[str, list[str]]:
    """By name of a stage that was trained, in order, the names of those that Ray was told will follow."""
    names: dict[str, list[str]] = {}

    def train(config: RunConfig, _, later: Sequence[RunConfig]) -> None:
        assert config.name not in names, "a stage is trained once"
        names[config.name] = [run.name for run in later]
        model = MultimodalModel(config)
        load_weights(model, config)
        save_model(config.folder / "model", model.state_dict(), config)

    monkeypatch.setattr(launch, "train", train)
    return names


def sound_after_notation(
    folder: Path, val: str, storage: str = "", last=lambda config: config
) -> tuple[RunConfig, ...]:
    """A stage of notation, then one of sound, neither of which can be scored on the other's rows.

    Args:
        folder: of training shards.
        val: shards that both are scored on.
        storage: of the runs; `folder` by default.
        last: changes the second stage.
    """
    notation, sound = (
        replace(
            config,
            storage=storage or str(folder),
            name="both",
            data=replace(config.data, train=(train,), val=(val,) if val else ()),
        )
        for config, train in (
            (symbolic_config(TEXT), write_scores(folder / "scores", 8)),
            (small_config(), write_shards(folder / "sounds", [8])),
        )
    )
    return Stages((Stage("notation", notation), Stage("sound", last(sound), "towers"))).chained("both")


def test_a_stage_that_cannot_be_scored_does_not_stop_the_next(tmp_path, trained, capsys):
    runs = sound_after_notation(tmp_path, write_shards(tmp_path, [6], "val"))
    for _ in range(2):  # the same command again trains nothing and ends as well
        assert pretrain_stages(runs, ["test"]) == tmp_path / "both"
    assert trained == {"notation": ["sound"], "sound": []}
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
    assert list(trained) == ["notation", "sound"]
    assert set(Muser.from_pretrained(tmp_path / "both").config.model.towers()) == {"audio", "spectrogram", "text"}


def with_pairs(config: RunConfig) -> RunConfig:
    objective = replace(config.objective, pairs=(*config.objective.pairs, PairConfig("audio", "partner")))
    return replace(config, objective=objective, data=replace(config.data, pairs="/none/pairs.parquet"))


@pytest.mark.parametrize(
    ("last", "message"),
    [
        (
            lambda config: with_towers(config, audio={"weights": "/none/audio.pt"}),
            r"model\.audio\.weights: '/none/audio",
        ),
        (with_pairs, r"data\.pairs: /none/pairs\.parquet"),
        (lambda config: replace(config, train=replace(config.train, global_batch=16)), "fewer than one global batch"),
        (
            lambda config: replace(config, train=replace(config.train, checkpoint_storage="/dev/null")),
            r"train\.checkpoint_storage: cannot write to",
        ),
    ],
    ids=["weights", "pairs", "rows", "checkpoints"],
)
def test_what_is_wrong_with_a_later_stage_is_told_before_the_first_trains(tmp_path, trained, last, message):
    with pytest.raises(MuserError, match=message):
        pretrain_stages(sound_after_notation(tmp_path, "", last=last), ["test"])
    assert not trained


def test_a_stage_with_weights_of_its_own_starts_from_the_stage_before_too(tmp_path, trained):
    other = small_config()
    save_model(tmp_path / "audio", MultimodalModel(other).state_dict(), other)
    runs = sound_after_notation(
        tmp_path, "", last=lambda config: with_towers(config, audio={"weights": str(tmp_path / "audio")})
    )
    pretrain_stages(runs, ["test"])
    told = json.loads((runs[1].folder / "weights.json").read_text())
    assert {name: match["source"] for name, match in told.items()} == {
        "audio": str(tmp_path / "audio"),
        "text": str(runs[0].folder),
    }


def test_a_dry_run_of_a_later_stage_reads_weights_of_its_own(tmp_path):
    def last(config: RunConfig) -> RunConfig:
        return with_towers(config, audio={"weights": "/none/audio.pt"})

    first, second = sound_after_notation(tmp_path, "", last=last)
    with pytest.raises(ConfigError, match=r"model\.audio\.weights: '/none/audio"):
        dry_run(second, first)
    assert f"Starts from the model of {first.folder}" in dry_run(*sound_after_notation(tmp_path, "")[::-1])


def test_stages_go_on_where_their_folder_has_moved_to(tmp_path, trained):
    pretrain_stages(sound_after_notation(tmp_path, "", str(tmp_path / "old")), ["test"])
    (tmp_path / "old").rename(tmp_path / "new")
    moved = sound_after_notation(tmp_path, "", str(tmp_path / "new"))
    pretrain_stages(moved, ["test"])
    assert list(trained) == ["notation", "sound"]
    elsewhere = with_towers(moved[1], text={"weights": str(tmp_path / "scores")})
    with pytest.raises(CheckpointError, match=r"another config \(model\.text\.weights: "):
        prepare_folder(elsewhere, ["test"])


def test_a_run_may_move_away_from_weights_that_stay(tmp_path, trained):
    other = small_config()
    save_model(tmp_path / "old" / "audio", MultimodalModel(other).state_dict(), other)
    run = with_towers(small_config(name="run"), audio={"weights": str(tmp_path / "old" / "audio")})
    run = replace(run, data=replace(run.data, train=(write_shards(tmp_path / "sounds", [8]),)))
    pretrain(replace(run, storage=str(tmp_path / "old")), ["test"])
    (tmp_path / "new").mkdir()
    (tmp_path / "old" / "run").rename(tmp_path / "new" / "run")
    pretrain(replace(run, storage=str(tmp_path / "new")), ["test"])
    assert list(trained) == ["run"]
