"""Pretrain a recipe: `python jobs/pretrain.py RECIPE [--field value ...]`."""

from muser_dist.cli import main, parse_run


def job(arguments: list[str]) -> None:
    config = parse_run(arguments, "jobs/pretrain.py")
    from muser_dist.train.launch import pretrain  # after the options: importing torch and Ray takes seconds

    pretrain(config, ["python", "jobs/pretrain.py", *arguments])


if __name__ == "__main__":
    main(job)
