"""Recommend songs to who liked some: `python jobs/recommend.py EMBEDDINGS KEY [KEY ...]`."""

from dataclasses import dataclass
from pathlib import Path

import tyro

from muser_dist.cli import main, print_hits
from muser_dist.config import Modality


@dataclass(frozen=True)
class Recommend:
    """Prints the songs nearest to the mean of the given ones, the best first; also songs that nobody has heard yet."""

    index: tyro.conf.Positional[Path]
    """Folder that jobs/embed.py has written, with a model that knows what people like (docs/htcl.md)."""
    history: tyro.conf.Positional[tuple[str, ...]]
    """Keys of the songs that were liked."""
    k: int = 10
    """Songs to print."""
    modality: Modality | None = None
    """Whose embeddings are compared; the first of the folder's by default."""


def job(arguments: list[str]) -> None:
    options = tyro.cli(Recommend, args=arguments, prog="jobs/recommend.py")
    from muser_dist.search import Index  # after the options

    index = Index.open(options.index)
    print_hits(index.recommend(options.history, options.k, options.modality), index.manifest.fields)


if __name__ == "__main__":
    main(job)
