"""RunConfig: one typed tree that says everything about a run.

Recipes return it, the command line overrides it (docstrings under the fields are its help),
and `config.json` in the run's folder holds it. It never changes after the run has started.
Lengths of training are counted in samples, so that they mean the same at every batch size
and number of workers.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, is_dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from muser_dist.data.config import DataConfig
from muser_dist.errors import ConfigError, require
from muser_dist.models.config import MODALITIES as MODALITIES
from muser_dist.models.config import Modality as Modality
from muser_dist.models.config import ModelConfig as ModelConfig
from muser_dist.models.config import TowerConfig as TowerConfig
from muser_dist.objectives.config import TOWER_OF, WITHOUT_PAIRS, ObjectiveConfig
from muser_dist.objectives.config import Feature as Feature
from muser_dist.objectives.config import PairConfig as PairConfig
from muser_dist.objectives.config import TemperatureConfig as TemperatureConfig
from muser_dist.strict import Strict
from muser_dist.train.config import TrainConfig


@dataclass(frozen=True)
class EvaluateConfig(Strict):
    fields: tuple[str, ...] = ()
    """Metadata fields for zero-shot classification through the templates; those that the
    data or the templates lack are named and left out."""
    rows: int = 10_000
    """Most validation rows to score, from the first on."""
    languages: tuple[str, ...] = ()
    """Where fields are objects {language: text}: languages, as the data call them, that retrieval by texts is scored
    in, each by itself."""
    every_samples: int = 0
    """Samples of training between scores of the model so far, which a task of its own makes while training goes on:
    on a GPU that no worker has, or on CPUs. 0 means only the trained model is scored."""

    def __post_init__(self) -> None:
        require(self.rows >= 1, "evaluate.rows must be at least 1")
        require(len(set(self.languages)) == len(self.languages), "evaluate.languages names one twice")
        require(self.every_samples >= 0, "evaluate.every_samples must not be negative")


@dataclass(frozen=True)
class RunConfig(Strict):
    model: ModelConfig
    """Towers and heads."""
    name: str = ""
    """Name of the run's folder. By default the recipe's name and a hash of the config, so the
    same command again resumes the same run and another config gets another folder."""
    storage: str = "runs"
    """Folder that holds the runs' folders; every node must see it under this path."""
    seed: int = 0
    """Decides initial weights, order, crops, templates and dropout."""
    data: DataConfig = field(default_factory=DataConfig)
    """Shards and what becomes of a clip."""
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    """What the towers are trained for."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """Workers, batch, optimizer, checkpoints."""
    evaluate: EvaluateConfig = EvaluateConfig()
    """What the trained model is scored on."""

    def __post_init__(self) -> None:
        towers = self.model.towers()
        objective = self.objective.name
        for pair in self.objective.pairs:
            for tower_name in pair.towers:
                require(
                    tower_name in towers,
                    f"objective.pairs contrasts {pair.first} with {pair.second}, but model.{tower_name} is None; "
                    f"the model has {', '.join(towers)}",
                )
            require(
                "notation" not in (pair.first, pair.second) or len(self.data.symbolic.notations) == 2,
                f"objective.pairs contrasts {pair.first} with {pair.second}, of two notations, and "
                f"data.symbolic.notations is only {self.data.symbolic.notations[0]}; give abc and midi",
            )
        of_songs = any(pair.of_songs for pair in self.objective.pairs)
        require(
            of_songs or not self.data.pairs or ":" in self.objective.name,
            "data.pairs: no pair of objective.pairs names partner or fused, so nothing would learn of it; leave it out",
        )
        require(
            not of_songs or self.train.chunk % 2 == 0,
            f"objective.pairs: two songs of a pair share a chunk, so train.chunk must be even, not {self.train.chunk}",
        )
        require(
            objective not in WITHOUT_PAIRS or len(towers) == 1,
            f'objective.name: "{objective}" trains one tower, and the model has {", ".join(towers)}; leave one',
        )
        require(
            objective == "supervised" or ":" in objective or not self.data.label_kinds(),
            f'data.classes and data.tags are learned by the objective "supervised", not by {objective!r}; '
            "take the recipe muser_audio_only, or jobs/finetune.py",
        )
        for name, tower in towers.items():
            rewrites = tower.build == "m3_pretraining"
            require(
                rewrites or ":" in tower.build or objective != "masked_patches",
                f'objective.name: "masked_patches" trains the tower m3_pretraining, not {tower.build}; give '
                f"--model.{name}.build m3_pretraining",
            )
            require(
                not rewrites or ":" in objective or objective == "masked_patches",
                f'model.{name}.build: m3_pretraining is for the objective "masked_patches"; with {objective!r} take m3',
            )
            require(
                name in self.encoded or tower.freeze_head,
                f"model.{name}: no pair of objective.pairs names it, so it would not be trained; name it in a pair, "
                f"leave the tower out (None in a recipe), or keep it as it is (--model.{name}.freeze "
                f"--model.{name}.freeze-head)",
            )
        require(
            not self.objective.pairs or not all(towers[name].freeze_head for name in self.encoded),
            f"model: freeze and freeze_head keep all that is encoded ({', '.join(self.encoded)}) as it is, so nothing "
            "would be trained",
        )
        require(
            max(self.objective.dims, default=0) <= self.model.projection_dim,
            f"objective.dims goes beyond model.projection_dim ({self.model.projection_dim})",
        )
        require(
            self.objective.targets != "same_label" or bool(self.data.label),
            'objective.targets "same_label" needs the name of a metadata field: data.label',
        )
        require(
            self.train.zero_stage < 3 or self.model.text is None or self.model.text.cache_rows == 0,
            "model.text.cache_rows: at ZeRO-3 a rank that has no text to encode would leave the others waiting; "
            "give --train.zero-stage 2 or less, or --model.text.cache-rows 0",
        )
        for name, tower in towers.items():
            require(
                self.train.zero_stage < 3 or not tower.compile,
                f"model.{name}.compile: at ZeRO-3 DeepSpeed gathers weights around each layer, which leaves no graph "
                f"worth compiling; give --train.zero-stage 2 or less, or leave --model.{name}.compile out",
            )
        require("/" not in self.name, f"name {self.name!r} holds a slash; it names one folder inside `storage`")

    def named(self, recipe: str) -> "RunConfig":
        """This config with its default name filled in: `recipe` and a hash of the settings that decide the result."""
        if self.name:
            return self
        settings = {name: value for name, value in leaves(to_dict(self)) if name not in OPERATIONAL}
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
        return replace(self, name=f"{recipe.replace(':', '.')}-{digest[:8]}")

    def starting_from(self, before: "RunConfig", takes: Literal["model", "towers"]) -> "RunConfig":
        """This config with the model that another run leaves behind as its start."""
        if takes == "model":
            return replace(self, model=replace(self.model, start=str(before.folder)))
        there = before.model.towers()
        towers: dict[str, Any] = {
            name: replace(tower, weights=str(before.folder))
            for name, tower in self.model.towers().items()
            if name in there
        }
        return replace(self, model=replace(self.model, **towers))

    def apart_from(self, before: "RunConfig") -> "RunConfig":
        """This config without what `starting_from` took from that run, which may have no model yet."""
        return self._with_starts(lambda path: "" if path == str(before.folder) else path)

    def told_from_storage(self) -> "RunConfig":
        """This config with starts that lie in `storage` as paths from there, which a move of it leaves as they are."""

        def of(path: str) -> str:
            inside = path and Path(path).is_relative_to(self.storage)
            return str(Path(path).relative_to(self.storage)) if inside else path

        return self._with_starts(of)

    def _with_starts(self, of: Callable[[str], str]) -> "RunConfig":
        towers: dict[str, Any] = {
            n: replace(tower, weights=of(tower.weights)) for n, tower in self.model.towers().items()
        }
        return replace(self, model=replace(self.model, **towers, start=of(self.model.start)))

    @property
    def encoded(self) -> tuple[Modality, ...]:
        """The towers that run in training: all but those that no pair names, which are kept as they are."""
        named = {name for pair in self.objective.pairs for name in pair.towers}
        all_run = self.objective.name in WITHOUT_PAIRS or ":" in self.objective.name
        return tuple(name for name in self.model.towers() if all_run or name in named)

    @property
    def features(self) -> tuple[Feature, ...]:
        """What the model embeds in training: the modality of each tower that runs, and "view" and "notation" where a
        pair names them."""
        named = {name for pair in self.objective.pairs for name in (pair.first, pair.second)}
        return (*self.encoded, *(name for name in TOWER_OF if name in named))

    @property
    def evaluated(self) -> tuple[Feature, ...]:
        """What is embedded in evaluation: the modality of each tower; and behind symbolic, which is the first of
        data.symbolic.notations that a row has, "notation", the other one, where these are two."""
        found: list[Feature] = []
        for name in self.model.towers():
            found.append(name)
            if name == "symbolic" and len(self.data.symbolic.notations) == 2:
                found.append("notation")
        return tuple(found)

    @property
    def taking_part(self) -> tuple[tuple[str, str], ...]:
        """Names of flags in a chunk: a row is used when both of any of these are set."""
        pairs = [(pair.first, pair.second) for pair in self.objective.pairs]  # "partner" and "fused" have flags too
        labelled = [(name, "label") for name in self.model.towers() if self.data.label_kinds()]
        alone = [(name, name) for name in self.model.towers()]  # of masked patches, or for the user's own objective
        return (*pairs, *labelled) or tuple(alone)

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return Path(self.storage) / self.name


@dataclass(frozen=True)
class Stage:
    """A part of a recipe that is trained in parts, each of which is a whole run that starts from the one before."""

    name: str
    """Names the stage in options (--NAME.train.lr) and its folder in the run's."""
    config: RunConfig
    """What the stage trains on what, and how."""
    takes: Literal["model", "towers"] = "model"
    """What it takes over from the stage before: all weights that both models have, or those of the towers alone."""


@dataclass(frozen=True)
class Stages:
    """A recipe in stages."""

    stages: tuple[Stage, ...]
    """In the order in which they are trained."""

    def __post_init__(self) -> None:
        names = [stage.name for stage in self.stages]
        require(len(names) > 0 and len(set(names)) == len(names), f"stages: names must differ, not {', '.join(names)}")
        for name in names:
            taken = [field.name for field in fields(RunConfig)]
            require(
                name.isidentifier() and name not in taken,
                f"stages: {name!r} must be a word of letters, digits and _, and none of {', '.join(taken)}",
            )

    def chained(self, recipe: str) -> tuple[RunConfig, ...]:
        """The runs of the stages, in one folder: each starts from the one before.

        Raises:
            ConfigError: a stage has a setting that this would replace.
        """
        for before, stage in pairwise(self.stages):
            _check_follows(before, stage)
        settings = [
            (stage.name, stage.takes, name, value)
            for stage in self.stages
            for name, value in leaves(to_dict(stage.config))
            if name not in OPERATIONAL and name != "name"
        ]
        first = self.stages[0].config
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
        folder = Path(first.storage) / (first.name or f"{recipe.replace(':', '.')}-{digest[:8]}")
        runs: list[RunConfig] = []
        for stage in self.stages:
            config = replace(stage.config, storage=str(folder), name=stage.name)
            if place := config.train.checkpoint_storage:  # which stages of other runs may have as well
                place = f"{place.rstrip('/')}/{folder.name}"
                config = replace(config, train=replace(config.train, checkpoint_storage=place))
            runs.append(config.starting_from(runs[-1], stage.takes) if runs else config)
        return tuple(runs)


def _check_follows(before: Stage, stage: Stage) -> None:
    """Refuses settings of a stage of which nothing would come; those that the stage before has too came to it there."""
    for name in ("name", "storage"):
        there, here = (getattr(of.config, name) for of in (before, stage))
        require(
            there == here,
            f"{name} is {there!r} of stage {before.name} and {here!r} of {stage.name}, and all stages lie in one "
            f"folder; give --{name} without a stage's name before it",
        )
    if stage.takes == "model":
        replaced = {"model.start": (before.config.model.start, stage.config.model.start)}
    else:
        towers = before.config.model.towers()
        replaced = {
            f"model.{name}.weights": (towers[name].weights, tower.weights)
            for name, tower in stage.config.model.towers().items()
            if name in towers
        }
    for setting, (there, here) in replaced.items():
        require(
            here in ("", there),
            f"{stage.name}.{setting}: {here!r} would not be used, for stage {stage.name} goes on from stage "
            f"{before.name}; leave it out, or give it to the first stage",
        )


OPERATIONAL = frozenset(
    {
        "storage",
        "data.storage_options",
        "data.read_timeout",
        "data.cache_folder",
        "data.cache_gib",
        "data.clip_cache_gib",
        "data.decode_slots",
        "data.max_decode_slots",
        "data.buffer_mib",
        "data.max_bad_share",
        "train.workers",
        "train.gpu_share",
        "train.cpus_per_worker",
        "train.resource",
        "train.checkpoint_storage",
        "train.checkpoint_samples",
        "train.checkpoint_patience",
        "train.keep_checkpoints",
        "train.max_failures",
        "train.hang_seconds",
        "train.offload",
        "train.zero_stage",
        "train.cache_gradients",
        "train.log_steps",
        "train.trackers",
        "train.profile",
        "evaluate.every_samples",
        "objective.gather_mib",
        *(
            f"model.{name}.{field}"
            for name in MODALITIES
            for field in ("checkpoint_activations", "compile", "cache_rows")
        ),
    }
)
"""Settings that do not change what a run computes, rounding aside: they may differ when it goes on."""

_ADAPTER = TypeAdapter(RunConfig)


def to_dict(config: RunConfig) -> dict[str, Any]:
    """The config as plain JSON values."""
    return _ADAPTER.dump_python(config, mode="json")


def from_dict(values: Any, source: str) -> RunConfig:
    """A checked RunConfig out of plain values.

    Args:
        values: what `to_dict` returned, perhaps through JSON.
        source: where the values come from, for the error.

    Raises:
        ConfigError: a field is unknown, missing or of a wrong type; the message names it.
    """
    try:
        return _ADAPTER.validate_python(values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise ConfigError(f"{source}: {where}: {first['msg']}") from None


def leaves(values: dict[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted names and values of what `to_dict` returned."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{path}{name}.")
        else:
            yield path + name, value


def differences(old: Any, new: Any, path: str = "") -> list[str]:
    """Dotted names of the fields that decide the result and differ between two configs, with both values."""
    if is_dataclass(old) and type(old) is type(new):
        return [
            line
            for f in fields(old)
            for line in differences(getattr(old, f.name), getattr(new, f.name), f"{path}.{f.name}" if path else f.name)
        ]
    return [] if old == new or path in OPERATIONAL else [f"{path}: {old!r} there, {new!r} here"]
