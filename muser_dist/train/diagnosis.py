"""Why a step could not be applied: which rank, which pair, which rows."""

import math
from typing import Any

import torch
import torch.distributed as dist

from muser_dist.config import TrainConfig
from muser_dist.data.chunks import Chunk
from muser_dist.objectives.batch import global_metrics
from muser_dist.train.step import Step

_NAMED_ROWS = 10


def why_not_applied(made: Step, step: int, chunks: list[Chunk], grad_norm: float, train: TrainConfig) -> str:
    """The message with which a run ends, the same on all ranks; a collective.

    Args:
        made: the step.
        step: its number, from 1 on.
        chunks: what this rank trained on, in the order of the step's rows.
        grad_norm: of the step.
        train: the run's settings.
    """
    keys = [f"{shard}: {key}" for chunk in chunks for shard, key in zip(chunk["shard"], chunk["key"], strict=True)]
    bad = torch.zeros(len(keys), dtype=torch.bool)
    of_first = next(iter(made.batch.valid.values()))  # the tower that heads of fields read
    for name, features in made.features.items():
        bad |= ~features.isfinite().all(dim=1).cpu() & made.batch.valid.get(name, of_first).cpu()
    of_ranks: list[Any] = [None] * dist.get_world_size()
    own = (made.loss.share.item(), [keys[i] for i in bad.nonzero().flatten().tolist()])
    dist.all_gather_object(of_ranks, own)
    loss = sum(share for share, _ in of_ranks)
    if train.max_loss and math.isfinite(loss) and loss > train.max_loss:
        what = f"the loss of step {step:,} is {loss:.4g}, above train.max_loss ({train.max_loss:g})"
    else:
        what = (
            f"the loss or its gradient is not finite at step {step:,} (loss {loss:.4g}, gradient norm {grad_norm:.4g})"
        )
    metrics = global_metrics(made.loss)
    parts = [name[5:] for name, value in metrics.items() if name.startswith("loss/") and not math.isfinite(value)]
    ranks = [f"rank {rank}" for rank, (share, _) in enumerate(of_ranks) if not math.isfinite(share)]
    rows = [f"{row} (rank {rank})" for rank, (_, found) in enumerate(of_ranks) for row in found]
    more = f" and {len(rows) - _NAMED_ROWS:,} more" if len(rows) > _NAMED_ROWS else ""
    return (
        f"{what}; the step was not applied. Loss not finite: {', '.join(parts) or 'none'}; "
        f"{', '.join(ranks) or 'no rank'}. Rows whose embeddings are not finite: "
        f"{', '.join(rows[:_NAMED_ROWS]) or 'none'}{more}. The last checkpoint is from before: the same command goes "
        "on from it; other settings (a lower --train.lr, a higher --objective.temperature.minimum) need another --name"
    )
