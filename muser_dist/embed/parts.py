"""Embeddings in a folder, as Parquet parts that are whole or not there; plain pyarrow reads them.

    part-00000.parquet   rows 0 to part_rows - 1 of the sorted shards or files, and so on; what could not be embedded of
                         them is in the file's own metadata, so that a part and its quarantine are there together
    manifest.json        which model, what was embedded and how: a part that was made otherwise never lies beside others
    quarantine.jsonl     all entries of the parts: row, shard, key, member, reason

The columns are key, shard, row, windows, {modality}_embedding (fixed-size lists of float32, of unit length; null where
that modality could not be used), text (the sentence, where texts are embedded) and the metadata fields. The schema's
metadata hold the manifest under "muser_dist".
"""

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import TypeAdapter

from muser_dist.config import Modality
from muser_dist.data.shards import ShardIndex, shard_versions
from muser_dist.data.storage import Storage, redact
from muser_dist.data.symbolic.config import SymbolicConfig
from muser_dist.data.windows import Windows
from muser_dist.embed.songs import Wanted
from muser_dist.errors import ConfigError, DataError
from muser_dist.files import write_whole
from muser_dist.muser import Muser

FORMAT = 4
MANIFEST, QUARANTINE = "manifest.json", "quarantine.jsonl"
_KEY, _PROBLEMS = b"muser_dist", b"muser_dist.quarantine"
_RESERVED = ("key", "shard", "row", "windows", "text")


def embedding_column(modality: Modality) -> str:
    """The column that holds a modality's embeddings."""
    return f"{modality}_embedding"


@dataclass(frozen=True)
class Manifest:
    """What decides the content of the parts.

    Attributes:
        model: its `Muser.sha256`.
        dim: dimensions of the embeddings.
        sample_rate, crop_seconds, pad: of the windows.
        modalities, windows, hop_seconds, fields: as of `Wanted`.
        templates: that sentences come from; empty where no text is embedded.
        symbolic: how notation is read; None where none is.
        rows: of all parts.
        part_rows: of a part; the last one has fewer.
        inputs: SHA-256 over the shards' or files' names, their numbers of rows, and what tells them from others of
            their names: size and time, or what the storage says.
    """

    model: str
    dim: int
    sample_rate: int
    crop_seconds: float
    pad: str
    modalities: tuple[Modality, ...]
    windows: Windows
    hop_seconds: float
    fields: tuple[str, ...]
    templates: tuple[str, ...]
    rows: int
    part_rows: int
    inputs: str
    symbolic: SymbolicConfig | None = None

    @staticmethod
    def of(muser: Muser, wanted: Wanted, index: ShardIndex, storage: Storage, part_rows: int) -> "Manifest":
        """What a job makes; raises DataError where the storage does not say which version of a shard it has."""
        data = muser.config.data
        inputs = [map(redact, index.urls), index.rows.tolist(), shard_versions(storage, index)]
        return Manifest(
            model=muser.sha256,
            dim=muser.dim,
            sample_rate=data.sample_rate,
            crop_seconds=data.crop_seconds,
            pad=data.pad,
            modalities=wanted.modalities,
            windows=wanted.windows,
            hop_seconds=wanted.hop_seconds,
            fields=wanted.fields,
            templates=data.templates if "text" in wanted.modalities else (),
            rows=index.total,
            part_rows=part_rows,
            inputs=hashlib.sha256(json.dumps(list(zip(*inputs, strict=True))).encode()).hexdigest(),
            symbolic=data.symbolic if wanted.notation else None,
        )

    @staticmethod
    def read(folder: Path) -> "tuple[Manifest, dict[str, Any]]":
        """The manifest of a folder, and what made it.

        Raises:
            DataError: there is none, or it is of another format.
        """
        path = folder / MANIFEST
        try:
            content = json.loads(path.read_text())
            if content["format"] != FORMAT:
                raise DataError(f"{path} is of format {content['format']}, and this version reads {FORMAT}")
            return TypeAdapter(Manifest).validate_python(content["content"]), content["made_by"]
        except OSError:
            raise DataError(f"{folder} holds no embeddings (no {MANIFEST}); jobs/embed.py makes them") from None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{path} is broken ({error}); make the embeddings anew in another folder") from None

    @property
    def parts(self) -> int:
        """Number of parts."""
        return -(-self.rows // self.part_rows)

    def range(self, part: int) -> tuple[int, int]:
        """First row of a part, and the one after its last."""
        return part * self.part_rows, min((part + 1) * self.part_rows, self.rows)


class Parts:
    """The parts in a folder.

    Args:
        folder: where they lie.
        manifest: what they hold.
        made_by: command, commit and versions; they go into the files and are not compared.
    """

    def __init__(self, folder: Path, manifest: Manifest, made_by: dict[str, Any]) -> None:
        self.folder = folder
        self.manifest = manifest
        described = {"format": FORMAT, "content": asdict(manifest), "made_by": made_by}
        self._described = json.dumps(described, indent=1)
        vector = pa.list_(pa.float32(), manifest.dim)
        columns = [("key", pa.string()), ("shard", pa.string()), ("row", pa.int64()), ("windows", pa.int32())]
        columns += [(embedding_column(name), vector) for name in manifest.modalities]
        columns += [("text", pa.string())] if "text" in manifest.modalities else []
        self.schema = pa.schema(columns + [(name, pa.string()) for name in manifest.fields])

    def claim(self) -> None:
        """Makes the folder this job's.

        Raises:
            DataError: it holds embeddings of another model, other data or other settings.
            ConfigError: it cannot be written; or two columns would have the same name.
        """
        if len(set(self.schema.names)) < len(self.schema.names):
            raise ConfigError(
                f"fields: {', '.join(self.manifest.fields)}: a field occurs twice or has the name of a column "
                f"({', '.join(_RESERVED)}, ..._embedding); leave it out"
            )
        if (self.folder / MANIFEST).exists():
            there, _ = Manifest.read(self.folder)
            mine = asdict(self.manifest)
            changed = [f"{n}: {v!r} there, {mine[n]!r} here" for n, v in asdict(there).items() if v != mine[n]]
            if changed:
                raise DataError(
                    f"{self.folder} holds embeddings of another model, other data or other settings "
                    f"({'; '.join(changed)}); give another --out, or delete that folder"
                )
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if any(self.folder.glob("part-*.parquet")):
                raise DataError(f"{self.folder} holds parts and no {MANIFEST}; give another --out")
            write_whole(self.folder / MANIFEST, self._described)
        except OSError as error:
            raise ConfigError(f"out: cannot write to {self.folder} ({error.strerror}); give another --out") from None

    def path(self, part: int) -> Path:
        """The file of a part."""
        return self.folder / f"part-{part:05d}.parquet"

    @property
    def quarantine(self) -> Path:
        """The file with all entries of the quarantine."""
        return self.folder / QUARANTINE

    def missing(self) -> list[int]:
        """The parts that are not there, or not whole."""
        return [part for part in range(self.manifest.parts) if self._footer(part) is None]

    def write(
        self,
        part: int,
        rows: list[dict[str, Any]],
        embeddings: dict[Modality, np.ndarray],
        problems: list[dict[str, Any]],
    ) -> None:
        """Writes a part, whole or not at all.

        Args:
            part: its number.
            rows: of `SongReader`, in order.
            embeddings: (len(rows), dim) float32 for each modality; a row of NaN is none.
            problems: its entries of the quarantine.

        Raises:
            DataError: it cannot be written.
        """
        columns: dict[str, pa.Array] = {}
        for name in self.schema.names:
            kind = self.schema.field(name).type
            if name in self.manifest.fields:
                columns[name] = pa.array([row["fields"].get(name) for row in rows], kind)
            elif name in _RESERVED:
                columns[name] = pa.array([row[name] for row in rows], kind)
        for modality in self.manifest.modalities:
            values = embeddings[modality]
            columns[embedding_column(modality)] = pa.FixedSizeListArray.from_arrays(
                pa.array(values.ravel(), pa.float32()), self.manifest.dim, mask=pa.array(np.isnan(values[:, 0]))
            )
        about = {_KEY: self._described, _PROBLEMS: json.dumps(problems)}
        table = pa.table([columns[name] for name in self.schema.names], self.schema.with_metadata(about))
        path = self.path(part)
        temporary = path.with_name(f".{path.name}.part")
        try:
            with temporary.open("wb") as file:
                repeated = ["shard", *self.manifest.fields]
                pq.write_table(table, file, compression="zstd", use_dictionary=repeated, row_group_size=1 << 14)
                file.flush()
                os.fsync(file.fileno())  # else a machine that goes down may leave a file of zeros under the name
            temporary.replace(path)
        except OSError as error:
            raise DataError(
                f"--out: cannot write {path} ({error.strerror or error}); the same command goes on when it can"
            ) from None

    def finish(self) -> tuple[int, int]:
        """Writes quarantine.jsonl out of the parts that are there; returns the numbers of rows and of its entries."""
        rows, lines = 0, []
        for part in range(self.manifest.parts):
            if (footer := self._footer(part)) is not None:
                rows += footer.num_rows
                lines += [json.dumps(problem) + "\n" for problem in json.loads(footer.metadata[_PROBLEMS])]
        write_whole(self.quarantine, "".join(lines))
        return rows, len(lines)

    def _footer(self, part: int) -> pq.FileMetaData | None:
        """What the end of a part's file says; None where it is not there, torn or another job's."""
        try:
            footer = pq.read_metadata(self.path(part))
            content = json.loads(footer.metadata[_KEY])["content"]
        except (OSError, pa.ArrowInvalid, KeyError, TypeError):
            return None
        return footer if content == json.loads(self._described)["content"] else None
