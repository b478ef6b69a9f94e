"""Gathering rows from all ranks, with the gradient that belongs to it."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def world() -> tuple[int, int]:
    """(rank, number of ranks); (0, 1) where no process group was started."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def gather(x: Tensor) -> Tensor:
    """Concatenates the rows of all ranks, in rank order: (b, ...) to (W·b, ...).

    Every rank must give the same number of rows. The gradient of a rank's rows is the SUM of what
    all ranks ask of them, so that losses whose shares sum over ranks to the global loss get the
    gradient of the global loss. (Averaging here, as some released trainers do, would leave
    encoders with 1/W of the gradient that the temperature gets.)
    """
    return _Gather.apply(x) if world()[1] > 1 else x


def sum_over_ranks(x: Tensor) -> Tensor:
    """The sum over ranks, without gradient."""
    x = x.detach().clone()
    if world()[1] > 1:
        dist.all_reduce(x)
    return x


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        out = x.new_empty(dist.get_world_size() * x.shape[0], *x.shape[1:])
        dist.all_gather_into_tensor(out, x.contiguous())
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        grad = grads[0].contiguous()
        out = grad.new_empty(grad.shape[0] // dist.get_world_size(), *grad.shape[1:])
        dist.reduce_scatter_tensor(out, grad)
        return out
