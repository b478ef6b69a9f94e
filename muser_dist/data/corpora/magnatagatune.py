"""MagnaTagATune (Law et al. 2009): 25,863 clips of 29 seconds with tags from a game.

    ROOT/annotations_final.csv    tabs, quotes: clip_id, 188 tags as 0 or 1, mp3_path
    ROOT/clip_info_final.csv      optional: title, artist and album by clip_id
    ROOT/f/american_bach_soloists-j_s__bach_solo_cantatas-01-bwv54__i_aria-59-88.mp3

As in most published results, the 50 most frequent tags count, clips without any of them are left
out, and the folder decides the split: 0 to b train, c val, d to f test.
"""

from collections import Counter
from pathlib import Path
from typing import Any

from muser_dist.data.corpora.table import cells, named, require
from muser_dist.data.corpora.writer import Track

CORPUS = "MagnaTagATune"
TEMPLATES = ("A song with {tags}", "{tags}", "{title}, by {artist}")
TOP_TAGS = 50
SPLITS = {folder: "train" for folder in "0123456789ab"} | {"c": "val"} | {folder: "test" for folder in "def"}


def read_magnatagatune(root: Path) -> list[Track]:
    """A track for each clip; those without a frequent tag have a problem. Fields: tags, title, artist, album.

    Args:
        root: folder with annotations_final.csv and the sixteen folders of clips.

    Raises:
        DataError: a file is missing or not in the original layout.
    """
    info = _read_info(root / "clip_info_final.csv")
    rows = []
    counts: Counter[str] = Counter()
    for place, row in named(cells(root / "annotations_final.csv", CORPUS, "\t")):
        require(row, ("clip_id", "mp3_path"), place, CORPUS)
        clip, path = row.pop("clip_id"), row.pop("mp3_path")
        tags = [tag for tag, marked in row.items() if marked == "1"]
        counts.update(tags)
        rows.append((clip, path, tags))
    frequent = {tag for tag, _ in counts.most_common(TOP_TAGS)}
    tracks = []
    for clip, path, tags in rows:
        own = [tag for tag in tags if tag in frequent]
        split = SPLITS.get(path.partition("/")[0], "")
        problem = None
        if not split:
            problem = f"the path {path!r} does not begin with a folder from 0 to f"
        elif not own:
            problem = f"has none of the {TOP_TAGS} most frequent tags"
        metadata: dict[str, Any] = {"tags": own, **info.get(clip, {})}
        tracks.append(Track(clip, root / path, metadata, split, problem))
    return tracks


def _read_info(path: Path) -> dict[str, dict[str, str]]:
    """Title, artist and album by clip_id; nothing when there is no such file."""
    info = {}
    for place, row in named(cells(path, CORPUS, "\t")) if path.exists() else ():
        require(row, ("clip_id", "title", "artist", "album"), place, CORPUS)
        info[row["clip_id"]] = {name: row[name] for name in ("title", "artist", "album") if row[name]}
    return info
