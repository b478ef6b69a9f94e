import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from muser_dist.data.augment import augment
from muser_dist.data.config import AugmentConfig
from muser_dist.errors import ConfigError

RATE = 16_000
TIME = np.arange(RATE) / RATE
LOW, HIGH = (0.3 * np.sin(2 * np.pi * hertz * TIME).astype(np.float32) for hertz in (200, 6000))


def apply(waveform, seed=0, **settings):
    return augment(waveform, RATE, AugmentConfig(**settings), np.random.default_rng(seed))


def level(waveform, hertz) -> float:
    return float(np.abs(np.fft.rfft(waveform))[hertz])


def test_nothing_is_changed_unless_chance_selects_it():
    np.testing.assert_array_equal(apply(LOW), LOW)
    changed = [not np.array_equal(apply(LOW, seed, polarity=0.3), LOW) for seed in range(300)]
    assert 60 < sum(changed) < 120


def test_polarity_shift_and_gain():
    np.testing.assert_array_equal(apply(LOW, polarity=1), -LOW)
    np.testing.assert_allclose(apply(LOW, gain=1, gain_db=(6.0, 6.0)), LOW * 10**0.3, rtol=1e-5)
    ramp = np.linspace(0, 1, 100, dtype=np.float32)
    moved = apply(ramp, shift=1)
    assert not np.array_equal(moved, ramp)
    np.testing.assert_array_equal(np.sort(moved), ramp)


def test_a_low_pass_filter_has_3_db_at_its_cutoff_and_12_db_an_octave():
    filtered = apply(LOW + HIGH, low_pass=1, low_pass_hz=(1500.0, 1500.0))
    assert level(filtered, 200) == pytest.approx(level(LOW, 200), rel=1e-2)
    assert level(filtered, 6000) == pytest.approx(level(HIGH, 6000) / 16, rel=2e-2)  # two octaves above
    at_cutoff = apply(HIGH, low_pass=1, low_pass_hz=(6000.0, 6000.0))
    assert level(at_cutoff, 6000) == pytest.approx(level(HIGH, 6000) / np.sqrt(2), rel=1e-2)


@given(st.floats(-10, 40), st.integers(0, 2**32))
def test_noise_has_the_power_that_the_ratio_says(ratio, seed):
    noise = apply(LOW, seed, noise=1, noise_snr_db=(ratio, ratio)) - LOW
    measured = 10 * np.log10(np.mean(LOW**2) / np.mean(noise.astype(np.float64) ** 2))
    assert measured == pytest.approx(ratio, abs=0.1)


def test_a_probability_changes_nothing_else():
    both = apply(LOW, 3, polarity=1, gain=1)
    np.testing.assert_allclose(both, -apply(LOW, 3, gain=1))


@pytest.mark.parametrize(
    "settings", [{"noise": 1.5}, {"gain": -0.1}, {"gain_db": (1.0, 0.0)}, {"low_pass_hz": (0.0, 9.0)}]
)
def test_settings_that_make_no_sense(settings):
    with pytest.raises(ConfigError, match=r"data\.augment\."):
        AugmentConfig(**settings)
