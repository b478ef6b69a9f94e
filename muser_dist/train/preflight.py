"""Before anything starts: checks, the run's folder, the row counts of its shards."""

import contextlib
import json
import os
import platform
import subprocess
from collections.abc import Callable
from dataclasses import asdict, replace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from muser_dist.config import RunConfig, differences, from_dict, to_dict
from muser_dist.data.config import SourceConfig
from muser_dist.data.labels import find_label_values, with_stand_ins
from muser_dist.data.partners import Found, Partners, find_partners
from muser_dist.data.plan import Plan
from muser_dist.data.shards import ShardIndex, index_shards
from muser_dist.data.spectrogram import in_tasks
from muser_dist.data.storage import Storage, redact
from muser_dist.data.symbolic.characters import PATCH_BYTES
from muser_dist.data.text import check_templates, load_tokenizer
from muser_dist.errors import CheckpointError, ConfigError, DataError
from muser_dist.files import write_whole
from muser_dist.models.model import MultimodalModel
from muser_dist.objectives.registry import check_objective
from muser_dist.train.loop import MODEL
from muser_dist.train.store import CheckpointStore
from muser_dist.train.trackers import check_trackers

# Models of at most this size are tried on one row before anything starts; the machine that a job
# starts from may have little memory.
_TRIED_PARAMETERS = 300_000_000


def check_settings(
    config: RunConfig, try_model: Callable[[RunConfig], tuple[int, int]] | None = None
) -> tuple[int, int]:
    """Checks what can be checked without looking at the data; returns what `check_model` does.

    Args:
        config: the run's.
        try_model: in place of `check_model`.

    Raises:
        ConfigError: two settings contradict each other, or one cannot work.
    """
    check_paths(config)
    check_templates(config.data.templates)
    for source in config.data.sources:
        check_templates(source.templates, f"data.sources: templates of {source.name}")
    if config.objective.name == "supervised" and not config.data.label_kinds():
        raise ConfigError(
            'objective.name: "supervised" has nothing to learn; name metadata fields: --data.classes genre, with one '
            "value a row, or --data.tags tags, with lists of values"
        )
    if not config.data.pairs and any(pair.of_songs for pair in config.objective.pairs):
        raise ConfigError(
            "objective.pairs names partner or fused, of songs that listeners like together; give --data.pairs "
            "PAIRS.parquet, which jobs/mine_pairs.py makes of a log (with stages: --STAGE.data.pairs, such as "
            "--preference.data.pairs of htcl)"
        )
    config = replace(config, data=with_stand_ins(config.data))  # their values are found when the data is looked at
    check_objective(config)
    check_trackers(config.train.trackers)
    if config.evaluate.every_samples and not config.data.val:
        raise ConfigError("evaluate.every_samples: there is nothing to score; give --data.val, or leave it 0")
    smallest = min((source.weight for source in config.data.sources), default=1.0)
    if smallest * config.train.global_batch < sum(source.weight for source in config.data.sources):
        raise ConfigError(
            f"data.sources: the smallest weight gives less than one row in a global batch of "
            f"{config.train.global_batch}; raise it, or --train.global-batch"
        )
    if config.data.spectrogram_on == "cpu" and config.model.spectrogram is not None:
        in_tasks(config.data, config.model.spectrogram)
    if config.model.symbolic is not None:
        try:
            import muser_dist.data.symbolic.encode  # noqa: F401
        except ImportError as error:
            raise ConfigError(
                f"model.symbolic: what reads notation is not installed ({error}); pip install 'muser_dist[symbolic]'"
            ) from None
    if not config.data.training_sources():
        raise ConfigError(
            "no training data: give --data.train 'FOLDER/train-*.tar' (`python jobs/make_shards.py demo` makes some)"
        )
    return (try_model or check_model)(config)


def check_paths(config: RunConfig) -> None:
    """Refuses relative local paths in a job: they would be looked up in a copy of the working directory."""
    if "RAY_JOB_CONFIG_JSON_ENV_VAR" not in os.environ:
        return
    paths = [(f"data.{source.name}", path) for source in config.data.training_sources() for path in source.shards]
    paths += [("data.val", path) for path in config.data.val]
    paths += [
        (f"model.{name}.weights", tower.weights)
        for name, tower in config.model.towers().items()
        if tower.weights and Path(tower.weights).exists()  # else it may be a name on the hub
    ]
    paths += [
        (f"model.{name}.options.model", str(model))
        for name, tower in config.model.towers().items()
        if isinstance(model := tower.options.get("model"), str) and Path(model).exists()
    ]
    paths += [("data.pairs", config.data.pairs)] if config.data.pairs else []
    paths += [("data.storage-options", config.data.storage_options)] if config.data.storage_options else []
    paths += [("data.tokenizer", config.data.tokenizer)] if config.data.tokenizer_folder else []
    paths += [("model.start", config.model.start)] if config.model.start else []
    paths += [("train.checkpoint-storage", config.train.checkpoint_storage)] if config.train.checkpoint_storage else []
    for setting, path in [*paths, ("storage", config.storage)]:
        if "://" not in path and not Path(path).is_absolute():
            raise ConfigError(
                f"{setting}: {path!r} is a relative path, which in a submitted job means a temporary copy of your "
                f"working directory on the cluster; give an absolute path that every node sees: --{setting} /..."
            )


def check_model(config: RunConfig) -> tuple[int, int]:
    """The numbers of parameters and of those that are trained, after a look whether the towers can take a row.

    Raises:
        ConfigError: they cannot, or nothing of them is trained.
    """
    with torch.device("meta"):  # costs no memory, however large the towers are
        model = MultimodalModel(config)
    parameters = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    if trained == 0:
        options = " or ".join(f"--model.{name}.freeze" for name in config.model.towers())
        raise ConfigError(f"model: all of it is kept as it is, so nothing would be trained; leave out {options}")
    if parameters < _TRIED_PARAMETERS:
        data = config.data
        tokenizer = load_tokenizer(data.tokenizer, data.vocabulary, data.max_tokens)
        ids, lengths = tokenizer(["a song"])
        row = {
            "audio": torch.zeros(1, data.crop_samples, dtype=torch.int16),
            "audio_length": torch.tensor([data.crop_samples], dtype=torch.int32),
            "text_ids": torch.from_numpy(ids),
            "text_length": torch.from_numpy(lengths),
        }
        if config.model.symbolic is not None:
            row |= {
                "patches": torch.zeros(1, data.symbolic.max_patches, PATCH_BYTES, dtype=torch.uint8),
                "patches_length": torch.tensor([data.symbolic.max_patches], dtype=torch.int32),
            }
        if config.model.features is not None:
            row |= {
                "features": torch.zeros(1, data.features.max_windows, data.features.size, dtype=torch.float16),
                "features_length": torch.tensor([data.features.max_windows], dtype=torch.int32),
            }
        if "view" in config.features:
            row |= {"view": row["audio"], "view_length": row["audio_length"]}
        try:
            with torch.inference_mode():
                MultimodalModel(config)(row)
        except KeyError as missing:
            raise ConfigError(
                f"model: a tower reads {missing}, which is not made for any modality that the model has; `build` must "
                "fit its modality (docs/towers.md)"
            ) from None
        except (RuntimeError, ValueError, IndexError) as error:
            raise ConfigError(
                f"the towers cannot take a row of {data.crop_seconds:g} s at {data.sample_rate} Hz ({error}); "
                "give a longer --data.crop-seconds, or towers with smaller windows and fewer stages"
            ) from None
    return parameters, trained


def has_begun(config: RunConfig) -> bool:
    """Whether the run has results that its config and shards must not drift away from."""
    trained = (config.folder / MODEL / "config.json").exists()
    return trained or bool(CheckpointStore(config, Storage.of(config.data)).steps())


def prepare_folder(config: RunConfig, command: list[str]) -> None:
    """Makes the run's folder with config.json and run.json, or checks that it is the same run's.

    Raises:
        CheckpointError: the folder holds a run with another config.
        ConfigError: the folder cannot be made, or checkpoints cannot be written.
    """
    if "://" in config.storage:
        raise ConfigError(f"storage: {config.storage!r} is a URL; give a folder that every node sees")
    path = config.folder / "config.json"
    if config.train.checkpoint_storage:
        CheckpointStore(config, Storage.of(config.data)).check()
    if has_begun(config):
        there = _config_there(config, path)
        # A start may have moved with `storage`, or have stayed where it was.
        moved = differences(there.told_from_storage(), config.told_from_storage())
        changed = moved and differences(there, config)
        if changed:
            raise CheckpointError(
                f"{config.folder} already holds a run with another config ({'; '.join(changed[:4])}"
                f"{' ...' if len(changed) > 4 else ''}); give another --name, or delete that folder"
            )
    elif path.exists():
        _check_moved(_config_there(config, path), config)
    try:
        config.folder.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(to_dict(config), indent=2))
        record = config.folder / "run.json"
        started = [datetime.now(UTC).isoformat(timespec="seconds")]
        with contextlib.suppress(FileNotFoundError, ValueError, KeyError):
            started = json.loads(record.read_text())["starts"] + started
        write_whole(record, json.dumps(provenance(command) | {"started": started[0], "starts": started}, indent=2))
    except OSError as error:
        raise ConfigError(
            f"storage: cannot write to {config.folder} ({error.strerror}); give another --storage"
        ) from None


def _config_there(config: RunConfig, path: Path) -> RunConfig:
    """The config in a run's folder; raises CheckpointError where it cannot be read."""
    place = CheckpointStore(config, Storage.of(config.data)).url
    try:
        return from_dict(json.loads(path.read_text()), str(path))
    except FileNotFoundError:
        raise CheckpointError(
            f"{redact(place)} holds checkpoints, and {path} is not there to say of which run; give another --name, "
            "bring the folder back, or delete those checkpoints"
        ) from None
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} is broken ({error}); delete {config.folder} and the checkpoints in {redact(place)}, or give "
            "another --name"
        ) from None


def _check_moved(there: RunConfig, config: RunConfig) -> None:
    """Raises CheckpointError where a run that has checkpoints at one place is told to look for them at another."""
    stores = [CheckpointStore(run, Storage.of(config.data)) for run in (there, config)]
    old, new = (store.url for store in stores)
    if old != new and (steps := stores[0].steps()):
        raise CheckpointError(
            f"{config.folder} has its checkpoints in {redact(old)}, up to step {steps[-1]:,}, and there is none in "
            f"{redact(new)}; copy them there, or give the old --train.checkpoint-storage. To start again give another "
            "--name"
        )


def provenance(command: list[str]) -> dict[str, Any]:
    """The command, versions, git commit and machine that a result came from."""

    def commit() -> str | None:
        with contextlib.suppress(OSError, subprocess.CalledProcessError):
            root = Path(__file__).parents[1]
            head = subprocess.run(["git", "-C", root, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
            return head.stdout.strip()
        return None

    versions = {}
    for package in ("muser_dist", "torch", "torchaudio", "ray", "deepspeed", "transformers", "timm"):
        with contextlib.suppress(PackageNotFoundError):
            versions[package] = version(package)
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "command": " ".join(command),
        "commit": commit(),
        "versions": {"python": platform.python_version()} | versions,
        "machine": {"platform": platform.platform(), "cpus": os.cpu_count(), "gpu": gpu},
    }


VAL = SourceConfig("val", ())

LABEL_VALUES = "labels.json"
"""File in the run's folder with the values of the fields that are learned; --data.label-values reads it."""


PARTNERS = "partners"
"""Folder in the run's folder with the pairs of data.pairs as numbers of rows."""


def find_shards(config: RunConfig, storage: Storage) -> dict[str, list[str]]:
    """The shards of each training source, and of "val", by name.

    Raises:
        DataError: a pattern matches nothing.
    """
    several = bool(config.data.sources)
    found = {
        source.name: storage.expand(source.shards, f"data.sources: {source.name}" if several else "data.train")
        for source in config.data.training_sources()
    }
    if VAL.name in found:
        raise ConfigError('data.sources: "val" is the name of the validation shards; choose another')
    found |= {VAL.name: storage.expand(config.data.val, "data.val")}
    owner: dict[str, str] = {}
    for name, urls in found.items():
        for url in urls:
            if url in owner:
                raise DataError(f"{redact(url)} is among the shards of {owner[url]} and of {name}; name it once")
            owner[url] = name
    return found


def load_index(config: RunConfig, source: SourceConfig, storage: Storage, urls: list[str]) -> ShardIndex:
    """The row counts of a source's shards, kept in the run's folder so that its order never changes."""
    setting = f"data.{source.name}"
    kept = config.folder / f"{source.name}-index.json"
    if kept.exists() and has_begun(config):
        index = ShardIndex.load(kept)
        if index.urls == urls:
            return index
        raise DataError(
            f"{setting}: {len(urls)} shards match now, but the run began with {len(index)} others; "
            "its order of rows would change. Bring the shards back, or start a run with another --name"
        )

    def progress(done: int, of: int) -> None:
        if done == of or done % max(1, of // 20) == 0:
            print(f"Counting rows of {setting}: {done}/{of} shards", flush=True)

    index = index_shards(storage, urls, setting, progress)
    for url, problem in index.problems.items():
        print(f"Warning: {redact(url)} {problem}; rows that cannot be read will be quarantined", flush=True)
    index.save(kept)
    return index


def load_label_values(config: RunConfig, indices: list[ShardIndex], storage: Storage) -> RunConfig:
    """The config with the values of all fields that are learned, kept in the run's folder: heads are sized by them.

    Raises:
        DataError: a field has too few values, or too many.
    """
    if not config.data.label_kinds():
        return config
    kept = config.folder / LABEL_VALUES
    if kept.exists() and has_begun(config):
        values = {name: tuple(of_field) for name, of_field in json.loads(kept.read_text()).items()}
    else:

        def progress(done: int, of: int) -> None:
            if done == of or done % max(1, of // 20) == 0:
                fields = ", ".join(config.data.label_kinds())
                print(f"Looking for the values of {fields}: {done}/{of} shards", flush=True)

        values = find_label_values(config.data, indices, storage, progress)
        write_whole(kept, json.dumps(values, ensure_ascii=False, indent=1))
    print("; ".join(f"{name}: {len(of_field)} values" for name, of_field in values.items()), flush=True)
    return replace(config, data=replace(config.data, label_values=values))


def load_partners(
    config: RunConfig, indices: list[ShardIndex], storage: Storage, folder: Path | None = None
) -> Partners | None:
    """The partners of all rows, where data.pairs is given; kept in the run's folder so that they never change.

    Args:
        config, indices, storage: the run and its training shards.
        folder: where they are kept in place of the run's.

    Raises:
        DataError: as `find_partners`.
    """
    if not config.data.pairs:
        return None
    kept = folder or config.folder / PARTNERS
    record = kept / "found.json"
    if not (record.exists() and has_begun(config)):

        def progress(done: int, of: int) -> None:
            if of > 20 and (done == of or done % (of // 20) == 0):
                print(f"Looking for the songs of data.pairs: {done}/{of} shards", flush=True)

        found = find_partners(config.data.pairs, ShardIndex.join(indices), storage, kept, progress)
        write_whole(record, json.dumps(asdict(found)))
    print(f"Pairs: {Found(**json.loads(record.read_text()))}", flush=True)
    return Partners(kept)


def check_rows(config: RunConfig, indices: list[ShardIndex]) -> None:
    """Raises DataError when the shards cannot fill one global batch."""
    total = sum(index.total for index in indices)
    if total < config.train.global_batch:
        chunk = min(config.train.chunk, max(1, total // 2))
        raise DataError(
            f"data.train: {total} rows in {sum(map(len, indices))} shards are fewer than one global batch "
            f"({config.train.global_batch}); give more data, or --train.chunk {chunk} --train.global-batch "
            f"{total // chunk * chunk}"
        )


def describe_plan(config: RunConfig, indices: list[ShardIndex], plan: Plan, parameters: int) -> str:
    """One line: what will be trained on what. In a pass over pairs each song that has a partner comes once with one."""
    t, total = config.train, sum(index.total for index in indices) * config.data.train_share
    passes = t.steps * plan.batch / sum(source.length for source in plan.sources)
    return (
        f"{parameters / 1e6:.1f} M parameters, {total:,.0f} rows in {sum(map(len, indices))} shards, "
        f"{t.steps:,} steps of {t.global_batch} rows ({passes:.1f} passes), "
        f"{t.workers} workers, ZeRO {t.zero_stage}, {t.precision}"
    )
