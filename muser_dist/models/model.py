"""MultimodalModel: one tower and one head for each modality, and the temperatures."""

import hashlib
from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from muser_dist.config import DataConfig, ModelConfig, RunConfig, TowerConfig
from muser_dist.errors import ConfigError, require
from muser_dist.models.compiling import compile_tower, compiled
from muser_dist.models.esresnext import ESResNeXt
from muser_dist.models.frozen import FrozenOutputs
from muser_dist.models.heads import LogitScale, ProjectionHead
from muser_dist.models.huggingface import HuggingFaceSpectrogram, HuggingFaceText, HuggingFaceWaveform
from muser_dist.models.recompute import recompute_activations
from muser_dist.models.spectrogram import SpectrogramTower
from muser_dist.models.text import TextTower
from muser_dist.models.waveform import WaveformTower
from muser_dist.plugins import resolve

# A tower is an nn.Module that is built from the data config and its options, has `width`, and
# maps a batch to (rows, width). It must treat rows apart from each other and draw its random
# numbers from torch's global generator, which is seeded before each call. It may have
# `auxiliary_losses`, which returns scalars by name that depend on its parameters alone and are added
# to the loss; and `own_head`, the prefix of its last layer's weights.
TOWERS: dict[str, Callable[..., nn.Module]] = {
    "waveform": WaveformTower,
    "spectrogram": SpectrogramTower,
    "text": TextTower,
    "esresnext_fbsp": ESResNeXt,
    "hf_waveform": HuggingFaceWaveform,
    "hf_spectrogram": HuggingFaceSpectrogram,
    "hf_text": HuggingFaceText,
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
        return ProjectionHead(tower.width, config.projection_dim, config.projection_hidden)  # type: ignore[arg-type]
    require(
        bool(tower.width == config.projection_dim),
        f"model.{modality}: without a head the tower's {tower.width} outputs must be the model.projection_dim "
        f"({config.projection_dim}); change one of them, or give --model.{modality}.head",
    )
    return nn.Identity()


class MultimodalModel(nn.Module):
    """Maps batches to the joint space.

    Initial weights depend on config.seed alone, so that every rank starts from the same.

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
            self.heads = nn.ModuleDict(
                {name: build_head(name, tower, config.model) for name, tower in self.towers.items()}
            )
        self.logits = LogitScale(config.objective)
        self._frozen: dict[str, FrozenOutputs] = {}
        self._to_compile = {name for name, settings in config.model.towers().items() if settings.compile}
        self._compiled: set[str] = set()
        for name, settings in config.model.towers().items():
            if settings.freeze:
                self.towers[name].requires_grad_(False)
                self._frozen[name] = FrozenOutputs(settings.cache_rows)
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
        """Encodes every modality of a chunk.

        Args:
            batch: the chunk's arrays as tensors (muser_dist/data/pipeline.py).
            moment: (step, chunk), which with the seed and the tower decides the random state of
                dropout: the same on every number of workers, and again in a second pass.

        Returns:
            (rows, projection_dim) float32 for each modality, not normalised; and what depends on parameters
            alone: what `LogitScale` gives, and, where `moment` is given, the auxiliary losses of towers that are
            trained, as "MODALITY/NAME". They come from here because at ZeRO-3 a parameter can be read only inside its
            module's forward.
        """
        out = {}
        # Here and not around the call: DeepSpeed switches an outer autocast off.
        with torch.autocast(batch["text_ids"].device.type, torch.bfloat16, enabled=self.bf16):
            for name in self.towers:
                if moment is None:
                    out[name] = self.encode(name, batch)
                else:
                    torch.manual_seed(_mix(self.seed, *moment, name))
                    out[name] = self._project(name, self._train_tower(name, batch, moment))
                    out |= self._auxiliary_losses(name)
        return out | self.logits()

    def encode(self, modality: str, batch: dict[str, Tensor]) -> Tensor:
        """One modality of a batch: (rows, projection_dim) float32, not normalised."""
        return self.encode_with_features(modality, batch)[0]

    def encode_with_features(self, modality: str, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """What `encode` gives, and the tower's output before its head: (rows, width)."""
        features = self.towers[modality](batch)
        return self._project(modality, features), features

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
        return {f"{modality}/{name}": loss for name, loss in tower.auxiliary_losses().items()}  # type: ignore[operator]

    def _project(self, modality: str, features: Tensor) -> Tensor:
        projected = self.heads[modality](features)
        return projected.to(torch.promote_types(projected.dtype, torch.float32))


def _forget_outputs(model: MultimodalModel, _: object) -> None:
    for outputs in model._frozen.values():
        outputs.clear()


def _mix(*parts: int | str) -> int:
    """A 63-bit seed out of several numbers and names."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "big") >> 1
