"""How embeddings are doing, beside the loss: collapse shows here early.

All numbers are of the global batch: ranks exchange sums, so that W ranks find what one process with
all rows would. Nothing of the size of rows times rows is made.
"""

import torch
from torch import Tensor
from torch.nn.functional import normalize

from muser_dist.config import PairConfig
from muser_dist.objectives.batch import Batch
from muser_dist.objectives.collectives import gather, sum_over_ranks


@torch.no_grad()
def batch_health(features: dict[str, Tensor], batch: Batch, pairs: tuple[PairConfig, ...]) -> dict[str, float]:
    """Numbers of the global batch, equal on all ranks; three collectives, for steps that are logged.

    Args:
        features: by modality, (b, D), of any length: embeddings are compared as unit vectors.
        batch: this rank's rows, as many on every rank; those that are not valid count nowhere.
        pairs: which modalities are trained to agree.

    Returns:
        "valid_rows/M" for each modality M, and where there are such rows:
        "variance/M": variance of a dimension, mean over dimensions. Spread evenly over the sphere it
        is 1/D, collapsed to a point 0.
        "dimensions/M": in how many dimensions the embeddings vary, as the participation ratio
        tr(C)²/tr(C²) of their covariance C: from 1 (a line) to D. It cannot exceed the number of rows - 1.
        "alignment/A-B" for each pair: mean squared distance of the two embeddings of a row, from 0
        to 4; 2 is what unrelated ones have (Wang and Isola 2020).
        "duplicates": share of the rows with text whose text states the same facts as another's in the batch.
    """
    valid = {name: flags for name, flags in batch.valid.items() if name in features}
    unit = {
        name: normalize(torch.where(flags[:, None], features[name].float(), 0.0), dim=1)
        for name, flags in valid.items()
    }
    sums: dict[str, Tensor] = {}
    for name, flags in valid.items():
        sums |= {f"rows/{name}": flags.sum(), f"first/{name}": unit[name].sum(0)}
    for pair in pairs:
        first, second = unit[pair.first], unit.get(pair.second)
        both = valid[pair.first] & valid.get(pair.second, valid[pair.first])
        if pair.of_songs:  # the row's other song
            other = torch.arange(len(both), device=both.device) ^ 1
            both = both & both[other]
            if pair.second == "fused":
                both = both & valid["text"][other]
                first, second = first, normalize(features["fused"].float(), dim=1)[other]
            else:
                second = first[other]
        assert second is not None
        distances = (first - second).square().sum(1)
        key = f"{pair.first}-{pair.second}"
        sums |= {f"rows/{key}": both.sum(), f"distances/{key}": torch.where(both, distances, 0.0).sum()}
    sums = _over_ranks(sums)

    # About the mean, in a second exchange: near collapse, differences of sums would be rounding alone.
    present = {name: flags for name, flags in valid.items() if sums[f"rows/{name}"] > 0}
    seconds: dict[str, Tensor] = {}
    for name, flags in present.items():
        mean = (sums[f"first/{name}"] / sums[f"rows/{name}"]).float()
        centred = torch.where(flags[:, None], unit[name] - mean, 0.0)
        seconds[name] = centred.T @ centred
    seconds = _over_ranks(seconds)

    health: dict[str, float] = {}
    for name in valid:
        health[f"valid_rows/{name}"] = int(sums[f"rows/{name}"])
        if name in present:
            covariance = seconds[name] / sums[f"rows/{name}"]
            trace = covariance.trace()
            health[f"variance/{name}"] = float(trace / len(covariance))
            if trace > 0:
                health[f"dimensions/{name}"] = float(trace.square() / covariance.square().sum())
    for pair in pairs:
        key = f"{pair.first}-{pair.second}"
        if sums[f"rows/{key}"] > 0:
            health[f"alignment/{key}"] = float(sums[f"distances/{key}"] / sums[f"rows/{key}"])
    return health | _duplicates(batch)


def _duplicates(batch: Batch) -> dict[str, float]:
    if "text" not in batch.valid:
        return {}
    ids = gather(torch.where(batch.valid["text"], batch.text_id, -1))
    counts = ids[ids >= 0].unique(return_counts=True)[1]
    return {"duplicates": float(counts[counts > 1].sum() / counts.sum())} if len(counts) else {}


def _over_ranks(parts: dict[str, Tensor]) -> dict[str, Tensor]:
    """The sum of each tensor over ranks, as float64; one collective."""
    if not parts:
        return {}
    flat = sum_over_ranks(torch.cat([part.double().flatten() for part in parts.values()]))
    pieces = flat.split([part.numel() for part in parts.values()])
    return {name: piece.view(part.shape) for (name, part), piece in zip(parts.items(), pieces, strict=True)}
