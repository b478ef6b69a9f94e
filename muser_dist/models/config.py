"""ModelConfig: towers, heads, and what they start from."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from muser_dist.errors import require
from muser_dist.strict import Strict

Modality = Literal["audio", "spectrogram", "symbolic", "features", "text"]
MODALITIES: tuple[Modality, ...] = ("audio", "spectrogram", "symbolic", "features", "text")


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
    head_lr: float | None = None
    """Peak learning rate of its head, where it is another one."""
    freeze: bool = False
    """Keeps the tower's weights as they are (dropout off, batch norms with running statistics) and trains its head
    only. It runs forward once, also where chunks are encoded twice."""
    freeze_head: bool = False
    """Keeps the head of a frozen tower too: the modality stays as it is. No pair need name it then, and what none names
    is not even encoded in training."""
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
            self.freeze or not self.freeze_head,
            "freeze_head keeps the head of a tower that does not change either; give freeze too",
        )
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
    symbolic: TowerConfig | None = None
    """Tower that reads notation: ABC, MusicXML, MIDI; None leaves the modality out."""
    features: TowerConfig | None = None
    """Tower that reads features of windows of sound, which a frozen network made; None leaves the modality out."""
    text: TowerConfig | None = None
    """Tower that reads the text; None leaves the modality out."""
    projection_dim: int = 128
    """Dimensions of the joint space."""
    projection_hidden: int | tuple[int, ...] = 0
    """Hidden units of the projection heads, of several layers one number each (HTCL: 384 192); 0 means one linear
    layer."""
    projection_activation: Literal["gelu", "relu"] = "gelu"
    """What stands between the layers of the projection heads."""
    start: str = ""
    """Folder of a run, or of its exported model, from which this model goes on: towers, heads and temperatures, each
    weight by its name. What that model lacks, or has in another shape, stays as it is drawn here; weights.json lists
    both. Stages of a recipe set it."""

    def towers(self) -> dict[Modality, TowerConfig]:
        """The towers that the model has, by modality, in the order of MODALITIES."""
        return {name: tower for name in MODALITIES if (tower := getattr(self, name)) is not None}

    @property
    def hidden_layers(self) -> tuple[int, ...]:
        """Units of each hidden layer of the projection heads."""
        hidden = self.projection_hidden
        return hidden if isinstance(hidden, tuple) else (hidden,) if hidden else ()

    def with_absolute_paths(self) -> "ModelConfig":
        """The same with whole paths to weights, and to the folders that networks come from: workers run elsewhere."""

        def of(path: str) -> str:
            return str(Path(path).resolve()) if path and Path(path).exists() else path  # it may be a name on the hub

        towers: dict[str, Any] = {}
        for name, tower in self.towers().items():
            options = dict(tower.options)
            if isinstance(options.get("model"), str):
                options["model"] = of(options["model"])
            towers[name] = replace(tower, options=options, weights=of(tower.weights))
        return replace(self, **towers, start=str(Path(self.start).resolve()) if self.start else "")

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
