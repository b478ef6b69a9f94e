"""JSON lines of published corpora: objects, lines that are none, and the paths that they name.

A corpus of a hundred thousand lines has broken ones, and what others wrote may name any path: both cost their line, and
are told.
"""

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from muser_dist.data.corpora.table import hash_share, path_from
from muser_dist.data.corpora.writer import Track
from muser_dist.errors import DataError


@dataclass(frozen=True)
class Line:
    """A line of a file: its number, counted from 1, and its object; or what is wrong with it."""

    number: int
    values: dict[str, Any]
    problem: str | None = None


def read_lines(path: Path, corpus: str) -> Iterator[Line]:
    """Yields the lines of a file that are not empty.

    Args:
        path: JSON lines in UTF-8, one object each; or one array of objects, which count as lines.
        corpus: whose layout has this file, for errors.

    Raises:
        DataError: the file cannot be read, or is an array that is broken.
    """
    try:
        with path.open("rb") as file:
            if file.read(64).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
                file.seek(0)
                yield from _entries(file.read(), path)
                return
            file.seek(0)
            for number, line in enumerate(file, start=1):
                text = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
                if text.strip():
                    yield _line(number, text)
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); the layout is that of {corpus}") from None


def _entries(content: bytes, path: Path) -> Iterator[Line]:
    try:
        entries = json.loads(content.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: broken JSON: {error}; give JSON lines, or one array of objects") from None
    for number, entry in enumerate(entries, start=1):
        yield _checked(number, entry)


def _line(number: int, text: bytes) -> Line:
    try:
        return _checked(number, json.loads(text))
    except (ValueError, RecursionError) as error:  # ValueError also for what is no UTF-8
        return Line(number, {}, f"broken JSON: {error}")


def _checked(number: int, entry: Any) -> Line:
    return Line(number, entry) if isinstance(entry, dict) else Line(number, {}, "is no JSON object")


def fields_of(values: dict[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """Those of the named fields that say something."""
    return {name: values[name] for name in names if values.get(name) not in (None, "", [], {})}


def track_of(
    line: Line, source: Path, root: Path, paths: Any, metadata: dict[str, Any], split: str, val_share: float
) -> Track:
    """The track that a line stands for.

    Args:
        line: the line; what is wrong with it is the track's problem.
        source: the file that the line is in.
        root: folder that paths start from, and may not leave.
        paths: of its files, a str or a list of them; of what a line says, anything may be there.
        metadata: its fields.
        split: its split; of "train", a share is drawn for validation.
        val_share: that share, by a hash of the first path.
    """
    root = Path(os.path.abspath(root))
    listed = paths if isinstance(paths, list) else [paths]
    named = bool(listed) and all(isinstance(path, str) and path.strip() for path in listed)
    files = [path_from(root, path) for path in listed] if named else []
    outside = [path for path, file in zip(listed, files, strict=False) if not file.is_relative_to(root)]
    problem = line.problem
    if problem is None and not named:
        problem = f"names no file, but {json.dumps(paths)[:80]}"
    elif problem is None and outside:
        problem = f"{outside[0]!r} lies outside the folder {root}"
    if problem is not None:
        return Track(f"line {line.number}", source, {}, split, f"line {line.number}: {problem}")
    key = os.path.splitext(os.path.relpath(files[0], root))[0]
    if split == "train" and hash_share(key) < val_share:
        split = "val"
    return Track(key, files[0], metadata, split, None, tuple(files[1:]))
