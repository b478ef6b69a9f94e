"""Acoustic fingerprints, by which copies of a recording find each other whatever their encoding.

Haitsma and Kalker, "A Highly Robust Audio Fingerprinting System" (ISMIR 2002): 32 bits for each
frame say whether the difference between neighbouring bands grows or falls in time. Two clips are
the same recording when some of these words are equal and, aligned there, less than a quarter of all
bits differ. Most copies are found through other codecs, sample rates, channels and loudness, and
with a shifted excerpt, as long as 3 s of the two overlap. What is not found: another speed or
pitch, other performances, clips shorter than 3.4 s, and some clips of bare sine-like tones, between
which the bits tell of the codec.

Departures from the paper: frames hop by 1/16 of their length, not 1/32, which halves the memory;
frames that are nearly silent are no evidence; and the limit is 25 % of the bits, not 35 %, because
clips of one synthesizer in one key come close to 25 without being copies.
"""

from collections.abc import Iterator

import numpy as np

RATE = 5_500
"""Sample rate in Hz of the waveform that fingerprints are made from."""

LONGEST = 512
"""Most sub-fingerprints of a clip."""

_FRAME, _HOP = 2048, 128  # samples: 0.37 s and 23 ms

SECONDS = (_FRAME + LONGEST * _HOP) / RATE
"""Length of the excerpt that gives the most sub-fingerprints: 12.3 s."""

_EDGES = np.rint(np.geomspace(300, 2000, 34) * _FRAME / RATE).astype(np.int64)  # of 33 bands, in bins of the FFT

# Against the loudest frame: below, bits tell of dither and of codecs.
_SILENCE = 1e-6

# Of 80 demo pieces, 78 are found as mp3, 76 as ogg, and 73 as ogg with 1.3 s cut off; copies have 9 % in
# the median. The nearest two different pieces of 1,100 have 26 %.
_MOST_ERRORS = 0.25

# Fewer sub-fingerprints (3 s) may agree by chance.
_LEAST_OVERLAP = 128

# Rows of a common word that each row is compared with. Copies share many words, and are next to
# each other at the rare ones, so that few neighbours find them all.
_NEIGHBOURS = 4

# A shared word is looked at closely when these words before and after it differ by less than the paper's limit.
_AROUND, _MOST_ERRORS_AROUND = 8, 0.35

_AT_ONCE, _HITS_AT_ONCE = 1 << 24, 1 << 18

_BITS = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1).sum(axis=1, dtype=np.uint8)


def fingerprint(waveform: np.ndarray) -> np.ndarray:
    """The fingerprint of an excerpt.

    Args:
        waveform: (samples,) mono at `RATE`, of any scale.

    Returns:
        (n,) uint32, n at most `LONGEST`: one sub-fingerprint for each 23 ms, 0 where there is
        near silence; empty when the waveform is shorter than 0.4 s.
    """
    if len(waveform) < _FRAME + _HOP:
        return np.zeros(0, np.uint32)
    frames = np.lib.stride_tricks.sliding_window_view(waveform, _FRAME)[::_HOP][: LONGEST + 1]
    power = np.abs(np.fft.rfft(frames * np.hanning(_FRAME).astype(np.float32))) ** 2
    bands = np.add.reduceat(power[:, : _EDGES[-1]], _EDGES[:-1], axis=1)
    bits = np.diff(bands[:, :-1] - bands[:, 1:], axis=0) > 0
    words = np.packbits(bits, axis=1).view(">u4")[:, 0].astype(np.uint32)
    energy = bands.sum(axis=1)
    words[energy[1:] <= _SILENCE * energy.max()] = 0
    return words


def bit_errors(one: np.ndarray, other: np.ndarray, shift: int) -> float:
    """Share of bits that differ between two fingerprints, one[shift + i] beside other[i].

    Returns:
        0 to 1; 1 where less than 3 s of both overlap and are not silent.
    """
    one, other = one[max(0, shift) :], other[max(0, -shift) :]
    overlap = min(len(one), len(other))
    one, other = one[:overlap], other[:overlap]
    heard = (one != 0) & (other != 0)
    words = int(heard.sum())
    if words < _LEAST_OVERLAP:
        return 1.0
    return int(_BITS[(one ^ other)[heard].view(np.uint8)].sum(dtype=np.int64)) / (32 * words)


def recordings(prints: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Which rows hold the same recording.

    An inverted index gives candidates. It is made for a part of all words at a time, so that it
    takes about a GB at most, for any number of rows.

    Args:
        prints: (words,) uint32, the fingerprints of all rows one after the other.
        ends: (rows,) int64, where each row's ends.

    Returns:
        (rows,) int64: for each row the first row that holds its recording, perhaps itself.
    """
    first = list(range(len(ends)))

    def find(row: int) -> int:
        while first[row] != row:
            first[row] = row = first[first[row]]
        return row

    starts = np.append(0, ends[:-1])
    for one, other in _candidates(prints, ends):
        rows, others = (np.searchsorted(ends, at, side="right") for at in (one, other))
        shifts = (one - starts[rows]) - (other - starts[others])
        for row, match, shift in zip(rows.tolist(), others.tolist(), shifts.tolist(), strict=True):
            low, high = sorted((find(row), find(match)))
            if low == high:
                continue
            words, matching = (prints[starts[i] : ends[i]] for i in (row, match))
            if bit_errors(words, matching, shift) < _MOST_ERRORS:
                first[high] = low
    return np.array([find(row) for row in range(len(ends))], np.int64)


def _candidates(prints: np.ndarray, ends: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields where two rows share a word and look alike around it: (hits,) indices into prints each."""
    parts = len(prints) // _AT_ONCE + 1
    for part in range(parts):
        words, at = _index(prints, ends, part, parts)
        for distance in range(1, _NEIGHBOURS + 1):
            same = np.flatnonzero(words[distance:] == words[:-distance])
            for start in range(0, len(same), _HITS_AT_ONCE):
                some = same[start : start + _HITS_AT_ONCE]
                one, other = at[some], at[some + distance]
                # Most words that rows share are chance. This is no judgement yet, so rows' ends do not matter.
                around = np.arange(-_AROUND, _AROUND + 1)
                a, b = (prints.take(place[:, None] + around, mode="clip") for place in (one, other))
                alike = _BITS[(a ^ b).view(np.uint8)].sum(axis=1, dtype=np.int64) < _MOST_ERRORS_AROUND * 32 * len(
                    around
                )
                yield one[alike], other[alike]


def _index(prints: np.ndarray, ends: np.ndarray, part: int, parts: int) -> tuple[np.ndarray, np.ndarray]:
    """One part of all words, sorted, and where each row that has them has them first: (entries,) each."""
    keys, places = [np.zeros(0, np.uint64)], [np.zeros(0, np.int64)]
    for start in range(0, len(prints), _AT_ONCE):
        block = prints[start : start + _AT_ONCE]
        at = np.flatnonzero((block != 0) & (block % np.uint32(parts) == part))
        rows = np.searchsorted(ends, at + start, side="right").astype(np.uint64)
        keys.append(block[at].astype(np.uint64) << np.uint64(32) | rows)
        places.append(at + start)
    distinct, first = np.unique(np.concatenate(keys), return_index=True)
    return distinct >> np.uint64(32), np.concatenate(places)[first]
