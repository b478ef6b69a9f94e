"""The demo corpus: short pieces that this module composes and plays, so nothing is downloaded.

What the metadata says can be heard: the rhythm makes the type and the meter, triads and a drone
make tonic and mode, the tempo makes the pace. The instruments are synthetic and named after what
they imitate. Every piece is a function of (seed, index) alone, and in each block of consecutive
indices every value of a field occurs equally often.
"""

import io
import json
import os
import tarfile
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import soundfile

from muser_dist.errors import DataError

T = TypeVar("T")

FORMATS = ("flac", "ogg", "mp3")
SAMPLE_RATES = (22_050, 32_000, 44_100, 48_000)

VAL_FIRST = 720_720_000
"""Index of the first validation piece: out of training's reach, and a multiple of 1 to 16, so that
blocks of every field begin there."""


@dataclass(frozen=True)
class Rhythm:
    """What makes a piece a jig or a waltz.

    Attributes:
        meter: time signature.
        bars: melodies of one bar, as lengths of their notes in sixteenths.
        accompaniment: one letter for each eighth of a bar: b bass and drum, c chord, - nothing.
        accent: sixteenth of the bar on which the strongest note falls.
    """

    meter: str
    bars: tuple[str, ...]
    accompaniment: str
    accent: int = 0


RHYTHMS = {
    "jig": Rhythm("6/8", ("222222", "222222", "42222"), "b-cb-c"),
    "siciliana": Rhythm("6/8", ("312312", "31242"), "bccbcc"),
    "reel": Rhythm("4/4", ("22222222", "22222222", "4222222"), "b-c-b-c-"),
    "hornpipe": Rhythm("4/4", ("31313131", "313144"), "b-b-b-b-"),
    "waltz": Rhythm("3/4", ("444", "84", "444"), "b-c-c-"),
    "mazurka": Rhythm("3/4", ("3144", "318"), "b-c---", accent=4),
    "polka": Rhythm("2/4", ("112112", "11222"), "bcbc"),
    "march": Rhythm("2/4", ("314", "44", "314"), "b-b-"),
}
MODES = {"major": (0, 2, 4, 5, 7, 9, 11), "minor": (0, 2, 3, 5, 7, 8, 11)}  # semitones; minor is the harmonic one
TONICS = {"C": 60, "D": 62, "E": 64, "F": 65, "G": 67, "A": 69}  # as MIDI notes
PACES = {"slow": (76, 84), "moderate": (108, 120), "fast": (156, 176)}  # quarters per minute, both ends included
PROGRESSIONS = ((0, 0, 4, 0), (0, 0, 3, 0), (0, 3, 0, 4))  # root of each bar's triad, in steps of the scale

CAPTIONS = (
    "A {pace} {type} for {instrument} in {tonic} {mode}, in {meter} time.",
    "This {type} in {tonic} {mode} is played on the {instrument} at a {pace} pace, in {meter} time.",
    "The {instrument} plays a {pace} {type} in {meter} time, in the key of {tonic} {mode}.",
    "In {tonic} {mode} and {meter} time, a {type} on the {instrument}, {pace} in tempo.",
    "A {type} at a {pace} tempo: the {instrument} over a drone, {meter} time, {tonic} {mode}.",
    "You hear the {instrument} in a {meter} {type}; the pace is {pace} and the key is {tonic} {mode}.",
)
_TITLE_FIRST = "Amber Broken Copper Crooked Distant Drowsy Golden Hollow Merry Northern Paper Quiet Restless Silver Windy"
_TITLE_LAST = "Bridge Candle Clock Ferry Garden Harbour Heron Kettle Lantern Meadow Mill Orchard River Stair Weaver"


def compose(seed: int, index: int, seconds: float = 6.0) -> tuple[np.ndarray, int, dict[str, Any]]:
    """One piece.

    Args:
        seed: decides the whole corpus.
        index: number of the piece, from 0.
        seconds: its length.

    Returns:
        waveform, (frames,) or (frames, 2) float32 in [-1, 1]; its sample rate in Hz; its metadata.
    """
    metadata = describe(seed, index, seconds)
    rate = _pick(seed, index, 7, SAMPLE_RATES)
    rng = np.random.default_rng([seed, 1, index])
    melody, accompaniment = _perform(metadata, round(seconds * rate), rate, rng)
    if _pick(seed, index, 8, (1, 1, 2)) == 1:
        mix = melody + rng.uniform(0.35, 0.55) * accompaniment
    else:  # the melody to one side, the accompaniment to the other
        left, right = rng.permutation(np.array([0.6, 1.0], np.float32))
        mix = np.stack([left * melody + 0.45 * right * accompaniment, right * melody + 0.45 * left * accompaniment], 1)
    fade = np.linspace(1, 0, min(len(mix), rate // 5), dtype=np.float32)
    mix[-len(fade) :] *= fade if mix.ndim == 1 else fade[:, None]
    return mix * np.float32(rng.uniform(0.5, 0.9) / np.abs(mix).max()), rate, metadata


def describe(seed: int, index: int, seconds: float = 6.0) -> dict[str, Any]:
    """The metadata of a piece, without playing it; arguments as of `compose`."""
    rng = np.random.default_rng([seed, 2, index])
    kind = _pick(seed, index, 3, tuple(RHYTHMS))
    pace = _pick(seed, index, 4, tuple(PACES))
    slowest, fastest = PACES[pace]
    facts: dict[str, Any] = {
        "title": f"The {rng.choice(_TITLE_FIRST.split())} {rng.choice(_TITLE_LAST.split())}",
        "type": kind,
        "meter": RHYTHMS[kind].meter,
        "mode": _pick(seed, index, 5, tuple(MODES)),
        "tonic": _pick(seed, index, 6, tuple(TONICS)),
        "instrument": _pick(seed, index, 9, tuple(INSTRUMENTS)),
        "pace": pace,
        "qpm": int(rng.integers(slowest, fastest + 1)),
    }
    return facts | {"caption": _pick(seed, index, 10, CAPTIONS).format(**facts), "seconds": round(seconds, 3)}


def _pick(seed: int, index: int, stream: int, values: Sequence[T]) -> T:
    """A value that is random, yet balanced: consecutive blocks of indices each go through all values."""
    block, place = divmod(index, len(values))
    return values[np.random.default_rng([seed, stream, block]).permutation(len(values))[place]]


# --- The score: who plays what when ---------------------------------------------------------------------------------


def _perform(
    metadata: dict[str, Any], frames: int, rate: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Melody and accompaniment, each (frames,) float32 of RMS 1."""
    rhythm, scale = RHYTHMS[metadata["type"]], MODES[metadata["mode"]]
    instrument = INSTRUMENTS[metadata["instrument"]]
    tonic = TONICS[metadata["tonic"]]
    sixteenth = 15 / metadata["qpm"]
    bar = 2 * len(rhythm.accompaniment)
    progression = PROGRESSIONS[rng.integers(len(PROGRESSIONS))]
    lead = rng.uniform(0, 0.1)  # seconds before the first note
    bars = int((frames / rate - lead) / (bar * sixteenth)) + 1

    melody, accompaniment = _Track(frames, rate), _Track(frames, rate)
    drone = _hertz(tonic - 12)
    both = _soft(drone, frames, rate, rng) + 0.8*_soft(2 * drone, frames, rate, rng)+0.3 * _soft(1.5 * drone, frames, rate, rng)
    accompaniment.add("drone", 0, 0.35, lambda: both)

    step = 0  # of the scale, above the tonic
    for number in range(bars):
        root = progression[number % len(progression)]
        start = lead + number * bar * sixteenth
        position = 0
        for length in map(int, rhythm.bars[rng.integers(len(rhythm.bars))]):
            if number or position:  # the very first note is the tonic
                step = _next_step(step, root, position % (6 if rhythm.meter == "6/8" else 4) == 0, rng)
            strength = 1.0 if position == rhythm.accent else 0.75 if position % 4 == 0 else 0.6
            hertz = _hertz(tonic + 12 * instrument.octave + _semitones(step, scale))
            held = round(length * sixteenth * rate)
            melody.add((step, length), start + position * sixteenth, strength, _note(instrument, hertz, held, rate, rng))
            position += length
        triad = [_hertz(tonic - 12 + _semitones(root + third, scale) % 12) for third in (0, 2, 4)]
        for eighth, letter in enumerate(rhythm.accompaniment):
            when = start + 2 * eighth * sixteenth
            if letter == "b":
                accompaniment.add(("bass", root), when, 1.0, lambda: _struck(triad[:1], rate, rng))  # noqa: B023
                accompaniment.add("drum", when, 0.6 if eighth else 1.2, lambda: _drum(rate, rng))
            elif letter == "c":
                accompaniment.add(("chord", root), when, 0.7, lambda: _struck([4 * f for f in triad], rate, rng))  # noqa: B023
    return melody.normalised(), accompaniment.normalised()


def _next_step(step: int, root: int, strong: bool, rng: np.random.Generator) -> int:
    """Strong beats take a note of the triad, others move along the scale; all stay within an octave and a half."""
    move = int(rng.choice((-2, -1, -1, 1, 1, 2)))
    target = step + move
    if target < -2 or target > 8:
        target = step - move
    if strong:
        near = [s for s in range(-3, 10) if (s - root) % 7 in (0, 2, 4)]
        target = min(near, key=lambda s: (abs(s - target), s))
    return target


def _semitones(step: int, scale: Sequence[int]) -> int:
    octave, place = divmod(step, 7)
    return 12 * octave + scale[place]


def _hertz(midi: float) -> float:
    return 440.0 * 2.0 ** ((midi - 69) / 12)


class _Track:
    """Sums sounds into one waveform and renders each of them once: a tune has few distinct notes."""

    def __init__(self, frames: int, rate: int) -> None:
        self.rate = rate
        self.sum = np.zeros(frames, np.float32)
        self.rendered: dict[Any, np.ndarray] = {}

    def add(self, key: Any, seconds: float, gain: float, render: Callable[[], np.ndarray]) -> None:
        """Adds the sound that `key` stands for; `render` makes it when it is new."""
        first = round(seconds * self.rate)
        if first >= len(self.sum):
            return
        if key not in self.rendered:
            self.rendered[key] = render()
        sound = self.rendered[key][: len(self.sum) - first]
        self.sum[first : first + len(sound)] += np.float32(gain) * sound

    def normalised(self) -> np.ndarray:
        return self.sum / np.float32(np.sqrt(np.mean(np.square(self.sum))) + 1e-6)


# --- The sound: every function returns (frames,) float32 at `rate` Hz -------------------------------------------------

_TABLE = 8192  # points of a single-cycle wavetable


def _time(frames: int, rate: int) -> np.ndarray:
    return np.arange(frames, dtype=np.float32) / np.float32(rate)


def _cycles(hertz: float, frames: int, rate: int, vibrato: float = 0.0) -> np.ndarray:
    """Phase in cycles, (frames,) float64; vibrato is the relative swing of the frequency, 5.5 times a second."""
    cycles = np.arange(frames) * (hertz / rate)
    if vibrato:
        speed = np.float32(2 * np.pi * 5.5)
        cycles += hertz * vibrato / speed * (1 - np.cos(speed * _time(frames, rate)))
    return cycles


def _harmonics(hertz: float, rate: int, most: int = 40) -> np.ndarray:
    """Numbers of the harmonics below the Nyquist frequency, so that nothing aliases."""
    return np.arange(1, max(1, min(most, int(0.45 * rate / hertz))) + 1)


def _periodic(amplitudes: np.ndarray | Sequence[float], cycles: np.ndarray) -> np.ndarray:
    """Additive synthesis: a sum of harmonics, through a table of one cycle."""
    spectrum = np.zeros(_TABLE // 2 + 1, complex)
    spectrum[1 : len(amplitudes) + 1] = -0.5j * _TABLE * np.asarray(amplitudes)
    return np.fft.irfft(spectrum).astype(np.float32)[(cycles * _TABLE).astype(np.int64) & (_TABLE - 1)]


def _ringing(amplitudes: np.ndarray, decays: np.ndarray, hertz: float, frames: int, rate: int) -> np.ndarray:
    """Harmonics that die away at different speeds (decays in seconds), through one table for each cycle."""
    points = 256
    cycle = np.arange(int(frames * hertz / rate) + 2)[:, None]
    spectrum = np.zeros((len(cycle), points // 2 + 1), np.complex64)
    spectrum[:, 1 : len(amplitudes) + 1] = -0.5j * points * amplitudes * np.exp(-cycle / (hertz * decays))
    table = np.fft.irfft(spectrum, points).astype(np.float32).ravel()
    place = _cycles(hertz * points, frames, rate)
    left = place.astype(np.int64)
    return table[left] + (place - left).astype(np.float32) * (table[left + 1] - table[left])


def _partials(partials: Sequence[tuple[float, float, float]], hertz: float, frames: int, rate: int) -> np.ndarray:
    """Inharmonic partials of struck metal or wood: (ratio, amplitude, decay in seconds) each."""
    time = _time(frames, rate)
    below = [p for p in partials if p[0] * hertz < 0.45 * rate]
    return sum(np.float32(a) * np.sin(np.float32(2 * np.pi * r * hertz) * time) * np.exp(-time / np.float32(d)) for r, a, d in below)


def _noise(frames: int, rng: np.random.Generator) -> np.ndarray:
    return rng.standard_normal(frames, np.float32)


def _soft(hertz: float, frames: int, rate: int, rng: np.random.Generator) -> np.ndarray:
    """The plain tone of the accompaniment, the same under every instrument."""
    return _periodic((1, 0.5, 0.25, 0.12), _cycles(hertz, frames, rate) + rng.random())


def _struck(hertz: Sequence[float], rate: int, rng: np.random.Generator) -> np.ndarray:
    frames = round(0.4 * rate)
    time = _time(frames, rate)
    envelope = np.minimum(time / 0.008, 1) * np.exp(-time / 0.12)
    return envelope * sum(_soft(f, frames, rate, rng) for f in hertz) / len(hertz) ** 0.5


def _drum(rate: int, rng: np.random.Generator) -> np.ndarray:
    time = _time(round(0.15 * rate), rate)
    return np.exp(-time / 0.03) * (np.sin(2 * np.pi * 85 * time) + 0.15 * _noise(len(time), rng))


def _flute(hertz: float, frames: int, rate: int, rng: np.random.Generator) -> np.ndarray:
    tone = _periodic((1, 0.4, 0.12, 0.04), _cycles(hertz, frames, rate, vibrato=0.005))
    return tone + 0.06 * _noise(frames, rng)


def _whistle(hertz: float, frames: int, rate: int, rng: np.random.Generator) -> np.ndarray:
    chiff = 0.4 * np.exp(-_time(frames, rate) / 0.015) * _noise(frames, rng)
    return _periodic((1, 0.05), _cycles(hertz, frames, rate)) + chiff


def _clarinet(hertz: float, frames: int, rate: int, rng: np.random.Generator) -> np.ndarray:
    k = _harmonics(hertz, rate)
    return _periodic(np.where(k % 2, 1.0, 0.03) / k, _cycles(hertz, frames, rate))


def _reed_organ(hertz: float, frames: int, rate: int, rng: np.random.Generator) -> np.ndarray:
    reed = _harmonics(hertz, rate, 24) ** -0.6  # two ranks of reeds, a little out of tune with each other
    return _periodic(reed, _cycles(hertz, frames, rate)) + _periodic(reed, _cycles(1.006 * hertz, frames, rate))


def _fiddle(hertz: float, frames: int, rate: int, rng: np.random.Generator) -> np.ndarray:
    k = _harmonics(hertz, rate)
    body = 0.2 + sum(np.exp(-((np.log2(k * hertz / f) / 0.3) ** 2)) for f in (290, 480, 1100, 2700))
    return _periodic(body / k, _cycles(hertz, frames, rate, vibrato=0.012)) + 0.01 * _noise(frames, rng)


def _horn(hertz: float, frames: int, rate: int, rng: np.random.Generator) -> np.ndarray:
    """FM as Chowning's brass (1973): the louder, the brighter."""
    time = _time(frames, rate)
    phase = (2 * np.pi * (_cycles(hertz, frames, rate) % 1)).astype(np.float32)
    index = np.minimum(time / 0.08, 1) * (2.2 + 1.5 * np.exp(-time / 0.15))
    return np.sin(phase + index * np.sin(phase))


def _guitar(hertz: float, frames: int, rate: int, rng: np.random.Generator) -> np.ndarray:
    """Karplus and Strong's string (1983), solved: each turn of its loop multiplies harmonic k by cos(pi k f / rate)."""
    k = _harmonics(hertz, rate)
    loss = -hertz * np.log(np.cos(np.pi * k * hertz / 48_000).clip(0.05))
    burst = rng.uniform(0.6, 1, len(k)) * np.exp(2j * np.pi * rng.random(len(k))) / k**0.5
    return _ringing(burst, 1 / (loss + 1 / 0.9), hertz, frames, rate)


def _harpsichord(hertz: float, frames: int, rate: int, rng: np.random.Generator) -> np.ndarray:
    k = _harmonics(hertz, rate)
    plucked = np.abs(np.sin(0.11 * np.pi * k)) * np.where(k % 2, 1, 1.8)  # near the end, with a four-foot stop
    return _ringing(plucked * np.exp(2j * np.pi * rng.random(len(k))), 0.8 / (1 + 0.04 * k), hertz, frames, rate)


def _marimba(hertz: float, frames: int, rate: int, rng: np.random.Generator) -> np.ndarray:
    return _partials(((1, 1, 0.16), (3.93, 0.4, 0.05), (9.2, 0.15, 0.02)), hertz, frames, rate)


def _music_box(hertz: float, frames: int, rate: int, rng: np.random.Generator) -> np.ndarray:
    return _partials(((1, 1, 0.5), (2.76, 0.5, 0.3), (5.4, 0.3, 0.12)), hertz, frames, rate)


def _bass(hertz: float, frames: int, rate: int, rng: np.random.Generator) -> np.ndarray:
    k = _harmonics(hertz, rate, 24)
    return _ringing(1 / k, 0.7 / k**0.8, hertz, frames, rate)


def _synth_pad(hertz: float, frames: int, rate: int, rng: np.random.Generator) -> np.ndarray:
    """Subtractive: three sawtooth waves out of tune, through a low-pass filter at 1,200 Hz."""
    k = _harmonics(hertz, rate)
    filtered = 1 / k / (1 + (k * hertz / 1200) ** 4) ** 0.5
    return sum(_periodic(filtered, _cycles(hertz * cents, frames, rate) + rng.random()) for cents in (0.992, 1, 1.009))


@dataclass(frozen=True)
class Instrument:
    """A timbre. `octave` is its register above the tonic's, `attack` and `release` are in seconds."""

    voice: Callable[[float, int, int, np.random.Generator], np.ndarray]
    octave: int
    attack: float
    release: float


INSTRUMENTS = {
    "flute": Instrument(_flute, 1, 0.05, 0.06),
    "whistle": Instrument(_whistle, 2, 0.01, 0.03),
    "clarinet": Instrument(_clarinet, 0, 0.03, 0.04),
    "reed organ": Instrument(_reed_organ, 0, 0.02, 0.03),
    "fiddle": Instrument(_fiddle, 0, 0.06, 0.06),
    "horn": Instrument(_horn, -1, 0.04, 0.06),
    "guitar": Instrument(_guitar, -1, 0.002, 0.15),
    "harpsichord": Instrument(_harpsichord, 0, 0.001, 0.08),
    "marimba": Instrument(_marimba, 0, 0.002, 0.2),
    "music box": Instrument(_music_box, 2, 0.001, 0.4),
    "bass": Instrument(_bass, -2, 0.004, 0.06),
    "synth pad": Instrument(_synth_pad, 0, 0.09, 0.25),
}


def _note(
    instrument: Instrument, hertz: float, held: int, rate: int, rng: np.random.Generator
) -> Callable[[], np.ndarray]:
    """Plays a note: held for 0.9 of its `held` frames, then released."""

    def render() -> np.ndarray:
        frames = round(0.9 * held + instrument.release * rate)
        time = _time(frames, rate)
        envelope = np.minimum(time / np.float32(instrument.attack), (frames / rate - time) / np.float32(instrument.release))
        return np.minimum(envelope, 1).astype(np.float32) * instrument.voice(hertz, frames, rate, rng).astype(np.float32)

    return render
