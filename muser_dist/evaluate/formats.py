"""Values out of a run's files as text for people; whatever they turn out to be, there is a text for it."""

import math
from typing import Any


def number(value: Any) -> float:
    """The value as a float; NaN where it is no number."""
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else math.nan


def amount(value: Any) -> str:
    """A count or a measured value, for people: thin spaces between thousands, three digits of a fraction."""
    x = number(value)
    if not math.isfinite(x):
        return "–" if value is None else "not finite" if isinstance(value, float) else str(value)
    if x == int(x) or abs(x) >= 1000:
        return f"{round(x):,}".replace(",", "\u202f")
    return f"{x:.3g}"


def percent(value: Any) -> str:
    x = number(value)
    if not math.isfinite(x):
        return amount(value)
    return f"{100 * x:.{1 if x >= 0.01 or x == 0 else 2}f}\u202f%"


def fraction(value: Any) -> float:
    """A number from 0 to 1 for style sheets."""
    x = number(value)
    return round(min(1.0, max(0.0, x)), 4) if math.isfinite(x) else 0.0
