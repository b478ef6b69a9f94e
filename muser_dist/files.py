"""Files that are either whole or not there: a run may die while it writes."""

from pathlib import Path


def write_whole(path: Path, content: str | bytes) -> None:
    """Writes a file beside its place and moves it there; what was there before is replaced."""
    temporary = path.with_name(f".{path.name}.part")
    temporary.write_bytes(content.encode() if isinstance(content, str) else content)
    temporary.replace(path)
