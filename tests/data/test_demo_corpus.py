"""The demo corpus: reproducible, balanced, heard as its metadata says, and written in whole shards."""

import io
import json
import runpy
import tarfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import soxr

from muser_dist.data.corpora import demo
from muser_dist.errors import ConfigError, DataError
from muser_dist.files import alone_in

RATE = 16_000
HOP = 160
PIECES = 120


@dataclass(frozen=True)
class Heard:
    """A piece as training hears it.

    Attributes:
        waveform: (samples,) at RATE.
        bands: (frames, 24) log-magnitudes, a frame every HOP samples.
        onsets: (frames,) how much each frame rises above the one before it, over all bands.
        facts: the metadata.
    """

    waveform: np.ndarray
    bands: np.ndarray
    onsets: np.ndarray
    facts: dict[str, Any]


def spectrogram(waveform: np.ndarray, window: int, hop: int) -> np.ndarray:
    """Magnitudes, (frames, window // 2 + 1)."""
    frames = np.lib.stride_tricks.sliding_window_view(waveform, window)[::hop]
    return np.abs(np.fft.rfft(frames * np.hanning(window).astype(np.float32)))


@pytest.fixture(scope="module")
def pieces() -> list[Heard]:
    heard = []
    edges = np.unique(np.geomspace(2, 256, 28).astype(int))[:-1]
    for index in range(PIECES):
        waveform, rate, facts = demo.compose(3, index)
        mono = soxr.resample(waveform if waveform.ndim == 1 else waveform.mean(axis=1), rate, RATE)
        bands = np.log(np.add.reduceat(spectrogram(mono, 512, HOP), edges, axis=1) + 0.02)
        heard.append(Heard(mono, bands, np.maximum(np.diff(bands, axis=0), 0).mean(axis=1), facts))
    return heard


def test_a_piece_depends_on_seed_and_index_alone():
    first, rate, metadata = demo.compose(1, 5)
    demo.compose(1, 6)
    again, rate_again, metadata_again = demo.compose(1, 5)
    assert np.array_equal(first, again) and (rate, metadata) == (rate_again, metadata_again)
    assert metadata == demo.describe(1, 5)
    assert demo.describe(2, 5) != metadata and demo.describe(1, demo.VAL_FIRST + 5) != metadata


@pytest.mark.parametrize("first", [0, demo.VAL_FIRST])
def test_fields_are_balanced(first: int):
    described = [demo.describe(0, index) for index in range(first, first + 240)]
    sizes = {"type": 8, "meter": 4, "mode": 2, "tonic": 6, "instrument": 12, "pace": 3}
    for name, values in sizes.items():
        assert set(Counter(facts[name] for facts in described).values()) == {240 // values}, name
    # The fields tell nothing about each other: no pair of values is missing or twice as frequent as by chance.
    pairs = Counter((facts["mode"], facts["pace"], facts["meter"]) for facts in described)
    assert len(pairs) == 24 and max(pairs.values()) <= 20


def test_captions_state_every_fact_in_several_phrasings():
    described = [demo.describe(0, index) for index in range(60)]
    for facts in described:
        for name in ("pace", "type", "instrument", "mode", "tonic", "meter"):
            assert facts[name] in facts["caption"]
        assert facts["meter"] == demo.RHYTHMS[facts["type"]].meter
        assert demo.PACES[facts["pace"]][0] <= facts["qpm"] <= demo.PACES[facts["pace"]][1]
    assert {facts["caption"].split()[0] for facts in described} == {"A", "This", "The", "You"}
    assert len({facts["title"] for facts in described}) > 40


def test_waveforms_vary_in_rate_and_channels_and_never_clip():
    made = [demo.compose(0, index, 1.5) for index in range(24)]
    assert {rate for _, rate, _ in made} == set(demo.SAMPLE_RATES)
    assert {waveform.shape[1:] for waveform, _, _ in made} == {(), (2,)}
    for waveform, rate, metadata in made:
        assert waveform.dtype == np.float32 and len(waveform) == 1.5 * rate and metadata["seconds"] == 1.5
        assert 0.4 < np.abs(waveform).max() <= 1
        if waveform.ndim == 2:
            assert not np.allclose(waveform[:, 0], waveform[:, 1], atol=0.01)


def test_pace_is_heard_as_onset_rate(pieces: list[Heard]):
    counts: dict[str, list[int]] = {pace: [] for pace in demo.PACES}
    for piece in pieces:
        before, here, after = piece.onsets[:-2], piece.onsets[1:-1], piece.onsets[2:]
        peaks = (here > before) & (here >= after) & (here > 0.25 * np.percentile(here, 99))
        counts[piece.facts["pace"]].append(peaks.sum())
    slow, moderate, fast = (np.median(counts[pace]) for pace in ("slow", "moderate", "fast"))
    assert moderate > 1.15 * slow and fast > 1.15 * moderate, (slow, moderate, fast)


def recurrence(piece: Heard, period: float) -> float:
    """Covariance of the onsets with those `period` frames, or one more or less, later."""
    varying = piece.onsets - piece.onsets.mean()
    lags = range(round(period) - 1, round(period) + 2)
    return max(float(np.mean(varying[lag:] * varying[:-lag])) for lag in lags)


def test_meter_and_tempo_are_heard_as_the_period_of_a_bar(pieces: list[Heard]):
    """Onsets recur after a bar of the stated length, more than after an eighth of it less or more."""
    right = 0
    for piece in pieces:
        beats, unit = map(int, piece.facts["meter"].split("/"))
        bar = beats * 4 / unit * 60 / piece.facts["qpm"] * RATE / HOP  # frames
        right += recurrence(piece, bar) > max(recurrence(piece, bar * 7 / 8), recurrence(piece, bar * 9 / 8))
    assert right / PIECES > 0.85, right / PIECES


def test_type_is_heard_as_a_pattern_of_onsets(pieces: list[Heard]):
    """Of the patterns of all eight types, at the stated tempo, that of the stated type fits the onsets best."""
    patterns = {}
    for name, rhythm in demo.RHYTHMS.items():
        pattern = np.zeros(2 * len(rhythm.accompaniment))
        for bar in rhythm.bars:
            assert sum(map(int, bar)) == len(pattern)
            pattern[np.cumsum([0, *map(int, bar[:-1])])] += 1 / len(rhythm.bars)
        pattern[::2] += [{"b": 1.5, "c": 0.7, "-": 0}[letter] for letter in rhythm.accompaniment]
        patterns[name] = pattern
    right = 0
    for piece in pieces:
        sixteenth = 15 / piece.facts["qpm"] * RATE / HOP  # frames
        nearby = np.lib.stride_tricks.sliding_window_view(piece.onsets, 3).max(axis=1)
        fits = dict.fromkeys(patterns, -1.0)
        for lead in range(0, 12, 2):  # frames of silence before the first note
            heard = nearby[np.arange(lead, len(nearby), sixteenth).astype(int)]
            for name, pattern in patterns.items():
                fits[name] = max(fits[name], np.corrcoef(heard, np.resize(pattern, len(heard)))[0, 1])
        right += max(fits, key=lambda name: fits[name]) == piece.facts["type"]
    assert right / PIECES > 0.6, right / PIECES  # chance is 0.125; soft attacks blur the sixteenths for this simple ear


def test_instruments_sound_different(pieces: list[Heard]):
    """The piece with the most similar spectrum has the same instrument."""
    features = np.array([np.concatenate([p.bands.mean(axis=0), p.bands.std(axis=0)]) for p in pieces])
    distances = np.square(features[:, None] - features).sum(axis=2)
    np.fill_diagonal(distances, np.inf)
    names = np.array([piece.facts["instrument"] for piece in pieces])
    agreement = np.mean(names[distances.argmin(axis=1)] == names)
    assert agreement > 0.7, agreement


def strength(piece: Heard, note: int) -> float:
    """How strong a MIDI note is from the octave below to two octaves above."""
    points = 1 << 17
    spectrum = np.abs(np.fft.rfft(piece.waveform, points))
    places = [demo.HERTZ[note + octave] * points / RATE for octave in (-12, 0, 12, 24)]
    return float(sum(spectrum[int(0.985 * place) : int(1.015 * place) + 1].max() for place in places))


def test_tonic_and_mode_are_heard(pieces: list[Heard]):
    """What never stops, in the drone's octave, is the tonic; the stronger third above it tells the mode."""
    tonics = modes = 0
    for piece in pieces:
        lasting = np.median(spectrogram(piece.waveform, 8192, 8 * HOP), axis=0)
        notes = {name: lasting[round(demo.HERTZ[note - 12] * 8192 / RATE)] for name, note in demo.TONICS.items()}
        tonics += max(notes, key=lambda name: notes[name]) == piece.facts["tonic"]
        tonic = demo.TONICS[piece.facts["tonic"]]
        third = "major" if strength(piece, tonic + 4) > strength(piece, tonic + 3) else "minor"
        modes += third == piece.facts["mode"]
    assert tonics / PIECES > 0.9 and modes / PIECES > 0.9, (tonics / PIECES, modes / PIECES)


def read(shard: Path) -> dict[str, bytes]:
    with tarfile.open(shard) as tar:
        members = tar.getmembers()
        assert all(m.mtime == 0 and m.uname == "muser" and m.isreg() for m in members)
        return {m.name: tar.extractfile(m).read() for m in members}


def write(folder: Path, **settings: Any) -> None:
    demo.write_demo(folder, **{"train": 20, "val": 6, "shard_rows": 8, "seconds": 1.0, **settings})


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus") / "made" / "on demand"
    write(folder)
    return folder


def test_shards_hold_what_the_index_says(corpus: Path):
    rows = {"train-00000.tar": 8, "train-00001.tar": 8, "train-00002.tar": 4, "val-00000.tar": 6}
    assert sorted(path.name for path in corpus.glob("[!.]*")) == sorted([*rows, "muser-index.json"])
    assert json.loads((corpus / "muser-index.json").read_text()) == {"format": 1, "rows": rows}
    formats, channels, waveforms = set(), set(), set()
    for name, count in rows.items():
        files = read(corpus / name)
        keys = {file.partition(".")[0] for file in files}
        assert len(files) == 2 * count and len(keys) == count and all(k.startswith(name.split("-")[0]) for k in keys)
        for file, content in files.items():
            if file.endswith(".json"):
                assert json.loads(content)["seconds"] == 1.0
                continue
            waveform, rate = soundfile.read(io.BytesIO(content))
            assert len(waveform) == rate and f"{file.partition('.')[0]}.json" in files
            formats.add(file.partition(".")[2])
            channels.add(waveform.ndim)
            waveforms.add(content)
    assert formats == {"flac", "ogg", "mp3"} and channels == {1, 2}
    assert len(waveforms) == 26  # none of them twice, so none of validation is in training


def test_pieces_in_shards_are_those_of_compose(corpus: Path):
    files = read(corpus / "train-00001.tar")
    waveform, rate, metadata = demo.compose(0, 9, 1.0)
    assert json.loads(files["train-000009.json"]) == metadata
    decoded, decoded_rate = soundfile.read(io.BytesIO(files["train-000009.flac"]))
    assert decoded_rate == rate and np.allclose(decoded, waveform, atol=1e-4)


def test_same_seed_same_shards_and_resume_keeps_what_is_there(corpus: Path, tmp_path: Path):
    calls: list[tuple[int, int]] = []
    (tmp_path / "train-00001.tar").write_bytes(kept := (corpus / "train-00001.tar").read_bytes())
    (tmp_path / ".val-00000.tar.part").write_bytes(b"an interrupted run left this")
    before = (tmp_path / "train-00001.tar").stat()
    write(tmp_path, progress=lambda done, total: calls.append((done, total)))
    after = (tmp_path / "train-00001.tar").stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)
    assert (tmp_path / "train-00001.tar").read_bytes() == kept
    assert calls[0] == (8, 26) and calls[-1] == (26, 26) and calls == sorted(calls)
    for name in json.loads((tmp_path / "muser-index.json").read_text())["rows"]:
        first, second = read(corpus / name), read(tmp_path / name)
        assert list(first) == list(second)
        assert all(first[f] == second[f] for f in first if not f.endswith(".ogg"))  # ogg has a random serial number


@pytest.mark.parametrize("other", [{"seed": 1}, {"seconds": 2.0}, {"train": 8}, {"shard_rows": 4}])
def test_shards_of_another_corpus_are_refused(corpus: Path, other: dict[str, Any]):
    with pytest.raises(DataError, match=r"-0000\d\.tar is of another corpus"):
        write(corpus, **other)


@pytest.mark.parametrize(
    "wrong", [{"train": -1}, {"train": 0, "val": 0}, {"shard_rows": 0}, {"seconds": 0.1}, {"seed": -1}]
)
def test_senseless_numbers_are_refused(tmp_path: Path, wrong: dict[str, Any]):
    with pytest.raises(DataError):
        write(tmp_path / "new", **wrong)
    assert not (tmp_path / "new").exists()


def test_folder_that_cannot_be_written_is_refused(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"--out: cannot write to .*file/folder"):
        write(tmp_path / "file" / "folder")


def test_folder_that_another_job_works_in_is_not_touched(tmp_path: Path):
    with alone_in(tmp_path), pytest.raises(DataError, match="another job works in"):
        write(tmp_path)
    assert not list(tmp_path.glob("[!.]*"))


@pytest.fixture
def make_shards(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """jobs/make_shards.py, called with command line arguments."""
    path = Path(__file__).parents[2] / "jobs" / "make_shards.py"

    def call(*arguments: str) -> None:
        monkeypatch.setattr("sys.argv", [str(path), *arguments])
        runpy.run_path(str(path), run_name="__main__")

    return call


def test_job_says_what_is_where_and_what_comes_next(make_shards, corpus: Path, capsys: pytest.CaptureFixture[str]):
    make_shards("demo", "--out", str(corpus), "--train", "20", "--val", "6", "--seconds", "1", "--shard-rows", "8")
    out, err = capsys.readouterr()
    assert "train: 20 clips, 0.01 hours, 3 shards" in out and "26 of 26 pieces" in err
    assert out.splitlines()[-1] == (
        f"next: python jobs/pretrain.py tiny --data.train '{corpus}/train-*.tar' --data.val '{corpus}/val-*.tar'"
    )


@pytest.mark.parametrize("arguments", [[], ["--out", "x"], ["demo"], ["other", "--out", "x"]])
def test_job_needs_the_name_of_a_corpus_and_a_folder(make_shards, arguments: list[str]):
    with pytest.raises(SystemExit) as exit_:
        make_shards(*arguments)
    assert exit_.value.code == 2


def test_job_prints_errors_in_one_line(make_shards, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as exit_:
        make_shards("demo", "--out", str(tmp_path), "--seconds", "0")
    err = capsys.readouterr().err
    assert exit_.value.code == 2 and err.startswith("error: ") and err.count("\n") == 1
