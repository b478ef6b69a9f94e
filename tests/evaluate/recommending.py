"""Small logs for the tests of recommendation."""

from typing import Any

import numpy as np
import pyarrow as pa

from muser_dist.evaluate.recommend import Interactions

Event = tuple[str, str, int | None, str, bool]
"""User, item, time, signal, and whether it is of validation."""


def log_of(events: list[Event]) -> tuple[pa.Table, np.ndarray]:
    """A log and its split."""
    user, item, time, signal, validation = zip(*events, strict=True) if events else ((),) * 5
    columns: dict[str, Any] = {
        "user": pa.array(user, pa.string()),
        "item": pa.array(item, pa.string()),
        "time": pa.array(time, pa.int64()),
        "signal": pa.array(signal, pa.string()),
        "value": pa.array(np.ones(len(events)), pa.float32()),
    }
    return pa.table(columns), np.array(validation, bool)


def drawn(seed: int, users: int = 30, items: int = 40, events: int = 900) -> tuple[list[Event], list[str], set[str]]:
    """Random events, the catalogue, and its cold items, which have none in training."""
    rng = np.random.default_rng(seed)
    names = [f"i{i:03d}" for i in range(items)]
    cold = {name for name in names if rng.random() < 0.3}
    made: list[Event] = []
    for _ in range(events):
        item = names[min(int(rng.exponential(items / 3)), items - 1)]
        validation = item in cold or rng.random() < 0.3
        kind = ("play", "like", "skip")[rng.choice(3, p=[0.6, 0.2, 0.2])]
        made.append((f"u{rng.integers(users):02d}", item, int(rng.integers(1000)), kind, validation))
    return made, names, cold


def interactions(seed: int, **sizes: int) -> Interactions:
    """The interactions of a random log."""
    events, names, cold = drawn(seed, **sizes)
    return Interactions.of(*log_of(events), names, cold)
