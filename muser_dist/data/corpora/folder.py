"""A folder of music without a table: notation or audio, by the names of the files.

    tunes/irish/jig.abc     files of a folder that share a name up to the extension are one track,
    tunes/irish/jig.mid     such as a score with its MIDI or its recording;
    tunes/irish/jig.json    one of them may be an object with the track's fields
    tunes/oneill.abc        a book: each of its tunes (X:) is a track

Of a book, what stands before the first tune says nothing of one; its .json has fields of all.
"""

import json
import os
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

from muser_dist.data.corpora.table import hash_share
from muser_dist.data.corpora.writer import EXTENSIONS, Track
from muser_dist.errors import DataError
from muser_dist.files import files_in

TEMPLATES = ("{title}",)


def read_folder(root: Path, val_share: float = 0.0) -> list[Track]:
    """A track for each name, and for each tune of a book. Fields are those of the .json, and `title`: by default the
    file's name, or of a tune in a book its first T:.

    Args:
        root: folder of the files, those of the folders in it too.
        val_share: share of the tracks that goes to "val", by a hash of the path.

    Raises:
        DataError: there is no such folder, or no file of a known extension in it, or one in it cannot be listed.
    """
    of_names: dict[str, list[Path]] = defaultdict(list)
    for path in map(Path, files_in(root)):
        if path.suffix[1:].lower() in EXTENSIONS:
            of_names[os.path.splitext(os.path.relpath(path, root))[0]].append(path)
    if not of_names:
        raise DataError(f"{root}: there is no file with an extension of music ({', '.join(sorted(EXTENSIONS))})")
    tracks = []
    for name, files in sorted(of_names.items()):
        metadata, problem = _metadata(root / f"{name}.json")
        titled = {"title": os.path.basename(name)} | metadata
        tunes = {file: _tunes(file) for file in files}
        for book in [file for file in files if len(tunes[file]) > 1]:
            files.remove(book)
            for number, tune in enumerate(tunes[book], start=1):
                key = f"{name}-{number:05d}"
                split = "val" if hash_share(key) < val_share else "train"
                place = book / f"{number}.abc"  # no file of its own: the name says where it lies
                tracks.append(Track(key, place, titled | _title(tune), split, problem, content=tune))
        if files:
            first, *further = sorted(files)
            split = "val" if hash_share(name) < val_share else "train"
            tracks.append(Track(name, first, titled, split, problem, tuple(further)))
    return tracks


def _tunes(file: Path) -> list[bytes]:
    """The tunes of a file of ABC; none of what is no ABC or cannot be read."""
    if file.suffix.lower() != ".abc":
        return []
    try:
        content = file.read_bytes()
    except OSError:  # whoever writes it says so
        return []
    return [part for part in re.split(rb"^(?=X:)", content, flags=re.MULTILINE) if part.startswith(b"X:")]


def _title(tune: bytes) -> dict[str, str]:
    """The tune's own title, if it has one."""
    match = re.search(rb"^T:[ \t]*([^\r\n]+)", tune, re.MULTILINE)
    return {"title": match[1].decode(errors="replace").strip()} if match else {}


def _metadata(path: Path) -> tuple[dict[str, Any], str | None]:
    """The fields in a file, if there is one, and what is wrong with it."""
    if not path.exists():
        return {}, None
    try:
        values = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        return {}, f"{path.name}: cannot be read: {error}"
    return (values, None) if isinstance(values, dict) else ({}, f"{path.name}: is no JSON object")
