"""The stages of a recipe, one run after the other."""

from collections.abc import Sequence
from pathlib import Path

from muser_dist.config import RunConfig
from muser_dist.errors import ScoringError
from muser_dist.models.weights import report_weights
from muser_dist.train.launch import prepare, tell_weights
from muser_dist.train.loop import MODEL


def pretrain_stages(runs: Sequence[RunConfig], command: list[str]) -> Path:
    """Runs the stages of a recipe, each of which starts from the one before; those that are trained already, not again.

    Args:
        runs: of `Stages.chained`; all are prepared before the first starts, which may take days.
        command: as of `pretrain`.

    Returns:
        the folder of all stages; in it, `model` is the last one's.

    Raises:
        ScoringError: all are trained, and the last one's model cannot be scored.
        MuserError: as `pretrain`.
    """
    prepared = []
    for number, config in enumerate(runs):  # in order: paths to a stage become absolute once its folder is there
        print(f"Preparing stage {config.name}", flush=True)
        prepared.append(prepare(config, command, runs[number - 1] if number else None))
    unscored: ScoringError | None = None
    for number, run in enumerate(prepared, 1):
        print(f"\n=== Stage {number} of {len(runs)}: {run.config.name} ===", flush=True)
        if number > 1:
            tell_weights(run.config, report_weights(run.config))  # now those of the stage before are there
        try:
            run.carry_out(later=runs[number:])
            unscored = None
        except ScoringError as error:  # the next stage needs the model alone
            unscored = error
            if number < len(runs):
                print(f"Warning: {error}", flush=True)
    folder = Path(runs[-1].storage)
    link = folder / MODEL
    link.unlink(missing_ok=True)
    link.symlink_to(Path(runs[-1].name) / MODEL)
    if unscored is not None:
        raise unscored
    return folder
