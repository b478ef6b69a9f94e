"""Recipes: functions that return a complete RunConfig, or several as `Stages`; one file for each published system."""

from collections.abc import Callable
from functools import partial

from muser_dist.config import RunConfig, Stages
from muser_dist.errors import ConfigError
from muser_dist.plugins import resolve
from muser_dist.recipes.clamp import clamp2, m3, muser_symbolic
from muser_dist.recipes.clamp3 import clamp3
from muser_dist.recipes.clmr import clmr
from muser_dist.recipes.htcl import htcl
from muser_dist.recipes.muser import muser, muser_audio_text, muser_code, muser_paper
from muser_dist.recipes.muser_audio_only import muser_audio_only
from muser_dist.recipes.tiny import tiny

RECIPES: dict[str, Callable[[], RunConfig | Stages]] = {
    "tiny": tiny,
    "muser": muser,
    "muser_tiny": partial(muser, "tiny"),
    "muser_base": partial(muser, "base"),
    "muser_large": partial(muser, "large"),
    "muser_audio_text": muser_audio_text,
    "muser_audio_text_tiny": partial(muser_audio_text, "tiny"),
    "muser_audio_text_base": partial(muser_audio_text, "base"),
    "muser_audio_text_large": partial(muser_audio_text, "large"),
    "muser_paper": muser_paper,
    "muser_code": muser_code,
    "muser_audio_only": muser_audio_only,
    "clmr": clmr,
    "m3": m3,
    "m3_tiny": partial(m3, "tiny"),
    "clamp2": clamp2,
    "clamp2_tiny": partial(clamp2, "tiny"),
    "clamp3": clamp3,
    "clamp3_tiny": partial(clamp3, "tiny"),
    "muser_symbolic": muser_symbolic,
    "muser_symbolic_tiny": partial(muser_symbolic, "tiny"),
    "htcl": htcl,
    "htcl_tiny": partial(htcl, "tiny"),
}


def find_recipe(name: str) -> RunConfig | Stages:
    """What a recipe returns.

    Args:
        name: a built-in recipe ("tiny", "muser", "muser_base", ...), or your own function as "package.module:function".

    Raises:
        ConfigError: there is no such recipe.
    """
    return resolve(name, RECIPES, "recipe")()


def load_recipe(name: str) -> RunConfig:
    """The config of a recipe without stages.

    Raises:
        ConfigError: there is no such recipe, or it has stages.
    """
    recipe = find_recipe(name)
    if isinstance(recipe, Stages):
        stages = ", ".join(stage.name for stage in recipe.stages)
        raise ConfigError(f"{name} has stages ({stages}), which only jobs/pretrain.py trains")
    return recipe
