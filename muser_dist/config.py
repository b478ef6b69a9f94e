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
from muser_dist.train.config import TrainConfig

Modality = Literal["audio", "spectrogram", "text"]
MODALITIES: tuple[Modality, ...] = ("audio", "spectrogram", "text")


@dataclass(frozen=True)
class TowerConfig(Strict):
    build: str
    """Built-in tower ("waveform", "spectrogram", "text") or your own as "package.module:Class"."""
    options: dict[str, Any] = field(default_factory=dict)
    """Arguments of the tower's constructor: its sizes. Each tower's docstring lists them."""
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
    projection_hidden: int = 0
    """Hidden units of the projection heads; 0 means one linear layer."""

    def towers(self) -> dict[Modality, TowerConfig]:
        """The towers that the model has, by modality, in the order of MODALITIES."""
        return {name: tower for name in MODALITIES if (tower := getattr(self, name)) is not None}

    def __post_init__(self) -> None:
        require(len(self.towers()) >= 2, "model has fewer than two towers; contrasting needs two modalities")
        require(self.projection_dim >= 1, "model.projection_dim must be at least 1")
        for name, tower in self.towers().items():
            require(
                tower.cache_rows == 0 or name == "text",
                f"model.{name}.cache_rows: only texts come again as they were; leave it out",
            )


@dataclass(frozen=True)
class PairConfig(Strict):
    first: Modality
    """One modality of the pair."""
    second: Modality
    """The other one; both directions are trained."""
    weight: float = 1.0
    """Share of this pair in the loss; weights are divided by their sum."""


@dataclass(frozen=True)
class TemperatureConfig(Strict):
    init: float = 0.07
    """Temperature at the start; similarities are divided by it."""
    learnable: bool = True
    """Whether it is trained."""
    minimum: float = 0.01
    """Lowest temperature (similarities are multiplied by at most its inverse)."""
    maximum: float = 100.0
    """Highest temperature."""
    shared: bool = False
    """One temperature for all pairs instead of one for each."""

    def __post_init__(self) -> None:
        require(
            0 < self.minimum <= self.init <= self.maximum,
            f"objective.temperature: need 0 < minimum <= init <= maximum, not minimum {self.minimum}, "
            f"init {self.init} and maximum {self.maximum}",
        )


@dataclass(frozen=True)
class ObjectiveConfig(Strict):
    name: str = "contrastive"
    """"contrastive" (symmetric InfoNCE), "decoupled", "sigmoid", "debiased", "similarity_weighted", "muser_poster",
    "muser_code" (docs/objective.md), or your own objective as "package.module:function"."""
    options: dict[str, float] = field(default_factory=dict)
    """Further numbers of the objective, as NAME VALUE: "debiased" takes tau_plus and beta, "similarity_weighted"
    kappa."""
    pairs: tuple[PairConfig, ...] = (PairConfig("audio", "text"), PairConfig("spectrogram", "text"))
    """Modalities that are contrasted with each other."""
    targets: Literal["instance", "same_text", "same_label"] = "same_text"
    """What counts as a match: only the row itself, every row whose text states the same facts, or every row
    with the same value of data.label."""
    exclude_same_text: bool = False
    """Leaves rows whose text states the same facts out of the negatives where they are no match."""
    temperature: TemperatureConfig = TemperatureConfig()
    """Temperature of the softmax."""
    bias: float | None = None
    """Start of a learned bias of all similarities, one for each pair; "sigmoid" needs it (SigLIP: -10)."""
    normalise: bool = True
    """Compares by cosine; without, by the dot product of the embeddings as they are (CLaMP 2 and 3)."""
    dims: tuple[int, ...] = ()
    """Trains these many leading dimensions of the embedding as embeddings of their own (Matryoshka)."""
    bf16: bool = False
    """Rounds embeddings to bfloat16 before they are gathered and compared: half of the traffic, and tensor cores.
    Sums stay float32."""
    gather_mib: int = 4096
    """MiB of gathered embeddings that a worker may hold; above, blocks of them travel in a ring instead."""

    def __post_init__(self) -> None:
        require(len(self.pairs) > 0, "objective.pairs is empty; name at least one pair of modalities")
        for pair in self.pairs:
            require(pair.first != pair.second, f"objective.pairs contrasts {pair.first} with itself")
            require(pair.weight > 0, f"objective.pairs: the weight of {pair.first}-{pair.second} must be positive")
        named = [{pair.first, pair.second} for pair in self.pairs]
        require(all(named.count(pair) == 1 for pair in named), "objective.pairs names a pair twice; give it a weight")
        require(
            self.name != "sigmoid" or self.bias is not None,
            "objective.bias: the sigmoid loss needs a bias; SigLIP starts at -10",
        )
        require(
            self.bias is None or self.name == "sigmoid" or ":" in self.name,
            f"objective.bias means nothing to {self.name!r}; only the sigmoid loss has one",
        )
        require(all(dim >= 1 for dim in self.dims), "objective.dims: a number of dimensions must be at least 1")
        require(len(set(self.dims)) == len(self.dims), "objective.dims: numbers of dimensions must differ")
        require(self.gather_mib >= 0, "objective.gather_mib must not be negative")


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
    objective: ObjectiveConfig = ObjectiveConfig()
    """What the towers are trained for."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """Workers, batch, optimizer, checkpoints."""
    evaluate: EvaluateConfig = EvaluateConfig()
    """What the trained model is scored on."""

    def __post_init__(self) -> None:
        towers = self.model.towers()
        for pair in self.objective.pairs:
            for name in (pair.first, pair.second):
                require(
                    name in towers,
                    f"objective.pairs contrasts {pair.first} with {pair.second}, but model.{name} is None; "
                    f"the model has {', '.join(towers)}",
                )
        used = {name for pair in self.objective.pairs for name in (pair.first, pair.second)}
        for name in towers:
            require(
                name in used or ":" in self.objective.name,
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
