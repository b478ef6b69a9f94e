"""A set of shards as arrays: every row's embeddings, validity and metadata; what is done may be kept in a folder."""

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol
from zipfile import BadZipFile

import numpy as np

from muser_dist.config import Feature, RunConfig, to_dict
from muser_dist.data.pipeline import evaluation_chunks
from muser_dist.data.shards import ShardIndex
from muser_dist.data.storage import Storage
from muser_dist.data.symbolic.characters import CHARACTERS, PATCH_BYTES
from muser_dist.data.text import by_language, flat
from muser_dist.errors import DataError

_SECONDS = 2.0  # between two calls of `progress`
_PART_ROWS = 2048  # about, in a file that is kept: an interruption costs no more


_LISTS = ("keys", "fields", "translations", "problems")
"""Of `Embedded`, what is no array."""


class Encoder(Protocol):
    """What is scored: `muser_dist.Muser`, or what `muser_dist.evaluate.external` makes of any other model."""

    @property
    def modalities(self) -> tuple[Feature, ...]:
        """What it encodes."""
        ...

    def encode_chunk(self, modality: Feature, chunk: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
        """A chunk of muser_dist/data/chunks.py to (rows, D) in the joint space and (rows, width) before the head."""
        ...

    def encode_text(self, sentences: list[str]) -> np.ndarray:
        """(n, D) in the joint space."""
        ...


@dataclass(frozen=True)
class Embedded:
    """Rows of a set of shards, in their order. Arrays hold whatever they hold where a modality is not valid.

    `joint` and `tower`: (n, D) in the joint space and (n, width) before the heads, float32, by modality; `valid`:
    (n,) bool; `text_ids`: (n,) int64, equal where texts state the same; `keys`: the rows' names; `fields`: metadata,
    and `translations` those that are objects {language: text}; `problems`: why rows cannot be used.
    """

    joint: dict[str, np.ndarray]
    tower: dict[str, np.ndarray]
    valid: dict[str, np.ndarray]
    text_ids: np.ndarray
    keys: list[str]
    fields: list[dict[str, Any]]
    translations: list[dict[str, dict[str, Any]]]
    problems: list[str]

    def __len__(self) -> int:
        return len(self.keys)

    @staticmethod
    def join(parts: "Sequence[Embedded]") -> "Embedded":
        """The rows of all parts, of which there is one at least."""

        def together(arrays: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
            return {name: np.concatenate([part[name] for part in arrays]) for name in arrays[0]}

        return Embedded(
            together([part.joint for part in parts]),
            together([part.tower for part in parts]),
            together([part.valid for part in parts]),
            np.concatenate([part.text_ids for part in parts]),
            [key for part in parts for key in part.keys],
            [values for part in parts for values in part.fields],
            [values for part in parts for values in part.translations],
            [problem for part in parts for problem in part.problems],
        )

    def save(self, path: Path) -> None:
        """Writes a NumPy archive, whole or not at all."""
        arrays: dict[str, Any] = {
            f"{kind}.{name}": values
            for kind in ("joint", "tower", "valid")
            for name, values in getattr(self, kind).items()
        }
        temporary = path.with_name(f".{path.name}.part")
        with temporary.open("wb") as file:
            rest = json.dumps({name: getattr(self, name) for name in _LISTS})
            np.savez(file, text_ids=self.text_ids, rest=np.array(rest), **arrays)
        temporary.replace(path)

    @staticmethod
    def load(path: Path) -> "Embedded":
        """What `save` wrote.

        Raises:
            DataError: the file is broken.
        """
        kinds: dict[str, dict[str, np.ndarray]] = {"joint": {}, "tower": {}, "valid": {}}
        try:
            with np.load(path, allow_pickle=False) as archive:
                for entry in archive.files:
                    kind, _, name = entry.partition(".")
                    if name:
                        kinds[kind][name] = archive[entry]
                rest = json.loads(str(archive["rest"]))
                arrays = kinds["joint"], kinds["tower"], kinds["valid"], archive["text_ids"]
                return Embedded(*arrays, *(rest[name] for name in _LISTS))
        except (OSError, ValueError, KeyError, TypeError, EOFError, BadZipFile) as error:
            raise DataError(f"{path}: kept embeddings that cannot be read ({error}); delete the file") from None


def embed(
    model: Encoder,
    config: RunConfig,
    index: ShardIndex,
    storage: Storage,
    progress: Callable[[int, int], None] | None = None,
    keep: Path | None = None,
) -> Embedded:
    """Embeds the first config.evaluate.rows rows of some shards.

    Args:
        model: encodes.
        config: `data` says how clips are heard, `evaluate.rows` how many.
        index: the shards.
        storage: where they are read from.
        progress: called now and then with the rows that are done and all.
        keep: folder for what is done: the same call again takes it from there. The model is told by what it makes
            of a sentence and a crop of noise, shards by their names and rows.

    Raises:
        DataError: there are no rows, or a kept file is broken.
    """
    total, chunk = min(index.total, config.evaluate.rows), config.train.chunk
    step = max(1, _PART_ROWS // chunk)  # chunks in a part
    chunks = -(-total // chunk)
    starts = range(0, max(1, chunks), step)
    kept: list[Path | None] = [None] * len(starts)
    if keep:
        keep.mkdir(parents=True, exist_ok=True)
        name = _digest(model, config, index)
        # By rows: where evaluate.rows ends amid a chunk, the chunk's number does not tell what is in it.
        ranges = [(start * chunk, min(total, (start + step) * chunk)) for start in starts]
        kept = [keep / f"{name}-rows-{first:08d}-{end:08d}.npz" for first, end in ranges]
    parts: list[Embedded] = []
    for path in kept:  # those at the front that are there
        if path is None or not path.exists():
            break
        parts.append(Embedded.load(path))
    done = sum(map(len, parts))
    told = time.monotonic()
    if progress:
        progress(done, total)
    gathered: list[Embedded] = []
    for number, read in enumerate(evaluation_chunks(config, index, storage, len(parts) * step), len(parts) * step + 1):
        gathered.append(_embed_chunk(model, read))
        done += len(gathered[-1])
        if progress and (done == total or time.monotonic() > told + _SECONDS):
            told = time.monotonic()
            progress(done, total)
        if number % step == 0 or number == chunks:
            parts.append(Embedded.join(gathered))
            gathered = []
            if path := kept[len(parts) - 1]:
                parts[-1].save(path)
    if not parts:
        raise DataError(f"{', '.join(index.urls[:3])}: there is no row to score")
    return Embedded.join(parts)


def _embed_chunk(model: Encoder, chunk: dict[str, Any]) -> Embedded:
    """A chunk's rows without its padding."""
    real = chunk["row"] >= 0
    encoded = {name: model.encode_chunk(name, chunk) for name in model.modalities}
    metadata = [json.loads(values) for values, use in zip(chunk["fields"], real, strict=True) if use]
    return Embedded(
        {name: joint[real] for name, (joint, _) in encoded.items()},
        {name: tower[real] for name, (_, tower) in encoded.items()},
        {name: chunk[f"valid_{name}"][real] for name in model.modalities},
        chunk["text_id"][real],
        [key for key, use in zip(chunk["key"], real, strict=True) if use],
        [flat(values) for values in metadata],
        [by_language(values) for values in metadata],
        [json.loads(problem)["reason"] for problem in chunk["problems"]],
    )


def _digest(model: Encoder, config: RunConfig, index: ShardIndex) -> str:
    """Tells sets of embeddings apart."""
    rng, data = np.random.default_rng(0), config.data
    noise = rng.integers(-8000, 8000, (1, data.crop_samples), np.int16)
    given = {"audio": noise, "audio_length": np.array([data.crop_samples], np.int32), "row": np.zeros(1, int)}
    patches = rng.integers(4, CHARACTERS, (1, data.symbolic.max_patches, PATCH_BYTES), np.uint8)
    for name, length in (("patches", "patches_length"), ("notation_patches", "notation_length")):
        given |= {name: patches, length: np.array([data.symbolic.max_patches], np.int32)}
    windows, size = data.features.max_windows, data.features.size
    given |= {
        "features": rng.standard_normal((1, windows, size)).astype(np.float16),
        "features_length": np.array([windows], np.int32),
    }
    content = hashlib.sha256()
    for name in model.modalities:
        if name == "text":
            content.update(model.encode_text(["a slow waltz, played on the flute"]).tobytes())
        else:
            for array in model.encode_chunk(name, given | {f"valid_{name}": np.ones(1, bool)}):
                content.update(array.tobytes())
    of_data = {
        name: value for name, value in to_dict(config)["data"].items() if name not in ("train", "val", "sources")
    }
    content.update(json.dumps([of_data, config.train.chunk, index.urls, index.rows.tolist()], sort_keys=True).encode())
    return content.hexdigest()[:16]
