"""`resample_window` against SciPy and NumPy: offsets, aliases, lines, constants, rows of their own."""

from __future__ import annotations

import math
import warnings
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from noisy_windows import RATES, module, noise, rates, seeds
from scipy.signal import resample_poly

from normwear_fast.errors import InputError
from normwear_fast.preprocess import FlatChannelWarning, preprocess, resample_window


@pytest.mark.parametrize("rate", [r for r in RATES if r > 65])
@pytest.mark.parametrize("samples", [11, 390])
def test_resample_window_is_resample_poly(rate: float, samples: int) -> None:
    x = noise(5, 2, math.ceil(samples * rate / 65)) + 3
    y = resample_window(x, rate, samples)
    down, up = module._simple_ratio(rate, 65.0, samples)
    exact = Fraction(rate).limit_denominator(10**6) / 65
    if rate == int(rate):
        assert Fraction(down, up) == exact
    if up > samples:
        down, up = exact.numerator, exact.denominator
    assert abs(down / up - rate / 65) * samples <= 1e-3
    expected = resample_poly(x, up, down, axis=-1, padtype="line")
    expected /= resample_poly(np.ones(x.shape[1]), up, down, padtype="line")  # its tremor
    assert y.shape == (2, samples)
    assert expected.shape[-1] >= samples
    np.testing.assert_allclose(y, expected[:, :samples], rtol=0, atol=1e-12)


def plain_window(x: np.ndarray, rate: float, samples: int, offset: float) -> np.ndarray:
    """Every output as a sum over inputs continued along their line, by scipy's Kaiser window."""
    reach = math.ceil(10 * rate / 65) + 2
    i = np.arange(-reach, max(len(x), math.ceil(samples * rate / 65)) + reach)
    line = x[0] + (x[-1] - x[0]) / max(len(x) - 1, 1) * i
    value = np.where((i >= 0) & (i < len(x)), x[np.clip(i, 0, len(x) - 1)], line)
    u = (np.arange(samples)[:, None] / 65 - offset - i / rate) * 65
    kaiser = np.i0(5 * np.sqrt(np.clip(1 - (u / 10) ** 2, 0, None))) / np.i0(5)
    weights = np.where(np.abs(u) <= 10, np.sinc(u) * kaiser, 0)
    return weights @ value / weights.sum(axis=1)


@pytest.mark.parametrize("rate", [r for r in RATES if r >= 65])
@pytest.mark.parametrize("part", [0.0, 0.3, 0.999999, -0.25])
def test_offsets_shift_the_filter(rate: float, part: float) -> None:
    samples = 130
    x = noise(6, math.ceil(samples * rate / 65)).cumsum()
    x /= np.abs(x).max()
    y = resample_window(x, rate, samples, offset=part / rate)
    expected = plain_window(x, rate, samples, part / rate)
    # Offsets hold to 5e-7 samples; where the rate is made simpler, the last output to 1e-3.
    down, up = module._simple_ratio(rate, 65.0, samples)
    simpler = up <= samples and Fraction(down, up) != Fraction(rate).limit_denominator(10**6) / 65
    tolerance = 3e-3 if simpler else 1e-6
    np.testing.assert_allclose(y, expected, rtol=0, atol=tolerance)


@settings(max_examples=60)
@given(
    rate=st.floats(100, 4000), part=st.floats(0, 0.999), frequency=st.floats(0.2, 15), seed=seeds
)
def test_band_limited_signals_come_through(
    rate: float, part: float, frequency: float, seed: int
) -> None:
    samples, offset = 195, part / rate
    phase = 6.28 * np.random.default_rng(seed).random()
    t = offset + np.arange(math.ceil(samples * rate / 65)) / rate
    y = resample_window(np.sin(2 * np.pi * frequency * t + phase), rate, samples, offset=offset)
    expected = np.sin(2 * np.pi * frequency * np.arange(samples) / 65 + phase)
    inside = slice(11, -11)
    # The pass band's ripple is 2e-3; the drift of a simple fraction adds 1e-3 samples.
    np.testing.assert_allclose(y[inside], expected[inside], rtol=0, atol=4e-3)


def test_what_would_alias_is_removed() -> None:
    t = np.arange(6000) / 1000
    y = resample_window(np.sin(2 * np.pi * 60 * t), 1000, 390)  # would appear at 5 Hz
    assert np.abs(y[11:-11]).max() < 2e-3


@settings(max_examples=80)
@given(rate=rates, samples=st.integers(11, 200), part=st.floats(0, 0.999), slope=st.floats(-5, 5))
def test_lines_stay_lines(rate: float, samples: int, part: float, slope: float) -> None:
    offset = part / rate
    length = max(2, math.ceil(samples * rate / 65))
    seconds = offset + np.arange(length) / rate
    y = resample_window(2 + slope * seconds, rate, samples, offset=offset)
    time = np.arange(samples) / 65
    if rate < 65:
        time = np.clip(time, seconds[0], seconds[-1])  # ends held
    # The filter's first moment is off by up to 5e-3 samples, a simpler fraction by 1e-3 more.
    np.testing.assert_allclose(y, 2 + slope * time, rtol=1e-13, atol=1e-4 * abs(slope))


@settings(max_examples=80)
@given(
    rate=rates, samples=st.integers(11, 200), length=st.integers(1, 300), part=st.floats(0, 0.999)
)
def test_constants_stay_constant(rate: float, samples: int, length: int, part: float) -> None:
    """Windows of any number of raw samples, one and two included, to rounding."""
    y = resample_window(np.full((2, length), 3.0), rate, samples, offset=part / rate)
    assert y.shape == (2, samples)
    np.testing.assert_allclose(y, 3.0, rtol=1e-14, atol=0)


@pytest.mark.parametrize("rate", [65.5, 70.0, 75.0, 100.0, 117.096, 128.0])
def test_a_constant_leaves_no_tremor_on_a_pulse(rate: float) -> None:
    """A raw PPG's constant, 200 times its pulse, which the derivatives' channels would show."""
    t = np.arange(math.ceil(6 * rate) + 1) / rate
    pulse = 0.5 * np.sin(2 * np.pi * 1.3 * t)
    whole = resample_window(100 + pulse, rate, 390)
    np.testing.assert_allclose(whole - 100, resample_window(pulse, rate, 390), rtol=0, atol=1e-11)


@pytest.mark.parametrize("rate", [1.5, 10, 50, 64.9])
def test_below_the_target_rate_it_is_numpy_interp(rate: float) -> None:
    x = noise(8, 3, 40)
    y = resample_window(x, rate, 390, offset=0.4 / rate)
    place = np.arange(390) / 65
    for channel in range(3):
        expected = np.interp(place, 0.4 / rate + np.arange(40) / rate, x[channel])
        np.testing.assert_allclose(y[channel], expected, rtol=0, atol=2e-6)


def test_the_target_rate_is_the_identity() -> None:
    x = noise(9, 2, 390)
    np.testing.assert_array_equal(resample_window(x, 65, 390), x)
    np.testing.assert_array_equal(resample_window(x, 65, 390, offset=1e-9), x)
    shifted = resample_window(x, 65, 390, offset=0.5 / 65)
    assert np.abs(shifted - x).max() > 0.1


@settings(max_examples=50)
@given(rate=rates, samples=st.integers(11, 150), part=st.floats(0, 0.999), seed=seeds)
def test_every_row_is_its_own_to_the_bit(rate: float, samples: int, part: float, seed: int) -> None:
    """Batches of windows and of channels are the windows one by one."""
    x = noise(seed, 3, 2, max(1, round(samples * rate / 65)))
    x[0, 1] *= 1e6
    offset = part / rate
    y = resample_window(x, rate, samples, offset=offset)
    for window in range(3):
        np.testing.assert_array_equal(
            resample_window(x[window], rate, samples, offset=offset), y[window]
        )
        for channel in range(2):
            alone = resample_window(x[window, channel], rate, samples, offset=offset)
            np.testing.assert_array_equal(alone, y[window, channel])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FlatChannelWarning)
        y = preprocess(x, rate, samples=samples, offset=offset)
        for window in range(3):
            for channel in range(2):
                alone = preprocess(x[window, channel], rate, samples=samples, offset=offset)
                np.testing.assert_array_equal(alone, y[window, channel])


def test_rounding_errors_of_an_offset_change_nothing() -> None:
    x = noise(10, 703)
    y = resample_window(x, 117.096, 390, offset=0.003)
    np.testing.assert_array_equal(resample_window(x, 117.096, 390, offset=0.003 + 1e-12), y)


def test_filters_do_not_pile_up() -> None:
    module._cached_filter.cache_clear()
    x = noise(11, 360)
    for part in np.linspace(0, 0.9, 200):
        resample_window(x, 360, 65, offset=part / 360)
    assert module._cached_filter.cache_info().currsize == 128
    resample_window(noise(11, 40_000), 360.001, 7000)
    assert module._cached_filter.cache_info().currsize <= 128


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((np.empty(0), 100, 390), "no samples"),
        ((np.ones(9), 0, 390), "sampling rate is 0"),
        ((np.ones(9), -5, 390), "sampling rate is -5"),
        ((np.ones(9), math.inf, 390), "sampling rate is inf"),
        ((np.ones(9), 100, 0), "at least 1"),
    ],
)
def test_resample_window_refuses(arguments: tuple, message: str) -> None:
    with pytest.raises(InputError, match=message):
        resample_window(*arguments)


@pytest.mark.parametrize("offset", [0.011, -0.011, math.nan])
def test_resample_window_refuses_offsets_beyond_a_sample(offset: float) -> None:
    with pytest.raises(InputError, match=r"within one sample, 0\.01 s"):
        resample_window(np.ones(9), 100, 390, offset=offset)
