"""What is measured while a run trains. Every rank has a watch, and calls it when the others do; rank 0 writes."""

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from muser_dist.config import RunConfig
from muser_dist.data.chunks import Chunk
from muser_dist.errors import StopTraining
from muser_dist.objectives.batch import Loss, Objective, global_metrics
from muser_dist.objectives.collectives import world
from muser_dist.train.accounting import Accounting
from muser_dist.train.dealer import decoding_slots
from muser_dist.train.engine import DeepSpeedEngine
from muser_dist.train.health import batch_health
from muser_dist.train.optimizer import lr_factor
from muser_dist.train.runlog import RunLog
from muser_dist.train.step import Step
from muser_dist.train.stopwatch import Stopwatch
from muser_dist.train.trackers import trackers_of

_JUDGED_ROWS, _KEPT_REASONS = 1_000, 100


class Watch:
    """Accounts, times and the health of a run.

    Args:
        config: the run.
        device: of this worker.
        log: writes lines down; None on ranks other than 0.
        step: optimizer steps done.
        totals: the accounting of rows up to there.
        seconds: of training up to there.

    Attributes:
        stopwatch: where this worker's time goes.
        accounting: every row that the run was dealt.
        seconds: of training up to the last line.
    """

    def __init__(
        self,
        config: RunConfig,
        device: torch.device,
        log: RunLog | None,
        step: int,
        totals: dict[str, Any] | None,
        seconds: float,
    ) -> None:
        self._config, self._log = config, log
        self.accounting = Accounting(config.taking_part, totals)
        self.stopwatch = Stopwatch(device)
        self.seconds = seconds
        self._trackers = trackers_of(config.train.trackers, config, step) if log else None
        self._logged_step = step
        self._slots = decoding_slots(config, world()[1])
        self._reasons: Counter[str] = Counter()
        self._losses: list[float] = []  # since the last checkpoint
        self._saving = 0.0

    def timed(self, objective: Objective) -> Objective:
        """The objective, told apart from what comes before: its first collective is where ranks wait for each other."""

        def arriving(*arguments: Any) -> Loss:
            self.stopwatch.arrive()
            return objective(*arguments)

        return arriving

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Counts the block as time in which training stood still for a checkpoint."""
        start = time.perf_counter()
        yield
        self._saving += time.perf_counter() - start

    def trained_on(self, chunks: list[Chunk]) -> None:
        """Counts the chunks of a step that is done."""
        self.stopwatch.leave()
        for chunk in chunks:
            self.accounting.add(chunk)

    def line(self, done: int, made: Step, engine: DeepSpeedEngine) -> dict[str, Any]:
        """Writes a line of metrics and what was quarantined since the last one.

        Args:
            done: optimizer steps done.
            made: the last of them.
            engine: that made it.

        Returns:
            the line.

        Raises:
            StopTraining: too few rows can be used.
        """
        train, objective, pairs = self._config.train, self._config.objective, self._config.objective.pairs
        samples = done * train.global_batch
        problems = self.accounting.flush()
        if self._log:
            self._log.quarantine(problems)
        self._reasons.update(problem["reason"] for problem in problems if problem["row"] is not None)
        # Some name a file: there is no end of those.
        self._reasons = Counter(dict(self._reasons.most_common(_KEPT_REASONS)))
        check_share(self.accounting.totals, self._reasons, self._config.data.max_bad_share)

        line: dict[str, Any] = {"step": done, "samples": samples, **global_metrics(made.loss)}
        self._losses.append(line["loss"])
        line["grad_norm"] = engine.grad_norm()
        line |= {f"grad_norm/{part}": norm for part, norm in engine.grad_norms().items()}
        for p, pair in enumerate(pairs):
            line[f"temperature/{pair.first}-{pair.second}"] = 1.0 / made.logits.scale[p].item()
            if made.logits.bias is not None:
                line[f"bias/{pair.first}-{pair.second}"] = made.logits.bias[p].item()
        # Of masked patches a tower gives sums, which are no embeddings.
        line |= batch_health(made.features if objective.embeds else {}, made.batch, pairs)
        line |= {"lr": train.lr * lr_factor(samples, train), **self.accounting.totals}
        line |= self.stopwatch.lap((done - self._logged_step) * train.global_batch)
        line["decode_ms_per_row"] = self.accounting.decode_ms_per_row()
        line |= self.accounting.clips() if self._config.data.keep_clips else {}
        line["decode_slots"] = self._slots
        line["checkpoint_seconds"] = round(self._saving, 3)
        self.seconds += line["seconds"]
        self._logged_step, self._saving = done, 0.0
        if self._log and self._trackers:
            self._log.metrics(line)
            self._trackers.metrics(line, done)
        return line

    def scores(self, step: int, scores: dict[str, float]) -> None:
        """Writes down how an earlier state of the model scores; on rank 0."""
        if self._log and self._trackers:
            self._log.event("validation", step, **scores)
            self._trackers.scores(scores, step)

    def checkpoint(self, done: int) -> float:
        """Writes the accounts since the last checkpoint; returns the mean loss since then."""
        accounts = self.accounting.accounts()
        if self._log:
            self._log.accounts(done, accounts)
        mean = sum(self._losses) / len(self._losses)
        self._losses = []
        return mean

    def close(self) -> None:
        """Closes what rank 0 writes to."""
        if self._log and self._trackers:
            self._trackers.close()
            self._log.close()


def check_share(totals: dict[str, Any], reasons: Counter[str], most: float) -> None:
    """Raises StopTraining when too many of the rows read so far are quarantined."""
    read, bad = totals["rows_read"], totals["rows_quarantined"]
    if bad == read or (read >= _JUDGED_ROWS and bad > most * read):
        reason, count = next(iter(reasons.most_common(1)), ("?", 0))
        what = "none" if bad == read else f"{read - bad:,}"
        raise StopTraining(
            f"{what} of the first {read:,} rows of training can be used; the most frequent reason ({count:,} times): "
            f"{reason}. quarantine.jsonl names them all. Mend the data, or raise --data.max-bad-share ({most:g})"
        )
