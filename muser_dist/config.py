"""RunConfig: one typed tree that says everything about a run.

Recipes return it, the command line overrides it (docstrings under the fields are its help),
and `config.json` in the run's folder holds it. It never changes after the run has started.
Lengths of training are counted in samples, so that they mean the same at every batch size
and number of workers.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from muser_dist.data.config import DataConfig, Strict
from muser_dist.errors import ConfigError, require
from muser_dist.objectives.config import WITHOUT_PAIRS, Feature, ObjectiveConfig
from muser_dist.objectives.config import PairConfig as PairConfig
from muser_dist.objectives.config import TemperatureConfig as TemperatureConfig
from muser_dist.train.config import TrainConfig

Modality = Literal["audio", "spectrogram", "text"]
MODALITIES: tuple[Modality, ...] = ("audio", "spectrogram", "text")


@dataclass(frozen=True)
class TowerConfig(Strict):
    build: str
    """Built-in tower ("waveform", "spectrogram", "text", sized by options; "esresnext_fbsp" on raw samples;
    "hf_waveform", "hf_spectrogram", "hf_text" for networks of Hugging Face; "htcl_audio", "m3", "features" of HTCL and
    CLaMP; docs/towers.md) or your own as "package.module:Class"."""
    options: dict[str, Any] = field(default_factory=dict)
    """Arguments of the tower's constructor: its sizes. Each tower's docstring lists them."""
    head: bool = True
    """Projects the tower's output into the joint space. Off, the output is the embedding: towers that end in a
    projection of their own, as CLIP's do; their width must be model.projection_dim."""
    weights: str = ""
    """Weights to start from: a file (.safetensors, or .pt/.bin with nothing but tensors), a folder of Hugging Face's or
    its name there, or the folder `model` of a run, of which the tower of this modality is taken. How keys met is said
    at the start and in weights.json."""
    lr: float | None = None
    """Peak learning rate of this tower and its head; train.lr when not given."""
    freeze: bool = False
    """Keeps the tower's weights as they are (dropout off, batch norms with running statistics) and trains its head
    only. It runs forward once, also where chunks are encoded twice."""
    cache_rows: int = 0
    """Rows of a frozen text tower's output that a worker keeps, so that a text that comes again is not encoded again
    (width x 4 bytes each, on its device). 0 keeps none."""
    checkpoint_activations: bool = False
    """Keeps of each layer its input alone, and runs it once more in the backward pass: less memory, more time."""
    compile: bool = False
    """torch.compile in training, at ZeRO stages up to 2. Takes a minute or more at the start; needs a C++ compiler on
    CPUs, Triton on GPUs."""

    def __post_init__(self) -> None:
        require(self.cache_rows >= 0, "cache_rows of a tower must not be negative")
        require(
            self.cache_rows == 0 or self.freeze,
            "cache_rows keeps outputs of a tower that does not change; give freeze too (--model.text.freeze)",
        )
        require(
            not (self.cache_rows and self.compile),
            "cache_rows runs a tower on as many rows as are missing, compile makes code for one number; choose one",
        )
        require(
            not (self.freeze and self.checkpoint_activations),
            "checkpoint_activations does nothing for a tower with freeze, which keeps no activations; leave it out",
        )


@dataclass(frozen=True)
class ModelConfig(Strict):
    audio: TowerConfig | None = None
    """Tower that hears the waveform; None leaves the modality out."""
    spectrogram: TowerConfig | None = None
    """Tower that sees the log-mel spectrogram; None leaves the modality out."""
    text: TowerConfig | None = None
    """Tower that reads the text; None leaves the modality out."""
    projection_dim: int = 128
    """Dimensions of the joint space."""
    projection_hidden: int | tuple[int, ...] = 0
    """Hidden units of the projection heads, of several layers one number each (HTCL: 384 192); 0 means one linear
    layer."""
    projection_activation: Literal["gelu", "relu"] = "gelu"
    """What stands between the layers of the projection heads."""

    def towers(self) -> dict[Modality, TowerConfig]:
        """The towers that the model has, by modality, in the order of MODALITIES."""
        return {name: tower for name in MODALITIES if (tower := getattr(self, name)) is not None}

    @property
    def hidden_layers(self) -> tuple[int, ...]:
        """Units of each hidden layer of the projection heads."""
        hidden = self.projection_hidden
        return hidden if isinstance(hidden, tuple) else (hidden,) if hidden else ()

    def with_absolute_weights(self) -> "ModelConfig":
        """The same with whole paths to the weights that towers start with: workers run in other folders."""
        towers: dict[str, Any] = {
            name: replace(tower, weights=str(Path(tower.weights).resolve()))
            for name, tower in self.towers().items()
            if tower.weights and Path(tower.weights).exists()  # else it may be a name on the hub
        }
        return replace(self, **towers)

    def __post_init__(self) -> None:
        require(len(self.towers()) >= 1, "model has no tower; give it one for each modality, such as model.audio")
        require(self.projection_dim >= 1, "model.projection_dim must be at least 1")
        require(
            all(units >= 1 for units in self.hidden_layers),
            "model.projection_hidden: each layer needs at least 1 unit; give 0 alone for heads without hidden layers",
        )
        for name, tower in self.towers().items():
            require(
                tower.cache_rows == 0 or name == "text",
                f"model.{name}.cache_rows: only texts come again as they were; leave it out",
            )


@dataclass(frozen=True)
class EvaluateConfig(Strict):
    fields: tuple[str, ...] = ()
    """Metadata fields for zero-shot classification through the templates; those that the
    data or the templates lack are named and left out."""
    rows: int = 10_000
    """Most validation rows to score, from the first on."""
    every_samples: int = 0
    """Samples of training between scores of the model so far, which a task of its own makes while training goes on:
    on a GPU that no worker has, or on CPUs. 0 means only the trained model is scored."""

    def __post_init__(self) -> None:
        require(self.rows >= 1, "evaluate.rows must be at least 1")
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
        used: set[str] = set(towers) if objective in WITHOUT_PAIRS else set()
        for pair in self.objective.pairs:
            for name in (pair.first, pair.second):
                tower_name = "audio" if name == "view" else name
                require(
                    tower_name in towers,
                    f"objective.pairs contrasts {pair.first} with {pair.second}, but model.{tower_name} is None; "
                    f"the model has {', '.join(towers)}",
                )
                used.add(tower_name)
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
                name in used or ":" in objective,
                f"model.{name}: no pair of objective.pairs names it, so it would not be trained; name it in a pair, or "
                "leave the tower out (None in a recipe)",
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

    @property
    def features(self) -> tuple[Feature, ...]:
        """What the model embeds in training: the modality of each tower, and "view" where a pair names it."""
        views = any("view" in (pair.first, pair.second) for pair in self.objective.pairs)
        return (*self.model.towers(), "view") if views else tuple(self.model.towers())

    @property
    def taking_part(self) -> tuple[tuple[str, str], ...]:
        """Names of flags in a chunk: a row is used when both of any of these are set."""
        pairs = [(pair.first, pair.second) for pair in self.objective.pairs]
        labelled = [(name, "label") for name in self.model.towers() if self.data.label_kinds()]
        rewritten = [(name, name) for name in self.model.towers() if self.objective.name == "masked_patches"]
        return (*pairs, *labelled, *rewritten)

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return Path(self.storage) / self.name


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
