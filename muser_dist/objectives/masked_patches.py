"""Masked patches, M3's pretraining (CLaMP 2, Wu et al. 2024): how well a decoder writes selected patches again."""

from torch import Tensor

from muser_dist.config import ObjectiveConfig
from muser_dist.errors import require
from muser_dist.objectives.batch import Batch, Logits, Loss
from muser_dist.objectives.collectives import sum_over_ranks


def masked_patches(features: dict[str, Tensor], logits: Logits, batch: Batch, config: ObjectiveConfig) -> Loss:
    """The mean cross-entropy in nats over the characters of the selected patches of the global batch.

    Args:
        features: of the model's only tower (muser_dist/models/symbolic.py, M3Pretraining): (b, 2), by row the sum of
            the cross-entropies and the number of characters.
        logits, config: not used.
        batch: the tower's flags count.

    Returns:
        the rank's share; metric "loss".

    Raises:
        ConfigError: the tower gives something else.
    """
    ((modality, valid),) = batch.valid.items()
    require(
        features[modality].shape[1] == 2,
        'objective.name: "masked_patches" needs a tower that gives a sum and a count for each row in training, as '
        f"m3_pretraining does when it is not frozen; model.{modality} gives {features[modality].shape[1]} numbers",
    )
    sums, counts = features[modality].masked_fill(~valid[:, None], 0.0).unbind(dim=1)
    # float32 does not count beyond 16 million.
    share = sums.sum() / sum_over_ranks(counts.double().sum()).clamp(min=1).to(sums.dtype)
    return Loss(share, {"loss": share.detach()})
