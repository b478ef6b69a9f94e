"""Pretrain a recipe: `python jobs/pretrain.py RECIPE [--field value ...] [--dry-run | --train.find-chunk | --digest]`.

With --dry-run it prints what the run would do and need: steps, memory per worker, CPUs for decoding,
disk. With --train.find-chunk it tries which is the largest chunk that fits into a worker's memory.
With --digest it only prints a SHA-256 over (step, chunk, key, crop) of all rows that such a run is
dealt, and that of the rows that the run of this name has delivered so far.
"""

from muser_dist.cli import main, train_job


def job(arguments: list[str]) -> None:
    train_job(arguments, "jobs/pretrain.py")


if __name__ == "__main__":
    main(job)
