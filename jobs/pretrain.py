"""Pretrain a recipe: `python jobs/pretrain.py RECIPE [--field value ...] [--dry-run | --train.find-chunk | --digest]`.

With --dry-run it prints what the run would do and need: steps, memory per worker, CPUs for decoding,
disk. With --train.find-chunk it tries which is the largest chunk that fits into a worker's memory.
With --digest it only prints a SHA-256 over (step, chunk, key, crop) of all rows that such a run is
dealt, and that of the rows that the run of this name has delivered so far.
"""

from muser_dist.cli import main, parse_run

FLAGS = ("--dry-run", "--train.find-chunk", "--train.find_chunk", "--digest")


def job(arguments: list[str]) -> None:
    config = parse_run([argument for argument in arguments if argument not in FLAGS], "jobs/pretrain.py")
    from muser_dist.train.launch import (
        pretrain,
        print_chunk,
        print_digest,
    )  # after the options: importing torch takes seconds

    if "--dry-run" in arguments:
        from muser_dist.train.dry_run import dry_run

        print(dry_run(config))
    elif "--train.find-chunk" in arguments or "--train.find_chunk" in arguments:
        print_chunk(config)
    elif "--digest" in arguments:
        print_digest(config)
    else:
        pretrain(config, ["python", "jobs/pretrain.py", *arguments])


if __name__ == "__main__":
    main(job)
