"""Logs in files, and the pipeline in this process."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from muser_dist.data.config import DataConfig
from muser_dist.data.storage import Storage
from muser_dist.interactions.log import LogLayout
from muser_dist.interactions.mining import MiningConfig
from muser_dist.interactions.phases import PHASES, Job, Phases
from muser_dist.interactions.readers import pieces_of, read_piece
from muser_dist.interactions.split import SplitConfig

STORAGE = Storage.of(DataConfig())
COLUMNS = ("user", "item", "time", "signal", "value")


def write_log(path: Path, rows: list[tuple]) -> Path:
    """Rows of five cells, as text or None, in the format that the name says."""
    if path.suffix == ".parquet":
        columns = {name: pa.array([row[i] for row in rows], pa.string()) for i, name in enumerate(COLUMNS)}
        pq.write_table(pa.table(columns), path, row_group_size=max(len(rows) // 3, 1))
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(dict(zip(COLUMNS, row, strict=True))) + "\n" for row in rows))
    else:
        lines = ["\t".join(COLUMNS), *("\t".join(cell or "" for cell in row) for row in rows)]
        path.write_text("\n".join(lines) + "\n")
    return path


def read(path: Path, layout: LogLayout, latest: int | None = None):
    """All rows of a file as dicts, and what is left out."""
    rows, left_out = [], {}
    for piece in pieces_of(STORAGE, [str(path)], layout):
        for table, reasons in read_piece(STORAGE, piece, layout, latest):
            rows += table.to_pylist()
            for reason, number in reasons.items():
                left_out[reason] = left_out.get(reason, 0) + number
    return rows, left_out


def phases_of(
    paths: list[Path],
    folder: Path,
    layout: LogLayout,
    mining: MiningConfig | None = None,
    split: SplitConfig | None = None,
    latest: int | None = None,
    items: str = "",
    partitions: int = 4,
) -> Phases:
    pieces = tuple(pieces_of(STORAGE, [str(path) for path in paths], layout))
    job = Job(pieces, layout, mining or MiningConfig(), split or SplitConfig(), latest, items, partitions)
    return Phases(job, STORAGE, folder)


def run(phases: Phases) -> dict:
    """What muser_dist/interactions/job.py does, in this process."""
    phases.claim({"commit": "c0ffee"})
    for phase in PHASES:
        for task in phases.missing(phase):
            phases.run(phase, task)
    return phases.finish({"commit": "c0ffee"})


def pairs_of(folder: Path) -> list[dict]:
    return pq.read_table(folder / "pairs").to_pylist()


def items_of(folder: Path) -> dict[str, dict]:
    return {row["item"]: row for row in pq.read_table(folder / "items").to_pylist()}
