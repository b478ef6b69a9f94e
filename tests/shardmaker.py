"""Small shards of real encoded audio for tests, with whatever is wrong that a test needs."""

import io
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

INSTRUMENTS = ("flute", "fiddle", "horn", "bell")


def encode(waveform: np.ndarray, rate: int = 16_000, kind: str = "flac") -> bytes:
    """A waveform as the bytes of a flac, ogg, wav or mp3 file."""
    buffer = io.BytesIO()
    subtype = {"ogg": "VORBIS", "wav": "FLOAT"}.get(kind)
    soundfile.write(buffer, waveform, rate, format=kind, subtype=subtype)
    return buffer.getvalue()


def tone(index: int, seconds: float = 1.0, rate: int = 16_000) -> np.ndarray:
    """A tone whose pitch and noise depend on the index."""
    rng = np.random.default_rng(index)
    time = np.arange(round(seconds * rate)) / rate
    hertz = 220.0 * 2.0 ** (index % 24 / 12)
    return (0.4 * np.sin(2 * np.pi * hertz * time) + 0.05 * rng.standard_normal(len(time))).astype(np.float32)


def sample(index: int, **fields: Any) -> dict[str, bytes]:
    """A good sample: flac and JSON. Fields override the metadata."""
    metadata = {
        "instrument": INSTRUMENTS[index % len(INSTRUMENTS)],
        "mode": ("major", "minor")[index // 4 % 2],
        "caption": f"Piece {index} for {INSTRUMENTS[index % len(INSTRUMENTS)]}.",
    } | fields
    return {"flac": encode(tone(index)), "json": json.dumps(metadata).encode()}


def write_shard(path: Path, samples: Sequence[tuple[str, dict[str, bytes]]]) -> Path:
    """Writes (key, members by extension) as a tar."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for key, members in samples:
            for extension, data in members.items():
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return path


def write_shards(folder: Path, rows: Sequence[int], name: str = "train") -> str:
    """Writes good shards with these numbers of rows; returns a pattern for all of them."""
    index = 0
    for number, count in enumerate(rows):
        write_shard(
            folder / f"{name}-{number:05d}.tar", [(f"piece{i:05d}", sample(i)) for i in range(index, index + count)]
        )
        index += count
    return f"{folder}/{name}-*.tar"


def bad_samples() -> list[tuple[str, dict[str, bytes], str]]:
    """One sample of each kind that cannot be used: key, members, and what the reason says."""
    good = sample(0)
    silence = encode(np.zeros(16_000, np.float32))
    hot = encode(np.full(16_000, np.nan, np.float32), kind="wav")
    return [
        ("undecodable", {**good, "flac": b"no audio at all"}, "cannot be decoded"),
        ("cutaudio", {**good, "flac": good["flac"][:60]}, "cannot be decoded|empty"),
        ("empty", {"wav": encode(np.zeros(0, np.float32), kind="wav"), "json": good["json"]}, "empty"),
        ("nobytes", {**good, "flac": b""}, "empty"),
        ("silent", {**good, "flac": silence}, "silent"),
        ("notfinite", {"wav": hot, "json": good["json"]}, "NaN"),
        ("brokenjson", {**good, "json": b'{"instrument": '}, "broken JSON"),
        ("notobject", {**good, "json": b"[1, 2]"}, "no object"),
        ("noaudio", {"json": good["json"]}, "no audio member"),
        ("notext", {"flac": good["flac"]}, r"no \.json and no \.txt"),
        ("emptycaption", {"flac": good["flac"], "json": b'{"caption": "  "}'}, "no text"),
        ("../escape", good, "unsafe member name"),
        ("hugenumber", {**good, "json": b'{"caption": ' + b"9" * 5000 + b"}"}, "broken JSON"),
        ("twosongs", {"a.flac": good["flac"], "b.flac": good["flac"], "json": good["json"]}, "several audio members"),
    ]
