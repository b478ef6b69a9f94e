"""Small trees in the original layout of each corpus, with real encoded audio."""

import csv
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from muser_dist.data.corpora import fma, gtzan, jamendo, magnatagatune
from muser_dist.data.corpora.table import read_table
from muser_dist.data.corpora.writer import Track
from tests.shardmaker import INSTRUMENTS, encode, tone


def audio(path: Path, index: int = 0) -> Path:
    """A second of sound in the format of the extension."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encode(tone(index), kind=path.suffix[1:]))
    return path


def write_csv(path: Path, rows: Iterable[Iterable[object]], delimiter: str = ",", quoting: int = csv.QUOTE_MINIMAL):
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, delimiter=delimiter, quoting=quoting).writerows(rows)


# --- A table of one's own ---


def make_table(root: Path) -> None:
    """Twelve tracks in an album's folder, two of them for validation."""
    rows = [["file", "title", "instrument", "year", "part"]]
    for i in range(12):
        kind = ("flac", "ogg", "mp3", "wav")[i % 4]
        audio(root / "album" / f"{i:02d}. song.{kind}", i)
        part = "validation" if i % 6 == 5 else "train"
        year = "" if i % 2 else 1990 + i
        rows.append([f"album/{i:02d}. song.{kind}", f"Song, {i}", INSTRUMENTS[i % 4], year, part])
    write_csv(root / "tracks.csv", rows)


# --- GTZAN ---

GENRES = ("blues", "hiphop", "jazz")


def make_gtzan(root: Path, kind: str = "wav") -> None:
    """Six clips of three genres; 5 is in no list, and the last of the test list is missing."""
    folder = root / {"wav": "genres_original", "au": "genres"}[kind]
    lists: dict[str, list[str]] = {"train": [], "valid": [], "test": []}
    for genre in GENRES:
        for i in range(6):
            audio(folder / genre / f"{genre}.{i:05d}.{kind}", i)
            if i < 5:  # the lists say .wav, whatever the files are
                lists["train" if i < 3 else "valid" if i == 3 else "test"].append(f"{genre}/{genre}.{i:05d}.wav")
    (folder / "jazz" / f"jazz.00004.{kind}").unlink()
    for name, lines in lists.items():
        (root / f"{name}_filtered.txt").write_text("\n".join(lines) + "\n")


# --- FMA ---

FMA_COLUMNS = {
    "album": "comments date_created date_released engineer favorites id information listens producer tags title tracks "
    "type",
    "artist": "active_year_begin active_year_end associated_labels bio comments date_created favorites id latitude "
    "location longitude members name related_projects tags website wikipedia_page",
    "set": "split subset",
    "track": "bit_rate comments composer date_created date_recorded duration favorites genre_top genres genres_all "
    "information interest language_code license listens lyricist number publisher tags title",
}


def make_fma(root: Path) -> None:
    """Ten tracks of fma_small, one of which has no file, and one that only the medium subset has."""
    columns = [(upper, lower) for upper, names in FMA_COLUMNS.items() for lower in names.split()]
    rows = [["", *(upper for upper, _ in columns)], ["", *(lower for _, lower in columns)]]
    rows.append(["track_id"] + [""] * len(columns))
    for i in range(11):
        number = 2 + 700 * i
        values = {
            ("album", "title"): "AWOL - A Way Of Life",
            ("artist", "bio"): '<p>A band, "the" band.</p>\n<p>Of New Jersey.</p>',
            ("artist", "name"): "AWOL",
            ("set", "split"): ("training", "validation", "test")[max(0, i - 7)] if i < 10 else "training",
            ("set", "subset"): "medium" if i == 10 else "small",
            ("track", "genre_top"): "Rock",
            ("track", "genres"): ("[45, 25]", "[12]", "[]")[min(i, 2)] if i < 3 else "[25]",
            ("track", "language_code"): "en" if i == 1 else "",
            ("track", "tags"): "['live', \"rock 'n' roll\"]" if i == 1 else "[]",
            ("track", "title"): f"Food {i}",
        }
        rows.append([number, *(values.get(column, "") for column in columns)])
        if i != 6:
            audio(root / "fma_small" / f"{number:06d}"[:3] / f"{number:06d}.mp3", i)
    write_csv(root / "fma_metadata" / "tracks.csv", rows)
    genres = [["genre_id", "#tracks", "parent", "title", "top_level"], [12, 32923, 0, "Rock", 12]]
    genres += [[25, 9261, 12, "Punk", 12], [45, 12, 25, "Loud-Punk", 12]]
    write_csv(root / "fma_metadata" / "genres.csv", genres)


# --- MagnaTagATune ---

MTAT_TAGS = ["no voice", "singer", *(f"tag {i}" for i in range(60))]


def make_magnatagatune(root: Path, with_info: bool = True) -> None:
    """A clip in each of the sixteen folders, in c two; one of 0 has a rare tag alone, that of 1 none."""
    marked = {f"{i:x}": {"no voice", "singer", f"tag {i}"} for i in range(16)} | {"1": set()}
    clips = [(folder, 2 + i, tags) for i, (folder, tags) in enumerate(marked.items())]
    # Tags up to 49 are used twice or more: 48 of them and the two above are the 50 most frequent ones.
    clips += [("c", 100 + i, {f"tag {i}", f"tag {(i + 1) % 48}", f"tag {(i + 2) % 48}"}) for i in range(48)]
    clips.append(("0", 200, {"tag 59"}))
    rows: list[list[object]] = [["clip_id", *MTAT_TAGS, "mp3_path"]]
    info = [["clip_id", "track_number", "title", "artist", "album", "url", "segmentStart", "segmentEnd"]]
    info[0] += ["original_url", "mp3_path"]
    for folder, clip, tags in clips:
        path = f"{folder}/american_bach_soloists-j_s__bach-01-bwv54__i_aria-{clip}-88.mp3"
        rows.append([clip, *(int(tag in tags) for tag in MTAT_TAGS), path])
        info.append([str(clip), "1", "BWV54 - I Aria", "American Bach Soloists", "", "", "59", "88", "", path])
        if clip < 102:
            audio(root / path, clip)
    write_csv(root / "annotations_final.csv", rows, "\t", csv.QUOTE_ALL)
    if with_info:
        write_csv(root / "clip_info_final.csv", info, "\t", csv.QUOTE_ALL)


# --- MTG-Jamendo ---


def make_jamendo(root: Path) -> None:
    """Ten tracks for training, one each for validation and test; odd ones from the smaller download."""
    header = ["TRACK_ID", "ARTIST_ID", "ALBUM_ID", "PATH", "DURATION", "TAGS"]
    lines: dict[str, list[list[str]]] = {"train": [header], "validation": [header], "test": [header]}
    names = [["TRACK_ID", "ARTIST_ID", "ALBUM_ID", "TRACK_NAME", "ARTIST_NAME", "ALBUM_NAME", "RELEASEDATE", "URL"]]
    for i in range(12):
        track, ids = 948 + i, ["artist_000087", "album_000149"]
        path = f"{track % 100:02d}/{track}"
        tags = ["genre---rock", "genre---pop", "instrument---piano", f"mood/theme---{('happy', 'dark')[i % 2]}"]
        part = "validation" if i == 10 else "test" if i == 11 else "train"
        lines[part].append([f"track_{track:07d}", *ids, f"{path}.mp3", "212.7", *tags[i % 3 :]])
        # An unmatched quotation mark, and in one line a cell too many, as in the original.
        title = [f'Trio 12" No {i}'] + ([""] if i == 3 else [])
        names.append([f"track_{track:07d}", *ids, *title, "Both", "", "2004-12-28", "http"])
        audio(root / "audio" / f"{path}{'.low' if i % 2 else ''}.mp3", i)
    tables = {root / "data" / "splits" / "split-0" / f"autotagging-{part}.tsv": rows for part, rows in lines.items()}
    tables[root / "data" / "autotagging.tsv"] = [header, *(row for rows in lines.values() for row in rows[1:])]
    tables[root / "data" / "raw.meta.tsv"] = names
    for path, rows in tables.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join("\t".join(row) + "\n" for row in rows))


@dataclass(frozen=True)
class Layout:
    """How a corpus is made and read, and what comes of it."""

    make: Callable[[Path], None]
    read: Callable[[Path], list[Track]]
    templates: tuple[str, ...]
    rows: dict[str, int]
    skipped: int


LAYOUTS = {
    "table": Layout(
        make_table,
        lambda root: read_table(root / "tracks.csv", audio="file", split="part"),
        ("{title}, for {instrument}, of {year}",),
        {"train": 10, "val": 2},
        0,
    ),
    "gtzan": Layout(
        make_gtzan,
        lambda root: gtzan.read_gtzan(root, root),
        gtzan.TEMPLATES,
        {"train": 9, "val": 3, "test": 2},
        4,
    ),
    "fma": Layout(
        make_fma, lambda root: fma.read_fma(root, "small"), fma.TEMPLATES, {"train": 7, "val": 1, "test": 1}, 1
    ),
    "magnatagatune": Layout(
        make_magnatagatune,
        magnatagatune.read_magnatagatune,
        magnatagatune.TEMPLATES,
        {"train": 11, "val": 3, "test": 3},
        48,
    ),
    "jamendo": Layout(
        make_jamendo,
        lambda root: jamendo.read_jamendo(root / "data", root / "audio"),
        jamendo.TEMPLATES,
        {"train": 10, "val": 1, "test": 1},
        0,
    ),
}


def lines_of(path: Path) -> list[dict]:
    """The objects of a file of JSON lines."""
    return [json.loads(line) for line in path.read_text().splitlines()]
