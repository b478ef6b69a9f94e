"""SweepConfig: what a sweep tries, by which rules, and what it looks for."""

from dataclasses import dataclass
from typing import Literal

from muser_dist.errors import require
from muser_dist.strict import Strict


@dataclass(frozen=True)
class SweepConfig(Strict):
    space: str
    """JSON file with the fields to vary, {"objective.temperature.init": {"log_uniform": [0.01, 1]}, ...}, or a preset:
    temperature, projection, temperature_x_projection (docs/sweeps.md)."""
    trials: int = 12
    """How many runs are tried; "grid" tries all of its points."""
    search: Literal["random", "grid", "optuna"] = "random"
    """Where trials come from: drawn independently; all combinations, of a range five values; or by Optuna's TPE
    (Tree-structured Parzen Estimator), which learns from the trials that are there."""
    early_stopping: Literal["asha", "none"] = "asha"
    """Whether trials that are behind the others at the same number of samples are stopped: ASHA (asynchronous
    successive halving), which goes by scores made while training (evaluate.every_samples)."""
    reduction: int = 3
    """One of so many trials is let go on at each of ASHA's comparisons."""
    grace_samples: int = 0
    """Samples of a trial before ASHA's first comparison; each next one is at `reduction` times as many. 0 makes it two
    comparisons before the end."""
    metric: str = "val_MRR"
    """Score that decides: any of the evaluation's, such as "val_R@10/text->audio" or "val_accuracy/genre by audio";
    without the part after the slash, the mean over all (of retrieval, from and to text). Greater is better, of
    val_median_rank less."""
    concurrent: int = 0
    """Most trials that run at a time; 0 means as many as there is room for."""

    def __post_init__(self) -> None:
        require(self.trials >= 1, "trials must be at least 1")
        require(self.reduction >= 2, "reduction must be at least 2: one of so many trials goes on")
        require(self.grace_samples >= 0, "grace_samples must not be negative")
        require(self.concurrent >= 0, "concurrent must not be negative")
