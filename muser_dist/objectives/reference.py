"""The oracle: the contrastive loss written as its definition, for one process and few rows.

Read this first to know what is computed; contrastive.py computes the same over many workers.
Nothing here is fast. Tests run it in float64.
"""

import torch
from torch import Tensor

from muser_dist.config import ObjectiveConfig
from muser_dist.objectives.contrastive import Batch


def reference_loss(features: dict[str, Tensor], scale: Tensor, batch: Batch, config: ObjectiveConfig) -> Tensor:
    """The loss of the whole batch, anchor by anchor.

    For an anchor i of modality x, its candidates are the rows j of modality y that are valid in
    both, without other copies of the same clip. Its positives P_i are itself and, with
    same_text, the candidates that state the same facts. With
    s_ij = scale · cos(x_i, y_j) its loss is

        l_i = - 1/|P_i| · Σ_{j in P_i} log( exp(s_ij) / Σ_{k candidate} exp(s_ik) ).

    A pair's loss is the mean of l_i over both directions and all valid anchors, the total the
    weighted mean over pairs.

    Args:
        features: by modality, (N, D).
        scale: (pairs,) inverse temperatures.
        batch: validity and ids of all N rows.
        config: pairs, weights, targets.

    Returns:
        scalar; zero when no row is valid.
    """
    total = scale.new_zeros(())
    for p, pair in enumerate(config.pairs):
        rows = [i for i in range(len(batch.row)) if batch.valid[pair.first][i] and batch.valid[pair.second][i]]
        losses = []
        for x, y in ((pair.first, pair.second), (pair.second, pair.first)):
            for i in rows:
                positives = [j for j in rows if _is_positive(i, j, batch, config.targets)]
                candidates = [j for j in rows if j in positives or batch.row[j] != batch.row[i]]
                s = {j: scale[p] * torch.cosine_similarity(features[x][i], features[y][j], dim=0) for j in candidates}
                log_sum = torch.logsumexp(torch.stack(list(s.values())), dim=0)
                losses.append(torch.stack([log_sum - s[j] for j in positives]).mean())
        if losses:
            total = total + pair.weight * torch.stack(losses).mean()
    return total / sum(pair.weight for pair in config.pairs)


def _is_positive(i: int, j: int, batch: Batch, targets: str) -> bool:
    if i == j:
        return True
    return targets == "same_text" and bool(batch.text_id[i] == batch.text_id[j]) and bool(batch.text_id[i] >= 0)
