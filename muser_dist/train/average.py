"""AdamW, with a moving average of the weights where one is asked for, and the gradients' norms by tower.

The average is a state of the optimizer like its moments, so ZeRO shares it out among ranks as it
does those, and checkpoints hold it without more ado.
"""

from typing import Any

import torch
from torch import Tensor

from muser_dist.config import RunConfig
from muser_dist.models.model import MultimodalModel
from muser_dist.train.optimizer import parameter_groups

AVERAGE = "average"
"""Name of the average among the optimizer's states."""


class AveragingAdamW(torch.optim.AdamW):
    """torch's AdamW, whose states exist from the start.

    Args:
        groups: as of torch.optim.AdamW.
        betas: as of torch.optim.AdamW.
        average_decay: weight of the old average in each step; None without an average.

    Attributes:
        squares: by the groups' "part", the sum of squares of the last step's gradients, clipped, on this rank.
    """

    def __init__(self, groups: list[dict[str, Any]], betas: tuple[float, float], average_decay: float | None) -> None:
        super().__init__(groups, betas=betas)
        self.average_decay = average_decay
        self.squares: dict[str, Tensor] = dict.fromkeys((group["part"] for group in groups), torch.zeros(()))

    def prepare(self, parameter: Tensor) -> None:
        """Makes the states of a parameter, or of what ZeRO has put in its place, as before the first step."""
        state = self.state[parameter]
        if state:
            return
        state["step"] = torch.zeros((), dtype=torch.float32)
        state["exp_avg"] = torch.zeros_like(parameter, requires_grad=False)
        state["exp_avg_sq"] = torch.zeros_like(parameter, requires_grad=False)
        if self.average_decay is not None:
            state[AVERAGE] = parameter.detach().clone()

    def forget_squares(self) -> None:
        """Before each step, which ZeRO makes group by group."""
        self.squares = dict.fromkeys(self.squares, torch.zeros(()))

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        super().step(closure)
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                square = torch.linalg.vector_norm(parameter.grad).square()
                self.squares[group["part"]] = self.squares[group["part"]].to(square.device) + square
                if self.average_decay is not None:
                    self.state[parameter][AVERAGE].lerp_(parameter.detach(), 1.0 - self.average_decay)


def optimizer_of(model: MultimodalModel, config: RunConfig) -> AveragingAdamW:
    """The optimizer of a run."""
    train = config.train
    decay = train.ema_decay if train.ema_samples else None
    return AveragingAdamW(parameter_groups(model, config), train.betas, decay)
