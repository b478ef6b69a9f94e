"""What stands between a tower and the loss: pooling, projection, temperature."""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn

from muser_dist.config import ObjectiveConfig


def inside(sequence: Tensor, lengths: Tensor) -> Tensor:
    """Which positions of (rows, positions, ...) are among a row's first `lengths`: (rows, positions) bool."""
    return torch.arange(sequence.shape[1], device=sequence.device) < lengths[:, None]


def masked_mean(sequence: Tensor, lengths: Tensor) -> Tensor:
    """Mean over the first `lengths` positions: (rows, positions, width), (rows,) to (rows, width)."""
    weights = inside(sequence, lengths).to(sequence.dtype)
    return torch.einsum("rpw,rp->rw", sequence, weights) / weights.sum(dim=1, keepdim=True)


def _mlp(widths: Sequence[int], activation: type[nn.Module]) -> list[nn.Module]:
    """Linear layers from each width to the next, with an activation between two of them."""
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        layers += [nn.Linear(inputs, outputs), activation()]
    return layers[:-1]


class ProjectionHead(nn.Sequential):
    """(rows, width) to (rows, dim): one linear layer without bias, or several with an activation between them.

    Args:
        width: of the tower's output.
        dim: of the joint space.
        hidden: units of each hidden layer.
        activation: "gelu" or "relu".
    """

    def __init__(self, width: int, dim: int, hidden: Sequence[int], activation: Literal["gelu", "relu"]) -> None:
        if hidden:
            super().__init__(*_mlp([width, *hidden, dim], {"gelu": nn.GELU, "relu": nn.ReLU}[activation]))
        else:
            super().__init__(nn.Linear(width, dim, bias=False))


class Fusion(nn.Sequential):
    """What a song's sound and its text say together: layers of 2·dim, dim and dim units (HTCL, Pan et al. 2025).

    Args:
        dim: of the joint space.
    """

    def __init__(self, dim: int) -> None:
        super().__init__(*_mlp([2 * dim, 2 * dim, dim, dim], nn.ReLU))

    def forward(self, audio: Tensor, text: Tensor) -> Tensor:  # type: ignore[override]
        """The embeddings of the same songs, (rows, dim) each and not normalised, to (rows, dim)."""
        return super().forward(torch.cat([audio, text], dim=1))


class LabelHeads(nn.Linear):
    """A linear layer on a tower's output for each metadata field, made as one.

    Args:
        width: of the tower's output.
        sizes: by field, how many values it has.
    """

    def __init__(self, width: int, sizes: dict[str, int]) -> None:
        super().__init__(width, sum(sizes.values()))
        self.sizes = sizes

    def of_fields(self, features: Tensor) -> dict[str, Tensor]:
        """(rows, width) to logits (rows, values) of each field, float32 or finer."""
        logits = self(features)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return dict(zip(self.sizes, logits.split(list(self.sizes.values()), dim=1), strict=True))


class _ClampInward(torch.autograd.Function):
    """Clamps; beyond a bound only the gradient that leads back inside passes.

    With the usual clamp a parameter that has crossed the bound gets no gradient and stays there.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, low: float, high: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.bounds = low, high
        return x.clamp(low, high)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (x,), (low, high), (grad,) = ctx.saved_tensors, ctx.bounds, grads
        leads_out = ((x >= high) & (grad < 0)) | ((x <= low) & (grad > 0))
        return grad.masked_fill(leads_out, 0.0), None, None


class LogitScale(nn.Module):
    """How similarities become logits: inverse temperatures and, where the objective has them, biases.

    Parameters are the temperatures' negative logarithms, of shape [1] because DeepSpeed cannot take
    scalars, and the biases themselves, likewise.
    """

    def __init__(self, config: ObjectiveConfig) -> None:
        super().__init__()
        temperature, self.pairs = config.temperature, len(config.pairs)
        self.bounds = -math.log(temperature.maximum), -math.log(temperature.minimum)
        self.log_scale = nn.ParameterList(
            nn.Parameter(torch.tensor([-math.log(temperature.init)]), requires_grad=temperature.learnable)
            for _ in range(min(1, self.pairs) if temperature.shared else self.pairs)
        )
        biases = 0 if config.bias is None else self.pairs
        self.bias = nn.ParameterList(nn.Parameter(torch.tensor([float(config.bias or 0.0)])) for _ in range(biases))

    def forward(self) -> dict[str, Tensor]:
        """ "scale" and perhaps "bias", (pairs,) float32 each."""
        if self.pairs == 0:
            return {"scale": torch.zeros(0)}
        # Clamped before it is shared: the sum of the pairs' gradients decides whether it leads back.
        out = {"scale": _ClampInward.apply(torch.cat(list(self.log_scale)), *self.bounds).exp().expand(self.pairs)}
        if len(self.bias):
            out["bias"] = torch.cat(list(self.bias))
        return out
