"""GTZAN (Tzanetakis and Cook 2002): 1,000 clips of 30 seconds in ten genres.

    ROOT/genres_original/blues/blues.00000.wav    or    ROOT/genres/blues/blues.00000.au
    SPLITS/train_filtered.txt, valid_filtered.txt, test_filtered.txt

The lists are the fault-filtered split (Kereliuk, Sturm and Larsen 2015): without clips that are
broken (jazz.00054), repeated or of an artist in another part. They name files as blues/blues.00029.wav.
"""

from pathlib import Path

from muser_dist.data.corpora.writer import Track
from muser_dist.errors import DataError

CORPUS = "GTZAN's fault-filtered split"
TEMPLATES = ("A {genre} song", "{genre} music")
LISTS = {"train": "train_filtered.txt", "val": "valid_filtered.txt", "test": "test_filtered.txt"}


def read_gtzan(root: Path, splits: Path) -> list[Track]:
    """A track for each file of the lists, and one with a problem for each file that they leave out.

    Args:
        root: folder with genres_original/ or genres/.
        splits: folder with the three lists.

    Raises:
        DataError: a folder or a list is missing.
    """
    genres = next((root / name for name in ("genres_original", "genres") if (root / name).is_dir()), None)
    if genres is None:
        raise DataError(
            f"{root} holds neither genres_original/ nor genres/; name the folder that GTZAN was unpacked to"
        )
    files = {
        (file.parent.name, file.stem): file for file in sorted(genres.glob("*/*")) if file.suffix in (".wav", ".au")
    }
    tracks = []
    for split, name in LISTS.items():
        try:
            lines = (splits / name).read_text().split()
        except (OSError, ValueError) as error:
            raise DataError(f"{splits / name} cannot be read ({error}); it is a list of {CORPUS}") from None
        for line in lines:
            listed = Path(line)
            genre, stem = listed.parent.name, listed.stem
            # Where there is none, the path of the list says in skipped.jsonl which file is missing.
            file = files.pop((genre, stem), genres / genre / listed.name)
            tracks.append(Track(stem, file, {"genre": genre}, split))
    left_out = f"is in none of the lists of {CORPUS}"
    tracks += [Track(stem, file, {"genre": genre}, problem=left_out) for (genre, stem), file in files.items()]
    return tracks
