"""What ranks exchange: plain collectives on tensors, and the one rule of gradients that needs a collective.

Every function does nothing but copy where there is no process group or one rank.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def world() -> tuple[int, int]:
    """(rank, number of ranks); (0, 1) where no process group was started."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def gather(x: Tensor) -> Tensor:
    """The rows of all ranks in rank order, without gradient: (b, ...) to (W·b, ...), b equal on all ranks."""
    ranks = world()[1]
    if ranks == 1:
        return x.detach()
    out = x.new_empty(ranks * x.shape[0], *x.shape[1:])
    dist.all_gather_into_tensor(out, x.detach().contiguous())
    return out


def exchange(x: Tensor) -> Tensor:
    """Gives x[r] to rank r and returns what all ranks gave to this one: (W, ...) to (W, ...)."""
    if world()[1] == 1:
        return x
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    dist.all_to_all_single(out, x.contiguous())
    return out


def pass_on(tensors: list[Tensor]) -> list[Tensor]:
    """Gives tensors to the next rank of the ring and returns those of the rank before, of the same shapes."""
    rank, ranks = world()
    if ranks == 1 or not tensors:
        return tensors
    received = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in tensors]
    after, before = (rank + 1) % ranks, (rank - 1) % ranks
    works = dist.batch_isend_irecv(
        [dist.P2POp(dist.isend, x.contiguous(), after) for x in tensors]
        + [dist.P2POp(dist.irecv, x, before) for x in received]
    )
    for work in works:
        work.wait()
    return received


def sum_over_ranks(x: Tensor) -> Tensor:
    """The sum over ranks, without gradient."""
    x = x.detach().clone()
    if world()[1] > 1:
        dist.all_reduce(x)
    return x


def of_rank_0(make: Callable[[], Any]) -> Any:
    """What `make` returns on rank 0, on all ranks; it is called there alone, and its result pickled."""
    rank, ranks = world()
    made = [make() if rank == 0 else None]
    if ranks > 1:
        dist.broadcast_object_list(made, src=0)
    return made[0]


def equal_gradient(x: Tensor) -> Tensor:
    """Returns x, which all ranks share; each gets 1/W of the gradient that its uses on all ranks sum to.

    For parameters whose gradient is looked at before it is reduced: a clamp asks for its sign, and
    the ranks' own shares may differ in that.
    """
    return _EqualGradient.apply(x) if world()[1] > 1 else x


class _EqualGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return sum_over_ranks(grads[0]) / world()[1]
