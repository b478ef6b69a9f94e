"""Which interactions are held out: by time, by user, and by item.

Each of an interaction's time, user and item belongs to train, val or test, and the interaction belongs to the latest of
the three. So no user and no item of val or test is in train at all: held-out items are cold. And nothing of val's or
test's time is in train, nothing of test's in val.

A pair belongs to the later split of its two interactions, and the pairs of a split are mined from its own interactions
and earlier ones only. So training pairs are the same as if held-out interactions had never been logged.
"""

import re
from dataclasses import dataclass
from datetime import UTC, datetime

import numpy as np

from muser_dist.data.config import Strict
from muser_dist.errors import ConfigError, require
from muser_dist.interactions.ids import hash_name, mix
from muser_dist.interactions.rows import EARLIEST

SPLITS = ("train", "val", "test")
"""Splits by number."""


@dataclass(frozen=True)
class SplitConfig(Strict):
    val_users: float = 0.0
    """Share of the users held out for validation, by a hash of seed and user: none moves when others join."""
    test_users: float = 0.0
    """Share of the users held out for the test."""
    val_items: float = 0.0
    """Share of the items held out for validation: cold items, of which training has no interaction at all."""
    test_items: float = 0.0
    """Share of the items held out for the test."""
    val_from: str = ""
    """What happened from then on is held out for validation: YYYY-MM-DD, YYYYMMDD, YYYY-MM-DDTHH:MM:SS (UTC), or a
    number in the log's seconds. Empty: time holds nothing out."""
    test_from: str = ""
    """What happened from then on is held out for the test."""
    seed: int = 0
    """Draws users and items."""

    def __post_init__(self) -> None:
        for kind in ("users", "items"):
            val, test = getattr(self, f"val_{kind}"), getattr(self, f"test_{kind}")
            require(
                val >= 0 and test >= 0 and val + test < 1,
                f"split.val_{kind} is {val} and split.test_{kind} is {test}; they are shares, and some must be left",
            )
        require(self.seed >= 0, f"split.seed is {self.seed}; it must not be negative")
        val_from, test_from = seconds(self.val_from, "split.val_from"), seconds(self.test_from, "split.test_from")
        require(
            val_from is None or test_from is None or val_from < test_from,
            f"split.val_from ({self.val_from}) must be before split.test_from ({self.test_from})",
        )

    @property
    def by_time(self) -> bool:
        """Whether time holds anything out."""
        return bool(self.val_from or self.test_from)

    @property
    def levels(self) -> tuple[int, ...]:
        """Numbers of the splits that there are."""
        val = self.val_users or self.val_items or self.val_from
        test = self.test_users or self.test_items or self.test_from
        return (0, *([1] if val else []), *([2] if test else []))

    def check_times(self, relative: bool, latest: int | None) -> None:
        """Raises ConfigError where no time of the log can be what `val_from` or `test_from` says.

        Args:
            relative: whether the log's times count from a beginning of its own.
            latest: a time beyond this, in seconds, is in the future; None: none is.
        """
        for option, when in (("split.val_from", self.val_from), ("split.test_from", self.test_from)):
            at = seconds(when, option)
            if at is None:
                continue
            if relative:
                require(
                    _date(when) is None,
                    f"{option}: {when!r} is a date, and the log's times count from a beginning of its own; give "
                    "seconds (with a 0 before eight digits that look like a date)",
                )
                continue
            require(
                at >= EARLIEST,
                f"{option}: {when!r} is before 1990, and no time of a log is; give a date such as 2009-01-31, or "
                "seconds since 1970",
            )
            require(
                latest is None or at <= latest,
                f"{option}: {when!r} is in the future, and would hold nothing out; give a date such as 2009-01-31, or "
                "seconds since 1970 (not milliseconds)",
            )


def seconds(when: str, option: str) -> int | None:
    """Seconds since 1970, or since the log's beginning, that an option says; None where it is empty.

    Raises:
        ConfigError: it is neither a date nor a number.
    """
    if not when:
        return None
    if (date := _date(when)) is not None:
        return int((date if date.tzinfo else date.replace(tzinfo=UTC)).timestamp())
    if when.removeprefix("-").isdecimal():
        return int(when)
    raise ConfigError(f"{option}: {when!r} is neither a date such as 2009-01-31 nor a number of seconds")


def _date(when: str) -> datetime | None:
    """The date that an option says; None where it is something else, such as a number."""
    if when.isdecimal() and not re.fullmatch(r"(19|20)\d{6}", when):
        return None
    try:
        return datetime.fromisoformat(when)
    except ValueError:
        return None


def of_users(split: SplitConfig, users: np.ndarray) -> np.ndarray:
    """The split of each user, of numbers as of `ids.hash_names`: (n,) int8."""
    return _drawn(users, split.val_users, split.test_users, f"{split.seed} user")


def of_items(split: SplitConfig, items: np.ndarray) -> np.ndarray:
    """The split of each item, of numbers as of `ids.hash_names`: (n,) int8; those beyond 0 are cold."""
    return _drawn(items, split.val_items, split.test_items, f"{split.seed} item")


def of_times(split: SplitConfig, times: np.ndarray) -> np.ndarray:
    """The split of each time, (n,) int64 in seconds: (n,) int8."""
    levels = np.zeros(len(times), np.int8)
    for level, when in ((1, seconds(split.val_from, "val_from")), (2, seconds(split.test_from, "test_from"))):
        if when is not None:
            levels[times >= when] = level
    return levels


def of_interactions(split: SplitConfig, users: np.ndarray, items: np.ndarray, times: np.ndarray) -> np.ndarray:
    """The split of each interaction, as number in `SPLITS`: the latest of its user's, its item's and its time's.

    Args:
        split: what is held out.
        users: (n,) uint64, of `ids.hash_names`.
        items: (n,) uint64, of `ids.hash_names`.
        times: (n,) int64, seconds; not looked at where time holds nothing out.

    Returns:
        (n,) int8.
    """
    levels = np.maximum(of_users(split, users), of_items(split, items))
    return np.maximum(levels, of_times(split, times)) if split.by_time else levels


def _drawn(numbers: np.ndarray, val: float, test: float, key: str) -> np.ndarray:
    uniform = mix(numbers, hash_name(key)) / 2.0**64
    return np.where(uniform < test, 2, np.where(uniform < test + val, 1, 0)).astype(np.int8)
