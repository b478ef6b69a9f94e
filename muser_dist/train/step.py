"""One optimizer step: encode this rank's chunks, one loss over the global batch, one update."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from muser_dist.config import Modality, ObjectiveConfig
from muser_dist.data.chunks import Chunk
from muser_dist.objectives.contrastive import Batch, Loss, Objective
from muser_dist.train.engine import Engine

TENSORS = ("audio", "audio_length", "spectrogram", "text_ids", "text_length")
"""Arrays of a chunk that towers may read."""


@dataclass(frozen=True)
class DeviceChunk:
    """A chunk on the worker's device: what towers read, and what the objective reads."""

    moment: tuple[int, int]
    tensors: dict[str, Tensor]
    batch: Batch


def to_device(chunk: Chunk, modalities: tuple[Modality, ...], device: torch.device) -> DeviceChunk:
    """Moves the arrays of a chunk that training needs; they may be read-only memory of the object store."""

    def move(name: str) -> Tensor:
        return torch.from_numpy(np.array(chunk[name])).to(device)

    return DeviceChunk(
        (int(chunk["step"]), int(chunk["chunk"])),
        {name: move(name) for name in TENSORS if name in chunk},
        Batch({name: move(f"valid_{name}") for name in modalities}, move("row"), move("text_id")),
    )


def train_step(
    engine: Engine, objective: Objective, config: ObjectiveConfig, chunks: list[DeviceChunk], lr_factor: float
) -> tuple[Loss, Tensor]:
    """Trains on this rank's chunks of a global batch.

    Each chunk is a forward pass with random numbers of its own, so that the result does not
    depend on which rank runs it.

    Returns:
        this rank's share of the loss, and the inverse temperatures (pairs,) that it was made with.
    """
    encoded = [engine.encode(chunk.tensors, chunk.moment) for chunk in chunks]
    scale = encoded[-1].pop("scale")
    features = {name: torch.cat([part[name] for part in encoded]) for name in encoded[-1]}
    loss = objective(features, scale, join([chunk.batch for chunk in chunks]), config)
    engine.backward(loss.share)
    engine.step(lr_factor)
    return loss, scale.detach()


def join(batches: list[Batch]) -> Batch:
    """The rows of several chunks as one batch."""
    return Batch(
        {name: torch.cat([batch.valid[name] for batch in batches]) for name in batches[0].valid},
        torch.cat([batch.row for batch in batches]),
        torch.cat([batch.text_id for batch in batches]),
    )
