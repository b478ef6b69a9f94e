"""Engines: the model, its optimizer and how gradients meet. The only file that imports deepspeed.

Every rank gives its share of the loss; shares sum over ranks to the loss of the global batch.
DeepSpeed averages gradients over ranks, so the engine multiplies by their number, here and
nowhere else.
"""

import math
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from muser_dist.config import RunConfig
from muser_dist.models.model import MultimodalModel
from muser_dist.objectives.collectives import sum_over_ranks, world
from muser_dist.train.optimizer import AVERAGE, AveragingOptimizer, optimizer_of


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
        """Clips, updates the parameters with that share of the peak learning rates, clears gradients.

        Where the gradient is not finite, no parameter changes on any rank, and `grad_norm` is not finite.
        """
        ...

    def grad_norm(self) -> float:
        """Norm of the last step's gradient over all parameters, before clipping."""
        ...

    def grad_norms(self) -> dict[str, float]:
        """The same by tower, and of the temperatures and biases as "logits"; a collective."""
        ...

    def state_dict(self) -> dict[str, Tensor]:
        """A copy of the whole model's weights on the CPU, or of their moving average where there is one.

        A collective, and empty on ranks other than 0.
        """
        ...


WEIGHT, BUFFER = "weight", "buffer"
"""Names of states in a checkpoint, beside those of the optimizer."""


@dataclass(frozen=True)
class Fragment:
    """A piece of a parameter that this rank's optimizer updates.

    Attributes:
        name: of the parameter.
        start: the piece's first element in the flattened parameter.
        owner: the tensor that the optimizer knows, which may hold many pieces.
        offset, length: where the piece lies in it.
        stored: whether this rank writes it into checkpoints; one of those that hold it does.
    """

    name: str
    start: int
    owner: Tensor
    offset: int
    length: int
    stored: bool


class PlainEngine:
    """One process and plain torch: for debugging, benchmarks without Ray or DeepSpeed, and as the oracle."""

    def __init__(self, model: MultimodalModel, config: RunConfig, device: torch.device) -> None:
        self.device = device
        self.model = model.to(device).train()
        self._clip_norm = config.train.clip_norm or float("inf")
        self._optimizer = optimizer_of(model, config)
        self._peaks = [group["lr"] for group in self._optimizer.param_groups]
        self._grad_norm = 0.0

    def encode(self, batch: dict[str, Tensor], moment: tuple[int, int]) -> dict[str, Tensor]:
        return self.model(batch, moment)

    def backward(self, share: Tensor, last: bool = True) -> None:
        share.backward()

    def step(self, lr_factor: float) -> None:
        self._optimizer.forget_squares()
        for group, peak in zip(self._optimizer.param_groups, self._peaks, strict=True):
            group["lr"] = peak * lr_factor
        self._grad_norm = float(torch.nn.utils.clip_grad_norm_(self.model.parameters(), self._clip_norm))
        if math.isfinite(self._grad_norm):
            self._optimizer.step()
        self._optimizer.zero_grad()

    def grad_norm(self) -> float:
        return self._grad_norm

    def grad_norms(self) -> dict[str, float]:
        return _by_part(self._optimizer, self._grad_norm)

    def state_dict(self) -> dict[str, Tensor]:
        states, whole = self._optimizer.state, self.model.state_dict(keep_vars=True)
        return {
            name: states.get(value, {}).get(AVERAGE, value).detach().to("cpu", copy=True)
            for name, value in whole.items()
        }


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
        self._optimizer = optimizer_of(model, config)
        self._peaks = [group["lr"] for group in self._optimizer.param_groups]
        self._grad_norm = 0.0
        self._one_reduction: ExitStack | None = None
        self.deepspeed, *_ = deepspeed.initialize(
            model=model,
            optimizer=self._optimizer,
            dist_init_required=False,
            config={
                "train_micro_batch_size_per_gpu": train.chunk * train.chunks_per_worker(world()[1]),
                "gradient_accumulation_steps": 1,
                # Said even when it is off: DeepSpeed clips to norm 1 by default.
                "gradient_clipping": train.clip_norm,
                "zero_allow_untested_optimizer": True,  # torch's AdamW: the same update on every device
                "zero_force_ds_cpu_optimizer": False,  # with train.offload too
                "zero_optimization": {
                    "stage": train.zero_stage,
                    "reduce_bucket_size": 50_000_000,
                    "allgather_bucket_size": 50_000_000,
                }
                | ({"offload_optimizer": {"device": "cpu", "pin_memory": train.gpu}} if train.offload else {}),
            },
        )
        for owner in self._owners():
            self._optimizer.prepare(owner)

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
        self._optimizer.forget_squares()
        for group, peak in zip(self._optimizer.param_groups, self._peaks, strict=True):
            group["lr"] = peak * lr_factor
        if self.deepspeed.zero_optimization_stage() == 0:  # there DeepSpeed does not tell it
            gradients = [p.grad for p in self.deepspeed.module.parameters() if p.grad is not None]
            self._grad_norm = float(torch.nn.utils.get_total_norm(gradients))
            if not math.isfinite(self._grad_norm):  # the other stages look at it themselves
                self.deepspeed.zero_grad()
                return
        self.deepspeed.step()
        if self.deepspeed.zero_optimization_stage() > 0:
            self._grad_norm = float(self.deepspeed.get_global_grad_norm())

    def grad_norm(self) -> float:
        return self._grad_norm

    def grad_norms(self) -> dict[str, float]:
        return _by_part(self._optimizer, self._grad_norm)

    def state_dict(self) -> dict[str, Tensor]:
        import deepspeed

        model, rank = self.deepspeed.module, world()[0]
        whole = self._whole(WEIGHT if self._optimizer.average_decay is None else AVERAGE)
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
                    if rank == 0:
                        whole[name] = parameter.detach().to("cpu", copy=True)
        if rank > 0:
            return {}
        return {
            name: whole[names[id(value)]] if id(value) in names else value.to("cpu", copy=True)
            for name, value in model.state_dict(keep_vars=True).items()
        }

    # --- Checkpoints ---

    def snapshot(self) -> dict[str, Tensor]:
        """A copy on the CPU of what this rank has to write down, so that all ranks together write everything once.

        Returns:
            flat tensors by "state/parameter@start": `start` is the piece's first element in the flattened parameter.
            The pieces do not depend on how ranks share them, so any number of ranks at any stage can `restore` them.
        """
        pieces = {
            f"{state}/{piece.name}@{piece.start}": values.to("cpu", copy=True)
            for piece in self._fragments()
            if piece.stored
            for state, values in self._states(piece)
        }
        pieces |= {
            f"{WEIGHT}/{name}@{start}": values.to("cpu", copy=True)
            for name, start, values, stored in self._frozen()
            if stored
        }
        if world()[0] == 0:
            pieces |= {f"{BUFFER}/{name}@0": value.flatten().to("cpu", copy=True) for name, value in self._buffers()}
        return pieces

    def restore(self, read: Callable[[str, str, int, int], Tensor], step: int) -> None:
        """Puts a checkpoint in place of model and optimizer; all ranks call it.

        Args:
            read: gives the elements start <= e < stop of a state of a parameter, as (state, parameter, start, stop).
            step: optimizer steps that were made.
        """
        for piece in self._fragments():
            for state, values in self._states(piece):
                values.copy_(read(state, piece.name, piece.start, piece.start + len(values)))
            self._optimizer.state[piece.owner]["step"].fill_(step)
        for name, start, values, _ in self._frozen():
            values.copy_(read(WEIGHT, name, start, start + len(values)))
        for name, value in self._buffers():
            value.copy_(read(BUFFER, name, 0, value.numel()).view(value.shape))
        stage = self.deepspeed.zero_optimization_stage()
        trained = [(name, p) for name, p in self.deepspeed.module.named_parameters() if p.requires_grad]
        if stage in (1, 2):  # whole weights are apart from the optimizer's
            for name, parameter in trained:
                parameter.data.copy_(read(WEIGHT, name, 0, parameter.numel()).view(parameter.shape))
        elif stage == 3:
            zero = self.deepspeed.optimizer
            for group in range(len(zero.fp32_partitioned_groups_flat)):
                zero._reassign_or_swap_out_partitioned_parameters(group)
            if zero.persistent_parameters:  # small ones, which every rank holds
                zero.persistent_parameters[0].partition(zero.persistent_parameters)
                zero.persistent_parameters[0].all_gather(zero.persistent_parameters)

    def _owners(self) -> list[Tensor]:
        """What the optimizer updates on this rank: parameters, or what ZeRO has put in their place."""
        stage, zero = self.deepspeed.zero_optimization_stage(), self.deepspeed.optimizer
        if stage == 0:
            return [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        return zero.fp32_partitioned_groups_flat if stage == 3 else zero.single_partition_of_fp32_groups

    def _fragments(self) -> Iterator[Fragment]:
        """What this rank's optimizer updates of each parameter; where it lies, DeepSpeed decides by stage."""
        rank, ranks = world()
        stage, zero = self.deepspeed.zero_optimization_stage(), self.deepspeed.optimizer
        for number, (name, parameter) in enumerate(self.deepspeed.module.named_parameters()):
            if not parameter.requires_grad:
                continue
            if stage == 0:
                yield Fragment(name, 0, parameter, 0, parameter.numel(), number % ranks == rank)
            elif stage < 3:
                if (place := parameter._hp_mapping) is not None:
                    owner = zero.single_partition_of_fp32_groups[place.param_group_index]
                    here = place.hp_fragment_address
                    yield Fragment(name, place.lp_fragment_address.start, owner, here.start, here.numel, True)
            else:
                group, offset, size = zero.grad_position[zero.get_param_id(parameter)]
                length = min(size, parameter.ds_numel - rank * size)  # the last ranks' may be padded
                if length > 0:
                    owner = zero.fp32_partitioned_groups_flat[group]
                    yield Fragment(name, rank * size, owner, offset, length, True)

    def _frozen(self) -> Iterator[tuple[str, int, Tensor, bool]]:
        """Name, first element, view and whether this rank writes it: what it holds of weights that are not trained."""
        rank, ranks = world()
        for number, (name, parameter) in enumerate(self.deepspeed.module.named_parameters()):
            if parameter.requires_grad:
                continue
            if hasattr(parameter, "ds_id"):
                size = parameter.ds_tensor.numel()
                length = min(size, parameter.ds_numel - rank * size)
                if length > 0:
                    yield name, rank * size, parameter.ds_tensor.data.view(-1)[:length], True
            else:
                yield name, 0, parameter.data.view(-1), number % ranks == rank

    def _states(self, piece: Fragment) -> Iterator[tuple[str, Tensor]]:
        """Views of a fragment's weights and of each of its optimizer states, (n,) float32."""
        states = {WEIGHT: piece.owner.data} | self._optimizer.state[piece.owner]
        for state, values in states.items():
            if state != "step":
                yield state, values.view(-1)[piece.offset : piece.offset + piece.length]

    def _buffers(self) -> Iterator[tuple[str, Tensor]]:
        for prefix, module in self.deepspeed.module.named_modules():
            for name, value in module.named_buffers(recurse=False):
                if name not in module._non_persistent_buffers_set:
                    yield f"{prefix}.{name}" if prefix else name, value

    def _whole(self, state: str) -> dict[str, Tensor]:
        """A state of all trained parameters, put together from all ranks: on rank 0, and empty on the others."""
        pieces = {piece.name: piece for piece in self._fragments() if piece.stored}
        whole = {}
        for name, parameter in self.deepspeed.module.named_parameters():
            if not parameter.requires_grad:
                continue
            shape = getattr(parameter, "ds_shape", parameter.shape)
            values = torch.zeros(shape.numel(), device=self.device)
            if (piece := pieces.get(name)) is not None:
                values[piece.start : piece.start + piece.length] = dict(self._states(piece))[state]
            values = sum_over_ranks(values)
            if world()[0] == 0:
                whole[name] = values.view(shape).cpu()
        return whole


def _by_part(optimizer: AveragingOptimizer, grad_norm: float) -> dict[str, float]:
    """A gradient's norm by part of the model, before clipping: which changes no part's share of the squares."""
    squares = sum_over_ranks(torch.stack([square.double() for square in optimizer.squares.values()]))
    norms = (squares / squares.sum().clamp(min=1e-300)).sqrt() * grad_norm
    return dict(zip(optimizer.squares, norms.tolist(), strict=True))
