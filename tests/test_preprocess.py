"""Preprocessing against the reference numbers, SciPy, and the definitions written out plainly."""

from __future__ import annotations

import importlib
import itertools
import math
import subprocess
import sys
import warnings
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.ndimage import gaussian_filter1d
from scipy.signal import detrend, resample_poly

from normwear_fast.errors import InputError, UsageError
from normwear_fast.preprocess import (
    FlatChannelWarning,
    RunningStatistics,
    fill_missing,
    prepare_window,
    preprocess,
    resample_sinc,
    resample_window,
    sinc_samples,
)

# The package's attribute of this name is the function.
module = importlib.import_module("normwear_fast.preprocess")

Golden = Callable[[str], dict[str, np.ndarray]]
GOLDEN_RATES = (4, 50, 64, 125, 700, 1000)
SINC_RATES = (257, 500, 700, 1000)
# Below, at and above 65 Hz; whole, decimal, of a millisecond clock, next to a simple fraction's.
RATES = (1, 4, 10.5, 50, 64, 65, 65.5, 66, 99.9, 100, 117.096, 125, 128, 1000 / 7.7, 130.0004)
RATES += (200, 250, 256, 360, 1000, 4000)

rates = st.sampled_from(RATES) | st.floats(1, 4000)
seeds = st.integers(0, 2**32 - 1)


def noise(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


def test_the_public_name_is_the_function_whatever_was_imported_first() -> None:
    code = (
        "import normwear_fast.preprocess; from normwear_fast.preprocess import fill_missing\n"
        "from normwear_fast import preprocess; import normwear_fast, sys\n"
        "assert normwear_fast.preprocess is preprocess and callable(preprocess)\n"
        "assert not {'torch', 'scipy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# fill_missing


def test_fill_missing_interpolates_inside_and_holds_the_ends() -> None:
    nan, inf = math.nan, math.inf
    x = [[nan, 1, nan, nan, 4, inf], [0, 1, 2, 3, 4, 5], [nan] * 6, [-inf, nan, 7, nan, nan, nan]]
    filled, fraction = fill_missing(x)
    expected = [[1, 1, 2, 3, 4, 4], [0, 1, 2, 3, 4, 5], [nan] * 6, [7] * 6]
    np.testing.assert_array_equal(filled, expected)
    np.testing.assert_array_equal(fraction, [4 / 6, 0, 1, 5 / 6])


@given(seed=seeds, missing=st.floats(0, 1), samples=st.integers(1, 60))
def test_fill_missing_is_numpy_interp(seed: int, missing: float, samples: int) -> None:
    x = noise(seed, 2, 3, samples)
    x[np.random.default_rng(seed).random(x.shape) < missing] = np.nan
    before = x.copy()
    filled, fraction = fill_missing(x)
    np.testing.assert_array_equal(x, before)
    for row in np.ndindex(2, 3):
        good = np.isfinite(x[row])
        assert fraction[row] == 1 - good.mean() or abs(fraction[row] - 1 + good.mean()) < 1e-15
        if good.any():
            index = np.arange(samples)
            expected = np.interp(index, index[good], x[row][good])
            np.testing.assert_allclose(filled[row], expected, rtol=0, atol=1e-14)
            np.testing.assert_array_equal(filled[row][good], x[row][good])
            first, last = index[good][[0, -1]]
            assert (filled[row][:first] == x[row][first]).all()
            assert (filled[row][last:] == x[row][last]).all()
        else:
            assert np.isnan(filled[row]).all()


def test_fill_missing_of_shapes_and_huge_values() -> None:
    filled, fraction = fill_missing([1, 2, 3])
    assert filled.dtype == np.float64
    assert fraction.shape == ()
    assert fill_missing(np.empty((2, 0)))[1].tolist() == [1, 1]
    filled, _ = fill_missing([-1.7e308, math.nan, 1.7e308])
    assert filled[1] == 0
    filled, _ = fill_missing([math.nan, math.nan, 1.7e308, math.nan, math.nan])
    assert (filled == 1.7e308).all()


# preprocess


@pytest.mark.parametrize("rate", GOLDEN_RATES)
def test_preprocess_golden(golden: Golden, rate: int) -> None:
    arrays = golden("preprocess")
    y = preprocess(arrays[f"in_{rate}"], rate)
    np.testing.assert_allclose(y, arrays[f"out_{rate}"], rtol=0, atol=1e-10)


def plain_preprocess(x: np.ndarray, rate: float, samples: int, offset: float = 0) -> np.ndarray:
    """One channel, sample by sample, from the description."""
    jumps = [abs(x[i + 1] - x[i]) for i in range(len(x) - 1)]
    limit = np.quantile(jumps, 0.95)
    kept = [i for i in range(len(x)) if i == len(x) - 1 or jumps[i] <= limit]
    places = [(k / 65 - offset) * rate for k in range(samples)]
    y = gaussian_filter1d(detrend(np.interp(places, kept, x[kept])), 1.3)
    return y / np.mean(np.abs(y))


@settings(max_examples=40)
@given(seed=seeds, rate=rates, samples=st.integers(11, 60), part=st.floats(0, 1))
def test_preprocess_is_the_description(seed: int, rate: float, samples: int, part: float) -> None:
    # Of fewer, all but a straight line can be rounding errors, of which no two ways agree.
    assume(samples * rate / 65 >= 5)
    length = math.ceil(samples * rate / 65)
    x = noise(seed, 2, length).cumsum(axis=1)
    offset = part / rate
    y = preprocess(x, rate, samples=samples, offset=offset)
    assert y.shape == (2, samples)
    for channel in range(2):
        expected = plain_preprocess(x[channel], rate, samples, offset)
        np.testing.assert_allclose(y[channel], expected, rtol=0, atol=1e-9)


def test_preprocess_does_not_depend_on_scale_and_offset_of_the_signal() -> None:
    x = noise(0, 1, 900)
    np.testing.assert_allclose(preprocess(x * 7e3 - 4e4, 150), preprocess(x, 150), atol=1e-10)


@pytest.mark.parametrize("rate", [117.096, 130 / 3, 1000 / 7.7, 0.1, 64, 65, 1000, 1 / 3])
def test_sample_counts_do_not_suffer_from_rounding(rate: float) -> None:
    exact = Fraction(rate).limit_denominator(1000)
    # As many samples as make the quotient a whole number, where float arithmetic may step over it.
    length = exact.numerator
    whole = 65 * exact.denominator
    for multiple in (1, 3, 7):
        assert sinc_samples(multiple * length, rate) == multiple * whole
        assert sinc_samples(multiple * length + 1, rate) > multiple * whole
    if length < 20_000:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FlatChannelWarning)  # of one or two samples
            assert preprocess(noise(0, length), rate).shape == (whole,)


def test_some_float_rate_would_be_off_by_one() -> None:
    """The reason for fractions is real: the plain formula is wrong for some decimal rate."""
    decimal_rates = [Fraction(n, 100) for n in range(101, 20_000, 7)]
    wrong = [
        r for r in decimal_rates if math.ceil(65 * r.numerator / float(r)) != 65 * r.denominator
    ]
    assert wrong
    for rate in wrong[:50]:
        assert sinc_samples(rate.numerator, float(rate)) == 65 * rate.denominator


@pytest.mark.parametrize("x", [np.full(300, 7.3), np.full(300, 0.0), 1e6 + 0.37 * np.arange(300)])
def test_flat_channels_become_zero_and_are_named(x: np.ndarray) -> None:
    good = noise(1, 300)
    with pytest.warns(FlatChannelWarning, match="channel 1 is flat"):
        y = preprocess([good, x, good], 100)
    assert not y[1].any()
    np.testing.assert_array_equal(y[0], preprocess(good, 100))
    np.testing.assert_array_equal(y[2], y[0])


def test_a_line_is_flat_unless_an_end_is_held() -> None:
    line = np.arange(50.0)
    with pytest.warns(FlatChannelWarning):
        assert not preprocess(line, 65).any()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bent = preprocess(
            line, 128
        )  # the last output is at sample 25 * 128 / 65 = 49.2, held at 49
    assert np.abs(bent).mean() == pytest.approx(1)


OF_500_HZ = [
    np.float32(500),
    np.int16(500),
    np.array(500.0),
    torch.tensor(500),
    torch.tensor(500.0),
]


@pytest.mark.parametrize("rate", [*OF_500_HZ, Fraction(500), np.float16(500)])
def test_a_rate_is_any_real_number(rate: Any) -> None:
    x = noise(5, 2, 400)
    for call in (preprocess, resample_sinc):
        np.testing.assert_array_equal(call(x, rate), call(x, 500))
        np.testing.assert_array_equal(call(x, 250, rate), call(x, 250, 500))
    np.testing.assert_array_equal(resample_window(x, rate, 52), resample_window(x, 500, 52))
    assert sinc_samples(400, rate) == sinc_samples(400, 500)
    for choice in ("none", "reference"):
        found, wanted = (
            prepare_window([(x[0], r, 0.0)], 52, preprocess=choice).data for r in (rate, 500.0)
        )
        np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize(
    "rate",
    [
        "500",
        None,
        True,
        [500],
        np.array([500.0]),
        0,
        -1,
        math.nan,
        math.inf,
        5 + 1j,
        pytest.param(10**400, id="huge"),
    ],
)
def test_what_is_no_rate_is_one_line(rate: Any) -> None:
    x = noise(5, 2, 400)
    calls = (
        lambda: preprocess(x, rate),
        lambda: resample_sinc(x, rate),
        lambda: resample_window(x, rate, 52),
        lambda: prepare_window([(x[0], rate, 0.0)], 52),
    )
    for call in calls:
        with pytest.raises(InputError, match=r"sampling rate is .* it must be a positive number"):
            call()
    with pytest.raises(InputError, match="target rate is"):
        preprocess(x, 500, rate)


def test_tensors_are_taken_as_encode_takes_them() -> None:
    x = torch.from_numpy(noise(5, 2, 400))
    wanted = preprocess(x.numpy(), 500)
    np.testing.assert_array_equal(preprocess(x.clone().requires_grad_(), 500), wanted)
    for narrow in (x.bfloat16(), x.half()):
        wanted = preprocess(narrow.double().numpy(), 500)
        np.testing.assert_array_equal(preprocess(narrow, 500), wanted)
    with pytest.raises(InputError, match="real numbers"):
        preprocess(x + 1j, 500)


def test_a_small_signal_on_a_large_offset_is_not_flat() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        y = preprocess(1e6 + 1e-3 * np.sin(np.arange(600) / 10), 100)
    assert np.abs(y).mean() == pytest.approx(1)


def test_preprocess_refuses() -> None:
    x = noise(0, 2, 100)
    x[1, 3] = np.nan
    with pytest.raises(InputError, match="channel 1 holds NaN or inf"):
        preprocess(x, 100)
    with pytest.raises(InputError, match=r"channel \(0, 1\) holds"):
        preprocess(x[None], 100)
    with pytest.raises(InputError, match="no samples"):
        preprocess(np.empty((2, 0)), 100)
    with pytest.raises(InputError, match="sampling rate is 0"):
        preprocess(noise(0, 100), 0)
    with pytest.raises(InputError, match="too large for float64"):
        preprocess(noise(0, 100) * 1.7e307, 100)
    with pytest.raises(InputError, match="within one sample"):
        preprocess(noise(0, 100), 100, offset=0.02)


# resample_sinc


@pytest.mark.parametrize("rate", SINC_RATES)
@pytest.mark.parametrize("kind", [np.asarray, torch.as_tensor])
def test_resample_sinc_golden(golden: Golden, rate: int, kind: Callable) -> None:
    arrays = golden("resample_sinc")
    x = kind(arrays[f"in_{rate}"])
    y = resample_sinc(x, rate)
    assert type(y) is type(x)
    assert y.dtype == x.dtype
    assert y.shape[-1] == sinc_samples(x.shape[-1], rate)
    np.testing.assert_allclose(np.asarray(y), arrays[f"out_{rate}"], rtol=0, atol=1e-5)


def plain_sinc(x: np.ndarray, o: int, m: int) -> np.ndarray:
    """The formula as written, for one series."""
    b = 0.99 * min(o, m)
    j, i = np.arange(-(-m * len(x) // o))[:, None], np.arange(len(x))
    t = np.clip(b * (i / o - j / m), -6, 6)
    return b / o * (x * np.sinc(t) * np.cos(np.pi * t / 12) ** 2).sum(axis=1)


# 1000.123 and 300.007 Hz have too many phases for one kernel; 20 Hz goes up.
@pytest.mark.parametrize("rate", [257, 500, 700, 512.5, 300.007, 1000.123, 20, 64])
def test_resample_sinc_is_its_formula(rate: float) -> None:
    x = noise(2, 3, 911)
    ratio = Fraction(rate).limit_denominator(10**6) / 65
    y = resample_sinc(x, rate)
    for channel in range(3):
        expected = plain_sinc(x[channel], ratio.numerator, ratio.denominator)
        np.testing.assert_allclose(y[channel], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("rate", [500, 1000.123])
def test_resample_sinc_gradients(rate: float) -> None:
    x = torch.from_numpy(noise(3, 2, 60)).requires_grad_()
    assert torch.autograd.gradcheck(lambda value: resample_sinc(value, rate), (x,))


def test_resample_sinc_after_inference_mode_still_trains() -> None:
    """What is cached between calls must not be an inference tensor."""
    x = torch.randn(1, 1, 600)
    with torch.inference_mode():
        first = resample_sinc(x, 480)
    x.requires_grad_()
    second = resample_sinc(x, 480)
    second.sum().backward()
    assert torch.equal(first, second.detach())
    assert x.grad is not None


def test_resample_sinc_of_shapes_and_dtypes() -> None:
    x = noise(4, 2, 3, 700)
    y = resample_sinc(x, 350)
    assert y.shape == (2, 3, 130)
    np.testing.assert_allclose(resample_sinc(x[1, 2], 350), y[1, 2], rtol=0, atol=1e-15)
    assert resample_sinc((x * 100).astype(np.int16), 350).dtype == np.float64
    half = resample_sinc(torch.from_numpy(x).bfloat16(), 350)
    assert half.dtype == torch.bfloat16
    assert (half.double() - torch.from_numpy(y)).abs().max() < 0.02
    assert np.array_equal(resample_sinc(x, 65), x)
    assert resample_sinc(np.ones(1), 700).shape == (1,)
    with pytest.raises(InputError, match="no samples"):
        resample_sinc(np.empty((2, 0)), 500)
    with pytest.raises(InputError, match="sampling rate is nan"):
        resample_sinc(x, math.nan)


@pytest.mark.parametrize("rate", [1000, 1000.123])
def test_resample_sinc_of_two_hours(rate: float) -> None:
    """A slow sine of two hours at 1 kHz, whose whole weight matrix would be terabytes."""
    x = torch.arange(7_200_000, dtype=torch.float32).div_(1000).remainder_(4)
    x = torch.sin(x * (math.pi / 2)).unsqueeze(0)
    y = resample_sinc(x, rate)
    seconds = torch.arange(y.shape[-1], dtype=torch.float64) / 65 * rate / 1000
    expected = torch.sin(seconds * (math.pi / 2))
    assert y.shape[-1] == sinc_samples(7_200_000, rate)
    assert (y[0, 20:-20] - expected[20:-20]).abs().max() < 2e-3


# resample_window


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


# prepare_window


def window_channel(signal: Callable, rate: float, start: float, duration: float = 6.0) -> tuple:
    """The samples a window owns of a channel that starts with the recording."""
    first = math.ceil(start * rate - 1e-6)
    last = math.ceil((start + duration) * rate - 1e-6)
    t = np.arange(first, last) / rate
    return signal(t), rate, first / rate - start


@pytest.mark.parametrize("start", [0.0, 7.123, 100.0077])
def test_channels_of_different_rates_stay_aligned(start: float) -> None:
    frequency = 5.0
    channels = [
        window_channel(lambda t: np.sin(2 * np.pi * frequency * t), rate, start)
        for rate in (360, 117.096, 250, 64, 1000 / 7.7, 4000, 99.9, 65)
    ]
    data = prepare_window(channels, 390).data
    assert data is not None
    seconds = start + np.arange(390) / 65
    carrier = np.exp(-2j * np.pi * frequency * seconds)[26:-26]  # 26 whole periods of 13 samples
    phases = np.angle((data[:, 26:-26] * carrier).sum(axis=1) * 1j)
    delays = phases / (2 * np.pi * frequency)
    np.testing.assert_allclose(delays, 0, atol=1e-3)
    assert np.ptp(delays) < 1e-4


@pytest.mark.parametrize("choice", ["none", "reference"])
def test_prepare_window_is_its_parts(choice: str) -> None:
    raw = noise(12, 3, 2160)
    raw[1, 50:90] = np.nan
    slow = noise(13, 60)
    channels = [(raw[0], 360, 0.001), (slow, 10, 0.05), (raw[1], 360, 0.001), (raw[2], 360, 0.0)]
    prepared = prepare_window(channels, 390, preprocess=choice)
    assert prepared.data is not None
    assert prepared.data.dtype == np.float32
    assert prepared.missing_fraction == 40 / 2160
    assert prepared.flat == ()
    for row, (x, rate, offset) in zip(prepared.data, channels, strict=True):
        filled, _ = fill_missing(x)
        if choice == "none":
            expected = resample_window(filled, rate, 390, offset=offset)
        else:
            expected = preprocess(filled, rate, samples=390, offset=offset)
        np.testing.assert_array_equal(row, expected.astype(np.float32))


@settings(max_examples=30)
@given(seed=seeds, order=st.permutations(range(4)), normalize=st.sampled_from(["none", "window"]))
def test_channels_are_independent(seed: int, order: list[int], normalize: str) -> None:
    channels = [
        (noise(seed, 720), 120.0, 0.0),
        (noise(seed + 1, 720), 120.0, 0.0),
        (noise(seed + 2, 702), 117.096, 0.004),
        (noise(seed + 3, 90), 15.0, 0.01),
    ]
    data = prepare_window(channels, 390, normalize=normalize).data
    permuted = prepare_window([channels[i] for i in order], 390, normalize=normalize).data
    assert data is not None
    np.testing.assert_array_equal(permuted, data[list(order)])
    alone = prepare_window([channels[order[0]]], 390, normalize=normalize).data
    np.testing.assert_array_equal(alone, data[[order[0]]])


def test_normalize_window_and_recording() -> None:
    raw = 50 + 7 * noise(14, 2, 600)
    channels = [(row, 100.0, 0.0) for row in raw]
    plain = prepare_window(channels, 390).data
    scaled = prepare_window(channels, 390, normalize="window").data
    assert plain is not None
    assert scaled is not None
    np.testing.assert_allclose(scaled.mean(axis=1), 0, atol=1e-6)
    np.testing.assert_allclose(scaled.std(axis=1), 1, atol=1e-6)
    statistics = [(50.0, 7.0), (40.0, 2.0)]
    scaled = prepare_window(channels, 390, normalize="recording", statistics=statistics).data
    expected = (plain - [[50], [40]]) / [[7], [2]]
    np.testing.assert_allclose(scaled, expected, rtol=0, atol=1e-4 / 7)


@pytest.mark.parametrize("rate", [50, 65, 100, 117.096])
def test_flat_channels_are_zero_once_scaled(rate: float) -> None:
    """Nor is a constant's rounding blown up to a signal of size one."""
    length = math.ceil(6 * rate)
    channels = [(noise(15, length), rate, 0.0), (np.full(length, 1234.5), rate, 0.0)]
    for choices in ({"normalize": "window"}, {"preprocess": "reference"}):
        prepared = prepare_window(channels, 390, **choices)
        assert prepared.flat == (1,)
        assert prepared.data is not None
        assert not prepared.data[1].any()
        assert prepared.data[0].any()
    prepared = prepare_window(
        channels, 390, normalize="recording", statistics=[(0.0, 1.0), (1234.5, 0.0)]
    )
    assert prepared.flat == (1,)
    assert prepared.data is not None
    assert not prepared.data[1].any()
    prepared = prepare_window(channels, 390)
    assert prepared.flat == (1,)
    assert prepared.data is not None
    np.testing.assert_allclose(prepared.data[1], 1234.5, rtol=1e-6)


@pytest.mark.parametrize("empty", [np.full(600, np.nan), np.full(600, np.inf), np.empty(0)])
def test_a_channel_without_values_leaves_no_data(empty: np.ndarray) -> None:
    prepared = prepare_window([(noise(16, 600), 100, 0.0), (empty, 100, 0.0)], 390)
    assert prepared.data is None
    assert prepared.missing_fraction == 1


@pytest.mark.parametrize("length", [1, 2, 3])
@pytest.mark.parametrize("rate", [1, 64, 65, 100, 117.096, 4000])
def test_windows_of_a_few_raw_samples(rate: float, length: int) -> None:
    for choice in ("none", "reference"):
        prepared = prepare_window(
            [(noise(17, length), rate, 0.5 / rate)], 11, preprocess=choice, normalize="window"
        )
        assert prepared.data is not None
        assert prepared.data.shape == (1, 11)
        assert np.isfinite(prepared.data).all()


@pytest.mark.parametrize("rate", [50, 65, 100, 117.096])
@pytest.mark.parametrize("size", [1e39, 1e200, 1.7e308])
def test_too_large_for_float32_is_refused_by_channel(rate: float, size: float) -> None:
    x = noise(18, math.ceil(6 * rate))
    x /= np.abs(x).max()
    channels = [(x, rate, 0.0), (x * size, rate, 0.0)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(InputError, match="channel 1 is too large for float32"):
            prepare_window(channels, 390)
        if size > 1e150:  # squares or sums leave float64, and std with them
            with pytest.raises(InputError, match="channel 1 is too large"):
                prepare_window(channels, 390, normalize="window")
        else:
            data = prepare_window(channels, 390, normalize="window").data
            np.testing.assert_allclose(data[1], data[0], atol=1e-6)


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"preprocess": "detrend"}, "must be 'none' or 'reference'"),
        ({"normalize": "zscore"}, "must be 'none', 'window' or 'recording'"),
        ({"normalize": "recording"}, "statistics of 1 channels, not of 0"),
        ({"normalize": "recording", "statistics": [(0, 1)] * 2}, "of 1 channels, not of 2"),
        (
            {"normalize": "recording", "preprocess": "reference", "statistics": [(0, 1)]},
            "has no meaning",
        ),
    ],
)
def test_prepare_window_refuses_choices(choices: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        prepare_window([(np.ones(600), 100, 0.0)], 390, **choices)


def test_prepare_window_refuses_shapes() -> None:
    with pytest.raises(InputError, match="without channels"):
        prepare_window([], 390)
    with pytest.raises(InputError, match="channel 0 has shape"):
        prepare_window([(np.ones((2, 600)), 100, 0.0)], 390)


# RunningStatistics


@settings(max_examples=60)
@given(seed=seeds, cuts=st.lists(st.integers(0, 500), max_size=6), offset=st.floats(-1e6, 1e6))
def test_running_statistics_are_those_of_the_whole(
    seed: int, cuts: list[int], offset: float
) -> None:
    x = offset + noise(seed, 2, 500)
    x[0, np.random.default_rng(seed).random(500) < 0.3] = np.nan
    x[1, 7] = np.inf
    edges = [0, *sorted(cuts), 500]
    running = RunningStatistics(2)
    halves = [RunningStatistics(2), RunningStatistics(2)]
    for number, (a, b) in enumerate(itertools.pairwise(edges)):
        running.update(list(x[:, a:b]))
        halves[number % 2].update(list(x[:, a:b]))
    halves[0].merge(halves[1])
    for statistics in (running, halves[0]):
        for channel, (mean, std) in enumerate(statistics.statistics()):
            good = x[channel][np.isfinite(x[channel])]
            assert statistics.count[channel] == len(good)
            assert mean == pytest.approx(good.mean(), rel=1e-12, abs=1e-12)
            assert std == pytest.approx(good.std(), rel=1e-8)


def test_running_statistics_of_ragged_empty_and_constant_channels() -> None:
    running = RunningStatistics(3)
    for _ in range(7):
        running.update([np.full(3, 0.1), np.empty(0), np.array([1, 2], dtype=np.int16)])
    assert running.count.tolist() == [21, 0, 14]
    assert running.statistics() == [(0.1, 0.0), (0.0, 0.0), (1.5, 0.5)]
    with pytest.raises(InputError, match="a block of 1 channels"):
        running.update([np.ones(3)])


def test_running_statistics_keep_the_digits_of_a_small_signal() -> None:
    x = noise(19, 100_000)
    running = RunningStatistics(1)
    for block in np.split(1e9 + x, 50):
        running.update([block])
    assert running.std[0] == pytest.approx(x.std(), rel=1e-6)
