"""RunConfig: one typed tree that says everything about a run.

Recipes return it, the command line overrides it (docstrings under the fields are its help),
and `config.json` in the run's folder holds it. It never changes after the run has started.
Lengths of training are counted in samples, so that they mean the same at every batch size
and number of workers.
"""

import hashlib
import json
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict, TypeAdapter, ValidationError

from muser_dist.errors import ConfigError

Modality = Literal["audio", "spectrogram", "text"]
MODALITIES: tuple[Modality, ...] = ("audio", "spectrogram", "text")


class _Strict:
    """Makes a field that a JSON config has and the dataclass lacks an error."""

    __pydantic_config__ = ConfigDict(extra="forbid")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


@dataclass(frozen=True)
class DataConfig(_Strict):
    train: tuple[str, ...] = ()
    """Training shards: paths or fsspec URLs, with braces ({0000..0099}) and globs (*.tar)."""
    val: tuple[str, ...] = ()
    """Validation shards, in the same form; may be empty (then the run ends without scores)."""
    sample_rate: int = 16_000
    """Rate in Hz that every clip is resampled to."""
    crop_seconds: float = 5.0
    """Seconds of each clip that the audio towers see: a random crop in training, the middle
    in evaluation; shorter clips are padded with silence."""
    templates: tuple[str, ...] = ("{caption}",)
    """Sentences over the metadata fields, one chosen per row and pass. A clause (between
    commas) that needs a missing field is left out."""
    tokenizer: str = "words"
    """"words" (hashed words, needs no files) or a Hugging Face tokenizer: local path or name."""
    vocabulary: int = 16_384
    """Number of hash buckets of the "words" tokenizer; ignored for Hugging Face tokenizers."""
    max_tokens: int = 48
    """Tokens kept of each sentence."""
    window_shards: int = 8
    """Rows are shuffled inside windows of this many shards, whose order is shuffled too."""
    decode_slots: int = 2
    """Logical CPUs for reading and decoding: declared beside the workers' when the job starts
    Ray itself; a cluster that is already running must have at least one left."""

    @property
    def crop_samples(self) -> int:
        """Samples in a crop."""
        return round(self.sample_rate * self.crop_seconds)

    def __post_init__(self) -> None:
        _require(self.sample_rate >= 1_000, f"data.sample_rate is {self.sample_rate} Hz; give at least 1000")
        _require(self.crop_seconds > 0, f"data.crop_seconds is {self.crop_seconds}; give a positive length")
        _require(len(self.templates) > 0, 'data.templates is empty; give at least one, such as "{caption}"')
        _require(self.window_shards >= 1, "data.window_shards must be at least 1")
        _require(self.decode_slots >= 1, "data.decode_slots must be at least 1, or nothing can be decoded")
        _require(self.max_tokens >= 2, "data.max_tokens must be at least 2")
        _require(self.vocabulary >= 16, "data.vocabulary must be at least 16")


@dataclass(frozen=True)
class TowerConfig(_Strict):
    build: str
    """Built-in tower ("waveform", "spectrogram", "text") or your own as "package.module:Class"."""
    options: dict[str, Any] = field(default_factory=dict)
    """Arguments of the tower's constructor: its sizes. Each tower's docstring lists them."""
    lr: float | None = None
    """Peak learning rate of this tower and its head; train.lr when not given."""


@dataclass(frozen=True)
class ModelConfig(_Strict):
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
        _require(len(self.towers()) >= 2, "model has fewer than two towers; contrasting needs two modalities")
        _require(self.projection_dim >= 1, "model.projection_dim must be at least 1")


@dataclass(frozen=True)
class PairConfig(_Strict):
    first: Modality
    """One modality of the pair."""
    second: Modality
    """The other one; both directions are trained."""
    weight: float = 1.0
    """Share of this pair in the loss; weights are divided by their sum."""


@dataclass(frozen=True)
class TemperatureConfig(_Strict):
    init: float = 0.07
    """Temperature at the start; similarities are divided by it."""
    learnable: bool = True
    """Whether it is trained."""
    minimum: float = 0.01
    """Lowest temperature (similarities are multiplied by at most its inverse)."""
    shared: bool = False
    """One temperature for all pairs instead of one for each."""

    def __post_init__(self) -> None:
        _require(
            0 < self.minimum <= self.init,
            f"objective.temperature: need 0 < minimum <= init, not minimum {self.minimum} and init {self.init}",
        )


@dataclass(frozen=True)
class ObjectiveConfig(_Strict):
    name: str = "contrastive"
    """"contrastive" (symmetric InfoNCE) or your own objective as "package.module:function"."""
    pairs: tuple[PairConfig, ...] = (PairConfig("audio", "text"), PairConfig("spectrogram", "text"))
    """Modalities that are contrasted with each other."""
    targets: Literal["instance", "same_text"] = "same_text"
    """What counts as a match: only the row itself, or every row whose text states the same facts."""
    temperature: TemperatureConfig = TemperatureConfig()
    """Temperature of the softmax."""

    def __post_init__(self) -> None:
        _require(len(self.pairs) > 0, "objective.pairs is empty; name at least one pair of modalities")
        for pair in self.pairs:
            _require(pair.first != pair.second, f"objective.pairs contrasts {pair.first} with itself")
            _require(pair.weight > 0, f"objective.pairs: the weight of {pair.first}-{pair.second} must be positive")


@dataclass(frozen=True)
class TrainConfig(_Strict):
    workers: int = 2
    """Ray Train workers (W). The learning curve does not depend on it."""
    gpu: bool = False
    """One GPU for each worker (nccl); without, CPU (gloo)."""
    cpus_per_worker: float = 1.0
    """Logical CPUs that each worker reserves."""
    zero_stage: Literal[0, 1, 2, 3] = 2
    """DeepSpeed ZeRO stage: 0 shares nothing, 1 optimizer state, 2 gradients too, 3 parameters too."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16 runs the towers under autocast; parameters, gradients and the loss stay float32."""
    samples: int = 32_768
    """Length of training in samples, all passes over the data together."""
    global_batch: int = 128
    """Rows in one optimizer step over all workers (N); every row is a negative for every other."""
    chunk: int = 32
    """Rows that are dealt and encoded at a time (c); must divide global_batch."""
    lr: float = 1e-3
    """Peak learning rate of AdamW."""
    warmup_samples: int = 4_096
    """Samples of linear warm-up; a half cosine to zero follows."""
    weight_decay: float = 0.05
    """Decoupled weight decay; none on temperatures, biases and norms."""
    betas: tuple[float, float] = (0.9, 0.98)
    """AdamW's decay rates of the first and second moment."""
    clip_norm: float = 1.0
    """Gradient norm over all parameters that steps are clipped to; 0 means no clipping."""
    checkpoint_samples: int = 8_192
    """Samples between checkpoints."""
    keep_checkpoints: int = 2
    """How many of the latest checkpoints stay on disk."""
    log_steps: int = 10
    """Optimizer steps between lines of metrics.jsonl."""
    max_failures: int = 3
    """How often the run goes on from its last checkpoint after workers died."""

    @property
    def steps(self) -> int:
        """Optimizer steps of the run."""
        return self.samples // self.global_batch

    @property
    def chunks_per_step(self) -> int:
        """Chunks in a global batch (K)."""
        return self.global_batch // self.chunk

    @property
    def chunks_per_worker(self) -> int:
        """Forward passes of each worker in a step; the last may be on all-masked chunks."""
        return -(-self.chunks_per_step // self.workers)

    def __post_init__(self) -> None:
        _require(self.workers >= 1, "train.workers must be at least 1")
        _require(self.chunk >= 1, "train.chunk must be at least 1")
        _require(
            self.global_batch >= 2 and self.global_batch % self.chunk == 0,
            f"train.global_batch ({self.global_batch}) must be a multiple of train.chunk ({self.chunk}); "
            f"nearest: {max(1, round(self.global_batch / self.chunk)) * self.chunk}",
        )
        _require(
            self.samples >= self.global_batch,
            f"train.samples ({self.samples}) is less than one global batch ({self.global_batch}); give at least that",
        )
        for name in ("lr", "cpus_per_worker", "checkpoint_samples", "log_steps", "keep_checkpoints"):
            _require(getattr(self, name) > 0, f"train.{name} must be positive")
        for name in ("weight_decay", "clip_norm", "warmup_samples", "max_failures"):
            _require(getattr(self, name) >= 0, f"train.{name} must not be negative")


@dataclass(frozen=True)
class EvaluateConfig(_Strict):
    fields: tuple[str, ...] = ()
    """Metadata fields for zero-shot classification through the templates; those that the
    data or the templates lack are named and left out."""
    rows: int = 10_000
    """Most validation rows to score, from the first on."""

    def __post_init__(self) -> None:
        _require(self.rows >= 1, "evaluate.rows must be at least 1")


@dataclass(frozen=True)
class RunConfig(_Strict):
    model: ModelConfig
    """Towers and heads."""
    name: str = ""
    """Name of the run's folder. By default the recipe's name and a hash of the config, so the
    same command again resumes the same run and another config gets another folder."""
    storage: str = "runs"
    """Folder that holds the runs' folders; every node must see it under this path."""
    seed: int = 0
    """Decides initial weights, order, crops, templates and dropout."""
    data: DataConfig = DataConfig()
    """Shards and what becomes of a clip."""
    objective: ObjectiveConfig = ObjectiveConfig()
    """What the towers are trained for."""
    train: TrainConfig = TrainConfig()
    """Workers, batch, optimizer, checkpoints."""
    evaluate: EvaluateConfig = EvaluateConfig()
    """What the trained model is scored on."""

    def __post_init__(self) -> None:
        towers = self.model.towers()
        for pair in self.objective.pairs:
            for name in (pair.first, pair.second):
                _require(
                    name in towers,
                    f"objective.pairs contrasts {pair.first} with {pair.second}, but model.{name} is None; "
                    f"the model has {', '.join(towers)}",
                )
        _require("/" not in self.name, f"name {self.name!r} holds a slash; it names one folder inside `storage`")

    def named(self, recipe: str) -> "RunConfig":
        """This config with its default name filled in: `recipe` and a hash of all settings but the storage."""
        if self.name:
            return self
        settings = to_dict(self) | {"storage": ""}
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
        return replace(self, name=f"{recipe.replace(':', '.')}-{digest[:8]}")

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return Path(self.storage) / self.name


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


def differences(old: Any, new: Any, path: str = "") -> list[str]:
    """Dotted names of the fields in which two configs differ, with both values."""
    if is_dataclass(old) and type(old) is type(new):
        return [
            line
            for f in fields(old)
            for line in differences(getattr(old, f.name), getattr(new, f.name), f"{path}.{f.name}" if path else f.name)
        ]
    return [] if old == new else [f"{path}: {old!r} there, {new!r} here"]
