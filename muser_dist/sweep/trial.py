"""One trial: a whole run, and what it tells Ray Tune meanwhile. This is what runs in a trial's actor."""

import json
from threading import Thread
from typing import Any

from ray import tune

from muser_dist.config import RunConfig, from_dict
from muser_dist.errors import MuserError
from muser_dist.evaluate.validation import flat_scores
from muser_dist.files import write_whole
from muser_dist.train.launch import EVALUATION, pretrain
from muser_dist.train.runlog import EVENTS, read_lines

ERROR = "error.txt"
"""File in a trial's folder that says why it failed or diverged."""

_LOOK_SECONDS = 1.0


def run_trial(settings: dict[str, Any], metric: str, command: list[str]) -> None:
    """Trains and scores a run, or goes on with it; reports every score of `metric`.

    The run's workers are Ray Train's own. This actor waits for them, and reads in the run's files what they write; it
    ends with them, and they with it: Ray ends what belongs to an actor that is gone.

    Args:
        settings: {"number": of the trial, "config": its RunConfig as JSON}.
        metric: the score that decides.
        command: for the run's run.json.

    Raises:
        MuserError: the run failed or diverged, or has no such score.
    """
    config = from_dict(json.loads(settings["config"]), "the trial's config")
    try:
        if not (config.folder / EVALUATION).exists():
            _train(config, metric, command)
        scores = _scores(config, metric)
    except Exception as error:
        # For the driver, which Ray Tune tells a traceback of its own.
        config.folder.mkdir(parents=True, exist_ok=True)
        write_whole(config.folder / ERROR, str(error) if isinstance(error, MuserError) else repr(error))
        raise
    _report(config.train.steps * config.train.global_batch, scores, metric, finished=True)


def _scores(config: RunConfig, metric: str) -> dict[str, float]:
    """The scores of the trained model.

    Raises:
        MuserError: the one that decides is not among them.
    """
    evaluation = json.loads((config.folder / EVALUATION).read_text())
    scores = flat_scores(evaluation)
    if metric not in scores:
        skipped = "; ".join(f"{field}: {reason}" for field, reason in evaluation["skipped_fields"].items())
        raise MuserError(f"metric: the validation data give no {metric}{f' ({skipped})' if skipped else ''}")
    return scores


def _train(config: RunConfig, metric: str, command: list[str]) -> None:
    failed: list[BaseException] = []

    def run() -> None:
        try:
            pretrain(config, command)
        except BaseException as error:
            failed.append(error)

    training = Thread(target=run, daemon=True)
    training.start()
    told = 0
    while training.is_alive():
        training.join(_LOOK_SECONDS)
        for event in read_lines(config.folder / EVENTS):
            # Scores come in order, but for a start from an earlier checkpoint, which makes some again.
            if event["event"] == "validation" and metric in event and event["step"] > told:
                told = event["step"]
                scores = {name: value for name, value in event.items() if name.startswith("val_")}
                _report(told * config.train.global_batch, scores, metric, finished=False)
    if failed:
        raise failed[0]


def _report(samples: int, scores: dict[str, float], metric: str, finished: bool) -> None:
    # As text: Ray Tune takes names with slashes apart.
    tune.report({"samples": samples, "score": scores[metric], "scores": json.dumps(scores), "finished": finished})
