"""Objectives by their names in configs."""

import inspect
from collections.abc import Callable
from functools import partial

from muser_dist.config import ObjectiveConfig
from muser_dist.errors import ConfigError
from muser_dist.objectives.batch import Loss, Objective
from muser_dist.objectives.contrastive import contrastive
from muser_dist.objectives.debiased import debiased
from muser_dist.objectives.decoupled import decoupled
from muser_dist.objectives.muser import muser_code, muser_poster
from muser_dist.objectives.sigmoid import sigmoid
from muser_dist.objectives.similarity_weighted import similarity_weighted
from muser_dist.plugins import resolve

OBJECTIVES: dict[str, Callable[..., Loss]] = {
    "contrastive": contrastive,
    "debiased": debiased,
    "decoupled": decoupled,
    "muser_code": muser_code,
    "muser_poster": muser_poster,
    "sigmoid": sigmoid,
    "similarity_weighted": similarity_weighted,
}


def load_objective(config: ObjectiveConfig) -> Objective:
    """The objective that `objective.name` names, with `objective.options`.

    Raises:
        ConfigError: there is none of that name, or it does not take these options.
    """
    objective = resolve(config.name, OBJECTIVES, "objective.name")
    try:
        inspect.signature(objective).bind(None, None, None, config, **config.options)
    except TypeError as error:
        raise ConfigError(f"objective.options: {config.name}: {error}") from None
    return partial(objective, **config.options)
