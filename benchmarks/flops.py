"""Floating point operations of a model's towers by count, and of devices by their makers' tables."""

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from synthetic import synthetic_chunk
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode

from muser_dist.config import RunConfig
from muser_dist.models.model import MultimodalModel
from muser_dist.train.step import to_device

PEAKS = {
    "A100": 312e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200 NVL": 835e12,
    "H200": 989e12,
}
"""FLOP/s of dense bfloat16 products by a part of torch's name for the device (NVIDIA's data sheets)."""


@dataclass(frozen=True)
class Counts:
    """Operations of the towers and heads for one row, a multiplication and an addition being two; parameters.

    Products and convolutions alone, as is usual: neither norms and activations, nor the Fourier transform of
    spectrograms, nor the loss.
    """

    forward: float
    backward: float
    parameters: int

    @property
    def model(self) -> float:
        """What the mathematics needs: a forward and a backward pass."""
        return self.forward + self.backward

    def hardware(self, forwards: int) -> float:
        """What is executed where chunks are encoded so many times (twice with GradCache)."""
        return forwards * self.forward + self.backward


def of_towers(config: RunConfig) -> Counts:
    """Counts a forward and a backward pass of the config's model over two rows, on the CPU."""
    config = replace(config, train=replace(config.train, precision="fp32", chunk=2, global_batch=2))
    model = MultimodalModel(config).train()
    batch = to_device(synthetic_chunk(config, 0), tuple(config.model.towers()), torch.device("cpu")).tensors()
    # Attention in plain products: the counter knows nothing of the CPU's fused kernel.
    with sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as forward:
            encoded = model(batch, (0, 0))
        with FlopCounterMode(display=False, custom_mapping=_FORMULAS) as backward:
            torch.stack([encoded[name].sum() for name in config.model.towers()]).sum().backward()
    parameters = sum(p.numel() for p in model.parameters())
    return Counts(forward.get_total_flops() / 2, backward.get_total_flops() / 2, parameters)


def _convolution_backward(grad_shape: list[int], x_shape: list[int], w_shape: list[int], *rest: Any, **_: Any) -> int:
    """As many for the gradient of the input, and for that of the weights, as forward.

    torch's own formula forgets that groups do not see each other: of a depthwise convolution it counts as many times
    too much as there are channels.
    """
    *_, transposed, _, _, wanted = rest
    positions = math.prod((x_shape if transposed else grad_shape)[2:])
    return 2 * x_shape[0] * positions * math.prod(w_shape) * sum(wanted[:2])


_FORMULAS = {torch.ops.aten.convolution_backward: _convolution_backward}


def forwards(config: RunConfig, chunks: int) -> int:
    """How often `train_step` encodes each of a rank's chunks."""
    return 2 if config.train.cache_gradients and chunks > 1 else 1


def peak(device_name: str) -> float | None:
    """FLOP/s of a GPU in dense bfloat16; None where the table lacks it."""
    return next((rate for name, rate in PEAKS.items() if name in device_name), None)


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Measured FLOP/s of a large square product."""
    n = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    timer = Timer("a @ b", globals={"a": a, "b": b}, num_threads=torch.get_num_threads())
    return 2 * n**3 / timer.blocked_autorange(min_run_time=0.3).median
