"""Small trees of corpora of notation in the original layout of each."""

import json
from pathlib import Path
from typing import Any

from muser_dist.data.corpora import clamp, folder, midicaps, wikimt
from muser_dist.data.symbolic.midi import midi_to_mtf
from tests.data.corpora.layouts import Layout
from tests.data.symbolic.notation import note, score
from tests.scores import abc, midi

TITLES = ("Planxty", "Осенний вальс", "慢板", "Αργό βαλς", "لحن بطيء", "धीमा वाल्ट्ज", "느린 왈츠", "Gigue")


def write(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def write_lines(path: Path, lines: list[Any]) -> None:
    """JSON lines; what is bytes goes in as it is."""
    raw = [line if isinstance(line, bytes) else json.dumps(line, ensure_ascii=False).encode() for line in lines]
    write(path, b"".join(line + b"\n" for line in raw))


def make_wikimt(root: Path) -> None:
    """Eight lead sheets, and four lines that are none."""
    lines: list[Any] = [
        {
            "title": TITLES[i],
            "artist": "Ann",
            "genre": ("Jazz", "Folk")[i % 2],
            "description": f"A song of {1900 + i}.",
            "music": abc(i).decode(),
        }
        for i in range(8)
    ]
    lines[3:3] = [b'{"title": "torn', {"title": "mute", "music": " "}, ["music"], b""]
    lines.append({"title": "a list", "music": ["X:1"]})
    write_lines(root / "wikimusictext.jsonl", lines)


def make_midicaps(root: Path) -> None:
    """Eight files, the last two for testing; one is missing, one is empty, and three lines have no good path."""
    lines: list[Any] = []
    for i in range(8):
        path = f"lmd_full/{i % 3}/{i:032x}.mid"
        lines.append(
            {
                "location": path,
                "caption": f"A lively piece with flute, number {i}.",
                "genre": ["pop", "folk"],
                "genre_prob": [0.4, 0.2],
                "mood": ["happy", "film"],
                "mood_prob": [0.1, 0.1],
                "key": "D minor",
                "time_signature": "4/4",
                "tempo": 96 + i,
                "tempo_word": "Moderate tempo",
                "duration": 12,
                "duration_word": "Short song",
                "chord_summary": ["Dm", "Am"],
                "chord_summary_occurence": 3,
                "instrument_summary": ["Flute"],
                "instrument_numbers_sorted": [73],
                "all_chords": ["Dm", "Am", "Dm"],
                "all_chords_timestamps": [0.4, 1.2, 2.0],
                "test_set": i >= 6,
            }
        )
        if i != 2:
            write(root / path, b"" if i == 3 else midi(i))
    write(root.parent / f"{root.name}-secret.mid", midi(0))
    lines += [{"location": path, "caption": "no"} for path in (f"../{root.name}-secret.mid", "/etc/passwd", 7)]
    write_lines(root / "train.json", lines)


def make_clamp(root: Path) -> None:
    """Nine pieces of ABC, MIDI text, MIDI and MusicXML; one lacks its second file, others are no lines."""
    kinds = {
        "abc": lambda i: abc(i),
        "mtf": lambda i: midi_to_mtf(midi(i), 1000).encode(),
        "mid": lambda i: midi(i),
        "xml": lambda i: score([[note("C5", 32)]]).encode(),
    }
    have = [("abc", "mtf"), ("abc", "mid"), ("xml",), ("mid",), ("mtf",), ("abc", "mid"), ("abc", "abc"), ("xml",)]
    lines: list[Any] = []
    for i, names in enumerate(have):
        paths = [f"{name}{n or ''}/Folk/tune {i}.{name}" for n, name in enumerate(names)]
        for name, path in zip(names, paths, strict=True):
            if path != "mid1/Folk/tune 5.mid":
                write(root / path, kinds[name](i))
        lines.append(
            {
                "title": TITLES[i],
                "composer": None,
                "genres": ["Folk", "Dance"],
                "description": "",
                "lyrics": None,
                "tags": ["slow", "old"],
                "ensembles": [],
                "instruments": ["Flute"],
                "summary_en": f"A tune, number {i}.",
                "summary_nen": {"language": ("Russian", "Chinese")[i % 2], "summary": f"{TITLES[1 + i % 2]} {i}"},
                "filepaths": paths,
            }
        )
    lines[2]["summary_nen"] = [{"language": "Greek", "summary": TITLES[3]}, {"language": "Korean", "summary": None}]
    lines[3]["summary_nen"] = "nothing of the kind"
    lines += [
        {"title": "no files", "filepaths": []},
        {"title": "out", "filepaths": ["abc/Folk/tune 0.abc", "../x.abc"]},
    ]
    lines += [b'{"title": "\xff"}', b"{" * 5000]
    write_lines(root / "clamp.jsonl", lines)


def make_folder(root: Path) -> None:
    """Five names: a score with its MIDI and fields, one with broken fields, MIDI alone, MusicXML, and an empty file."""
    write(root / "irish" / "jig.abc", abc(1))
    write(root / "irish" / "jig.mid", midi(1))
    write(root / "irish" / "jig.json", json.dumps({"title": "The Jig", "type": "jig"}).encode())
    write(root / "reel.abc", abc(2))
    write(root / "reel.json", b"{")
    write(root / "01. Slow Air.MID", midi(3))
    write(root / "sheet.musicxml", score([[note("C5", 32)]]).encode())
    write(root / "empty.mid", b"")
    write(root / "notes.txt", b"nothing")


SCORES = {
    "wikimt": Layout(
        make_wikimt, lambda root: wikimt.read_wikimt(root / "wikimusictext.jsonl"), wikimt.TEMPLATES, {"test": 8}, 4
    ),
    "midicaps": Layout(make_midicaps, midicaps.read_midicaps, midicaps.TEMPLATES, {"train": 4, "test": 2}, 5),
    "clamp": Layout(
        make_clamp,
        lambda root: clamp.read_clamp(root / "clamp.jsonl", val_share=0.4),
        clamp.TEMPLATES,
        {"train": 5, "val": 3},
        4,
    ),
    "folder": Layout(make_folder, folder.read_folder, folder.TEMPLATES, {"train": 3}, 2),
}
