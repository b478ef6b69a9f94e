"""The command line of jobs: a recipe's config with overrides, progress, and errors in one line."""

import sys
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import TYPE_CHECKING, Annotated, TypeVar

import tyro
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from muser_dist.config import RunConfig, Stages
from muser_dist.data.config import SourceConfig, read_label_values, read_sources
from muser_dist.errors import ConfigError, MuserError
from muser_dist.recipes import RECIPES, find_recipe, load_recipe
from muser_dist.sweep.config import SweepConfig

if TYPE_CHECKING:
    from muser_dist.search import Hit

_T = TypeVar("_T")


def main(job: Callable[[list[str]], None]) -> None:
    """Runs a job's function on the arguments of the command line.

    A MuserError is printed without a traceback, and the exit status is 2. Ctrl-C exits with 130.
    """
    warnings.filterwarnings("ignore", category=FutureWarning)
    try:
        job(sys.argv[1:])
    except MuserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on where it stopped", file=sys.stderr, flush=True)
        sys.exit(130)


class Progress:
    """Shows on stderr how many of the pieces are there, how fast they come, and the time that the others will take.

    Args:
        unit: what they are.
        every: seconds between two lines, but for the first and the last.
    """

    def __init__(self, unit: str, every: float = 0.0) -> None:
        self.unit = unit
        self.every = every
        self.started: float | None = None
        self.shown = 0.0
        self.kept = 0

    def __call__(self, done: int, total: int, note: str = "") -> None:
        """Shows a line; `note` ends it."""
        now = time.monotonic()
        if self.started is None:  # what an earlier run made says nothing about the speed
            self.started, self.kept = now, done
        elif done < total and now - self.shown < self.every:
            return
        self.shown = now
        line = f"{done:,} of {total:,} {self.unit}"
        if self.kept < done and now > self.started:
            line += f", {(done - self.kept) / (now - self.started):,.1f} a second"
        if self.kept < done < total:
            line += f", {(now - self.started) * (total - done) / (done - self.kept):.0f} s left"
        line += f"; {note}" if note else ""
        if sys.stderr.isatty():
            print(f"\r{line}\033[K", end="\n" if done == total else "", file=sys.stderr, flush=True)
        else:
            print(line, file=sys.stderr, flush=True)


def print_hits(hits: "Iterable[Hit]", fields: Iterable[str]) -> None:
    """A line for each row of an index that was found, with these fields of it."""
    for hit in hits:
        told = "  ".join(f"{name}: {hit.metadata[name]}" for name in fields if hit.metadata[name])
        line = f"{hit.score:.4f}  {hit.key}  {told}"
        # Names are other people's: nothing that moves the cursor, but the joiners that Persian and Indic words hold.
        print("".join(c if c.isprintable() or c in "\u200c\u200d" else "�" for c in line).rstrip())


_FILES = ConstructorRegistry()


@_FILES.primitive_rule
def _sources_from_file(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec | None:
    """Lets data.sources be the name of a file: a list of corpora is no matter for a command line."""
    if info.type != tuple[SourceConfig, ...]:
        return None
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar="FILE.json",
        instance_from_str=lambda files: read_sources(files[0]),
        is_instance=lambda value: isinstance(value, tuple),
        str_from_instance=lambda sources: [" ".join(source.name for source in sources) or "none"],
    )


@_FILES.primitive_rule
def _values_from_file(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec | None:
    """Lets data.label_values be the name of a file, such as the labels.json of another run."""
    if info.type != dict[str, tuple[str, ...]]:
        return None
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar="FILE.json",
        instance_from_str=lambda files: read_label_values(files[0]),
        is_instance=lambda value: isinstance(value, dict),
        str_from_instance=lambda values: [" ".join(values) or "none"],
    )


def recipe_start(name: str) -> tuple[str, RunConfig | Stages]:
    """How pretraining begins: with a recipe, whose name the run gets."""
    return name, find_recipe(name)


Load = Callable[[str], tuple[str, RunConfig | Stages]]
"""Gives for START the beginning of the run's default name, and what the fields override."""

_FLAGS = ("--dry-run", "--train.find-chunk", "--train.find_chunk", "--digest")


def train_job(arguments: list[str], program: str, load: Load = recipe_start) -> None:
    """Trains, or does what one of the flags asks for in place of it.

    Args:
        arguments: START [--field value ...] [--dry-run | --train.find-chunk | --digest].
        program: its name in help.
        load: of START.

    Raises:
        MuserError: something is wrong that the user can mend.
    """
    runs = parse_runs([argument for argument in arguments if argument not in _FLAGS], program, load)
    # After the options: importing torch takes seconds.
    from muser_dist.train.dry_run import dry_run
    from muser_dist.train.launch import pretrain, print_chunk, print_digest
    from muser_dist.train.stages import pretrain_stages

    if not any(flag in arguments for flag in _FLAGS):
        command = ["python", program, *arguments]
        pretrain_stages(runs, command) if len(runs) > 1 else pretrain(runs[0], command)
        return
    before = None
    for number, config in enumerate(runs, 1):
        if len(runs) > 1:
            print(f"Stage {config.name}:", flush=True)
        if "--dry-run" in arguments:
            print(dry_run(config, before))
        elif "--digest" in arguments:
            print_digest(config)
        else:
            print_chunk(config, later=runs[number:])
        before = config


def parse_runs(arguments: list[str], program: str, load: Load = recipe_start) -> tuple[RunConfig, ...]:
    """START and --overrides to the named config of each stage, of which most recipes have one.

    Args:
        arguments, program, load: as of `train_job`. Of a recipe in stages --field is of all of them, and --STAGE.field
            of one.

    Raises:
        ConfigError: no recipe was given, or there is none of that name.
        SystemExit: after --help, or with status 2 for a wrong field; the nearest name is shown.
    """
    start, overrides = _start(arguments, f"{program} RECIPE", RECIPES)
    name, default = load(start)
    what = (
        "The same command again goes on where it stopped. "
        "With --dry-run it prints what the run would do and need, with --train.find-chunk the largest chunk that fits, "
        "with --digest a SHA-256 over (step, chunk, key, crop) of all rows that it is dealt; these train nothing."
    )
    if isinstance(default, RunConfig):
        config = _parse(RunConfig, default, overrides, f"{program} {start}", f"Trains what {start!r} names. {what}")
        return (config.named(name),)
    names = [stage.name for stage in default.stages]
    what = (
        f"Trains the stages of {start!r} one after the other: {', '.join(names)}. An option --FIELD holds for all, "
        f"--STAGE.FIELD for one, such as --{names[-1]}.train.lr; shown here are the fields of {{}}. {what}"
    )
    shared, own = _by_stage(overrides, names)
    stages = [
        replace(
            stage,
            config=_parse(
                RunConfig,
                stage.config,
                [*shared, *own[stage.name]],
                f"{program} {start}: stage {stage.name}:",
                what.format(stage.name),
            ),
        )
        for stage in default.stages
    ]
    return Stages(tuple(stages)).chained(name)


def _by_stage(arguments: list[str], names: list[str]) -> tuple[list[str], dict[str, list[str]]]:
    """Options that hold for all stages; and those of each, without its name."""
    shared: list[str] = []
    own: dict[str, list[str]] = {name: [] for name in names}
    into = shared
    for argument in arguments:
        if argument.startswith("--"):
            stage, dot, rest = argument[2:].partition(".")
            into = own[stage] if dot and stage in own else shared
            argument = f"--{rest}" if into is not shared else argument
        into.append(argument)
    return shared, own


@dataclass(frozen=True)
class _Sweep:
    """A sweep's options and its base's, side by side on the command line."""

    sweep: Annotated[SweepConfig, tyro.conf.arg(name="")]
    run: Annotated[RunConfig, tyro.conf.arg(name="")]


def parse_sweep(arguments: list[str], program: str) -> tuple[str, RunConfig, SweepConfig]:
    """RECIPE, --space and overrides to the recipe's name, what trials have in common, and the sweep's rules.

    Raises:
        ConfigError, SystemExit: as `parse_runs`.
    """
    recipe, overrides = _start(arguments, f"{program} RECIPE --space SPACE", _without_stages())
    base = load_recipe(recipe)
    base = replace(base, data=replace(base.data, keep_clips=True))  # trials hear the same clips over and over
    parsed = _parse(
        _Sweep,
        _Sweep(SweepConfig(tyro.MISSING), base),
        overrides,
        f"{program} {recipe}",
        f"Tries other values of some fields of the recipe {recipe!r}, each in a run of its own, and finds the best. "
        "The fields and their values are in --space; all other options are those of a run (jobs/pretrain.py), and hold "
        "for all trials. The same command again goes on where it stopped; trials that are over are not tried again. "
        "With --dry-run it prints the trials and what they would need, and starts nothing.",
    )
    return recipe, parsed.run, parsed.sweep


def _without_stages() -> list[str]:
    """Recipes of one run, which sweeps are made of."""
    return [name for name, recipe in RECIPES.items() if isinstance(recipe(), RunConfig)]


def _start(arguments: list[str], command: str, recipes: Iterable[str]) -> tuple[str, list[str]]:
    """The first argument, START or RECIPE, which may be one of these, and the others."""
    recipes = list(recipes)
    if not arguments or arguments[0].startswith("-"):
        usage = (
            f"usage: python {command} [--field value ...]\n"
            f"recipes: {', '.join(recipes)}, or your own function as package.module:function\n"
            f"python {command.split()[0]} {recipes[0]} --help explains every field"
        )
        if arguments and arguments[0] in ("-h", "--help"):
            print(usage)
            sys.exit(0)
        near = get_close_matches(arguments[0].strip("-"), recipes, n=1) if arguments else []
        raise ConfigError(f"the first argument must be a recipe{f' ({near[0]}?)' if near else ''}\n{usage}")
    return arguments[0], arguments[1:]


def _parse(kind: type[_T], default: _T, arguments: list[str], program: str, description: str) -> _T:
    return tyro.cli(
        kind,
        default=default,
        args=arguments,
        prog=program,
        registry=_FILES,
        config=(tyro.conf.AvoidSubcommands,),  # a recipe's towers are there or not; their fields are options
        description=description,
    )
