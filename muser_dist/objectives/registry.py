"""Objectives by their names in configs."""

import inspect
from collections.abc import Callable
from functools import partial

import torch

from muser_dist.config import ObjectiveConfig, RunConfig
from muser_dist.data.config import LABEL
from muser_dist.errors import ConfigError
from muser_dist.objectives.batch import Batch, Logits, Loss, Objective
from muser_dist.objectives.contrastive import contrastive
from muser_dist.objectives.debiased import debiased
from muser_dist.objectives.decoupled import decoupled
from muser_dist.objectives.masked_patches import masked_patches
from muser_dist.objectives.muser import muser_code, muser_poster
from muser_dist.objectives.sigmoid import sigmoid
from muser_dist.objectives.similarity_weighted import similarity_weighted
from muser_dist.objectives.supervised import supervised
from muser_dist.plugins import resolve

OBJECTIVES: dict[str, Callable[..., Loss]] = {
    "contrastive": contrastive,
    "debiased": debiased,
    "decoupled": decoupled,
    "masked_patches": masked_patches,
    "muser_code": muser_code,
    "muser_poster": muser_poster,
    "sigmoid": sigmoid,
    "similarity_weighted": similarity_weighted,
    "supervised": supervised,
}


def check_objective(config: RunConfig) -> None:
    """Runs a built-in objective on two rows: what is wrong with its settings shows before a cluster is started.

    The user's own is only loaded: it may need what workers alone have.

    Raises:
        ConfigError: as `load_objective`, and what the objective itself says.
    """
    objective = load_objective(config.objective)
    if config.objective.name not in OBJECTIVES:
        return
    pairs, two = len(config.objective.pairs), torch.arange(2)
    dim = config.model.projection_dim if pairs else 2  # masked patches: a sum and a count
    features: dict[str, torch.Tensor] = {name: torch.eye(2, dim) for name in config.features}
    valid = {name: torch.ones(2, dtype=torch.bool) for name in features}
    features |= {"fused": torch.eye(2, config.model.projection_dim)}
    kinds = config.data.label_kinds()
    features |= {LABEL + name: torch.eye(2) for name in kinds}
    labels = {name: two if kind == "class" else torch.eye(2) for name, kind in kinds.items()}
    bias = None if config.objective.bias is None else torch.full((pairs,), config.objective.bias)
    batch = Batch(valid, two, two, two, labels=labels)
    objective(features, Logits(torch.ones(pairs), bias), batch, config.objective)


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
