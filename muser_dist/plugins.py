"""Names in configs that stand for code: built-in, or a user's own as "package.module:name"."""

import importlib
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

from muser_dist.errors import ConfigError


def resolve(name: str, builtin: Mapping[str, Any], setting: str) -> Any:
    """The object that `name` stands for.

    Args:
        name: key of `builtin`, or "package.module:name" of something importable.
        builtin: what comes with the package.
        setting: the setting that holds `name`, for the error.

    Raises:
        ConfigError: no such name; the message lists what there is.
    """
    if name in builtin:
        return builtin[name]
    if ":" not in name:
        near = get_close_matches(name, builtin, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ConfigError(
            f"{setting}: no {name!r}; {hint}There are {', '.join(builtin)}, or your own as package.module:name"
        )
    module, _, attribute = name.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except ModuleNotFoundError as error:
        raise ConfigError(f"{setting}: {name!r}: {error}; is the folder that holds it on PYTHONPATH?") from None
    except AttributeError:
        raise ConfigError(f"{setting}: module {module!r} has no {attribute!r}") from None
