"""What is checked before Ray starts, and the command line's messages."""

import json
import shutil
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest

from muser_dist.cli import parse_runs
from muser_dist.config import from_dict, to_dict
from muser_dist.data.config import SourceConfig
from muser_dist.errors import CheckpointError, ConfigError, DataError, MuserError
from muser_dist.recipes import load_recipe
from muser_dist.train.launch import pretrain
from muser_dist.train.preflight import check_paths, check_settings, load_index, prepare_folder
from muser_dist.train.store import CheckpointStore
from tests.models.test_frozen import with_towers
from tests.object_store import object_store, storage_options
from tests.shardmaker import write_shards
from tests.small import LOCAL, small_config

ROOT = Path(__file__).parents[2]


def config_on(tmp_path, rows=(8, 8), **data):
    pattern = write_shards(tmp_path / "data", list(rows))
    return small_config(data={"train": (pattern,), **data}, name="run", storage=str(tmp_path / "runs"))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"train": ()}, "no training data: give --data.train"),
        ({"train": ("FOLDER/none-*.tar",)}, r"data\.train: .*no shard matches"),
        ({"train": ("FOLDER/train-{00000..00007}.tar",)}, r"data\.train: .*train-00002\.tar: the shard is missing"),
        ({"val": ("FOLDER/none-*.tar",)}, r"data\.val: .*no shard matches"),
        ({"templates": ("nothing",)}, r"data\.templates: 'nothing' names no field"),
        ({"tokenizer": "/not/there"}, r"data\.tokenizer: '/not/there' cannot be loaded"),
        ({"crop_seconds": 0.01}, r"the towers cannot take a row of 0\.01 s .*--data\.crop-seconds"),
    ],
)
def test_wrong_data_settings(tmp_path, data, message):
    data = {
        k: tuple(v.replace("FOLDER", f"{tmp_path}/data") for v in value) if isinstance(value, tuple) else value
        for k, value in data.items()
    }
    with pytest.raises(MuserError, match=message):
        pretrain(config_on(tmp_path, **data), ["test"])


def test_a_shard_that_is_no_tar(tmp_path):
    config = config_on(tmp_path)
    (tmp_path / "data" / "train-00001.tar").write_text("not a tar" * 200)
    with pytest.raises(DataError, match=r"train-00001\.tar is no tar archive"):
        pretrain(config, ["test"])


def test_fewer_rows_than_a_global_batch(tmp_path):
    with pytest.raises(
        DataError,
        match=r"7 rows in 2 shards are fewer than one global batch \(8\).*--train\.chunk 2 --train\.global-batch 6",
    ):
        pretrain(config_on(tmp_path, rows=(4, 3)), ["test"])


def test_shards_without_a_sample(tmp_path):
    empty = write_shards(tmp_path / "empty", [0])
    with pytest.raises(DataError, match=r"data\.val: 1 shards hold no sample at all"):
        pretrain(config_on(tmp_path, val=(empty,)), ["test"])


def test_a_run_folder_with_a_broken_config(tmp_path):
    config = config_on(tmp_path)
    (config.folder / "model").mkdir(parents=True)
    (config.folder / "model" / "config.json").write_text("{}")  # it was trained
    (config.folder / "config.json").write_text('{"model": ')
    with pytest.raises(CheckpointError, match=r"config\.json is broken .*another --name"):
        pretrain(config, ["test"])


def test_a_mistake_can_be_mended_under_the_same_name(tmp_path):
    config = config_on(tmp_path, rows=(4, 3))
    with pytest.raises(DataError, match="fewer than one global batch"):
        pretrain(config, ["test"])
    other = replace(config, train=replace(config.train, lr=0.5))
    prepare_folder(other, ["test"])  # nothing was trained yet, so another config is no contradiction
    assert json.loads((config.folder / "config.json").read_text())["train"]["lr"] == 0.5
    write_shards(tmp_path / "data", [4, 3, 4])
    assert load_index(other, SourceConfig("train", ()), LOCAL, LOCAL.expand(other.data.train, "data.train")).total == 11


def test_a_storage_that_cannot_be_written(tmp_path):
    (tmp_path / "runs").write_text("a file")
    with pytest.raises(ConfigError, match=r"storage: cannot write to .*--storage"):
        pretrain(config_on(tmp_path), ["test"])
    with pytest.raises(ConfigError, match=r"storage: 's3://bucket/runs' is a URL"):
        prepare_folder(replace(small_config(), storage="s3://bucket/runs", name="x"), ["test"])


def test_checkpoints_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("no folder")
    config = config_on(tmp_path)

    def pointing(place: str, options: str = ""):
        train, data = replace(config.train, checkpoint_storage=place), replace(config.data, storage_options=options)
        return replace(config, train=train, data=data)

    with pytest.raises(
        ConfigError, match=r"train\.checkpoint_storage: cannot write to .*/file/run .*--train\.checkpoint"
    ):
        pretrain(pointing(str(tmp_path / "file")), ["test"])
    with pytest.raises(DataError, match=r"train\.checkpoint_storage: nothing://x/run: "):
        pretrain(pointing("nothing://x"), ["test"])
    with object_store() as store:
        options = tmp_path / "options.json"
        options.write_text(json.dumps({"s3": storage_options(store.endpoint)}))
        with pytest.raises(ConfigError, match=r"cannot write to s3://absent/run "):
            prepare_folder(pointing("s3://absent", str(options)), ["test"])
        prepare_folder(pointing(f"s3://{store.bucket}/checkpoints", str(options)), ["test"])


def test_a_run_is_not_begun_again_where_its_checkpoints_are_elsewhere(tmp_path):
    config = config_on(tmp_path)

    def at(place: str):
        return replace(config, train=replace(config.train, checkpoint_storage=str(tmp_path / place)))

    prepare_folder(at("old"), ["test"])
    prepare_folder(at("new"), ["test"])  # nothing was saved yet
    prepare_folder(at("old"), ["test"])
    CheckpointStore(at("old"), LOCAL).complete(8, {"loss": None})
    with pytest.raises(CheckpointError, match=r"checkpoints in .*/old/run, up to step 8, .* none in .*/new/run; copy"):
        prepare_folder(at("new"), ["test"])
    shutil.copytree(tmp_path / "old", tmp_path / "new", dirs_exist_ok=True)
    prepare_folder(at("new"), ["test"])


def test_checkpoints_of_a_run_whose_folder_is_gone(tmp_path):
    config = config_on(tmp_path)
    config = replace(config, train=replace(config.train, checkpoint_storage=str(tmp_path / "saved")))
    CheckpointStore(config, LOCAL).complete(8, {"loss": None})
    with pytest.raises(CheckpointError, match=r"/saved/run holds checkpoints, and .*config\.json is not there"):
        prepare_folder(config, ["test"])


def test_relative_paths_in_a_submitted_job(monkeypatch):
    config = small_config(data={"train": ("data/train-*.tar",), "val": ("s3://b/val.tar",)}, storage="/shared")
    check_paths(config)
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps({}))
    with pytest.raises(ConfigError, match=r"data\.train: 'data/train-\*\.tar' is a relative path.*--data\.train /"):
        check_paths(config)
    absolute = replace(config, data=replace(config.data, train=("/data/train-*.tar",)))
    check_paths(absolute)
    check_paths(replace(absolute, train=replace(config.train, checkpoint_storage="s3://bucket/checkpoints")))
    monkeypatch.chdir(ROOT)
    for weights, local in (("tests", True), ("bert-base-uncased", False)):  # a name on the hub is no path
        named = with_towers(absolute, text={"weights": weights})
        with pytest.raises(ConfigError, match=r"model\.text\.weights: 'tests' is a rel") if local else nullcontext():
            check_paths(named)
    for field, path in {"storage_options": "key.json", "tokenizer": "tests"}.items():
        setting = field.replace("_", "-")
        with pytest.raises(ConfigError, match=rf"data\.{setting}: '{path}' is a relative path"):
            check_paths(replace(absolute, data=replace(absolute.data, **{field: path})))
    with pytest.raises(ConfigError, match=r"model\.text\.options\.model: 'tests' is a relative path"):
        check_paths(with_towers(absolute, text={"options": {"model": "tests"}}))
    with pytest.raises(ConfigError, match=r"train\.checkpoint-storage: 'saved' is a relative path"):
        check_paths(replace(absolute, train=replace(config.train, checkpoint_storage="saved")))
    with pytest.raises(ConfigError, match=r"storage: 'runs' is a relative path"):
        check_paths(replace(config, data=replace(config.data, train=()), storage="runs"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"global_batch": 30, "chunk": 8},
            r"train\.global_batch \(30\) must be a multiple of train\.chunk \(8\); nearest: 32",
        ),
        ({"samples": 4}, r"train\.samples \(4\) is less than one global batch"),
        ({"lr": 0.0}, r"train\.lr must be positive"),
        ({"workers": 0}, r"train\.workers is 0; give a number of at least 1, or a range such as 2:8"),
        ({"workers": "3:2", "resource": "trainer"}, r"train\.workers is '3:2'; the first number of a range"),
        ({"workers": "1:2"}, r"nothing but CPUs would limit the workers.*--train\.resource NAME"),
        ({"gpu_share": 0.0}, r"train\.gpu_share is 0\.0; give a share above 0, up to 1"),
        ({"gpu_share": 0.5, "workers": 2}, r"2 workers need a GPU each; give --train\.workers 1"),
        ({"betas": (0.9, 1.0)}, r"train\.betas is 0\.9 1; give two numbers from 0 to below 1"),
        ({"betas": (-0.1, 0.9)}, r"train\.betas is -0\.1 0\.9; give two numbers from 0 to below 1"),
        ({"optimizer": "sgd", "betas": (0.0, 0.9)}, r"train\.betas: the first is the momentum of SGD"),
        ({"profile": (3, 2)}, r"train\.profile names the first and the last step"),
    ],
)
def test_settings_that_contradict_each_other(changes, message):
    with pytest.raises(ConfigError, match=message):
        small_config(train=changes)


def test_a_run_that_would_train_nothing():
    config = load_recipe("m3_tiny")
    check_settings(replace(config, data=replace(config.data, train=("x.tar",))))
    config = with_towers(config, symbolic={"freeze": True})
    with pytest.raises(ConfigError, match=r"nothing would be trained; leave out --model\.symbolic\.freeze"):
        check_settings(replace(config, data=replace(config.data, train=("x.tar",))))


def test_a_pair_needs_its_towers():
    config = load_recipe("tiny")
    with pytest.raises(ConfigError, match=r"contrasts spectrogram with text, but model\.spectrogram is None"):
        replace(config, model=replace(config.model, spectrogram=None))


def test_config_survives_json_and_unknown_fields_are_errors():
    config = load_recipe("tiny")
    values = json.loads(json.dumps(to_dict(config)))
    assert from_dict(values, "x") == config
    values["train"]["wokers"] = 3
    with pytest.raises(ConfigError, match=r"file\.json: train\.wokers: "):
        from_dict(values, "file.json")
    with pytest.raises(ConfigError, match=r"train\.lr"):
        from_dict(to_dict(config) | {"train": {"lr": "fast"}}, "file.json")


def test_the_command_line_overrides_any_field():
    (config,) = parse_runs(
        [
            *("tiny", "--data.train", "a.tar", "b.tar", "--train.workers", "3", "--model.text.options.width", "64"),
            *("--objective.temperature.no-learnable", "--model.audio.lr", "1e-5"),
        ],
        "test",
    )
    assert config.data.train == ("a.tar", "b.tar")
    assert config.train.workers == 3
    elastic = parse_runs(["tiny", "--train.workers", "2:8", "--train.resource", "trainer"], "test")[0].train
    assert elastic.worker_range == (2, 8)
    assert config.model.text.options["width"] == 64
    assert config.model.audio.lr == 1e-5
    assert config.objective.temperature.learnable is False


def test_objectives_on_the_command_line():
    arguments = ["tiny", "--objective.name", "debiased", "--objective.targets", "instance", "--objective.options"]
    (config,) = parse_runs([*arguments, "tau_plus", "0.1", "--objective.dims", "32", "64"], "test")
    assert config.objective.options == {"tau_plus": 0.1}
    assert config.objective.dims == (32, 64)
    for wrong, message in (
        (["--objective.name", "sigmoid"], r"objective\.bias"),
        (["--objective.targets", "same_label"], r"data\.label"),
        (["--objective.dims", "64", "4096"], r"objective\.dims goes beyond model\.projection_dim"),
        (["--objective.temperature.maximum", "0.01"], r"objective\.temperature"),
    ):
        with pytest.raises(ConfigError, match=message):
            parse_runs(["tiny", *wrong], "test")


def test_the_default_name_tells_configs_apart():
    one, same, other = (parse_runs(["tiny", "--train.lr", lr], "test")[0] for lr in ("0.1", "0.1", "0.2"))
    assert one.name == same.name != other.name
    assert one.name.startswith("tiny-")
    assert parse_runs(["tiny", "--name", "mine"], "test")[0].name == "mine"


def my_recipe():
    return small_config()


def test_a_recipe_of_the_users_own():
    assert parse_runs([f"{__name__}:my_recipe", "--name", "x"], "test")[0].data.sample_rate == 8_000


def run_job(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "jobs/pretrain.py", *arguments], cwd=ROOT, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["tiny", "--data.train", "/none/x-*.tar"], 2, "error: data.train: /none/x-*.tar: there is no folder /none"),
        (["tinny"], 2, "error: recipe: no 'tinny'; did you mean 'tiny'"),
        (["--data.train", "x"], 2, "the first argument must be a recipe"),
        (["--help"], 0, "usage: python jobs/pretrain.py RECIPE"),
    ],
)
def test_messages_of_the_job(arguments, status, message):
    done = run_job(*arguments)
    assert done.returncode == status
    assert message in done.stderr + done.stdout
    assert "Traceback" not in done.stderr


def test_help_explains_and_a_misspelt_option_names_the_nearest():
    text = run_job("tiny", "--help").stdout
    for words in ("--train.global-batch", "Rate in Hz", "Rows in one optimizer step", "16000"):
        assert words in text
    done = run_job("tiny", "--train.wokers", "2")
    assert done.returncode == 2
    assert "--train.workers" in done.stderr + done.stdout
