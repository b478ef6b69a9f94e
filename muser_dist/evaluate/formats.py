"""Values out of a run's files as text for people; whatever they turn out to be, there is a text for it."""

import math
from collections.abc import Sequence
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


def interval(value: Any) -> str:
    """[low, high] as text; a dash where it is none."""
    ends = value if isinstance(value, (list, tuple)) and len(value) == 2 else (None, None)
    return " to ".join(f"{number(end):.3f}" for end in ends) if all(map(math.isfinite, map(number, ends))) else "–"


def share(value: Any) -> str:
    """A score from 0 to 1 for a terminal: three digits after the point."""
    x = number(value)
    return f"{x:.3f}" if math.isfinite(x) else "–"


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table for a terminal: the first column to the left, the others to the right; none without rows."""
    if not rows:
        return []
    lines = [columns, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    return [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
