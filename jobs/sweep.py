"""Find good values of a recipe's fields: `python jobs/sweep.py RECIPE --space SPACE [--field value ...] [--dry-run]`.

SPACE is a JSON file from dotted names of fields to what they may be, or a preset (docs/sweeps.md):

    {"objective.temperature.init": {"log_uniform": [0.01, 1]}, "model.projection_dim": {"choice": [32, 64, 128]}}

Each trial is a whole run. With --dry-run it prints the trials and what they would need.
"""

from muser_dist.cli import main, parse_sweep


def job(arguments: list[str]) -> None:
    recipe, base, options = parse_sweep([word for word in arguments if word != "--dry-run"], "jobs/sweep.py")
    from muser_dist.sweep.launch import sweep  # after the options: importing torch takes seconds
    from muser_dist.sweep.plan import dry_run_of, plan

    if "--dry-run" in arguments:
        print(dry_run_of(plan(recipe, base, options), options))
    else:
        sweep(recipe, base, options, ["python", "jobs/sweep.py", *arguments])


if __name__ == "__main__":
    main(job)
