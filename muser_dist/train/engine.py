"""Engines: the model, its optimizer and how gradients meet. The only file that imports deepspeed.

Every rank gives its share of the loss; shares sum over ranks to the loss of the global batch.
DeepSpeed averages gradients over ranks, so the engine multiplies by their number, here and
nowhere else.
"""

import os
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from muser_dist.config import RunConfig
from muser_dist.models.model import MultimodalModel
from muser_dist.objectives.collectives import world
from muser_dist.train.optimizer import parameter_groups


class Engine(Protocol):
    """What the training step asks of an engine."""

    device: torch.device
    model: MultimodalModel

    def encode(self, batch: dict[str, Tensor], moment: tuple[int, int]) -> dict[str, Tensor]:
        """MultimodalModel.forward."""
        ...

    def backward(self, share: Tensor, last: bool = True) -> None:
        """Adds the gradients of this rank's share of the loss, or of a part of it.

        Args:
            share: every rank gives as many parts in a step.
            last: whether it is the step's last part.
        """
        ...

    def step(self, lr_factor: float) -> None:
        """Clips, updates the parameters with that share of the peak learning rates, clears gradients."""
        ...

    def grad_norm(self) -> float:
        """Norm of the last step's gradient over all parameters, before clipping."""
        ...

    def state_dict(self) -> dict[str, Tensor]:
        """A copy of the whole model's weights on the CPU; a collective, and empty on ranks other than 0."""
        ...


class PlainEngine:
    """One process and plain torch: for debugging, benchmarks without Ray or DeepSpeed, and as the oracle."""

    def __init__(self, model: MultimodalModel, config: RunConfig, device: torch.device) -> None:
        self.device = device
        self.model = model.to(device).train()
        self._clip_norm = config.train.clip_norm or float("inf")
        self._optimizer = torch.optim.AdamW(parameter_groups(model, config), betas=config.train.betas)
        self._peaks = [group["lr"] for group in self._optimizer.param_groups]
        self._grad_norm = 0.0

    def encode(self, batch: dict[str, Tensor], moment: tuple[int, int]) -> dict[str, Tensor]:
        return self.model(batch, moment)

    def backward(self, share: Tensor, last: bool = True) -> None:
        share.backward()

    def step(self, lr_factor: float) -> None:
        for group, peak in zip(self._optimizer.param_groups, self._peaks, strict=True):
            group["lr"] = peak * lr_factor
        self._grad_norm = float(torch.nn.utils.clip_grad_norm_(self.model.parameters(), self._clip_norm))
        self._optimizer.step()
        self._optimizer.zero_grad()

    def grad_norm(self) -> float:
        return self._grad_norm

    def state_dict(self) -> dict[str, Tensor]:
        return {name: value.detach().to("cpu", copy=True) for name, value in self.model.state_dict().items()}


class DeepSpeedEngine:
    """DeepSpeed ZeRO over the process group that is already there (nccl on GPUs, gloo on CPUs)."""

    def __init__(self, model: MultimodalModel, config: RunConfig, device: torch.device) -> None:
        os.environ.setdefault("DS_ACCELERATOR", device.type)  # else it guesses, and warns of what it guessed
        import deepspeed

        # Its shared-memory collectives for CPUs would be compiled here and now, which takes a
        # minute and a C++ compiler; gloo does without.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        train = config.train
        self.device = device
        self.model = model
        self._optimizer = torch.optim.AdamW(parameter_groups(model, config), betas=train.betas)
        self._peaks = [group["lr"] for group in self._optimizer.param_groups]
        self._grad_norm = 0.0
        self._one_reduction: ExitStack | None = None
        self.deepspeed, *_ = deepspeed.initialize(
            model=model,
            optimizer=self._optimizer,
            dist_init_required=False,
            config={
                "train_micro_batch_size_per_gpu": train.chunk * train.chunks_per_worker,
                "gradient_accumulation_steps": 1,
                # Said even when it is off: DeepSpeed clips to norm 1 by default.
                "gradient_clipping": train.clip_norm,
                "zero_allow_untested_optimizer": True,  # torch's AdamW: the same update on every device
                "zero_optimization": {
                    "stage": train.zero_stage,
                    "reduce_bucket_size": 50_000_000,
                    "allgather_bucket_size": 50_000_000,
                },
            },
        )

    def encode(self, batch: dict[str, Tensor], moment: tuple[int, int]) -> dict[str, Tensor]:
        return self.deepspeed(batch, moment)

    def backward(self, share: Tensor, last: bool = True) -> None:
        # Several backward passes in a step are several steps' to DeepSpeed unless it is told, and at stages 1 and 2
        # the gradient is then silently wrong. There it can put off reduction to the last pass; stage 0 does so by
        # itself; stage 3 would have to hold a whole gradient for that, and reduces each pass.
        if self.deepspeed.zero_optimization_stage() in (1, 2):
            if not last and self._one_reduction is None:
                self._one_reduction = ExitStack()
                self._one_reduction.enter_context(self.deepspeed.coalesce_grad_reduction())
        else:
            self.deepspeed.set_gradient_accumulation_boundary(last)
        self.deepspeed.backward(share * world()[1])
        if last and self._one_reduction is not None:
            self._one_reduction.close()
            self._one_reduction = None

    def step(self, lr_factor: float) -> None:
        for group, peak in zip(self._optimizer.param_groups, self._peaks, strict=True):
            group["lr"] = peak * lr_factor
        if self.deepspeed.zero_optimization_stage() == 0:  # there DeepSpeed does not tell it
            gradients = [p.grad for p in self.deepspeed.module.parameters() if p.grad is not None]
            self._grad_norm = float(torch.nn.utils.get_total_norm(gradients))
        self.deepspeed.step()
        if self.deepspeed.zero_optimization_stage() > 0:
            self._grad_norm = float(self.deepspeed.get_global_grad_norm())

    def grad_norm(self) -> float:
        return self._grad_norm

    def state_dict(self) -> dict[str, Tensor]:
        import deepspeed

        model, rank = self.deepspeed.module, world()[0]
        if self.deepspeed.zero_optimization_stage() < 3:
            return (
                {name: value.detach().to("cpu", copy=True) for name, value in model.state_dict().items()}
                if rank == 0
                else {}
            )
        weights = {}
        for name, module in model.named_modules():
            own = list(module.parameters(recurse=False))
            with deepspeed.zero.GatheredParameters(own):  # one module at a time bounds the memory
                if rank == 0:
                    prefix = f"{name}." if name else ""
                    keep = {k for k, _ in module.named_parameters(recurse=False)}
                    keep |= {k for k, _ in module.named_buffers(recurse=False)} - module._non_persistent_buffers_set
                    weights.update({prefix + k: getattr(module, k).detach().to("cpu", copy=True) for k in keep})
        return weights

    def save(self, folder: Path) -> None:
        """Writes this rank's part of model and optimizer; every rank calls it, each with a folder of its own."""
        self.deepspeed.save_checkpoint(str(folder), tag="deepspeed", save_latest=False)

    def load(self, folder: Path) -> None:
        """Reads what `save` wrote, all ranks' parts merged into one folder, at the same number of ranks.

        DeepSpeed unpickles its files: give only checkpoints out of the run's own storage.
        """
        loaded: Any = self.deepspeed.load_checkpoint(str(folder), tag="deepspeed")[0]
        if loaded is None:
            raise FileNotFoundError(f"DeepSpeed found no checkpoint in {folder}")
