"""What is optimised how: parameter groups, and the schedule counted in samples."""

import math
from typing import Any

from torch import nn

from muser_dist.config import RunConfig, TrainConfig
from muser_dist.models.model import MultimodalModel


def parameter_groups(model: MultimodalModel, config: RunConfig) -> list[dict[str, Any]]:
    """AdamW's groups: a learning rate per tower (with its head), no decay on temperatures, biases and norms.

    Returns:
        groups with "params", "lr" (the peak), "weight_decay" and "part" (the tower, or "logits"), in a fixed order.
    """
    parts: list[tuple[str, nn.Module, float]] = []
    for name, tower in config.model.towers().items():
        lr = tower.lr if tower.lr is not None else config.train.lr
        parts.append((name, nn.ModuleList([model.towers[name], model.heads[name]]), lr))
    parts.append(("logits", model.logits, config.train.lr))

    groups = []
    for label, part, lr in parts:
        trainable = [parameter for parameter in part.parameters() if parameter.requires_grad]
        # Temperatures have shape [1]; biases, norms and layer scales are vectors too.
        for params, decay in (
            ([p for p in trainable if p.ndim >= 2], config.train.weight_decay),
            ([p for p in trainable if p.ndim < 2], 0.0),
        ):
            if params:
                groups.append({"params": params, "lr": lr, "weight_decay": decay, "part": label})
    return groups


def lr_factor(samples: int, train: TrainConfig) -> float:
    """Factor of the peak learning rate after `samples` samples: linear warm-up, then half a cosine to zero."""
    if samples < train.warmup_samples:
        return samples / train.warmup_samples
    rest = max(1, train.samples - train.warmup_samples)
    return 0.5 * (1.0 + math.cos(math.pi * min(1.0, (samples - train.warmup_samples) / rest)))
