"""MTG-Jamendo (Bogdanov et al. 2019): 55,000 whole tracks with genre, instrument and mood tags.

    METADATA/splits/split-0/autotagging-train.tsv, -validation.tsv, -test.tsv    (or METADATA/autotagging.tsv)
    METADATA/raw.meta.tsv    optional: names of track, artist and album
    AUDIO/48/948.mp3         or 948.low.mp3, as the smaller download calls it

METADATA is the folder `data` of the dataset's repository. Tags fill the last cells of a line, as many
as there are: genre---rock, instrument---piano, mood/theme---happy. The files have tabs and no quoting.
"""

from collections import defaultdict
from pathlib import Path
from typing import Any

from muser_dist.data.corpora.table import SPLITS, cells
from muser_dist.data.corpora.writer import Track
from muser_dist.errors import DataError

CORPUS = "MTG-Jamendo"
TEMPLATES = (
    "A {genre} song, with {instrument}, in a {mood} mood",
    "{mood}, {genre}, {instrument}",
    "{title}, by {artist}",
)

_TAGGED = ["TRACK_ID", "ARTIST_ID", "ALBUM_ID", "PATH", "DURATION", "TAGS"]
_NAMED = ["TRACK_ID", "ARTIST_ID", "ALBUM_ID", "TRACK_NAME", "ARTIST_NAME", "ALBUM_NAME", "RELEASEDATE", "URL"]
_FIELDS = {"mood/theme": "mood"}  # categories whose name no template can write


def read_jamendo(metadata: Path, audio: Path, tags: str = "autotagging", split: int | None = 0) -> list[Track]:
    """A track for each line. Fields: genre, instrument, mood (lists), title, artist, album.

    Args:
        metadata: the folder `data` of the dataset's repository.
        audio: folder with the folders 00 to 99.
        tags: which table: autotagging, autotagging_top50tags, autotagging_genre,
            autotagging_instrument or autotagging_moodtheme.
        split: number of the split, from 0 to 4; None reads the unsplit table, all of it as "train".

    Raises:
        DataError: a file is missing or not in the original layout.
    """
    names = _read_names(metadata / "raw.meta.tsv")
    if split is None:
        tables = {"train": metadata / f"{tags}.tsv"}
    else:
        folder = metadata / "splits" / f"split-{split}"
        tables = {SPLITS[part]: folder / f"{tags}-{part}.tsv" for part in ("train", "validation", "test")}
    tracks = []
    for part, table in tables.items():
        for place, row in _rows(table, _TAGGED):
            if len(row) < len(_TAGGED):
                raise DataError(f"{place}: {len(row)} cells; a line of {CORPUS} has at least {len(_TAGGED)}")
            track, path = row[0], row[3]
            fields: dict[str, Any] = defaultdict(list)
            for tag in row[5:]:
                category, separator, word = tag.partition("---")
                if not separator:
                    raise DataError(f"{place}: the tag {tag!r} is not category---tag")
                fields[_FIELDS.get(category, category)].append(word)
            file = audio / path
            low = file.with_suffix(f".low{file.suffix}")
            if not file.exists() and low.exists():
                file = low
            tracks.append(Track(track, file, {**fields, **names.get(track, {})}, part))
    return tracks


def _rows(path: Path, header: list[str]) -> list[tuple[str, list[str]]]:
    rows = list(cells(path, CORPUS, "\t", quoted=False))
    if not rows or rows[0][1] != header:
        raise DataError(f"{path}: the first line is not {' '.join(header)}, as that of {CORPUS}")
    return rows[1:]


def _read_names(path: Path) -> dict[str, dict[str, str]]:
    """Title, artist and album by TRACK_ID; nothing when there is no such file."""
    names = {}
    for place, row in _rows(path, _NAMED) if path.exists() else ():
        if len(row) == len(_NAMED) + 1 and not row[4]:
            del row[4]  # two lines of the original have an empty cell too many after the track's name
        if len(row) != len(_NAMED):
            raise DataError(f"{place}: {len(row)} cells, not the {len(_NAMED)} of {CORPUS}")
        fields = zip(("title", "artist", "album"), row[3:6], strict=True)
        names[row[0]] = {field: value for field, value in fields if value}
    return names
