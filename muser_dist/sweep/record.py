"""What a sweep writes down: `sweep.json`, from which it goes on after its driver has died.

Ray Tune's own record is made of pickles, and knows nothing of what a stopped comparison was based on; this one is
JSON, is all that is read when a sweep goes on, and the source of its page.
"""

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from muser_dist.errors import CheckpointError
from muser_dist.files import write_whole
from muser_dist.sweep.space import Overrides

RECORD = "sweep.json"

State = Literal["waiting", "running", "finished", "stopped", "diverged", "failed"]
OVER: tuple[State, ...] = ("finished", "stopped", "diverged")
"""States in which a trial is not tried again; one that failed is, when the same command is given again."""


@dataclass
class Trial:
    """A trial: a run of the recipe with other values of some fields.

    Attributes:
        number: from 0 on; its run's folder is trials/<number>.
        overrides: the other values, by dotted field.
        state: "stopped" is by early stopping.
        curve: (samples, the sweep's score) of the model while it trained, and at its end.
        scores: all scores, by name, of the trained model, or the last before it was stopped.
        seconds: of its attempts, but for those whose driver died.
        error: why it diverged or failed.
    """

    number: int
    overrides: Overrides
    state: State = "waiting"
    curve: list[tuple[int, float]] = field(default_factory=list)
    scores: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    error: str | None = None

    @property
    def name(self) -> str:
        """Name of its run's folder."""
        return f"{self.number:03d}"


class Record:
    """A sweep's trials, kept in its folder.

    Args:
        folder: the sweep's.
        definition: what makes it this sweep and no other: JSON values.
        lower: whether the least score is the best.

    Raises:
        CheckpointError: the folder holds another sweep.
    """

    def __init__(self, folder: Path, definition: dict[str, Any], lower: bool) -> None:
        self.folder, self.definition, self.lower = folder, definition, lower
        self.trials: list[Trial] = []
        self.load()

    def load(self) -> None:
        """Reads what the folder holds, if there is something.

        Raises:
            CheckpointError: it is another sweep.
        """
        folder, definition, path = self.folder, self.definition, self.folder / RECORD
        if not path.exists():
            return
        try:
            there = json.loads(path.read_text())
            trials = [Trial(**trial) for trial in there["trials"]]
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{path} is broken ({error}); delete {folder}, or give another --name") from None
        if differing := [name for name in definition if there.get(name) != definition[name]]:
            raise CheckpointError(
                f"{folder} holds another sweep (another {', '.join(differing)}); give another --name, or delete it"
            )
        self.trials = trials

    def add(self, overrides: Overrides) -> Trial:
        """A new trial."""
        trial = Trial(len(self.trials), overrides)
        self.trials.append(trial)
        return trial

    def save(self) -> None:
        """Writes everything down."""
        self.folder.mkdir(parents=True, exist_ok=True)
        content = self.definition | {"trials": [asdict(trial) for trial in self.trials]}
        write_whole(self.folder / RECORD, json.dumps(content, indent=1))

    def ranked(self) -> list[Trial]:
        """The finished trials, the best first; a score that is not finite counts as none."""
        finished = [trial for trial in self.trials if trial.state == "finished" and math.isfinite(trial.curve[-1][1])]
        return sorted(finished, key=lambda trial: trial.curve[-1][1] * (1 if self.lower else -1))
