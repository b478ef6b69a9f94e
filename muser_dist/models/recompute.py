"""Activation checkpointing (Chen et al. 2016): what a layer computes is not kept for its gradient, but computed again.

One mechanism for every tower, built-in or a user's own: the forward method of each layer is replaced
on the instance. No module is added, so names of weights stay, and DeepSpeed sees the same modules.
"""

from contextlib import nullcontext
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from muser_dist.models.batch_norm import Repetition


def recompute_activations(tower: nn.Module) -> None:
    """Keeps of a tower's forward pass only what enters its repeated layers; of one without such, what enters itself."""
    for layer in repeated_layers(tower) or [tower]:
        layer.forward = _Recomputed(layer)


def repeated_layers(module: nn.Module) -> list[nn.Module]:
    """The members of the outermost lists of modules of one class, where these are made of modules themselves."""
    found: list[nn.Module] = []
    for child in module.children():
        members = list(child.children())
        alike = len({type(member) for member in members}) == 1 and all(any(member.children()) for member in members)
        if isinstance(child, (nn.ModuleList, nn.Sequential)) and alike:
            found += members
        else:
            found += repeated_layers(child)
    return found


class _Recomputed:
    """A layer's forward method. Random numbers, autocast and batch norms are in the second pass as in the first."""

    def __init__(self, layer: nn.Module) -> None:
        self.layer, self.forward = layer, layer.forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return self.forward(*args, **kwargs)
        if torch.compiler.is_compiling():  # which takes the pass for a function, and its random numbers for values
            return checkpoint(self.forward, *args, use_reentrant=False, **kwargs)
        return checkpoint(
            self.forward,
            *args,
            use_reentrant=False,
            context_fn=lambda: (nullcontext(), Repetition(self.layer)),
            # To the end, though the last operations are not needed: DeepSpeed's hooks at ZeRO-3 count on it.
            early_stop=False,
            **kwargs,
        )
