"""Activation checkpointing (Chen et al. 2016): what a layer computes is not kept for its gradient, but computed again.

One mechanism for every tower, built-in or a user's own: the forward method of each layer is replaced
on the instance. No module is added, so names of weights stay, and DeepSpeed sees the same modules.
"""

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
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
            self._run,
            *args,
            use_reentrant=False,
            context_fn=lambda: (nullcontext(), Repetition(self.layer)),
            # To the end, though the last operations are not needed: DeepSpeed's hooks at ZeRO-3 count on it.
            early_stop=False,
            **kwargs,
        )

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        return tree_map_only(Tensor, _Kept.apply, self.forward(*args, **kwargs))


class _Kept(torch.autograd.Function):
    """The identity, which asks for its input before it passes a gradient on.

    As a layer's last operation it makes the layer be repeated before its backward pass reaches any module inside.
    Otherwise that would happen at the first operation that kept something; at ZeRO-3 the module of that one has
    its parameters gathered by then, and the repetition lets them go.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        _ = ctx.saved_tensors
        return grads[0]
