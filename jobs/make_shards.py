"""Makes training data: WebDataset shards with audio and metadata, and their index.

python jobs/make_shards.py demo --out demo-data
"""

import shlex
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import tyro

from muser_dist.cli import main
from muser_dist.errors import MuserError


@dataclass(frozen=True)
class Demo:
    """Short pieces that are composed and synthesised here; nothing is downloaded.

    1,920 pieces of 6 seconds take about a minute on two cores and 0.3 GB. The same command again
    goes on where an interrupted one stopped, and makes the same pieces.
    """

    out: Path
    """Folder for the shards; made when missing."""
    train: int = 1536
    """Pieces for training."""
    val: int = 384
    """Pieces for validation; none of them is in training."""
    seconds: float = 6.0
    """Length of each piece, from 1 to 60."""
    seed: int = 0
    """Another seed gives other pieces."""
    shard_rows: int = 64
    """Pieces in a shard."""

    def make(self) -> None:
        """Writes the shards and says what is where."""
        try:
            from muser_dist.data.corpora.demo import write_demo  # imports torch, which --help need not wait for
        except ModuleNotFoundError as error:
            raise MuserError(f"{error}; pip install 'muser_dist[data]' brings what makes shards") from None

        write_demo(self.out, self.train, self.val, self.shard_rows, self.seed, self.seconds, Progress("pieces"))
        patterns = []
        for split, rows in (("train", self.train), ("val", self.val)):
            if rows:
                pattern = shlex.quote(f"{self.out}/{split}-*.tar")
                patterns.append(f"--data.{split} {pattern}")
                hours, shards = rows * self.seconds / 3600, -(-rows // self.shard_rows)
                print(f"{split}: {rows:,} clips, {hours:.2f} hours, {shards} shards: {pattern}")
        print(f"next: python jobs/pretrain.py tiny {' '.join(patterns)}")


class Progress:
    """Shows on stderr how many of the pieces are there, and the time that the others will take."""

    def __init__(self, unit: str) -> None:
        self.unit = unit
        self.started: float | None = None
        self.kept = 0

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if self.started is None:  # what an earlier run made says nothing about the speed
            self.started, self.kept = now, done
        line = f"{done:,} of {total:,} {self.unit}"
        if self.kept < done < total:
            line += f", {(now - self.started) * (total - done) / (done - self.kept):.0f} s left"
        if sys.stderr.isatty():
            print(f"\r{line}\033[K", end="\n" if done == total else "", file=sys.stderr, flush=True)
        else:
            print(line, file=sys.stderr, flush=True)


def job(arguments: list[str]) -> None:
    tyro.extras.subcommand_cli_from_dict(
        {"demo": Demo}, prog="jobs/make_shards.py", description=__doc__, args=arguments
    ).make()


if __name__ == "__main__":
    main(job)
