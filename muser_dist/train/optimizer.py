"""What is optimised how: parameter groups, optimizers with a moving average of the weights, the schedule in samples."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from muser_dist.config import RunConfig, TrainConfig
from muser_dist.models.model import MultimodalModel

AVERAGE = "average"
"""Name of the average among the optimizer's states."""


def parameter_groups(model: MultimodalModel, config: RunConfig) -> list[dict[str, Any]]:
    """The optimizer's groups: a learning rate per tower (with its head), no decay on temperatures, biases and norms.

    Returns:
        groups with "params", "lr" (the peak), "weight_decay" and "part" (the tower, "label_heads", "fusion" or
        "logits"), in a fixed order.
    """
    parts: list[tuple[str, nn.Module, float]] = []
    for modality, tower in config.model.towers().items():
        lr = tower.lr if tower.lr is not None else config.train.lr
        if tower.head_lr is None:
            parts.append((modality, nn.ModuleList([model.towers[modality], model.heads[modality]]), lr))
        else:
            parts += [(modality, model.towers[modality], lr), (modality, model.heads[modality], tower.head_lr)]
    for name, heads in (("label_heads", model.label_heads), ("fusion", model.fusion)):
        if heads is not None:
            parts.append((name, heads, config.train.lr))
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


class AveragingOptimizer(torch.optim.Optimizer):
    """What torch's optimizers lack: states that exist from the start, an average, and gradients' norms by tower.

    The average is a state like the moments, so ZeRO shares it out among ranks as it does those, and checkpoints hold it
    without more ado.

    Attributes:
        moments: names of the states of the optimizer's size.
        average_decay: weight of the old average in each step; None without an average.
        squares: by the groups' "part", the sum of squares of the last step's gradients, clipped, on this rank.
    """

    moments: tuple[str, ...]
    average_decay: float | None
    squares: dict[str, Tensor]

    def start(self, average_decay: float | None) -> None:
        """Sets what the constructors of torch do not know."""
        self.average_decay = average_decay
        self.squares = dict.fromkeys((group["part"] for group in self.param_groups), torch.zeros(()))

    def prepare(self, parameter: Tensor) -> None:
        """Makes the states of a parameter, or of what ZeRO has put in its place, as before the first step."""
        state = self.state[parameter]
        if state:
            return
        state["step"] = torch.zeros((), dtype=torch.float32)
        for moment in self.moments:
            state[moment] = torch.zeros_like(parameter, requires_grad=False)
        if self.average_decay is not None:
            state[AVERAGE] = parameter.detach().clone()

    def forget_squares(self) -> None:
        """Before each step, which ZeRO makes group by group."""
        self.squares = dict.fromkeys(self.squares, torch.zeros(()))

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        updated = [(group["part"], p) for group in self.param_groups for p in group["params"] if p.grad is not None]
        for part, parameter in updated:
            self.prepare(parameter)
            square = torch.linalg.vector_norm(parameter.grad).square()  # now: SGD on GPUs adds the momentum to it
            self.squares[part] = self.squares[part].to(square.device) + square
        super().step(closure)
        if self.average_decay is not None:
            for _, parameter in updated:
                self.state[parameter][AVERAGE].lerp_(parameter.detach(), 1.0 - self.average_decay)


class AdamW(AveragingOptimizer, torch.optim.AdamW):
    """torch's AdamW."""

    moments = "exp_avg", "exp_avg_sq"


class SGD(AveragingOptimizer, torch.optim.SGD):
    """torch's SGD; a momentum that starts from zero is the same as one that starts with the first gradient."""

    moments = ("momentum_buffer",)


def optimizer_of(model: MultimodalModel, config: RunConfig) -> AveragingOptimizer:
    """The optimizer of a run."""
    train, groups = config.train, parameter_groups(model, config)
    optimizer: AveragingOptimizer
    if train.optimizer == "sgd":
        optimizer = SGD(groups, momentum=train.betas[0], nesterov=True)
    else:
        optimizer = AdamW(groups, betas=train.betas)
    optimizer.start(train.ema_decay if train.ema_samples else None)
    return optimizer


def lr_factor(samples: int, train: TrainConfig) -> float:
    """Factor of the peak learning rate after `samples` samples: linear warm-up, then half a cosine to zero."""
    if samples < train.warmup_samples:
        return samples / train.warmup_samples
    rest = max(1, train.samples - train.warmup_samples)
    return 0.5 * (1.0 + math.cos(math.pi * min(1.0, (samples - train.warmup_samples) / rest)))
