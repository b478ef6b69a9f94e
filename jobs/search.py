"""Search embeddings: `python jobs/search.py EMBEDDINGS MODEL "a slow waltz"`, or a file in place of the words."""

from dataclasses import dataclass
from pathlib import Path

import tyro

from muser_dist.cli import main, print_hits
from muser_dist.config import Modality


@dataclass(frozen=True)
class Search:
    """Prints the rows that are nearest to a sentence or to a piece of music, the best first."""

    index: tyro.conf.Positional[Path]
    """Folder that jobs/embed.py has written."""
    model: tyro.conf.Positional[Path]
    """The model that made it: a run's folder, or an exported model's."""
    query: tyro.conf.Positional[str]
    """A sentence in any language that the model knows, or the path of an audio file or of a piece of notation."""
    k: int = 10
    """Rows to print."""
    modality: Modality | None = None
    """Whose embeddings are searched; the first of the folder's by default."""


def job(arguments: list[str]) -> None:
    options = tyro.cli(Search, args=arguments, prog="jobs/search.py")
    from muser_dist import Muser  # after the options: importing torch takes seconds
    from muser_dist.search import Index

    index = Index.open(options.index)
    hits = Muser.from_pretrained(options.model).search(options.query, index, options.k, options.modality)
    print_hits(hits, index.manifest.fields)


if __name__ == "__main__":
    main(job)
