"""Pretrain a recipe: `python jobs/pretrain.py RECIPE [--field value ...] [--digest]`.

With --digest it only prints a SHA-256 over (step, chunk, key, crop) of all rows that such a run
is dealt, and that of the rows that the run of this name has delivered so far.
"""

from muser_dist.cli import main, parse_run


def job(arguments: list[str]) -> None:
    digest = "--digest" in arguments
    config = parse_run([argument for argument in arguments if argument != "--digest"], "jobs/pretrain.py")
    from muser_dist.train.launch import pretrain, print_digest  # after the options: importing torch takes seconds

    if digest:
        print_digest(config)
        return
    pretrain(config, ["python", "jobs/pretrain.py", *arguments])


if __name__ == "__main__":
    main(job)
