"""Recipes: functions that return a complete RunConfig, one file for each published system."""

from collections.abc import Callable

from muser_dist.config import RunConfig
from muser_dist.plugins import resolve
from muser_dist.recipes.clmr import clmr
from muser_dist.recipes.muser_audio_only import muser_audio_only
from muser_dist.recipes.tiny import tiny

RECIPES: dict[str, Callable[[], RunConfig]] = {"tiny": tiny, "clmr": clmr, "muser_audio_only": muser_audio_only}


def load_recipe(name: str) -> RunConfig:
    """The config that a recipe returns.

    Args:
        name: a built-in recipe ("tiny", "clmr", "muser_audio_only"), or your own function as "package.module:function".

    Raises:
        ConfigError: there is no such recipe.
    """
    return resolve(name, RECIPES, "recipe")()
