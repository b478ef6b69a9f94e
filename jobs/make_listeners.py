"""Makes an interaction log of simulated listeners.

python jobs/make_listeners.py --shards 'DATA/*.tar' --out listeners

The clips are real, the listeners are not: they are drawn from a model that muser_dist/data/corpora/listeners.py
describes, so that recommenders can be compared with an oracle that knows the true tastes.
"""

from dataclasses import dataclass
from pathlib import Path

import tyro

from muser_dist.cli import Progress, main
from muser_dist.data.config import DataConfig
from muser_dist.errors import MuserError


@dataclass(frozen=True, kw_only=True)
class MakeListeners:
    """Simulates who listened to which clip when, what they skipped and what they liked.

    Writes simulated-log.parquet, with the columns user, item, time, signal and value, and simulated-truth.npz. The same
    shards, listeners and seed make the same files.
    """

    shards: tuple[str, ...]
    """Paths or URLs of shards, with braces and globs. Tastes are over type, meter, mode, instrument and book, as the
    .json members say; a corpus may lack some of these fields."""
    out: Path
    """Folder for the two files; made when missing."""
    listeners: int = 2000
    """How many there are."""
    seed: int = 7
    """Another seed gives other listeners, and other clips that are popular or cold."""
    storage_options: str = ""
    """JSON file with arguments of fsspec's file systems, as of data.storage_options in training."""

    def make(self) -> None:
        """Writes the files and says what is in them."""
        from muser_dist.data.corpora.listeners import LOG, Population, simulate, write_listeners
        from muser_dist.data.corpora.tastes import NOTE, read_clips
        from muser_dist.data.shards import index_shards
        from muser_dist.data.storage import Storage

        population = Population(listeners=self.listeners, seed=self.seed)
        storage = Storage.of(DataConfig(storage_options=self.storage_options))
        index = index_shards(storage, storage.expand(self.shards, "--shards"), "--shards")
        clips = read_clips(storage, index, Progress("shards"))
        log, truth = simulate(clips, population, Progress("listeners", every=2.0))
        write_listeners(self.out, log, truth)
        print(NOTE)
        print(f"{self.out / LOG}: {log.num_rows:,} events, {len(truth.users):,} listeners, {len(truth.items):,} clips")
        print(f"cold clips, released at {population.test_start} (Unix time): {truth.cold.sum():,}")
        if clips.problems:
            first = "".join(c if c.isprintable() else "�" for c in clips.problems[0])  # keys are other people's
            print(f"rows that are no clips: {len(clips.problems):,}; the first is {first}")


def job(arguments: list[str]) -> None:
    options = tyro.cli(MakeListeners, args=arguments, prog="jobs/make_listeners.py")
    try:
        options.make()
    except ModuleNotFoundError as error:
        raise MuserError(f"{error}; pip install 'muser_dist[train]' brings what reads shards") from None


if __name__ == "__main__":
    main(job)
