"""The demo corpus: short pieces that this module composes and plays, so nothing is downloaded.

What the metadata says can be heard: the rhythm makes the type and the meter, triads and a drone
make tonic and mode, the tempo makes the pace. The instruments are synthetic, named after what they
imitate. A piece is a function of (seed, index) alone, and every value of a field is equally frequent.
"""

import io
import json
import os
import signal
import tarfile
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import soundfile
from webdataset import TarWriter

from muser_dist.errors import DataError
from muser_dist.files import alone_in, write_whole

FORMATS = ("flac", "ogg", "mp3")
SAMPLE_RATES = (22_050, 32_000, 44_100, 48_000)
VAL_FIRST = 720_720_000
"""Index of the first validation piece: out of training's reach, and a multiple of 1 to 16, so that
blocks of every field begin there."""


@dataclass(frozen=True)
class Rhythm:
    """What makes a piece a jig or a waltz."""

    meter: str
    bars: tuple[str, ...]  # melodies of one bar: the lengths of their notes in sixteenths
    accompaniment: str  # a letter for each eighth of a bar: b bass and drum, c chord, - nothing
    accent: int = 0  # the sixteenth of the bar on which the strongest note falls


RHYTHMS = {
    "jig": Rhythm("6/8", ("222222", "222222", "42222"), "b-cb-c"),
    "siciliana": Rhythm("6/8", ("312312", "31242"), "bccbcc"),
    "reel": Rhythm("4/4", ("22222222", "22222222", "4222222"), "b-c-b-c-"),
    "hornpipe": Rhythm("4/4", ("31313131", "313144"), "b-b-b-b-"),
    "waltz": Rhythm("3/4", ("444", "84", "444"), "b-c-c-"),
    "mazurka": Rhythm("3/4", ("3144", "318"), "b-c---", accent=4),
    "polka": Rhythm("2/4", ("112112", "211211"), "bcbc"),
    "march": Rhythm("2/4", ("314", "44", "314"), "b-b-"),
}
MODES = {"major": (0, 2, 4, 5, 7, 9, 11), "minor": (0, 2, 3, 5, 7, 8, 11)}  # semitones; minor is the harmonic one
TONICS = {"C": 60, "D": 62, "E": 64, "F": 65, "G": 67, "A": 69}  # as MIDI notes
PACES = {"slow": (70, 80), "moderate": (108, 120), "fast": (164, 184)}  # quarters per minute, both ends included
HERTZ = [440.0 * 2.0 ** ((note - 69) / 12) for note in range(128)]  # of MIDI notes
PROGRESSIONS = ((0, 0, 4, 0), (0, 0, 3, 0), (0, 3, 0, 4))  # root of each bar's triad, in steps of the scale

CAPTIONS = (
    "A {pace} {type} for {instrument} in {tonic} {mode}, in {meter} time.",
    "This {type} in {tonic} {mode} is played on the {instrument} at a {pace} pace, in {meter} time.",
    "The {instrument} plays a {pace} {type} in {meter} time, in the key of {tonic} {mode}.",
    "A {type} at a {pace} tempo: the {instrument} over a drone, {meter} time, {tonic} {mode}.",
    "You hear the {instrument} in a {meter} {type}; the pace is {pace} and the key is {tonic} {mode}.",
)
_TITLE_FIRST = "Amber Broken Copper Crooked Distant Drowsy Golden Hollow Merry Northern Paper Quiet Silver Windy"
_TITLE_LAST = "Bridge Candle Clock Ferry Garden Harbour Heron Kettle Lantern Meadow Mill Orchard River Stair Weaver"


def compose(seed: int, index: int, seconds: float = 6.0) -> tuple[np.ndarray, int, dict[str, Any]]:
    """One piece.

    Args:
        seed: decides the whole corpus.
        index: number of the piece, from 0.
        seconds: its length, from 1 to 60.

    Returns:
        waveform, (frames,) or (frames, 2) float32 in [-1, 1]; its sample rate in Hz; its metadata.
    """
    metadata = describe(seed, index, seconds)
    rate = _pick(seed, index, 7, SAMPLE_RATES)
    rng = np.random.default_rng([seed, 1, index])
    melody, accompaniment = (_play(notes, round(seconds * rate), rate, rng) for notes in _score(metadata, seconds, rng))
    if _pick(seed, index, 8, (1, 1, 2)) == 1:
        mix = melody + rng.uniform(0.35, 0.55) * accompaniment
    else:  # the melody to one side, the accompaniment to the other
        left, right = rng.permutation(np.array([0.6, 1.0], np.float32))
        mix = np.stack([left * melody + 0.45 * right * accompaniment, right * melody + 0.45 * left * accompaniment], 1)
    mix.T[..., -(rate // 5) :] *= np.linspace(1, 0, rate // 5, dtype=np.float32)  # fade out
    return mix * np.float32(rng.uniform(0.5, 0.9) / np.abs(mix).max()), rate, metadata


def describe(seed: int, index: int, seconds: float = 6.0) -> dict[str, Any]:
    """The metadata of a piece, without playing it; arguments as of `compose`."""
    rng = np.random.default_rng([seed, 2, index])
    kind = _pick(seed, index, 3, tuple(RHYTHMS))
    pace = _pick(seed, index, 4, tuple(PACES))
    facts: dict[str, Any] = {
        "title": f"The {rng.choice(_TITLE_FIRST.split())} {rng.choice(_TITLE_LAST.split())}",
        "type": kind,
        "meter": RHYTHMS[kind].meter,
        "mode": _pick(seed, index, 5, tuple(MODES)),
        "tonic": _pick(seed, index, 6, tuple(TONICS)),
        "instrument": _pick(seed, index, 9, tuple(INSTRUMENTS)),
        "pace": pace,
        "qpm": int(rng.integers(*PACES[pace], endpoint=True)),
    }
    return facts | {"caption": _pick(seed, index, 10, CAPTIONS).format(**facts), "seconds": round(float(seconds), 3)}


def _pick(seed: int, index: int, stream: int, values: Sequence[Any]) -> Any:
    """A value that is random, yet balanced: consecutive blocks of indices each go through all values."""
    block, place = divmod(index, len(values))
    return values[np.random.default_rng([seed, stream, block]).permutation(len(values))[place]]


class _Note(NamedTuple):
    """Start and length are in seconds; the instrument is known by its name."""

    instrument: str
    hertz: float
    start: float
    length: float
    gain: float


def _score(metadata: dict[str, Any], seconds: float, rng: np.random.Generator) -> tuple[list[_Note], list[_Note]]:
    """The notes of the melody and of the accompaniment."""
    rhythm, scale, tonic = RHYTHMS[metadata["type"]], MODES[metadata["mode"]], TONICS[metadata["tonic"]]
    instrument = metadata["instrument"]
    sixteenth = 15 / metadata["qpm"]
    bar = 2 * len(rhythm.accompaniment)  # sixteenths, as all positions and lengths in a bar
    beat = 6 if rhythm.meter == "6/8" else 4
    progression = PROGRESSIONS[rng.integers(len(PROGRESSIONS))]
    lead = rng.uniform(0, 0.1)
    melody: list[_Note] = []
    drone = ((1, 0.35), (1.5, 0.1), (2, 0.28))  # with more of the fifth, that would pass for the tonic
    accompaniment = [_Note("drone", ratio * HERTZ[tonic - 12], 0, seconds, gain) for ratio, gain in drone]
    step = 0  # of the scale, above the tonic, on which the melody begins
    for number in range(int((seconds - lead) / (bar * sixteenth)) + 1):
        root = progression[number % len(progression)]
        start = lead + number * bar * sixteenth
        position = 0
        for length in map(int, rhythm.bars[rng.integers(len(rhythm.bars))]):
            if number or position:  # else the very first note
                step = _next_step(step, root, position % beat == 0, rng)
            hertz = HERTZ[tonic + 12 * (INSTRUMENTS[instrument].octave + step // 7) + scale[step % 7]]
            gain = 1.0 if position == rhythm.accent else 0.8 if position % beat == 0 else 0.7
            melody.append(_Note(instrument, hertz, start + position * sixteenth, 0.9 * length * sixteenth, gain))
            position += length
        triad = [HERTZ[tonic - 12 + scale[(root + third) % 7]] for third in (0, 2, 4)]
        for eighth, letter in enumerate(rhythm.accompaniment):
            when = start + 2 * eighth * sixteenth
            if letter == "b":
                accompaniment.append(_Note("chord", triad[0], when, 0.3, 1.0))
                accompaniment.append(_Note("drum", 85, when, 0.12, 0.6 if eighth else 1.2))
            elif letter == "c":  # two octaves up, where a mel spectrogram tells semitones apart
                accompaniment.extend(_Note("chord", 4 * hertz, when, 0.3, 0.4) for hertz in triad)
    return melody, accompaniment


def _next_step(step: int, root: int, strong: bool, rng: np.random.Generator) -> int:
    """Strong beats take a note of the triad, others move along the scale; all stay within two octaves."""
    move = int(rng.choice((-2, -1, -1, 1, 1, 2)))
    target = step + move if -2 <= step + move <= 8 else step - move
    if not strong:
        return target
    triad = [s for s in range(-3, 10) if (s - root) % 7 in (0, 2, 4) and s != step]
    return min(triad, key=lambda s: abs(s - target))


class _Tone:
    """A pitch, its length and the ways to synthesise it; each of them returns (frames,) float32."""

    def __init__(self, hertz: float, frames: int, rate: int, rng: np.random.Generator) -> None:
        self.hertz, self.rate, self.rng = hertz, rate, rng
        self.time = np.arange(frames, dtype=np.float32) / rate  # seconds
        self.k = np.arange(1, max(1, min(40, int(0.45 * rate / hertz))) + 1)  # harmonics that do not alias

    def cycles(self, ratio: float = 1.0, vibrato: float = 0.0) -> np.ndarray:
        """Phase in cycles, float64; `vibrato` is the relative swing of the frequency, 5.5 times a second."""
        cycles = np.arange(len(self.time)) * (ratio * self.hertz / self.rate)
        if vibrato:
            speed = 2 * np.pi * 5.5
            cycles += self.hertz * vibrato / speed * (1 - np.cos(speed * self.time))
        return cycles

    def periodic(self, amplitudes: Any, ratio: float = 1.0, vibrato: float = 0.0) -> np.ndarray:
        """Additive synthesis: a sum of harmonics of random common phase, read from a table of one cycle."""
        points = 8192
        spectrum = np.zeros(points // 2 + 1, complex)
        spectrum[1 : len(amplitudes) + 1] = -0.5j * points * np.asarray(amplitudes)
        table = np.fft.irfft(spectrum).astype(np.float32)
        place = points * (self.cycles(ratio, vibrato) + self.rng.random())
        return table[place.astype(np.int64) & (points - 1)]

    def ringing(self, amplitudes: np.ndarray, decays: np.ndarray) -> np.ndarray:
        """Harmonics that die away at different speeds (`decays` in seconds), read from one table for each cycle."""
        points = 256
        cycle = np.arange(int(self.time[-1] * self.hertz) + 3)[:, None]
        spectrum = np.zeros((len(cycle), points // 2 + 1), np.complex64)
        spectrum[:, self.k] = -0.5j * points * amplitudes * np.exp(-cycle / (self.hertz * decays))
        table = np.fft.irfft(spectrum, points).astype(np.float32).ravel()
        place = points * self.cycles()
        left = place.astype(np.int64)
        return table[left] + (place - left).astype(np.float32) * (table[left + 1] - table[left])

    def partials(self, *partials: tuple[float, float, float]) -> np.ndarray:
        """Inharmonic partials of struck metal or wood: (ratio, amplitude, decay in seconds) each."""
        total = np.zeros_like(self.time)
        for ratio, amplitude, decay in partials:
            if ratio * self.hertz < 0.45 * self.rate:
                total += amplitude * np.sin(2 * np.pi * ratio * self.hertz * self.time) * np.exp(-self.time / decay)
        return total

    def noise(self) -> np.ndarray:
        return self.rng.standard_normal(len(self.time), np.float32)


def _fiddle(tone: _Tone) -> np.ndarray:
    """A sawtooth through the resonances of a body."""
    resonances = sum(np.exp(-((np.log2(tone.k * tone.hertz / f) / 0.3) ** 2)) for f in (290, 480, 1100, 2700))
    return tone.periodic((0.2 + resonances) / tone.k, vibrato=0.012) + 0.01 * tone.noise()


def _horn(tone: _Tone) -> np.ndarray:
    """FM as in Chowning's brass (1973): the louder, the brighter."""
    phase = (2 * np.pi * (tone.cycles() % 1)).astype(np.float32)
    return np.sin(phase + np.minimum(tone.time / 0.08, 1) * (2.2 + 1.5 * np.exp(-tone.time / 0.15)) * np.sin(phase))


def _guitar(tone: _Tone) -> np.ndarray:
    """Karplus and Strong's string (1983), solved: each turn of its loop multiplies harmonic k by cos(pi k f / rate)."""
    burst = np.exp(2j * np.pi * tone.rng.random(len(tone.k))) / tone.k**0.5
    loss = -tone.hertz * np.log(np.cos(np.pi * tone.k * tone.hertz / 48_000).clip(0.05))
    return tone.ringing(burst, 1 / (loss + 1 / 0.9))


def _harpsichord(tone: _Tone) -> np.ndarray:
    """A string plucked near its end, with a four-foot stop (an octave higher) beside it."""
    amplitudes = np.abs(np.sin(0.11 * np.pi * tone.k)) * np.where(tone.k % 2, 1, 1.8)
    return tone.ringing(amplitudes * np.exp(2j * np.pi * tone.rng.random(len(tone.k))), 0.8 / (1 + 0.04 * tone.k))


def _synth_pad(tone: _Tone) -> np.ndarray:
    """Subtractive: three sawtooth waves out of tune, through a low-pass filter at 1,200 Hz."""
    filtered = 1 / tone.k / (1 + (tone.k * tone.hertz / 1200) ** 4) ** 0.5
    return tone.periodic(filtered, 0.992) + tone.periodic(filtered) + tone.periodic(filtered, 1.009)


@dataclass(frozen=True)
class Instrument:
    """A timbre. `octave` is its register above the tonic's; `attack` and `release` are in seconds."""

    octave: int
    attack: float
    release: float
    voice: Callable[[_Tone], np.ndarray]


INSTRUMENTS = {
    "flute": Instrument(1, 0.05, 0.06, lambda t: t.periodic((1, 0.4, 0.12, 0.04), vibrato=0.005) + 0.03 * t.noise()),
    "whistle": Instrument(2, 0.01, 0.03, lambda t: t.periodic((1, 0.05)) + 0.4 * np.exp(-t.time / 0.015) * t.noise()),
    "clarinet": Instrument(0, 0.03, 0.04, lambda t: t.periodic(np.where(t.k % 2, 1, 0.03) / t.k)),
    "reed organ": Instrument(0, 0.02, 0.03, lambda t: t.periodic(t.k**-0.6) + t.periodic(t.k**-0.6, ratio=1.006)),
    "fiddle": Instrument(0, 0.06, 0.06, _fiddle),
    "horn": Instrument(-1, 0.04, 0.06, _horn),
    "guitar": Instrument(-1, 0.002, 0.15, _guitar),
    "harpsichord": Instrument(0, 0.001, 0.08, _harpsichord),
    "marimba": Instrument(0, 0.002, 0.2, lambda t: t.partials((1, 1, 0.16), (3.93, 0.4, 0.05), (9.2, 0.15, 0.02))),
    "music box": Instrument(2, 0.001, 0.4, lambda t: t.partials((1, 1, 0.5), (2.76, 0.5, 0.3), (5.4, 0.3, 0.12))),
    "bass": Instrument(-2, 0.004, 0.06, lambda t: t.ringing(1 / t.k, 0.7 / t.k**0.8)),
    "synth pad": Instrument(0, 0.09, 0.25, _synth_pad),
}
ACCOMPANISTS = {  # the same under every melody, and plain
    "drone": Instrument(0, 0.01, 0.01, lambda t: t.periodic((1, 0.5, 0.25, 0.12))),
    "chord": Instrument(0, 0.008, 0.1, lambda t: t.periodic((1, 0.5, 0.25, 0.12)) * np.exp(-t.time / 0.12)),
    "drum": Instrument(0, 0.001, 0.03, lambda t: np.exp(-t.time / 0.03) * (np.sin(534 * t.time) + 0.15 * t.noise())),
}


def _play(notes: list[_Note], frames: int, rate: int, rng: np.random.Generator) -> np.ndarray:
    """The notes as (frames,) float32 of RMS 1. Equal notes are synthesised once; a tune has few others."""
    track = np.zeros(frames, np.float32)
    rendered: dict[Any, np.ndarray] = {}
    for note in notes:
        first = round(note.start * rate)
        if first >= frames:
            continue
        if (key := (note.instrument, note.hertz, note.length)) not in rendered:
            player = (INSTRUMENTS | ACCOMPANISTS)[note.instrument]
            tone = _Tone(note.hertz, round((note.length + player.release) * rate), rate, rng)
            attack = min(player.attack, note.length / 3)  # or the sixteenths would be lost
            envelope = np.minimum(tone.time / attack, (tone.time[-1] - tone.time) / player.release)
            rendered[key] = np.minimum(envelope, 1) * player.voice(tone)
        sound = rendered[key][: frames - first]
        track[first : first + len(sound)] += np.float32(note.gain) * sound
    return track / np.sqrt(np.mean(np.square(track)))


def write_demo(
    folder: Path,
    train: int = 1536,
    val: int = 384,
    shard_rows: int = 64,
    seed: int = 0,
    seconds: float = 6.0,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Writes train-00000.tar, val-00000.tar, ... and their index, one process for each core.

    Shards that are already there are kept, so that an interrupted call can be repeated.

    Args:
        folder: where they go; made when missing.
        train: number of pieces for training.
        val: number of pieces for validation, none of which is in training.
        shard_rows: pieces in a shard; the last one may have fewer.
        seed, seconds: as of `compose`.
        progress: called with (pieces there, pieces wanted), first when the kept shards are known.

    Raises:
        DataError: a number makes no sense, or the folder holds another corpus or another job works in it.
        ConfigError: the folder cannot be written.
    """
    if min(train, val) < 0 or not 0 < train + val <= VAL_FIRST:
        raise DataError(f"train is {train} and val is {val}; neither may be negative, nor both 0")
    if shard_rows < 1 or seed < 0 or not 1 <= seconds <= 60:
        raise DataError(f"need shard_rows >= 1, seed >= 0, 1 <= seconds <= 60, not {shard_rows}, {seed}, {seconds}")
    shards = {
        f"{split}-{number:05d}.tar": range(first + start, first + min(start + shard_rows, rows))
        for split, first, rows in (("train", 0, train), ("val", VAL_FIRST, val))
        for number, start in enumerate(range(0, rows, shard_rows))
    }
    try:
        with alone_in(folder):
            there = {path.name: path for split in ("train", "val") for path in sorted(folder.glob(f"{split}-*.tar"))}
            for name, path in there.items():
                if name not in shards or not _holds(path, shards[name], seed, seconds):
                    raise DataError(f"{path} is of another corpus than you ask for; delete it or choose another folder")
            done = sum(len(shards[name]) for name in there)
            report = progress or (lambda done, total: None)
            report(done, train + val)
            missing = [name for name in shards if name not in there]
            cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
            # The workers leave Ctrl-C to this process: they end their shards, and nothing is half written.
            deaf = partial(signal.signal, signal.SIGINT, signal.SIG_IGN)
            with ProcessPoolExecutor(max(1, min(len(missing), cores)), initializer=deaf) as pool:
                jobs = [pool.submit(_write_shard, folder / name, shards[name], seed, seconds) for name in missing]
                try:
                    for job in as_completed(jobs):
                        done += job.result()
                        report(done, train + val)
                finally:  # after an error, do not make the other shards before saying what went wrong
                    pool.shutdown(cancel_futures=True)
            index = {"format": 1, "rows": {name: len(indices) for name, indices in shards.items()}}
            write_whole(folder / "muser-index.json", json.dumps(index, indent=1).encode())
    except OSError as error:
        raise DataError(f"cannot write the demo corpus to {folder}: {error.strerror or error}") from None


def _write_shard(path: Path, indices: range, seed: int, seconds: float) -> int:
    """Writes one shard and returns its number of pieces."""
    buffer = io.BytesIO()
    with TarWriter(buffer, user="muser", group="muser", mtime=0, encoder=False) as tar:
        for index in indices:
            waveform, rate, metadata = compose(seed, index, seconds)
            extension = FORMATS[index % len(FORMATS)]
            key = f"{path.name.partition('-')[0]}-{index % VAL_FIRST:06d}"
            encoded = _encode(waveform, rate, extension)
            tar.write({"__key__": key, "json": json.dumps(metadata).encode(), extension: encoded})
    write_whole(path, buffer.getvalue())
    return len(indices)


def _encode(waveform: np.ndarray, rate: int, extension: str) -> bytes:
    buffer = io.BytesIO()
    channels = waveform.size // len(waveform)
    with soundfile.SoundFile(buffer, "w", rate, channels, format=extension.upper()) as file:
        for start in range(0, len(waveform), rate):  # libsndfile 1.2 crashes on a minute of Vorbis in one call
            file.write(waveform[start : start + rate])
    return buffer.getvalue()


def _holds(path: Path, indices: range, seed: int, seconds: float) -> bool:
    """Whether an existing shard has these pieces, judged by its length, first and last metadata."""
    try:
        with tarfile.open(path) as tar:
            members = [member for member in tar if member.name.endswith(".json")]
            ends = [json.load(file) for m in members[:1] + members[-1:] if (file := tar.extractfile(m))]
    except (tarfile.TarError, ValueError):
        return False
    return len(members) == len(indices) and ends == [describe(seed, i, seconds) for i in (indices[0], indices[-1])]
