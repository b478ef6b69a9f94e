"""A run as a folder to give away: `python jobs/export.py RUN --out FOLDER`."""

from dataclasses import dataclass
from pathlib import Path

import tyro

from muser_dist.cli import main


@dataclass(frozen=True)
class Export:
    """Writes model.safetensors, config.json, the tokenizer and a model card, in the form of a Hugging Face folder.

    Weights are those of the run's end, or of its last intact checkpoint where it has not ended.
    """

    run: tyro.conf.Positional[Path]
    """A run's folder."""
    out: Path
    """Folder to write; must be empty or missing."""
    force: bool = False
    """Replaces a model that is in it."""


def job(arguments: list[str]) -> None:
    options = tyro.cli(Export, args=arguments, prog="jobs/export.py")
    from muser_dist.train.export import CARD, export  # after the options: importing torch takes seconds

    print(f"{options.out}: {export(options.run, options.out, options.force)}")
    print(f"next: choose a licence in {options.out / CARD}, and read the rest of it")


if __name__ == "__main__":
    main(job)
