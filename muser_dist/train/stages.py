"""The stages of a recipe, one run after the other."""

from collections.abc import Sequence
from pathlib import Path

from muser_dist.config import RunConfig
from muser_dist.data.storage import Storage
from muser_dist.errors import ScoringError
from muser_dist.train.launch import pretrain
from muser_dist.train.loop import MODEL
from muser_dist.train.preflight import check_settings, find_shards


def pretrain_stages(runs: Sequence[RunConfig], command: list[str]) -> Path:
    """Runs the stages of a recipe, each of which starts from the one before; those that are trained already, not again.

    Args:
        runs: of `Stages.chained`; what can be checked of all of them is checked before the first starts.
        command: as of `pretrain`.

    Returns:
        the folder of all stages; in it, `model` is the last one's.

    Raises:
        ScoringError: all are trained, and the last one's model cannot be scored.
        MuserError: as `pretrain`.
    """
    for config in runs:
        check_settings(config)
        find_shards(config, Storage.of(config.data))
    unscored: ScoringError | None = None
    for number, config in enumerate(runs, 1):
        print(f"\n=== Stage {number} of {len(runs)}: {config.name} ===", flush=True)
        try:
            pretrain(config, command, runs[number:])
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
