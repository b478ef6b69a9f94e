"""Models of others, scored as ours are: two functions are enough.

A model is any object with

    encode_audio(clips, sample_rate) -> (n, D)   clips: n arrays (samples,) float32, mono, of any lengths
    encode_text(sentences) -> (n, D)
    sample_rate: int                             Hz that it wants clips in
    seconds: float                               how much of a clip it hears

and, if probes are to look at its tower's output before the head, `audio_features(clips, sample_rate) -> (n, width)`.
Embeddings need no unit length. What makes the model is a function, named `my_package.models:load`.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from muser_dist.config import (
    DataConfig,
    Feature,
    ModelConfig,
    ObjectiveConfig,
    PairConfig,
    RunConfig,
    TowerConfig,
)
from muser_dist.errors import ConfigError, require
from muser_dist.evaluate.clap import Clap
from muser_dist.muser import Muser
from muser_dist.plugins import resolve


def load_model(name: str, weights: str | None = None, device: str = "cpu") -> tuple["Muser | External", RunConfig]:
    """A model by what a command line says, and how it is to be fed.

    Args:
        name: folder of a run or of an exported model, key of EXTERNAL, or "package.module:function".
        weights: argument of that function.
        device: where the model computes.

    Raises:
        CheckpointError: the folder holds no model.
        ConfigError: there is no such device; no such function, or what it returns lacks something.
    """
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # no driver, no such number; torch without CUDA
        reason = str(error).partition("\n")[0].rstrip(". ")
        raise ConfigError(f"--device {device} cannot be used here ({reason}); give --device cpu") from None
    if name not in EXTERNAL and (Path(name).exists() or ":" not in name):
        require(weights is None, f"--weights is for models of others; {name} is one of ours, which has its own")
        muser = Muser.from_pretrained(name, device)
        return muser, muser.config
    external = External(name, weights, device)
    return external, external.config


class TwoFunctions(Protocol):
    """What is asked of a model of others; see above."""

    sample_rate: int
    seconds: float

    def encode_audio(self, clips: Sequence[np.ndarray], sample_rate: int) -> np.ndarray:
        """(n, D)."""
        ...

    def encode_text(self, sentences: Sequence[str]) -> np.ndarray:
        """(n, D)."""
        ...


EXTERNAL: dict[str, Any] = {"clap": Clap}
"""Functions that come with the package, by the name that a command line gives."""


class External:
    """A model of others as an `Encoder`.

    Args:
        name: key of EXTERNAL or "package.module:function".
        weights: handed to the function, where it is given.
        device: likewise, as the keyword `device`, where it is not "cpu".

    Raises:
        ConfigError: no such function, or what it returns lacks something.
    """

    modalities: tuple[Feature, ...] = ("audio", "text")

    def __init__(self, name: str, weights: str | None = None, device: str = "cpu") -> None:
        make = resolve(name, EXTERNAL, "model")
        try:
            self.model: TwoFunctions = make(
                *([weights] if weights else []), **({} if device == "cpu" else {"device": device})
            )
        except TypeError as error:
            raise ConfigError(
                f"model: {name} cannot be called: {error}; --weights is its first argument, --device its keyword"
            ) from None
        lacking = [
            part for part in ("encode_audio", "encode_text", "sample_rate", "seconds") if not hasattr(self.model, part)
        ]
        if lacking:
            raise ConfigError(f"model: what {name} returns has no {', '.join(lacking)}")

    @property
    def has_features(self) -> bool:
        """Whether the model gives its tower's output before the head."""
        return hasattr(self.model, "audio_features")

    @property
    def config(self) -> RunConfig:
        """A config that reads clips as the model wants them."""
        seconds, rate = self.model.seconds, self.model.sample_rate
        nothing = TowerConfig("waveform")  # says that there is such a modality; it is never built
        return RunConfig(
            model=ModelConfig(audio=nothing, text=nothing),
            data=DataConfig(sample_rate=rate, crop_seconds=seconds),
            objective=ObjectiveConfig(pairs=(PairConfig("audio", "text"),)),
        )

    def encode_chunk(self, modality: Feature, chunk: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
        """Embeds a chunk's valid rows; the others are 0. Without `audio_features` the second array has no columns."""
        valid = np.flatnonzero(chunk[f"valid_{modality}"])
        if modality == "text":
            joint = self.encode_text([chunk["text"][i] for i in valid])
            features = np.zeros((len(valid), 0), np.float32)
        else:
            clips = [chunk["audio"][i, : chunk["audio_length"][i]].astype(np.float32) / 32768 for i in valid]
            joint, features = self._ask("encode_audio", clips), self._ask("audio_features", clips)
        return _spread(joint, chunk[f"valid_{modality}"]), _spread(features, chunk[f"valid_{modality}"])

    def encode_text(self, sentences: Sequence[str]) -> np.ndarray:
        """(n, D) float32."""
        return self._ask("encode_text", list(sentences))

    def _ask(self, function: str, items: list[Any]) -> np.ndarray:
        """What one of the model's functions says, (n, D) float32; no columns where there is no such function."""
        if not hasattr(self.model, function):
            return np.zeros((len(items), 0), np.float32)
        if not items:  # for D alone
            time = np.arange(self.config.data.crop_samples, dtype=np.float32) / self.model.sample_rate
            trial = "music" if function == "encode_text" else np.sin(2 * np.pi * 440 * time) / 2
            return self._ask(function, [trial])[:0]
        rate = () if function == "encode_text" else (self.model.sample_rate,)
        found = np.asarray(getattr(self.model, function)(items, *rate), np.float32)
        if found.ndim != 2 or len(found) != len(items):
            raise ConfigError(f"model: {function} returned shape {found.shape} for {len(items)}; give (n, D)")
        return found


def _spread(found: np.ndarray, valid: np.ndarray) -> np.ndarray:
    rows = np.zeros((len(valid), found.shape[1]), np.float32)
    rows[valid] = found
    return rows
