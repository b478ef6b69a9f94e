"""The folder of each node that caches lie in: of remote shards, and of decoded clips."""

import os
import re
import tempfile
import time
from pathlib import Path

from muser_dist.data.config import DataConfig

LOCKS = 256
"""Lock files of a cache: of entries whose names fall on the same one, one is made at a time."""

# Names that caches give: a SHA-256, and of a clip's part its writer. A user's own files in the folder stay.
_ENTRY = re.compile(r"[0-9a-f]{64}(-\d+)?\.(tar|clip|part)")

# Seconds without a new byte after which no process is writing a part any more.
_ABANDONED = 3600.0


def cache_folder(config: DataConfig) -> Path:
    """data.cache_folder, or one of the user's own in the temporary folder."""
    user = os.getuid() if hasattr(os, "getuid") else "user"
    return Path(config.cache_folder or f"{tempfile.gettempdir()}/muser-cache-{user}").absolute()


def make_room(folder: Path, most_bytes: int, size: int = 0, keep: Path | None = None) -> None:
    """Removes the files that were not used for longest, until `size` bytes more fit.

    Args:
        folder: whose entries count, but for parts that are still being written; other files are left alone.
        most_bytes: that all of them may take.
        size: of what is to come.
        keep: one that stays.
    """
    files = []
    for file in folder.iterdir():
        if not _ENTRY.fullmatch(file.name):
            continue
        try:
            stat = file.stat()
            files.append((stat.st_mtime, stat.st_size, file))
        except FileNotFoundError:  # another process made room
            continue
    total = sum(length for _, length, _ in files) + size
    for used, length, file in sorted(files):
        if total <= most_bytes:
            break
        if file == keep or (file.suffix == ".part" and time.time() - used < _ABANDONED):
            continue
        file.unlink(missing_ok=True)  # who reads it just now goes on reading
        total -= length
