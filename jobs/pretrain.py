"""Pretrain a recipe: `python jobs/pretrain.py RECIPE [--field value ...]`."""

from muser_dist.cli import main, parse_run
from muser_dist.train.launch import pretrain


def job(arguments: list[str]) -> None:
    pretrain(parse_run(arguments, "jobs/pretrain.py"), ["python", "jobs/pretrain.py", *arguments])


if __name__ == "__main__":
    main(job)
