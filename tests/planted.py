"""Shards with one of everything that an inspection should find."""

import json
from pathlib import Path

import numpy as np
import soxr

from muser_dist.data.corpora.demo import compose
from muser_dist.data.shards import SIDECAR
from tests.fatal import FATAL
from tests.shardmaker import bad_samples, encode, sample, tone, write_shard


def plant(folder: Path) -> None:
    """Writes train-00000.tar to train-00002.tar and val-00000.tar."""
    waveform, rate, _ = compose(3, 0, 10.0)
    music = waveform if waveform.ndim == 1 else waveform.mean(axis=1)
    low = soxr.resample(music, rate, 22_050)
    write_shard(
        folder / "train-00000.tar",
        [
            ("plain", sample(0, title="A Waltz", artist="Ann")),
            ("twin", sample(1, tags=["old", "slow"])),
            ("other", sample(2, tags=["old"])),
            ("music", sample(3) | {"flac": encode(music, rate)}),
            ("musiccopy", _with_audio(sample(4), "mp3", encode(np.stack([low, low], axis=1), 22_050, "mp3"))),
            ("twincopy", sample(1) | {"json": sample(2)["json"]}),  # the file of twin, the text of other
            ("long", _with_audio(sample(5), "wav", encode(tone(5, 3.0, 8_000), 8_000, "wav"))),
        ],
    )
    bad = [(key, members) for key, members, _ in bad_samples()]
    write_shard(folder / "train-00001.tar", [*bad, ("fatal", sample(6) | {"flac": FATAL}), ("last", sample(7))])
    cut = write_shard(folder / "train-00002.tar", [("whole", sample(8)), ("torn", sample(9))])
    cut.write_bytes(cut.read_bytes()[: 512 + 600])  # inside the audio of its first row
    write_shard(
        folder / "val-00000.tar",
        [
            ("samefile", sample(20) | {"flac": sample(2)["flac"]}),
            ("sametitle", sample(21, title="a  WALTZ", artist="ann")),
            ("samemusic", _with_audio(sample(22), "ogg", encode(0.2 * music, rate, "ogg"))),
            ("new", sample(23)),
        ],
    )
    (folder / SIDECAR).write_text(
        json.dumps({"format": 1, "rows": {"train-00000.tar": 7, "train-00001.tar": 15, "val-00000.tar": 4}})
    )


def _with_audio(sample: dict[str, bytes], extension: str, audio: bytes) -> dict[str, bytes]:
    return {extension: audio, "json": sample["json"]}
