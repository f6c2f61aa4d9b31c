"""`fill_missing` and `preprocess` against the reference numbers and their plain definitions."""

from __future__ import annotations

import math
import subprocess
import sys
import warnings
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from noisy_windows import Golden, noise, rates, seeds
from scipy.ndimage import gaussian_filter1d
from scipy.signal import detrend

from normwear_fast.errors import InputError
from normwear_fast.preprocess import (
    FlatChannelWarning,
    fill_missing,
    prepare_window,
    preprocess,
    resample_sinc,
    resample_window,
    sinc_samples,
)

GOLDEN_RATES = (4, 50, 64, 125, 700, 1000)


def test_the_public_name_is_the_function_whatever_was_imported_first() -> None:
    code = (
        "import normwear_fast.preprocess; from normwear_fast.preprocess import fill_missing\n"
        "from normwear_fast import preprocess; import normwear_fast, sys\n"
        "assert normwear_fast.preprocess is preprocess and callable(preprocess)\n"
        "assert not {'torch', 'scipy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


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
        assert abs(fraction[row] - (1 - good.mean())) < 1e-15
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


def test_fill_missing_takes_any_shape_and_huge_values() -> None:
    filled, fraction = fill_missing([1, 2, 3])
    assert filled.dtype == np.float64
    assert fraction.shape == ()
    assert fill_missing(np.empty((2, 0)))[1].tolist() == [1, 1]
    filled, _ = fill_missing([-1.7e308, math.nan, 1.7e308])
    assert filled[1] == 0
    filled, _ = fill_missing([math.nan, math.nan, 1.7e308, math.nan, math.nan])
    assert (filled == 1.7e308).all()


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


@pytest.mark.parametrize(("rate", "samples"), [(65, 1), (65, 2), (130, 4), (360, 11)])
def test_one_and_two_values_are_a_line(rate: float, samples: int) -> None:
    with pytest.warns(FlatChannelWarning, match="channel 0, 1, 2 is flat"):
        assert not preprocess(1e3 + noise(2, 3, samples), rate).any()


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
