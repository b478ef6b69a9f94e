"""WikiMT (Wu et al. 2023, CLaMP, arXiv 2304.11029): 1,010 lead sheets in ABC, with what Wikipedia says of the songs.

    wikimusictext.jsonl    title, artist, genre, description, music (the ABC notation) of each

By its published description; `genre` is one of eight. It is for evaluation: all of it is the split "test". Title,
artist and genre lie beside the ABC, whose own header repeats some of them: no encoder of notation is shown that.
"""

from pathlib import Path

from muser_dist.data.corpora.objects import fields_of, read_lines
from muser_dist.data.corpora.writer import Track

CORPUS = "WikiMT"
TEMPLATES = ("{description}", "{title}, by {artist}", "A {genre} song")
FIELDS = ("title", "artist", "genre", "description")


def read_wikimt(file: Path) -> list[Track]:
    """A track for each line; those that are broken or have no music have a problem.

    Args:
        file: wikimusictext.jsonl, or the same as one JSON array.

    Raises:
        DataError: the file is missing.
    """
    tracks = []
    for line in read_lines(file, CORPUS):
        music = line.values.get("music")
        problem = line.problem
        if problem is None and not (isinstance(music, str) and music.strip()):
            problem = 'no ABC notation in "music"'
        # No file of its own: the name says where it lies.
        place, key = file / f"{line.number}.abc", f"{file.stem}-{line.number:05d}"
        if problem is not None or not isinstance(music, str):
            tracks.append(Track(key, place, {}, "test", f"line {line.number}: {problem}"))
            continue
        content = music.encode(errors="replace")  # JSON may hold half a surrogate pair
        tracks.append(Track(key, place, fields_of(line.values, FIELDS), "test", content=content))
    return tracks
