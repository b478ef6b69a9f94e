"""MidiCaps (Melechovsky, Roy and Herremans 2024, arXiv 2406.02255): 168,407 MIDI files of Lakh's, with captions.

    ROOT/train.json                    JSON lines: location, caption, genre, mood, key, tempo, ..., test_set
    ROOT/lmd_full/1/1b9f5f32....mid    what midicaps.tar.gz unpacks to: the paths of `location`

By its published description. Captions are a language model's, made of the other fields, which were extracted from the
MIDI. Of these, chords with their times, probabilities and counts are left out. `test_set` is true for the split "test".
"""

from pathlib import Path

from muser_dist.data.corpora.objects import fields_of, read_lines, track_of
from muser_dist.data.corpora.writer import Track

CORPUS = "MidiCaps"
TEMPLATES = ("{caption}", "{genre}, {mood}, with {instrument_summary}")
FIELDS = (
    "caption",
    "genre",
    "mood",
    "key",
    "time_signature",
    "tempo",
    "tempo_word",
    "duration_word",
    "instrument_summary",
    "chord_summary",
)


def read_midicaps(root: Path, val_share: float = 0.0) -> list[Track]:
    """A track for each line; those that are broken, or whose path leaves the root, have a problem.

    Args:
        root: folder with train.json, that `location` starts from.
        val_share: share of what is not for testing that goes to "val", by a hash of the path.

    Raises:
        DataError: the file is missing.
    """
    file = root / "train.json"
    return [
        track_of(
            line,
            file,
            root,
            line.values.get("location"),
            fields_of(line.values, FIELDS),
            "test" if line.values.get("test_set") is True else "train",
            val_share,
        )
        for line in read_lines(file, CORPUS)
    ]
