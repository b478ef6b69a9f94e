"""Random changes of a waveform, as published recipes use them, each a function of its random numbers."""

import numpy as np

from muser_dist.data.config import AugmentConfig


def augment(waveform: np.ndarray, rate: int, config: AugmentConfig, rng: np.random.Generator) -> np.ndarray:
    """The waveform with the changes that chance selects.

    Args:
        waveform: (samples,) float32 in [-1, 1].
        rate: its rate in Hz.
        config: probabilities and ranges.
        rng: decides; always drawn from equally often, so that a probability changes nothing else.

    Returns:
        (samples,) float32; values may exceed [-1, 1], and are clipped when the crop is quantised.
    """
    chosen, amounts, noise_seed = rng.random(5), rng.random(6), int(rng.integers(2**63))
    if chosen[0] < config.shift:
        waveform = np.roll(waveform, round((amounts[0] - 0.5) * len(waveform)))
    if chosen[1] < config.polarity:
        waveform = -waveform
    if chosen[2] < config.gain:
        waveform = waveform * np.float32(10 ** (_between(config.gain_db, amounts[1]) / 20))
    if chosen[3] < config.low_pass:
        waveform = _low_pass(waveform, rate, _between(config.low_pass_hz, amounts[2]))
    if chosen[4] < config.noise:
        noise = _noise(len(waveform), amounts[3], np.random.default_rng(noise_seed))
        power = float(np.mean(np.square(waveform))) / 10 ** (_between(config.noise_snr_db, amounts[4]) / 10)
        waveform = waveform + noise * np.float32(np.sqrt(power))
    return waveform


def _between(bounds: tuple[float, float], share: float) -> float:
    return bounds[0] + share * (bounds[1] - bounds[0])


def _low_pass(waveform: np.ndarray, rate: int, cutoff: float) -> np.ndarray:
    """A Butterworth magnitude of second order, |H|² = 1 / (1 + (f/f_c)⁴), without phase."""
    spectrum = np.fft.rfft(waveform)
    hertz = np.fft.rfftfreq(len(waveform), 1 / rate)
    return np.fft.irfft(spectrum / np.sqrt(1 + (hertz / cutoff) ** 4), len(waveform)).astype(np.float32)


def _noise(samples: int, colour: float, rng: np.random.Generator) -> np.ndarray:
    """Noise of power 1 whose power density falls with frequency: f^0 (white) to f^-2 (brown)."""
    bins = np.arange(samples // 2 + 1)
    spectrum = rng.standard_normal(len(bins)) + 1j * rng.standard_normal(len(bins))
    spectrum[1:] *= bins[1:] ** -colour
    spectrum[0] = 0
    noise = np.fft.irfft(spectrum, samples)
    return (noise / np.sqrt(np.mean(np.square(noise)) + 1e-20)).astype(np.float32)
