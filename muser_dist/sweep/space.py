"""The space of a sweep: which fields of a run's config vary, and over what.

A space is a JSON object from dotted names of fields to what they may be:

    {"choice": [false, true]}         one of these
    {"uniform": [0.0, 0.3]}           a number between these
    {"log_uniform": [1e-4, 1e-2]}     a number between these, by its logarithm
    {"integers": [1, 8]}              an integer from the first to the last
"""

import json
import math
import types
import typing
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, is_dataclass
from difflib import get_close_matches
from itertools import product
from pathlib import Path
from typing import Any, Union, get_args, get_origin

import numpy as np
from pydantic import TypeAdapter, ValidationError

from muser_dist.config import OPERATIONAL, RunConfig, from_dict, to_dict
from muser_dist.errors import ConfigError, MuserError, require

Overrides = dict[str, Any]
"""Values by dotted names of fields."""

Check = Callable[[RunConfig], object]
"""Raises MuserError where a config cannot work."""

PointsShown = Callable[[int, int, str], None]
"""Takes how many points are found, how many are wanted, and how many were left out, in words."""


def silent(found: int, wanted: int, note: str) -> None:
    """The progress that nobody sees."""


PRESETS: dict[str, dict[str, Any]] = {
    "temperature": {
        "objective.temperature.init": {"log_uniform": [0.01, 1.0]},
        "objective.temperature.learnable": {"choice": [True, False]},
    },
    "projection": {"model.projection_dim": {"choice": [16, 32, 64, 128, 256, 512]}},
}
PRESETS["temperature_x_projection"] = PRESETS["temperature"] | PRESETS["projection"]

_LARGEST = 1e18
"""Bound of a range's ends: integers below it fit into 64 bits, and nothing of a config is larger."""

_GRID_POINTS = 5
_GRID_MOST = 10_000
"""All combinations are made and checked before anything starts."""

_TRIES = 100
"""Draws in a row that bring no valid new point, after which there are none."""

# What decides how trials are measured, and what their files are called, must be the same for all.
_FIXED = ("name", "evaluate", "data.val")


@dataclass(frozen=True)
class Choice:
    """One of several values."""

    values: tuple[Any, ...]

    def draw(self, rng: np.random.Generator) -> Any:
        """A random value."""
        return self.values[rng.integers(len(self.values))]

    def points(self) -> tuple[Any, ...]:
        """The values of a grid; those at which types are checked, too."""
        return self.values


@dataclass(frozen=True)
class Range:
    """A number between two, both included."""

    low: float
    high: float
    log: bool = False
    integer: bool = False

    def draw(self, rng: np.random.Generator) -> float:
        """A random value."""
        if self.integer:
            return int(rng.integers(int(self.low), int(self.high) + 1))
        if self.log:
            return self._rounded(math.exp(rng.uniform(math.log(self.low), math.log(self.high))))
        return self._rounded(rng.uniform(self.low, self.high))

    def points(self) -> tuple[float, ...]:
        """The values of a grid, evenly spaced."""
        space = np.geomspace if self.log else np.linspace
        values = space(self.low, self.high, _GRID_POINTS).tolist()
        if self.integer:
            return tuple(dict.fromkeys(round(value) for value in values))
        return (self.low, *map(self._rounded, values[1:-1]), self.high)

    def _rounded(self, value: float) -> float:
        """Four digits, so that it can be read and pasted, and is what was tried."""
        return min(self.high, max(self.low, float(f"{value:.4g}")))


Dimension = Choice | Range
Space = dict[str, Dimension]


def load_space(name: str) -> Space:
    """The space of a preset or a JSON file.

    Raises:
        ConfigError: there is neither, or it holds something else; the message names the field.
    """
    if name in PRESETS:
        values: Any = PRESETS[name]
    else:
        try:
            values = json.loads(Path(name).read_text())
        except OSError as error:
            near = get_close_matches(name, PRESETS, n=1)
            raise ConfigError(
                f"space: cannot read {name}: {error.strerror}; "
                f"{f'did you mean {near[0]}? ' if near else ''}Give a JSON file, or a preset: {', '.join(PRESETS)}"
            ) from None
        except ValueError as error:
            raise ConfigError(f"space: {name} is no JSON: {error}") from None
    require(isinstance(values, dict) and bool(values), f'space: {name} must hold {{"FIELD": {{"choice": [...]}}, ...}}')
    return {field: _dimension(field, value) for field, value in values.items()}


def _dimension(field: str, value: Any) -> Dimension:
    kinds = ("choice", "uniform", "log_uniform", "integers")
    form = f'space: {field}: give one of {{"choice": [...]}} and {{"uniform"|"log_uniform"|"integers": [least, most]}}'
    require(isinstance(value, dict) and len(value) == 1, form)
    ((kind, values),) = value.items()
    near = get_close_matches(kind, kinds, n=1)
    require(kind in kinds, f"space: {field}: no {kind!r}{f'; did you mean {near[0]!r}?' if near else ''}. {form[7:]}")
    require(isinstance(values, list) and len(values) >= 1, form)
    if kind == "choice":
        return Choice(tuple(values))
    numbers = int if kind == "integers" else (int, float)
    require(
        len(values) == 2
        and all(isinstance(number, numbers) and not isinstance(number, bool) for number in values)
        and -_LARGEST < values[0] < values[1] < _LARGEST,
        f"space: {field}: {kind} takes two numbers, the smaller one first, not {json.dumps(values)[:80]}",
    )
    require(kind != "log_uniform" or values[0] > 0, f"space: {field}: log_uniform takes positive numbers")
    if kind == "integers":
        return Range(values[0], values[1], integer=True)
    return Range(float(values[0]), float(values[1]), log=kind == "log_uniform")


# --- Fields ---


def apply(base: RunConfig, overrides: Overrides) -> RunConfig:
    """The config with other values of some fields.

    Raises:
        ConfigError: it has no such fields, or the values do not go together.
    """
    values = to_dict(base)
    for field, value in overrides.items():
        *parents, last = field.split(".")
        place = values
        for i, part in enumerate(parents):
            if not isinstance(place.get(part), dict):
                raise ConfigError(f"space: {field}: {'.'.join(parents[: i + 1])} is not set in this recipe")
            place = place[part]
        place[last] = value
    return from_dict(values, "space")


def check_space(space: Space, base: RunConfig) -> None:
    """Checks that the fields are there, may each be what the space says, and can go together.

    Raises:
        ConfigError: the message names the first that is not right; a misspelt one with the nearest that there is.
    """
    for field, dimension in space.items():
        kind = _type_of(field)
        if field in OPERATIONAL:
            raise ConfigError(f"space: {field} does not change what a run computes; leave it out")
        if field.startswith(_FIXED):
            raise ConfigError(f"space: {field} must be the same for all trials, or they cannot be compared")
        for value in dimension.points():
            try:
                # From JSON, because a list may stand for a tuple there, but strictly: no "3" for 3.
                TypeAdapter(kind).validate_json(json.dumps(value), strict=True)
            except ValidationError as error:
                reason = error.errors()[0]["msg"]
                raise ConfigError(f"space: {field} cannot be {json.dumps(value)}: {reason}") from None
    draws(space, base, 1)


@dataclass(frozen=True)
class Points:
    """Points of a space whose configs are valid, and why others are not.

    Attributes:
        found: the valid ones, each once.
        refused: how many were left out.
        first: what is wrong with the first of those.
    """

    found: list[Overrides]
    refused: int
    first: str


def draws(
    space: Space, base: RunConfig, count: int, check: Check = lambda config: None, progress: PointsShown = silent
) -> Points:
    """Random points; fewer than asked for where there are not so many.

    The seed is the base's, and the first points do not depend on how many are asked for.

    Args:
        space: what varies.
        base: the values of all other fields.
        count: of points.
        check: raises MuserError where a config cannot work.
        progress: called before each point is checked, and behind the last.

    Raises:
        ConfigError: none of many is valid; the message is that of the first.
    """
    rng = np.random.default_rng(base.seed)
    endless = ({field: dimension.draw(rng) for field, dimension in space.items()} for _ in iter(int, 1))
    return _valid(endless, base, check, progress, count, _TRIES)


def grid(space: Space, base: RunConfig, check: Check = lambda config: None, progress: PointsShown = silent) -> Points:
    """All combinations.

    Raises:
        ConfigError: none makes a valid config, or none with some value; the message is that of the first. Or there are
            too many to be tried.
    """
    count = math.prod(len(dimension.points()) for dimension in space.values())
    require(
        count <= _GRID_MOST,
        f"space: the grid has {count:,} points, of which each is a run; leave fields out, or give --search random",
    )
    combinations = list(product(*(dimension.points() for dimension in space.values())))
    named_ones = (dict(zip(space, values, strict=True)) for values in combinations)
    points = _valid(named_ones, base, check, progress, len(combinations), len(combinations))
    for field, dimension in space.items():
        for value in dimension.points():
            if all(point[field] != value for point in points.found):
                raise ConfigError(f"space: no config with {field} {json.dumps(value)} is valid: {points.first}")
    return points


def _valid(
    candidates: Iterable[Overrides], base: RunConfig, check: Check, progress: PointsShown, count: int, tries: int
) -> Points:
    """The first `count` valid ones, until so many candidates in a row have brought no new one."""
    found: list[Overrides] = []
    first, vain = "", 0
    tried: set[str] = set()
    for overrides in candidates:
        vain += 1
        if (text := named(overrides)) not in tried:
            left_out = len(tried) - len(found)
            progress(len(found), count, f"{left_out:,} left out" if left_out else "")
            tried.add(text)
            try:
                check(apply(base, overrides))
                found.append(overrides)
                vain = 0
            except MuserError as error:
                first = first or f"{error}; tried {text}"
        if len(found) == count or vain == tries:
            break
    refused = len(tried) - len(found)
    progress(len(found), len(found), f"{refused:,} left out" if refused else "")
    if not found:
        raise ConfigError(f"space: no config satisfies it; the first of {refused} that were tried: {first}")
    return Points(found, refused, first)


def named(overrides: Overrides) -> str:
    """Names and values as text."""
    return ", ".join(f"{field} {json.dumps(value)}" for field, value in overrides.items())


def _type_of(path: str) -> Any:
    """The type of a field of RunConfig.

    Raises:
        ConfigError: there is none of that name; the message names the nearest.
    """
    kind: Any = RunConfig
    parts = path.split(".")
    for i, part in enumerate(parts):
        inner = _without_none(kind)
        if get_origin(inner) is dict and i == len(parts) - 1:
            return get_args(inner)[1]
        hints = typing.get_type_hints(inner) if is_dataclass(inner) else {}
        if part not in hints:
            near = get_close_matches(path, _names(RunConfig), n=1, cutoff=0.5)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ConfigError(f"space: there is no field {'.'.join(parts[: i + 1])}{hint}")
        kind = hints[part]
    return kind


def _without_none(kind: Any) -> Any:
    """X where the type is X | None."""
    if get_origin(kind) in (Union, types.UnionType):
        others = [inner for inner in get_args(kind) if inner is not type(None)]
        return others[0] if len(others) == 1 else kind
    return kind


def _names(kind: Any, path: str = "") -> Iterator[str]:
    """Dotted names of all fields of a dataclass and of those inside it."""
    for name, inner in typing.get_type_hints(kind).items():
        if name.startswith("_"):
            continue
        yield path + name
        if is_dataclass(_without_none(inner)):
            yield from _names(_without_none(inner), f"{path}{name}.")
