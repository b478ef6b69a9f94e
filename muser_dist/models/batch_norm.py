"""Batch normalisation where a batch is encoded in chunks, some of whose rows are masked, on several ranks.

torch's own would let masked rows into the statistics, would update the running ones with every
pass, twice where gradients are cached, and each rank would have its own.
"""

from typing import Literal

import torch
from timm.layers.norm_act import BatchNormAct2d
from torch import Tensor, nn

from muser_dist.objectives.collectives import sum_over_ranks, world


class ChunkBatchNorm(nn.Module):
    """Normalises over the valid rows of a chunk in training, and with running statistics else.

    What a chunk's pass contributes to the running statistics waits for `update_running_statistics`.
    So the result does not depend on the number of ranks, but it does on the rows in a chunk.

    Args:
        like: gives sizes, weights and running statistics.
        frozen: always normalises with running statistics, which never change.
    """

    running_mean: Tensor
    running_var: Tensor
    pending: Tensor

    def __init__(self, like: nn.modules.batchnorm._BatchNorm, frozen: bool) -> None:
        super().__init__()
        self.eps, self.frozen = like.eps, frozen
        self.momentum = 0.1 if like.momentum is None else like.momentum
        self.weight, self.bias = like.weight, like.bias
        self.register_buffer("running_mean", like.running_mean)
        self.register_buffer("running_var", like.running_var)
        self.valid: Tensor | None = None
        self.counts = True
        # Sums of means and of variances, and the number of chunks; no part of a checkpoint.
        self.register_buffer("pending", torch.zeros(2 * like.num_features + 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """(rows, channels, ...) to the same."""
        shape, given = (1, -1, *[1] * (x.ndim - 2)), x.dtype
        x = x.to(torch.promote_types(given, torch.float32))
        if self.training and not self.frozen:
            mean, variance = self._of_chunk(x)
        else:
            mean, variance = self.running_mean, self.running_var
        factor = self.weight * torch.rsqrt(variance + self.eps)
        return (x * factor.view(shape) + (self.bias - mean * factor).view(shape)).to(given)

    def _of_chunk(self, x: Tensor) -> tuple[Tensor, Tensor]:
        assert self.valid is not None, "set_valid_rows was not called"
        weights = self.valid.to(x.dtype).view(-1, *[1] * (x.ndim - 1))
        over = [0, *range(2, x.ndim)]
        positions = x[0, 0].numel()
        count = (weights.sum() * positions).clamp(min=1.0)
        mean = (x * weights).sum(dim=over) / count
        centred = (x - mean.view(1, -1, *[1] * (x.ndim - 2))) * weights
        variance = centred.square().sum(dim=over) / count
        # Where gradients are cached, the first pass is without graph; each chunk has one pass with it,
        # and perhaps a repetition.
        if torch.is_grad_enabled() and self.counts:
            unbiased = variance.detach() * count / (count - 1).clamp(min=1.0)
            seen = torch.cat([mean.detach(), unbiased, torch.ones_like(count)[None]])
            self.pending.add_(seen * self.valid.any())
        return mean, variance


def replace_batch_norm(module: nn.Module, kind: Literal["chunk", "frozen"]) -> None:
    """Puts a ChunkBatchNorm in place of each of torch's and timm's batch norms inside a module."""
    for name, child in module.named_children():
        if isinstance(child, nn.modules.batchnorm._BatchNorm):
            norm: nn.Module = ChunkBatchNorm(child, kind == "frozen")
            if isinstance(child, BatchNormAct2d):
                norm = nn.Sequential(norm, child.drop, child.act)
            setattr(module, name, norm)
        else:
            replace_batch_norm(child, kind)


def set_valid_rows(module: nn.Module, valid: Tensor) -> None:
    """Tells the norms inside a module which rows of the next chunk count, (rows,) bool."""
    for norm in module.modules():
        if isinstance(norm, ChunkBatchNorm):
            norm.valid = valid


class Repetition:
    """Context in which a module's forward pass is repeated: its norms use the rows of then, and count nothing twice.

    Made before the pass that will be repeated: others may be made in between.
    """

    def __init__(self, module: nn.Module) -> None:
        self._norms = [(norm, norm.valid) for norm in module.modules() if isinstance(norm, ChunkBatchNorm)]

    def __enter__(self) -> None:
        for norm, valid in self._norms:
            norm.valid, norm.counts = valid, False

    def __exit__(self, *error: object) -> None:
        for norm, _ in self._norms:
            norm.counts = True


def update_running_statistics(module: nn.Module) -> None:
    """Once a step: moves running statistics towards the mean over the step's chunks on all ranks; a collective."""
    norms = [norm for norm in module.modules() if isinstance(norm, ChunkBatchNorm) and not norm.frozen]
    if not norms:
        return
    pending = torch.cat([norm.pending for norm in norms])
    summed = sum_over_ranks(pending) if world()[1] > 1 else pending
    for norm, seen in zip(norms, summed.split([len(norm.pending) for norm in norms]), strict=True):
        norm.pending.zero_()
        mean, variance = (seen[:-1] / seen[-1].clamp(min=1.0)).chunk(2)
        weight = norm.momentum * (seen[-1] > 0)  # a step without a valid row changes nothing
        norm.running_mean.lerp_(mean, weight)
        norm.running_var.lerp_(variance, weight)
