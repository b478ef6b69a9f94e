"""Muser: a trained model in use. Needs neither Ray nor DeepSpeed."""

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from muser_dist.config import Feature, Modality, RunConfig, from_dict, to_dict
from muser_dist.data.features import Features
from muser_dist.data.runs import first_runs, read_runs
from muser_dist.data.symbolic.members import is_notation
from muser_dist.data.text import HuggingFaceTokenizer, load_tokenizer
from muser_dist.data.windows import Clip, Windows, hear
from muser_dist.errors import CheckpointError, ConfigError, require
from muser_dist.evaluate.retrieval import unit_rows
from muser_dist.files import write_whole
from muser_dist.models.huggingface import self_contained
from muser_dist.models.identity import identity_of
from muser_dist.models.model import MultimodalModel
from muser_dist.objectives.config import TOWER_OF

if TYPE_CHECKING:
    from muser_dist.search import Hit, Index

FORMAT = 3
MODEL_FILES = (_TOKENIZER, _WEIGHTS, _CONFIG) = ("tokenizer", "model.safetensors", "config.json")
"""All that `save_model` may write, in its order."""

# Windows that a tower gets at a time, and not a training chunk's hundreds: a laptop must hold what they need.
_MOST_WINDOWS = 32

_T = TypeVar("_T")


def save_model(folder: Path, weights: dict[str, Tensor], config: RunConfig) -> None:
    """Writes an exported model: model.safetensors, the tokenizer if it has files, and config.json last.

    Where data, weights and the run lay is left out of the config: addresses may say more than they should.
    """
    folder.mkdir(parents=True, exist_ok=True)
    data = replace(config.data, train=(), val=(), sources=(), pairs="", storage_options="", cache_folder="")
    tokenizer = load_tokenizer(data.tokenizer, data.vocabulary, data.max_tokens)
    if isinstance(tokenizer, HuggingFaceTokenizer):
        tokenizer.save(folder / _TOKENIZER)
    if Path(data.tokenizer).is_dir():  # it is in the folder; what others were called here is nobody's business
        data = replace(data, tokenizer=_TOKENIZER)
    train = replace(config.train, checkpoint_storage="")
    content = {"format": FORMAT, "config": to_dict(replace(self_contained(config), storage="", data=data, train=train))}
    temporary = folder / f"{_WEIGHTS}.part"
    save_file({name: value.contiguous() for name, value in weights.items()}, temporary)
    temporary.replace(folder / _WEIGHTS)
    write_whole(folder / _CONFIG, json.dumps(content, indent=2))


_INPUTS: dict[str, tuple[str, str]] = {
    "audio": ("audio", "audio_length"),
    "spectrogram": ("audio", "audio_length"),
    "symbolic": ("patches", "patches_length"),
    "notation": ("notation_patches", "notation_length"),
    "features": ("features", "features_length"),
    "text": ("text_ids", "text_length"),
}
"""The arrays of a chunk that what is embedded is in; spectrograms are made where the model is."""


def exported_weights(folder: str | Path) -> Path:
    """The weights of an exported model, which lie in its folder or in `model` of its run's.

    Raises:
        CheckpointError: there are none.
    """
    for path in (Path(folder) / _WEIGHTS, Path(folder) / "model" / _WEIGHTS):
        if path.is_file():
            return path
    raise CheckpointError(f"{folder}: no {_WEIGHTS}; give the folder `model` that a finished run left behind")


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
    # The one that training named may not be on this machine. "words" has no files: a folder is a former model's.
    if config.data.tokenizer != "words" and (folder / _TOKENIZER).is_dir():
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
    def modalities(self) -> tuple[Feature, ...]:
        """What of a chunk the model can encode: its towers' modalities, and "notation" (muser_dist/data/chunks.py)."""
        return self.config.evaluated

    @property
    def label_values(self) -> dict[str, tuple[str, ...]]:
        """By metadata field, the values that `classify` tells apart; empty where the model learned no labels."""
        return dict(self.config.data.label_values)

    def classify(self, clips: Sequence[Any], sample_rate: int | None = None) -> dict[str, np.ndarray]:
        """What the model's heads say of clips, or of sentences, pieces or features where it reads these.

        Args:
            clips, sample_rate: as of `encode_audio`; of longer clips the middle crop is heard. Or as of `encode_text`;
                or of `encode_symbolic` or `encode_features`, and of longer ones the head is read.

        Returns:
            probabilities by metadata field: (len(clips), values) float32, in the order of `label_values`. Those of a
            field in config.data.classes sum to 1; those of tags are each for itself.

        Raises:
            ConfigError: the model has no such heads.
            DataError: as of `encode_audio`.
        """
        if isinstance(clips, (str, Path, bytes, np.ndarray)):
            raise TypeError("classify takes a list; wrap the one you have in [ ]")
        name = self.modalities[0]
        width: int = self.model.towers[name].width  # type: ignore[assignment]
        features = [np.zeros((0, width), np.float32)]
        for part in _batches(clips, self.window_batch):
            if name == "text":
                arrays = self._read(part)
            elif name in ("symbolic", "features"):
                arrays = dict(zip(_INPUTS[name], first_runs(name, part, self.config.data), strict=True))
            else:
                arrays = self._middles(part, sample_rate)
            features.append(self._forward(name, arrays)[1])
        return self.classify_features(np.concatenate(features))

    def classify_features(self, features: np.ndarray) -> dict[str, np.ndarray]:
        """`classify` of (n, width) outputs of the tower that the heads read, as `encode_chunk` gives them."""
        if not self.label_values:
            raise ConfigError("this model tells no labels apart; train one with jobs/finetune.py")
        with torch.inference_mode():
            said = self.model.label_probabilities(torch.tensor(features, device=self.device))
        return {name: probabilities.cpu().numpy() for name, probabilities in said.items()}

    @cached_property
    def sha256(self) -> str:
        """Which model this is: see `identity_of`."""
        return identity_of(self.model.state_dict(), self.config)

    def encode_audio(
        self,
        clips: Sequence[Clip],
        sample_rate: int | None = None,
        *,
        windows: Windows = "all",
        hop_seconds: float | None = None,
    ) -> np.ndarray:
        """Embeds clips, of seconds or whole songs, with the waveform tower.

        A tower hears `config.data.crop_seconds` at a time. A longer clip is cut into windows of that length, one every
        `hop_seconds` and a last one that ends with the clip; silent ones are left out. Its embedding is the mean of
        the windows' embeddings of unit length, made unit length: training compares directions only, so a window's
        length before that says nothing about its worth. Clips are decoded bit by bit and windows of several clips
        encoded together, so that memory holds a batch of windows, however long a song is.

        Args:
            clips: paths, bytes of encoded files, or waveforms.
            sample_rate: Hz of clips given as waveforms; the model's own rate by default.
            windows: "all", or of longer clips only the "middle" crop, as evaluation hears them.
            hop_seconds: from a window's begin to the next one's; `config.data.crop_seconds` by default.

        Returns:
            (len(clips), dim) float32 of unit length.

        Raises:
            DataError: a clip cannot be decoded, is empty, silent, not finite or longer than four hours; the message
                says which.
        """
        return self._encode_clips("audio", clips, sample_rate, windows, hop_seconds)

    def encode_spectrogram(
        self,
        clips: Sequence[Clip],
        sample_rate: int | None = None,
        *,
        windows: Windows = "all",
        hop_seconds: float | None = None,
    ) -> np.ndarray:
        """Embeds clips with the spectrogram tower; as `encode_audio`."""
        return self._encode_clips("spectrogram", clips, sample_rate, windows, hop_seconds)

    def encode_text(self, sentences: Sequence[str]) -> np.ndarray:
        """Embeds sentences: (len(sentences), dim) float32 of unit length."""
        if isinstance(sentences, str):
            raise TypeError("encode_text takes a list of sentences; wrap the one you have in [ ]")
        parts = [self._forward("text", self._read(part))[0] for part in _batches(sentences, self.config.train.chunk)]
        return np.concatenate([np.zeros((0, self.dim), np.float32), *parts])

    def encode_symbolic(self, pieces: Sequence[str | Path | bytes]) -> np.ndarray:
        """Embeds scores and MIDI with the symbolic tower.

        A tower reads `config.data.symbolic.max_patches` at a time. A longer piece is cut into windows of as many, of
        which the last one ends with the piece. Its embedding is the mean of the windows', each of unit length and
        weighted with the patches that no window before it had, made unit length (CLaMP 3's released code weights so).

        Args:
            pieces: paths, or bytes, of ABC, MusicXML (.mxl too) or MIDI; their content tells which.

        Returns:
            (len(pieces), dim) float32 of unit length.

        Raises:
            DataError: a piece is broken, has no notes or is too large; the message says which.
        """
        return self._encode_in_runs("symbolic", pieces)

    def encode_features(self, songs: Sequence[Features]) -> np.ndarray:
        """Embeds songs by features of their windows, of the network whose features the model was trained on.

        A tower reads `config.data.features.max_windows` at a time; longer songs as `encode_symbolic` does pieces.

        Args:
            songs: (windows, size) float16 or float32; or paths or bytes of such arrays in NumPy's format (.npy).

        Returns:
            (len(songs), dim) float32 of unit length.

        Raises:
            DataError: features are of another shape or type, or not finite; the message says which.
        """
        return self._encode_in_runs("features", songs)

    def encode_chunks(self, modality: Feature, chunks: Iterable[dict[str, Any]]) -> np.ndarray:
        """Embeds chunks of muser_dist/data/chunks.py: (rows of all chunks, dim) float32 of unit length."""
        parts = [self.encode_chunk(modality, chunk)[0] for chunk in chunks]
        return np.concatenate(parts) if parts else np.zeros((0, self.dim), np.float32)

    def encode_chunk(self, modality: Feature, chunk: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
        """Embeds one chunk: as `encode_chunks`, and the tower's output before its head, (rows, width) float32."""
        tower = TOWER_OF.get(modality, modality)
        return self._forward(tower, {read: chunk[n] for read, n in zip(_INPUTS[tower], _INPUTS[modality], strict=True)})

    def search(self, query: "str | Clip", index: "Index", k: int = 10, modality: Modality | None = None) -> "list[Hit]":
        """The rows of an index that are nearest to a query by cosine.

        Args:
            query: a sentence; a clip, as a path, bytes or a waveform at the model's rate, heard as the index's rows
                were; a piece of notation, as a path with one of its extensions, or bytes where the model hears nothing;
                or an embedding, (dim,). A str is a path where there is such a file, and a sentence otherwise.
            index: `Index.open` of a folder that jobs/embed.py made with this model.
            k: most rows.
            modality: whose embeddings are searched; the index's first by default.

        Returns:
            the best first; rows with equal scores in the order of their keys.

        Raises:
            DataError: the index was made with another model, or is not of this modality; or as `encode_audio`.
        """
        index.check_model(self.sha256)
        manifest = index.manifest
        modality = modality or index.modalities[0]
        if isinstance(query, np.ndarray) and query.shape == (self.dim,):
            embedding = query
        elif isinstance(query, str) and not os.path.isfile(query):
            embedding = self.encode_text([query])[0]
        elif isinstance(query, (str, Path)) and is_notation(str(query)):
            (embedding,) = self.encode_symbolic([query])
        elif heard := [name for name in (modality, *self.config.model.towers()) if name in ("audio", "spectrogram")]:
            (embedding,) = self._encode_clips(heard[0], [query], None, manifest.windows, manifest.hop_seconds)
        elif not isinstance(query, np.ndarray):
            (embedding,) = self.encode_symbolic([query])
        else:
            raise ConfigError("this model hears nothing; give a sentence, or the path of a piece")
        (hits,) = index.search(embedding[None], k, modality)
        return hits

    def _encode_clips(
        self,
        modality: Modality,
        clips: Sequence[Clip],
        sample_rate: int | None,
        windows: Windows,
        hop_seconds: float | None,
    ) -> np.ndarray:
        if isinstance(clips, (str, Path, bytes, np.ndarray)):
            raise TypeError(f"encode_{modality} takes a list of clips; wrap the one you have in [ ]")
        hop = self.config.data.crop_seconds if hop_seconds is None else hop_seconds
        require(hop > 0, f"hop_seconds is {hop}; windows must move on")
        sums = np.zeros((len(clips), self.dim))
        heard = (
            (number, *window)
            for number, clip in enumerate(clips)
            for window in hear(clip, self.config.data, sample_rate, windows, hop)
        )
        for part in _batches(heard, self.window_batch):
            numbers, waveforms, lengths = zip(*part, strict=True)
            arrays = {"audio": np.stack(waveforms), "audio_length": np.array(lengths, np.int32)}
            np.add.at(sums, list(numbers), self._forward(modality, arrays)[0])
        return unit_rows(sums, "the clips' embeddings").astype(np.float32)

    def _encode_in_runs(self, modality: Modality, items: Sequence[Any]) -> np.ndarray:
        if isinstance(items, (str, Path, bytes, np.ndarray)):
            raise TypeError(f"encode_{modality} takes a list; wrap the one you have in [ ]")
        sums = np.zeros((len(items), self.dim))
        data = self.config.data
        runs = ((number, *run) for number, item in enumerate(items) for run in read_runs(modality, item, data))
        for part in _batches(runs, self.window_batch):
            numbers, read, lengths, new = zip(*part, strict=True)
            arrays = dict(zip(_INPUTS[modality], (np.stack(read), np.array(lengths, np.int32)), strict=True))
            np.add.at(sums, list(numbers), np.array(new)[:, None] * self._forward(modality, arrays)[0])
        return unit_rows(sums, f"{modality} embeddings").astype(np.float32)

    def _read(self, sentences: Sequence[Any]) -> dict[str, np.ndarray]:
        ids, lengths = self._tokenizer(list(sentences))
        return {"text_ids": ids, "text_length": lengths}

    def _middles(self, clips: Sequence[Clip], sample_rate: int | None) -> dict[str, np.ndarray]:
        data = self.config.data
        heard = (next(hear(clip, data, sample_rate, "middle", data.crop_seconds)) for clip in clips)
        waveforms, lengths = zip(*heard, strict=True)
        return {"audio": np.stack(waveforms), "audio_length": np.array(lengths, np.int32)}

    @property
    def window_batch(self) -> int:
        """Windows that a tower gets at a time."""
        return min(self.config.train.chunk, _MOST_WINDOWS)

    def _forward(self, modality: str, arrays: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        if modality not in self.modalities:
            raise ConfigError(f"this model has no {modality} tower; it has {', '.join(self.config.model.towers())}")
        batch = {name: torch.tensor(values, device=self.device) for name, values in arrays.items()}
        with torch.inference_mode():
            joint, features = self.model.encode_with_features(modality, batch)
            return torch.nn.functional.normalize(joint, dim=1).cpu().numpy(), features.float().cpu().numpy()


def _batches(items: Iterable[_T], size: int) -> Iterator[list[_T]]:
    items = iter(items)
    while batch := list(islice(items, size)):
        yield batch
