"""JSON lines in the form in which CLaMP 2 (Wu et al. 2024, arXiv 2410.13267) takes its training data.

    FILE.jsonl                     title, composer, genres, description, lyrics, tags, ensembles, instruments,
                                   summary_en, summary_nen, filepaths
    ROOT/abc/Folk/Planxty.abc      what `filepaths` names: .abc, .mtf, .mid, .xml, .musicxml or .mxl of one piece
    ROOT/mtf/Folk/Planxty.mtf

By the description in its published code; any of the fields may be null or missing. `summary_nen` is {"language": ...,
"summary": ...}, of one language that is not English, or a list of such. It becomes the field `summary`, an object
{language: text}, in which English is not: recipes draw `summary_en` and `summary` with shares of their own.
"""

from pathlib import Path
from typing import Any

from muser_dist.data.corpora.objects import fields_of, read_lines, track_of
from muser_dist.data.corpora.writer import Track

CORPUS = "CLaMP 2"
TEMPLATES = ("{summary_en}", "{summary}", "{title} | {composer} | {genres} | {tags} | {instruments}")
FIELDS = (
    "title",
    "composer",
    "genres",
    "description",
    "lyrics",
    "tags",
    "ensembles",
    "instruments",
    "summary_en",
)


def read_clamp(file: Path, root: Path | None = None, val_share: float = 0.01) -> list[Track]:
    """A track for each line; those that are broken, or one of whose paths leaves the root, have a problem.

    Args:
        file: the JSON lines.
        root: folder that `filepaths` start from; the file's by default.
        val_share: share of the lines that goes to "val", by a hash of the first path; CLaMP 2 draws as many.

    Raises:
        DataError: the file is missing.
    """
    root = root or file.parent
    return [
        track_of(
            line,
            file,
            root,
            line.values.get("filepaths"),
            fields_of(line.values, FIELDS) | _summary(line.values.get("summary_nen")),
            "train",
            val_share,
        )
        for line in read_lines(file, CORPUS)
    ]


def _summary(told: Any) -> dict[str, Any]:
    """The field `summary`; nothing where there is none."""
    texts = {}
    for entry in told if isinstance(told, list) else [told]:
        if isinstance(entry, dict) and isinstance(language := entry.get("language"), str) and language.strip():
            text = entry.get("summary")
            if isinstance(text, str) and text.strip():
                texts[language.strip()] = text
    return {"summary": texts} if texts else {}
