"""From a log of who heard what to pairs of songs: `python jobs/mine_pairs.py LOG --layout yambda --out pairs`.

LOG is one or more files, paths or URLs with braces and globs: .parquet, .csv, .tsv or .jsonl, text perhaps with .gz,
.bz2 or .zst. The layout says what their columns mean: events, playlists, taste_profile, music4all_onion, lastfm_1k,
lastfm_360k, lfm_2b, yambda, yambda_listens, yambda_likes, or a .json file with your own, such as

    {"user": "listener", "item": ["song"], "time": "when", "time_format": "iso", "signal_column": "action"}

What was liked within half an hour after something was heard, and what listeners have in common:

    python jobs/mine_pairs.py multi_event.parquet --layout yambda --out liked \\
        --mining.rule explicit --mining.triggers play --mining.signals like
    python jobs/mine_pairs.py multi_event.parquet --layout yambda --out heard --mining.min-value play 50 \\
        --split.val-users 0.05 --split.val-items 0.05 --split.val-from 25000000

Writes pairs/part-*.parquet (trigger, item, weight, support, split), items/part-*.parquet (item, the split that it is
held out for, users in each split), and summary.json, where every row of the log is used or counted under a reason. With
--dry-run it shows how it reads the log, and makes nothing. The same command again does what is missing. It runs on this
machine's cores, or on the Ray cluster that RAY_ADDRESS names, every node of which must see the log and --out.
"""

import json
import os
import sys
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import tyro

from muser_dist.cli import Progress, main
from muser_dist.data.config import DataConfig
from muser_dist.errors import require
from muser_dist.files import alone_in
from muser_dist.interactions.log import load_layout
from muser_dist.interactions.mining import MiningConfig, number
from muser_dist.interactions.phases import Job, Phases
from muser_dist.interactions.readers import partitions_for, pieces_of, read_piece
from muser_dist.interactions.split import SPLITS, SplitConfig, of_interactions, seconds


@dataclass(frozen=True)
class MinePairs:
    """Mines pairs of songs that the same listeners prefer."""

    log: tyro.conf.Positional[tuple[str, ...]]
    """Files of the log."""
    layout: str
    """What their columns mean: a name, or a .json file."""
    out: Path
    """Folder for the pairs; made when missing."""
    mining: MiningConfig = field(default_factory=MiningConfig)
    """What a pair is."""
    split: SplitConfig = field(default_factory=SplitConfig)
    """What is held out."""
    items: str = ""
    """File of the items that there are, one name in a line: others are counted and left out."""
    latest: str = ""
    """Times later than this are in the future, and left out: a date or seconds. By default a day after the job is first
    started."""
    partitions: int = 0
    """Parts, a power of two, that users are dealt into, and items as well: the more, the less memory each takes. 0: by
    the size of the log."""
    storage_options: str = ""
    """JSON file with arguments of fsspec's file systems, as of data.storage_options in training."""
    dry_run: bool = False
    """Shows how the log is read, by its first rows; makes nothing."""


def job(arguments: list[str]) -> None:
    options = tyro.cli(MinePairs, args=arguments, prog="jobs/mine_pairs.py", description=__doc__)
    require(len(options.log) > 0, "give at least one file of a log")
    for name, path in (("--out", options.out), ("--items", Path(options.items or "/"))):
        require(
            "RAY_JOB_CONFIG_JSON_ENV_VAR" not in os.environ or path.is_absolute(),
            f"{name} {path} is a relative path, which in a submitted job means a temporary copy of your working "
            "directory; give an absolute path that every node sees",
        )
    from muser_dist.data.storage import Storage

    layout = load_layout(options.layout)
    storage = Storage.of(DataConfig(storage_options=options.storage_options))
    urls = [url if "://" in url else os.path.abspath(url) for url in storage.expand(options.log, "log")]
    pieces = pieces_of(storage, urls, layout)
    latest = seconds(options.latest, "latest")
    if latest is None and not layout.relative_time:
        latest = int(time.time()) + 86_400
    items = os.path.abspath(options.items) if options.items else ""
    partitions = options.partitions or partitions_for(pieces, layout)
    work = Job(tuple(pieces), layout, options.mining, options.split, latest, items, partitions)
    phases = Phases(work, storage, options.out.absolute())
    if options.dry_run:
        print(look(phases))
        return
    from muser_dist.interactions.job import run_phases  # after the options: importing Ray takes seconds
    from muser_dist.train.preflight import provenance

    made_by = provenance(["python", "jobs/mine_pairs.py", *arguments])
    with alone_in(phases.folder):
        phases.claim(made_by)
        if not phases.summary_path.exists():
            run_phases(phases, lambda phase: Progress(f"tasks of {phase!r}", every=2.0))
        summary = phases.finish(made_by)
    print(f"{summary['rows']:,} rows: {summary['used']:,} used")
    for reason, rows in summary["left_out"].items():
        print(f"  {rows:,} left out: {reason}")
    for split, interactions in summary["interactions"].items():
        if not interactions:
            print(f"warning: {split} has no interaction; compare --split with --dry-run's times", file=sys.stderr)
    pairs = ", ".join(f"{number:,} {split}" for split, number in summary["pairs"].items())
    print(f"pairs: {pairs or 'none'}; in {options.out / 'pairs'}")


def look(phases: Phases) -> str:
    """How the first rows of the log are read."""
    work = phases.job
    files = len({piece.url for piece in work.pieces})
    lines = [f"{files:,} files, {len(work.pieces):,} pieces, {work.partitions:,} partitions"]
    for piece in work.pieces[:1]:
        for table, left_out in read_piece(phases.storage, piece, work.layout, work.latest):
            numbers, _, unused, signals = number(table, work.mining, None)
            lines.append(f"the first {table.num_rows + left_out.total():,} rows: {table.num_rows:,} can be read")
            lines += [f"  {rows:,} left out: {reason}" for reason, rows in (left_out + unused).most_common()]
            lines.append(f"  signals: {', '.join(f'{name} ({rows:,})' for name, rows in signals.most_common(20))}")
            lines += [f"  {line}" for line in splits(work, numbers)]
            lines += [json.dumps(row, ensure_ascii=False) for row in table.slice(0, 5).to_pylist()]
            break
    return "\n".join(lines)


def splits(work: Job, interactions: pa.Table) -> list[str]:
    """From when to when interactions are, and how many of them are in each split."""
    if not len(interactions):
        return []
    user, item, time = (interactions[name].to_numpy() for name in ("user", "item", "time"))
    lines = []
    if work.layout.time:
        first, last = map(int, (time.min(), time.max()))
        if work.layout.relative_time:
            lines.append(f"times: {first} to {last}")
        else:
            lines.append(f"times: {datetime.fromtimestamp(first, UTC)} to {datetime.fromtimestamp(last, UTC)}")
    found = np.bincount(of_interactions(work.split, user, item, time), minlength=len(SPLITS))
    return [*lines, f"splits: {', '.join(f'{found[level]:,} {SPLITS[level]}' for level in work.split.levels)}"]


if __name__ == "__main__":
    main(job)
