"""Muser: a trained model in use. Needs neither Ray nor DeepSpeed."""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from muser_dist.config import Modality, RunConfig, from_dict, to_dict
from muser_dist.data.audio import decode, to_int16
from muser_dist.data.text import HuggingFaceTokenizer, load_tokenizer
from muser_dist.errors import CheckpointError, ConfigError, DataError
from muser_dist.files import write_whole
from muser_dist.models.model import MultimodalModel
from muser_dist.models.weights import WEIGHTS, exported_weights

FORMAT = 3
_CONFIG, _TOKENIZER = "config.json", "tokenizer"

Clip = str | Path | bytes | np.ndarray
"""A file's path, its bytes, or a waveform: (samples,) or (samples, channels) float in [-1, 1]."""


def save_model(folder: Path, weights: dict[str, Tensor], config: RunConfig) -> None:
    """Writes an exported model: model.safetensors, the tokenizer if it has files, and config.json last.

    Where the data, the run and the weights that it began with lay is left out of the config: addresses may say more
    than they should.
    """
    folder.mkdir(parents=True, exist_ok=True)
    data = replace(config.data, train=(), val=(), sources=(), storage_options="", cache_folder="")
    towers: dict[str, Any] = {name: replace(tower, weights="") for name, tower in config.model.towers().items()}
    exported = replace(config, storage="", data=data, model=replace(config.model, **towers))
    content = {"format": FORMAT, "config": to_dict(exported)}
    tokenizer = load_tokenizer(data.tokenizer, data.vocabulary, data.max_tokens)
    if isinstance(tokenizer, HuggingFaceTokenizer):
        tokenizer.save(folder / _TOKENIZER)
    temporary = folder / f"{WEIGHTS}.part"
    save_file({name: value.contiguous() for name, value in weights.items()}, temporary)
    temporary.replace(folder / WEIGHTS)
    write_whole(folder / _CONFIG, json.dumps(content, indent=2))


_INPUTS = {
    "audio": ("audio", "audio_length"),
    "spectrogram": ("audio", "audio_length"),
    "text": ("text_ids", "text_length"),
}
"""By tower, the arrays of a chunk that it reads; spectrograms are made where the model is."""


def exported_config(folder: Path) -> RunConfig:
    """The config of an exported model; its tokenizer is the one in the folder, if that has files.

    Args:
        folder: holds config.json; a run's folder will do too.

    Raises:
        CheckpointError: there is none, or it is broken or of another format.
    """
    folder = exported_weights(folder).parent
    path = folder / _CONFIG
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        raise CheckpointError(
            f"{folder}: no {_CONFIG}; give the folder `model` that a finished run left behind"
        ) from None
    except ValueError as error:
        raise CheckpointError(f"{folder}: cannot be loaded: {error}") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise CheckpointError(f"{path}: not an exported model of format {FORMAT}")
    config = from_dict(content.get("config"), str(path))
    if (folder / _TOKENIZER).is_dir():  # the one that training named may not be on this machine
        config = replace(config, data=replace(config.data, tokenizer=str(folder / _TOKENIZER)))
    return config


class Muser:
    """Embeds audio and text into the joint space.

    Embeddings are (n, dim) float32 of unit length: cosine similarity is the dot product.

    >>> muser = Muser.from_pretrained("runs/tiny-1a2b3c4d/model")         # doctest: +SKIP
    >>> scores = muser.encode_text(["a slow waltz"]) @ muser.encode_audio(["song.mp3"]).T   # doctest: +SKIP
    """

    def __init__(self, model: MultimodalModel, config: RunConfig, device: torch.device | str = "cpu") -> None:
        self.config = config
        self.device = torch.device(device)
        self.model = model.to(self.device).eval()
        data = config.data
        self._tokenizer = load_tokenizer(data.tokenizer, data.vocabulary, data.max_tokens)

    @classmethod
    def from_pretrained(cls, folder: str | Path, device: torch.device | str = "cpu") -> "Muser":
        """Loads an exported model.

        Args:
            folder: holds model.safetensors and config.json; a run's folder will do too.
            device: where it computes.

        Raises:
            CheckpointError: files are missing, broken, of another format or do not fit together.
        """
        weights, config = exported_weights(folder), exported_config(Path(folder))
        try:
            model = MultimodalModel(config)
            model.load_state_dict(load_file(weights))
        except (SafetensorError, RuntimeError) as error:
            raise CheckpointError(f"{folder}: cannot be loaded: {str(error).splitlines()[0]}") from None
        return cls(model, config, device)

    @property
    def dim(self) -> int:
        """Dimensions of embeddings."""
        return self.model.dim

    @property
    def modalities(self) -> tuple[Modality, ...]:
        """What the model can encode."""
        return tuple(self.config.model.towers())

    @property
    def label_values(self) -> dict[str, tuple[str, ...]]:
        """By metadata field, the values that `classify` tells apart; empty where the model learned no labels."""
        return dict(self.config.data.label_values)

    def classify(self, clips: Sequence[Clip], sample_rate: int | None = None) -> dict[str, np.ndarray]:
        """What the model's heads say of clips, or of sentences where it reads texts.

        Args:
            clips, sample_rate: as of `encode_audio`.

        Returns:
            probabilities by metadata field: (len(clips), values) float32, in the order of `label_values`. Those of a
            field in config.data.classes sum to 1; those of tags are each for itself.

        Raises:
            ConfigError: the model has no such heads.
            DataError: as of `encode_audio`.
        """
        if isinstance(clips, (str, Path, bytes, np.ndarray)):
            raise TypeError("classify takes a list; wrap the one you have in [ ]")
        reads, size = self.model.labelled == "text", self.config.train.chunk
        parts = [
            self.classify_chunk(self._read(part) if reads else self._hear_all(part, sample_rate))
            for part in (clips[i : i + size] for i in range(0, len(clips), size))
        ]
        return {
            name: np.concatenate([np.zeros((0, len(values)), np.float32), *(part[name] for part in parts)])
            for name, values in self.label_values.items()
        }

    def classify_chunk(self, chunk: dict[str, Any]) -> dict[str, np.ndarray]:
        """`classify` of the rows of a chunk of muser_dist/data/chunks.py."""
        if not self.label_values:
            raise ConfigError("this model tells no labels apart; train one with jobs/finetune.py")
        names = _INPUTS[self.model.labelled]
        batch = {name: torch.tensor(chunk[name], device=self.device) for name in names}
        with torch.inference_mode():
            return {name: p.cpu().numpy() for name, p in self.model.label_probabilities(batch).items()}

    def encode_audio(self, clips: Sequence[Clip], sample_rate: int | None = None) -> np.ndarray:
        """Embeds clips with the waveform tower.

        Args:
            clips: paths, bytes of encoded files, or waveforms. Of longer clips the middle
                `config.data.crop_seconds` are heard.
            sample_rate: Hz of clips given as waveforms; the model's own rate by default.

        Returns:
            (len(clips), dim) float32 of unit length.

        Raises:
            DataError: a clip cannot be decoded, is empty, silent or not finite; the message says which.
        """
        return self._encode_clips("audio", clips, sample_rate)

    def encode_spectrogram(self, clips: Sequence[Clip], sample_rate: int | None = None) -> np.ndarray:
        """Embeds clips with the spectrogram tower; as `encode_audio`."""
        return self._encode_clips("spectrogram", clips, sample_rate)

    def encode_text(self, sentences: Sequence[str]) -> np.ndarray:
        """Embeds sentences: (len(sentences), dim) float32 of unit length."""
        if isinstance(sentences, str):
            raise TypeError("encode_text takes a list of sentences; wrap the one you have in [ ]")
        return self._encode("text", sentences, self._read)

    def encode_chunks(self, modality: Modality, chunks: Iterable[dict[str, Any]]) -> np.ndarray:
        """Embeds chunks of muser_dist/data/chunks.py: (rows of all chunks, dim) float32 of unit length."""
        parts = [self._forward(modality, {name: chunk[name] for name in _INPUTS[modality]}) for chunk in chunks]
        return np.concatenate(parts) if parts else np.zeros((0, self.dim), np.float32)

    def _encode_clips(self, modality: Modality, clips: Sequence[Clip], sample_rate: int | None) -> np.ndarray:
        if isinstance(clips, (str, Path, bytes, np.ndarray)):
            raise TypeError(f"encode_{modality} takes a list of clips; wrap the one you have in [ ]")
        return self._encode(modality, clips, partial(self._hear_all, sample_rate=sample_rate))

    def _read(self, sentences: Sequence[Any]) -> dict[str, np.ndarray]:
        ids, lengths = self._tokenizer(list(sentences))
        return {"text_ids": ids, "text_length": lengths}

    def _hear_all(self, clips: Sequence[Clip], sample_rate: int | None) -> dict[str, np.ndarray]:
        waveforms, lengths = zip(*(self._hear(clip, sample_rate) for clip in clips), strict=True)
        return {"audio": np.stack(waveforms), "audio_length": np.array(lengths, np.int32)}

    def _hear(self, clip: Clip, sample_rate: int | None) -> tuple[np.ndarray, int]:
        data = self.config.data
        try:
            if isinstance(clip, np.ndarray):
                rate = sample_rate or data.sample_rate
                wanted = round(data.crop_seconds * rate)
                start = max(0, len(clip) - wanted) // 2
                return to_int16(clip[start : start + wanted].astype(np.float32), rate, data)
            return decode(clip if isinstance(clip, bytes) else Path(clip).read_bytes(), data, position=0.5)
        except FileNotFoundError:
            raise DataError(f"{clip!s}: there is no such file") from None
        except DataError as error:
            name = str(clip) if isinstance(clip, (str, Path)) else f"a clip given as {type(clip).__name__}"
            raise DataError(f"{name}: {error}") from None

    def _encode(
        self, modality: Modality, items: Sequence[Any], tensors: Callable[[Any], dict[str, np.ndarray]]
    ) -> np.ndarray:
        size = self.config.train.chunk
        parts = [self._forward(modality, tensors(items[i : i + size])) for i in range(0, len(items), size)]
        return np.concatenate(parts) if parts else np.zeros((0, self.dim), np.float32)

    def _forward(self, modality: Modality, arrays: dict[str, np.ndarray]) -> np.ndarray:
        if modality not in self.modalities:
            raise ConfigError(f"this model has no {modality} tower; it has {', '.join(self.modalities)}")
        batch = {name: torch.tensor(values, device=self.device) for name, values in arrays.items()}
        with torch.inference_mode():
            return torch.nn.functional.normalize(self.model.encode(modality, batch), dim=1).cpu().numpy()
