"""MultimodalModel: one tower and one head for each modality, the temperatures, and heads for metadata fields."""

import hashlib
from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from muser_dist.config import DataConfig, ModelConfig, RunConfig, TowerConfig
from muser_dist.data.config import LABEL
from muser_dist.errors import ConfigError, require
from muser_dist.models.compiling import compile_tower, compiled
from muser_dist.models.esresnext import ESResNeXt
from muser_dist.models.features import FeatureTower
from muser_dist.models.frozen import FrozenOutputs
from muser_dist.models.heads import Fusion, LabelHeads, LogitScale, ProjectionHead
from muser_dist.models.htcl import HTCLAudio
from muser_dist.models.huggingface import HuggingFaceSpectrogram, HuggingFaceText, HuggingFaceWaveform
from muser_dist.models.recompute import recompute_activations
from muser_dist.models.spectrogram import SpectrogramTower
from muser_dist.models.symbolic import M3, M3Pretraining
from muser_dist.models.text import TextTower
from muser_dist.models.waveform import WaveformTower
from muser_dist.objectives.config import TOWER_OF
from muser_dist.plugins import resolve

AUXILIARY = "loss/"
"""Of what a model puts out, names of towers' own losses begin so; MODALITY/NAME follows."""

# A tower is an nn.Module that is built from the data config and its options, has `width`, and
# maps a batch to (rows, width); in training for the objective "masked_patches", to what that one
# sums. It must treat rows apart from each other and draw its random numbers from torch's global
# generator, which is seeded before each call. It may have `auxiliary_losses`, which returns scalars
# by name that depend on its parameters alone and are added to the loss; and `own_head`, the prefix
# of its last layer's weights.
TOWERS: dict[str, Callable[..., nn.Module]] = {
    "waveform": WaveformTower,
    "spectrogram": SpectrogramTower,
    "text": TextTower,
    "esresnext_fbsp": ESResNeXt,
    "hf_waveform": HuggingFaceWaveform,
    "hf_spectrogram": HuggingFaceSpectrogram,
    "hf_text": HuggingFaceText,
    "htcl_audio": HTCLAudio,
    "m3": M3,
    "m3_pretraining": M3Pretraining,
    "features": FeatureTower,
}


def build_tower(modality: str, config: TowerConfig, data: DataConfig) -> nn.Module:
    """The tower that a config names.

    Raises:
        ConfigError: it cannot be found or built with these options.
    """
    build = resolve(config.build, TOWERS, f"model.{modality}.build")
    try:
        tower = build(data, **config.options)
    except (TypeError, ValueError, AssertionError, IndexError) as error:
        raise ConfigError(f"model.{modality}.options: {config.build} cannot be built: {error}") from None
    if not isinstance(getattr(tower, "width", None), int):
        raise ConfigError(f"model.{modality}.build: {config.build} has no integer attribute `width`")
    return tower


def build_head(modality: str, tower: nn.Module, config: ModelConfig) -> nn.Module:
    """What a tower's config says stands between it and the loss.

    Raises:
        ConfigError: nothing, and the tower's output does not have the dimensions of the joint space.
    """
    if config.towers()[modality].head:  # type: ignore[index]
        width: int = tower.width  # type: ignore[assignment]
        return ProjectionHead(width, config.projection_dim, config.hidden_layers, config.projection_activation)
    require(
        bool(tower.width == config.projection_dim),
        f"model.{modality}: without a head the tower's {tower.width} outputs must be the model.projection_dim "
        f"({config.projection_dim}); change one of them, or give --model.{modality}.head",
    )
    return nn.Identity()


class MultimodalModel(nn.Module):
    """Maps batches to the joint space, and where fields are learned to logits of their values.

    Initial weights depend on config.seed alone, so that every rank starts from the same.

    Attributes:
        fused: the modality whose embeddings are fused with those of texts, where a pair names "fused".
        labelled: the tower whose output the heads of fields read: the first.
        label_kinds: of each of the fields, whether a row has one or any number of its values.
        dim: of embeddings. Where nothing is contrasted there is no joint space, and they are the tower's output.

    Raises:
        ConfigError: a tower cannot be built.
    """

    def __init__(self, config: RunConfig) -> None:
        super().__init__()
        self.seed = config.seed
        self.bf16 = config.train.precision == "bf16"
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self.towers = nn.ModuleDict(
                {name: build_tower(name, tower, config.data) for name, tower in config.model.towers().items()}
            )
            widths: dict[str, int] = {name: tower.width for name, tower in self.towers.items()}  # type: ignore[misc]
            contrasts, dim = bool(config.objective.pairs), config.model.projection_dim
            self.dim = dim if contrasts else max(widths.values())
            self.heads = nn.ModuleDict(
                {
                    # No projection that nothing uses: ZeRO would wait for its gradient.
                    name: build_head(name, tower, config.model) if contrasts else nn.Identity()
                    for name, tower in self.towers.items()
                }
            )
            self.labelled, width = next(iter(widths.items()))
            self.label_kinds = config.data.label_kinds()
            sizes = {name: len(config.data.label_values.get(name, ())) for name in self.label_kinds}
            self.label_heads = LabelHeads(width, sizes) if sizes else None
            self.fused = next((pair.first for pair in config.objective.pairs if pair.second == "fused"), None)
            self.fusion = Fusion(dim) if self.fused else None
        self.logits = LogitScale(config.objective)
        self._frozen: dict[str, FrozenOutputs] = {}
        self._to_compile = {name for name, settings in config.model.towers().items() if settings.compile}
        self._compiled: set[str] = set()
        self._idle = frozenset(config.model.towers()) - frozenset(config.encoded)
        for name, settings in config.model.towers().items():
            if settings.freeze:
                self.towers[name].requires_grad_(False)
                self._frozen[name] = FrozenOutputs(settings.cache_rows)
            if settings.freeze_head:
                self.heads[name].requires_grad_(False)
            if settings.checkpoint_activations:
                recompute_activations(self.towers[name])
        self.train()
        self.register_load_state_dict_post_hook(_forget_outputs)

    def train(self, mode: bool = True) -> "MultimodalModel":
        """Frozen towers stay in evaluation mode."""
        super().train(mode)
        for name in self._frozen:
            self.towers[name].eval()
        return self

    def forward(self, batch: dict[str, Tensor], moment: tuple[int, int] | None = None) -> dict[str, Tensor]:
        """Encodes every modality of a chunk, in training those that pairs name; with a second view or another notation
        in it, both in one pass of their tower.

        Args:
            batch: the chunk's arrays as tensors (muser_dist/data/pipeline.py).
            moment: (step, chunk), which with the seed and the tower decides the random state of
                dropout: the same on every number of workers, and again in a second pass.

        Returns:
            (rows, dim) float32 for each modality and perhaps "view", "notation" and "fused", not normalised;
            "label/<field>" (rows, values) float32, logits; and what depends on parameters alone: what `LogitScale`
            gives, and, where `moment` is given, the auxiliary losses of towers that are trained, as
            "loss/MODALITY/NAME". They come from here because at ZeRO-3 a parameter can be read only inside its module's
            forward.
        """
        out: dict[str, Tensor] = {}
        # Here and not around the call: DeepSpeed switches an outer autocast off.
        with torch.autocast(next(iter(batch.values())).device.type, torch.bfloat16, enabled=self.bf16):
            for name in self.towers:
                if moment is not None and name in self._idle:
                    continue
                second = _second(name, batch)
                inputs = _both(second, batch) if second else batch
                if moment is None:
                    features = self.towers[name](inputs)
                else:
                    torch.manual_seed(_mix(self.seed, *moment, name))
                    features = self._train_tower(name, inputs, moment)
                    out |= self._auxiliary_losses(name)
                projected = self._project(name, features)
                out |= dict(zip((name, second), projected.chunk(2), strict=True)) if second else {name: projected}
                if name == self.labelled:
                    out |= self._logits(features.chunk(2)[0] if second else features)
            if self.fusion is not None and self.fused is not None:
                fused = self.fusion(out[self.fused], out["text"])
                out["fused"] = fused.to(torch.promote_types(fused.dtype, torch.float32))
        return out | self.logits()

    def encode(self, modality: str, batch: dict[str, Tensor]) -> Tensor:
        """One modality of a batch: (rows, dim) float32, not normalised."""
        return self.encode_with_features(modality, batch)[0]

    def encode_with_features(self, modality: str, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """What `encode` gives, and the tower's output before its head: (rows, width)."""
        features = self.towers[modality](batch)
        return self._project(modality, features), features

    def label_probabilities(self, features: Tensor) -> dict[str, Tensor]:
        """What the heads say of the output (rows, width) of the tower `labelled`: by field (rows, values) float32; of
        classes they sum to 1."""
        of_fields = self._logits(features)
        names = ((name, of_fields[LABEL + name]) for name in self.label_kinds)
        return {name: x.softmax(dim=1) if self.label_kinds[name] == "class" else x.sigmoid() for name, x in names}

    def _train_tower(self, modality: str, batch: dict[str, Tensor], moment: tuple[int, int]) -> Tensor:
        """A tower's output, (rows, width), in the way that training runs it."""
        tower = self.towers[modality]
        # Not before: inference, which has batches of all sizes, and checks of the config do without.
        if modality in self._to_compile - self._compiled:
            compile_tower(tower)
            self._compiled.add(modality)
        with compiled(modality) if modality in self._compiled else nullcontext():
            if modality in self._frozen:
                return self._frozen[modality](tower, batch, moment)
            return tower(batch)

    def _auxiliary_losses(self, modality: str) -> dict[str, Tensor]:
        tower = self.towers[modality]
        if modality in self._frozen or not hasattr(tower, "auxiliary_losses"):
            return {}
        return {f"{AUXILIARY}{modality}/{name}": loss for name, loss in tower.auxiliary_losses().items()}  # type: ignore[operator]

    def _logits(self, features: Tensor) -> dict[str, Tensor]:
        if self.label_heads is None:
            return {}
        return {LABEL + name: logits for name, logits in self.label_heads.of_fields(features).items()}

    def _project(self, modality: str, features: Tensor) -> Tensor:
        projected = self.heads[modality](features)
        return projected.to(torch.promote_types(projected.dtype, torch.float32))


_SECOND: dict[str, dict[str, str]] = {
    "view": {"audio": "view", "audio_length": "view_length"},
    "notation": {"patches": "notation_patches", "patches_length": "notation_length"},
}
"""Of what a tower embeds besides its own modality, the arrays that it reads, and which of the chunk's those are."""


def _second(modality: str, batch: dict[str, Tensor]) -> str:
    """What a tower embeds besides its modality; "" where that is nothing."""
    there = (
        name for name, arrays in _SECOND.items() if TOWER_OF[name] == modality and batch.keys() >= {*arrays.values()}
    )
    return next(there, "")


def _both(second: str, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """A tower's own modality and the second one as rows of one batch, the second ones last."""
    return {read: torch.cat([batch[read], batch[other]]) for read, other in _SECOND[second].items()}


def _forget_outputs(model: MultimodalModel, _: object) -> None:
    for outputs in model._frozen.values():
        outputs.clear()


def _mix(*parts: int | str) -> int:
    """A 63-bit seed out of several numbers and names."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "big") >> 1
