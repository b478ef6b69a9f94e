"""FMA (Defferrard et al. 2017): the Free Music Archive with genres in a hierarchy, and tags.

    ROOT/fma_metadata/tracks.csv, genres.csv
    ROOT/fma_small/000/000002.mp3    or fma_medium, fma_large, fma_full

tracks.csv has two lines of column names, (set, split) and so on, and a third that names the index.
"""

import ast
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from muser_dist.data.corpora.table import SPLITS, cells, named, require
from muser_dist.data.corpora.writer import Track
from muser_dist.errors import DataError

CORPUS = "fma_metadata of the FMA dataset"
TEMPLATES = ("A {top_genre} song, of {genre}, a kind of {parent_genre}", "{tags}, {genre}", "{title}, by {artist}")

Subset = Literal["small", "medium", "large", "full"]

# The column (set, subset) names the smallest subset that has the track. The full one has the
# tracks of the large one, at their full length.
_WITHIN = {
    "small": {"small"},
    "medium": {"small", "medium"},
    "large": {"small", "medium", "large"},
    "full": {"small", "medium", "large", "full"},
}
_COLUMNS = {
    "title": "track.title",
    "artist": "artist.name",
    "album": "album.title",
    "language": "track.language_code",
}


def read_fma(root: Path, subset: Subset) -> list[Track]:
    """A track for each row of the subset.

    Its fields are title, artist, album, language, tags, genre (the genres it was filed under),
    parent_genre (the genres right above those) and top_genre (the roots above those).

    Args:
        root: folder with fma_metadata/ and fma_<subset>/.
        subset: small is part of medium, that of large; full has the tracks at full length.

    Raises:
        DataError: a file is missing or not in the original layout.
    """
    genres = _read_genres(root / "fma_metadata" / "genres.csv")
    tracks = []
    for place, row in named(_with_one_header(root / "fma_metadata" / "tracks.csv")):
        require(row, ("set.split", "set.subset", "track.genres", "track.tags", *_COLUMNS.values()), place, CORPUS)
        if row["set.subset"] not in _WITHIN[subset]:
            continue
        if not row["track_id"].isdecimal():
            raise DataError(f"{place}: the track_id {row['track_id']!r} is no number")
        number = f"{int(row['track_id']):06d}"
        own = [genre for genre in map(str, _list(row["track.genres"], place)) if genre in genres]
        metadata: dict[str, Any] = {field: row[column] for field, column in _COLUMNS.items()}
        metadata |= {
            "tags": _list(row["track.tags"], place),
            "genre": _titles(genres, own),
            "parent_genre": _titles(genres, (genres[genre]["parent"] for genre in own)),
            "top_genre": _titles(genres, (genres[genre]["top_level"] for genre in own)),
        }
        split = SPLITS.get(row["set.split"], "")
        problem = None if split else f"the split {row['set.split']!r} is none of training, validation, test"
        audio = root / f"fma_{subset}" / number[:3] / f"{number}.mp3"
        tracks.append(Track(number, audio, {k: v for k, v in metadata.items() if v}, split, problem))
    return tracks


def _with_one_header(path: Path) -> Iterable[tuple[str, list[str]]]:
    rows = iter(cells(path, CORPUS))
    (place, first), (_, second), (_, third) = (next(rows, (str(path), [""])) for _ in range(3))
    if third[0] != "track_id" or len(first) != len(second):
        raise DataError(f"{place}: the first three lines are not those of {CORPUS}")
    yield place, ["track_id", *(f"{upper}.{lower}" for upper, lower in zip(first[1:], second[1:], strict=True))]
    yield from rows


def _read_genres(path: Path) -> dict[str, dict[str, str]]:
    genres = {}
    for place, row in named(cells(path, CORPUS)):
        require(row, ("genre_id", "parent", "title", "top_level"), place, CORPUS)
        genres[row["genre_id"]] = row
    return genres


def _titles(genres: dict[str, dict[str, str]], wanted: Iterable[str]) -> list[str]:
    """Their titles, each once; 0, the parent of a root, has none."""
    return list(dict.fromkeys(genres[genre]["title"] for genre in wanted if genre in genres))


def _list(cell: str, place: str) -> list[Any]:
    """A list that was written as Python prints it; literals alone, nothing is evaluated."""
    try:
        value = ast.literal_eval(cell or "[]")
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        value = None
    if not isinstance(value, list):
        raise DataError(f"{place}: {cell[:80]!r} is no list as {CORPUS} writes them")
    return value
