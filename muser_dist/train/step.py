"""One optimizer step: encode this rank's chunks, one loss over the global batch, one update.

With several chunks the activations of one are kept at a time (GradCache, Gao et al. 2021): all are
encoded without graph, the loss gives the gradient with respect to their embeddings, and each is
encoded once more, with the same random numbers, to take that gradient back to the parameters.
Without train.cache_gradients the activations of all chunks are kept, and each is encoded once.
"""

import math
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.profiler import record_function

from muser_dist.config import Feature, RunConfig
from muser_dist.data.chunks import Chunk
from muser_dist.data.config import LABEL
from muser_dist.models.batch_norm import update_running_statistics
from muser_dist.models.model import AUXILIARY
from muser_dist.objectives.batch import Batch, Logits, Loss, Objective
from muser_dist.objectives.collectives import sum_over_ranks, world
from muser_dist.train.engine import Engine

_OF_LOGITS = ("scale", "bias")

TENSORS = (
    "audio",
    "audio_length",
    "view",
    "view_length",
    "spectrogram",
    "patches",
    "patches_length",
    "notation_patches",
    "notation_length",
    "features",
    "features_length",
    "text_ids",
    "text_length",
)
"""Arrays of a chunk that towers may read."""


@dataclass(frozen=True)
class DeviceChunk:
    """A chunk on the worker's device: what towers read, and what the objective reads.

    Attributes:
        moment: (step, chunk).
        tensors: makes what towers read; called for each pass, so that the device holds one chunk at a time.
        batch: flags and ids.
    """

    moment: tuple[int, int]
    tensors: Callable[[], dict[str, Tensor]]
    batch: Batch


def to_device(chunk: Chunk, features: tuple[Feature, ...], device: torch.device) -> DeviceChunk:
    """The arrays of a chunk that training needs; they may be read-only memory of the object store.

    Args:
        chunk: of the pipeline.
        features: RunConfig.features.
        device: where they go.
    """

    def move(name: str) -> Tensor:
        copy = torch.from_numpy(np.array(chunk[name]))
        return copy.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else copy.to(device)

    return DeviceChunk(
        (int(chunk["step"]), int(chunk["chunk"])),
        lambda: {name: move(name) for name in TENSORS if name in chunk},
        Batch(
            {name: move(f"valid_{name}") for name in features},
            move("row"),
            move("text_id"),
            move("label_id"),
            labels={name.removeprefix(LABEL): move(name) for name in chunk if name.startswith(LABEL)},
            liked=move("liked") if "liked" in chunk else None,
        ),
    )


class Step(NamedTuple):
    """What a step was: detached, so that nothing keeps the features of all ranks until the next.

    Attributes:
        loss: this rank's share.
        logits: scales and biases (pairs,) that it was made with.
        features: by modality, (b, D) of this rank's rows, not normalised.
        batch: flags and ids of these rows.
        applied: whether the parameters were updated; the same on all ranks.
    """

    loss: Loss
    logits: Logits
    features: dict[str, Tensor]
    batch: Batch
    applied: bool


def train_step(
    engine: Engine, objective: Objective, config: RunConfig, chunks: list[DeviceChunk], lr_factor: float
) -> Step:
    """Trains on this rank's chunks of a global batch.

    Each chunk is a forward pass with random numbers of its own, so that the result does not
    depend on which rank runs it. A step whose gradient is not finite, or whose loss is above
    train.max_loss, changes no parameter.
    """
    batch = Batch.join([chunk.batch for chunk in chunks])
    cached = config.train.cache_gradients and len(chunks) > 1
    with torch.set_grad_enabled(not cached), record_function("encode"):
        encoded = [engine.encode(tensors, moment) for tensors, moment in _inputs(chunks, engine.device)]
    auxiliary = {name: value for name, value in encoded[-1].items() if name.startswith(AUXILIARY)}
    of_logits = {name: encoded[-1][name] for name in _OF_LOGITS if name in encoded[-1]}
    shared = auxiliary | of_logits  # by all chunks
    features = {name: torch.cat([part[name] for part in encoded]) for name in encoded[-1] if name not in shared}
    if cached:
        for leaf in (*features.values(), *shared.values()):
            leaf.requires_grad_()
    logits = Logits(**of_logits)
    with record_function("objective"):
        loss = add_auxiliary(objective(features, logits, batch, config.objective), auxiliary)
    with record_function("backward"):
        if not cached:
            engine.backward(loss.share)
        else:
            loss.share.backward()
            _replay(engine, chunks, {name: leaf.grad for name, leaf in (features | shared).items()}, shared)
    most = config.train.max_loss
    applied = not (most and sum_over_ranks(loss.share).item() > most)
    with record_function("update"):
        if applied:
            engine.step(lr_factor)
            applied = math.isfinite(engine.grad_norm())
        if applied:
            update_running_statistics(engine.model)
    return Step(
        Loss(loss.share.detach(), loss.metrics),
        Logits(**{name: value.detach() for name, value in of_logits.items()}),
        {name: value.detach() for name, value in features.items()},
        batch,
        applied,
    )


def add_auxiliary(loss: Loss, losses: dict[str, Tensor]) -> Loss:
    """The loss with those of towers, which depend on parameters alone: each rank adds its share of 1/W.

    Returns:
        "loss" with them, and each as "loss/MODALITY/NAME".
    """
    if not losses:
        return loss
    shares = {name: value / world()[1] for name, value in losses.items()}
    added = torch.stack(list(shares.values())).sum()
    told = {name: share.detach() for name, share in shares.items()}
    return Loss(loss.share + added, loss.metrics | {"loss": loss.metrics["loss"] + added.detach()} | told)


def _replay(
    engine: Engine, chunks: list[DeviceChunk], gradients: dict[str, Tensor | None], shared: Collection[str]
) -> None:
    """Encodes each chunk again, and takes the gradients of its outputs back to the parameters."""
    start = 0
    for number, (tensors, moment) in enumerate(_inputs(chunks, engine.device)):
        outputs = engine.encode(tensors, moment)
        rows = slice(start, start := start + len(chunks[number].batch.row))
        part = torch.zeros((), device=engine.device)
        for name, gradient in gradients.items():
            if gradient is None:  # a modality that no pair names
                part = part + 0.0 * outputs[name].sum()
            elif name in shared:  # all chunks have the same
                part = part + (outputs[name] * gradient).sum() / len(chunks)
            else:
                part = part + (outputs[name] * gradient[rows]).sum()
        engine.backward(part, last=number == len(chunks) - 1)


def _inputs(chunks: list[DeviceChunk], device: torch.device) -> Iterator[tuple[dict[str, Tensor], tuple[int, int]]]:
    """What towers read of each chunk, and its moment. On a GPU the next chunk is copied there meanwhile."""
    if device.type != "cuda":
        for chunk in chunks:
            yield chunk.tensors(), chunk.moment
        return
    copying, computing = torch.cuda.Stream(device), torch.cuda.current_stream(device)

    def copied(chunk: DeviceChunk) -> dict[str, Tensor]:
        with torch.cuda.stream(copying):
            return chunk.tensors()

    ahead = copied(chunks[0])
    for chunk, following in zip(chunks, [*chunks[1:], None], strict=True):
        computing.wait_stream(copying)
        tensors = ahead
        for tensor in tensors.values():
            tensor.record_stream(computing)  # or its memory would be given away while it is read
        if following is not None:
            ahead = copied(following)
        yield tensors, chunk.moment
