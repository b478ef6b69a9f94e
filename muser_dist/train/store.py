"""Where a run's checkpoints lie: a local folder or any fsspec URL.

A checkpoint is a folder, `checkpoint-<step>`, with a part of each rank and `checkpoint.json`. That
is written last and names the size and SHA-256 of each part: a folder without it is no checkpoint.
Parts are safetensors; nothing is ever unpickled.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from fsspec.implementations.local import LocalFileSystem

from muser_dist.config import RunConfig
from muser_dist.data.storage import Storage, redact
from muser_dist.errors import CheckpointError, ConfigError

_DESCRIPTION, _SET_ASIDE = "checkpoint.json", "broken.json"
_BLOCK_BYTES = 8 << 20


class CheckpointStore:
    """Reads and writes a run's checkpoints, one file at a time; knows of no ranks.

    Args:
        config: names the run and the place.
        storage: opens URLs, with the credentials that the run has for its data.

    Raises:
        DataError: there is no file system for the URL.
        CheckpointError: by methods that look what is there: the storage does not say.
    """

    def __init__(self, config: RunConfig, storage: Storage) -> None:
        place = config.train.checkpoint_storage
        self.url = f"{place.rstrip('/')}/{config.name}" if place else str(config.folder)
        self._fs, self._path = storage.filesystem(self.url, "train.checkpoint_storage")

    @property
    def remote(self) -> bool:
        """Whether parts must be fetched before they can be read."""
        return not isinstance(self._fs, LocalFileSystem)

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, in order."""
        return [step for step, complete in self._folders() if complete]

    def describe(self, step: int) -> dict[str, Any]:
        """What checkpoint.json of a complete checkpoint says."""
        return json.loads(self._fs.cat_file(f"{self._folder(step)}/{_DESCRIPTION}"))

    def write(self, step: int, name: str, content: bytes) -> dict[str, Any]:
        """Writes a part, whole or not at all, and returns what checkpoint.json has to say of it."""
        path = f"{self._folder(step)}/{name}"
        if self.remote:
            self._fs.pipe_file(path, content)
        else:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            part = Path(f"{path}.part")
            with part.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            part.replace(path)
        return {"name": name, "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}

    def complete(self, step: int, description: dict[str, Any]) -> None:
        """Makes a checkpoint of the parts that were written for a step."""
        self.write(step, _DESCRIPTION, json.dumps(description, indent=1).encode())

    def fetch(self, step: int, name: str, folder: str) -> Path:
        """A part as a local file: itself, or a copy in `folder`."""
        path = f"{self._folder(step)}/{name}"
        if not self.remote:
            return Path(path)
        copy = Path(folder) / name
        if not copy.exists():
            part = copy.with_name(f"{name}.part")  # a copy that broke off is none
            self._fs.get_file(path, str(part))
            part.replace(copy)
        return copy

    def set_aside(self, step: int) -> None:
        """Makes a checkpoint that turned out to be broken count no more."""
        self._fs.mv(f"{self._folder(step)}/{_DESCRIPTION}", f"{self._folder(step)}/{_SET_ASIDE}")

    def prune(self, keep: int) -> None:
        """Leaves the last `keep` checkpoints and the one with the lowest loss; older incomplete ones go too."""
        complete = self.steps()
        kept = set(complete[-keep:])
        losses = {}
        for step in complete:
            loss = self.describe(step)["loss"]
            losses[step] = float("inf") if loss is None else loss
        if losses:
            kept.add(min(losses, key=lambda step: (losses[step], -step)))
        for step, is_complete in self._folders():
            if step not in kept and step < max(complete, default=0):
                if is_complete:  # first, lest half of it be taken for a whole
                    self._fs.rm_file(f"{self._folder(step)}/{_DESCRIPTION}")
                self._fs.rm(self._folder(step), recursive=True)

    def check(self) -> None:
        """Writes a file and removes it.

        Raises:
            ConfigError: that fails; the message names the option.
        """
        path = f"{self._path}/.muser-writes-here"
        try:
            self._fs.makedirs(self._path, exist_ok=True)
            self._fs.pipe_file(path, b"")
            self._fs.rm_file(path)
        except Exception as error:  # each kind of storage has its own
            raise ConfigError(
                f"train.checkpoint_storage: cannot write to {redact(self.url)} ({redact(str(error)).strip()}); give "
                "another --train.checkpoint-storage, or mend the credentials in the file of --data.storage-options"
            ) from None

    def _folder(self, step: int) -> str:
        return f"{self._path}/checkpoint-{step:08d}"

    def _folders(self) -> list[tuple[int, bool]]:
        """Steps for which there is a folder, in order, and whether it is complete."""
        self._fs.invalidate_cache()
        found = []
        try:
            for path in self._fs.ls(self._path, detail=False):
                kind, _, step = str(path).rstrip("/").rpartition("/")[2].rpartition("-")
                if kind == "checkpoint" and step.isdigit():
                    found.append((int(step), self._fs.exists(f"{self._folder(int(step))}/{_DESCRIPTION}")))
        except (FileNotFoundError, NotADirectoryError):
            return []
        except Exception as error:
            raise CheckpointError(
                f"the checkpoints in {redact(self.url)} cannot be listed ({redact(str(error)).strip()}); mend the "
                "credentials in the file of --data.storage-options, or give another --train.checkpoint-storage"
            ) from None
        return sorted(found)


def problem_of(path: Path, part: dict[str, Any]) -> str | None:
    """What is wrong with a part of a checkpoint, by its size and hash; None where it is what was written.

    Raises:
        OSError: it cannot be read, which says nothing of what was written; FileNotFoundError where it is not there.
    """
    size = path.stat().st_size
    if size != part["bytes"]:
        return f"{part['name']} has {size:,} bytes in place of {part['bytes']:,}"
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
    return None if digest.hexdigest() == part["sha256"] else f"{part['name']} has another SHA-256 than was written"
