"""`resample_sinc`: the reference numbers, its formula, sample counts, gradients, and long signals."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
import torch
from noisy_windows import Golden, noise

from normwear_fast.errors import InputError
from normwear_fast.preprocess import FlatChannelWarning, preprocess, resample_sinc, sinc_samples

SINC_RATES = (257, 500, 700, 1000)


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


def test_resample_sinc_keeps_shapes_and_dtypes() -> None:
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
def test_resample_sinc_of_two_hours_is_done_in_pieces(rate: float) -> None:
    """A slow sine of two hours at 1 kHz, whose whole weight matrix would be terabytes."""
    x = torch.arange(7_200_000, dtype=torch.float32).div_(1000).remainder_(4)
    x = torch.sin(x * (math.pi / 2)).unsqueeze(0)
    y = resample_sinc(x, rate)
    seconds = torch.arange(y.shape[-1], dtype=torch.float64) / 65 * rate / 1000
    expected = torch.sin(seconds * (math.pi / 2))
    assert y.shape[-1] == sinc_samples(7_200_000, rate)
    assert (y[0, 20:-20] - expected[20:-20]).abs().max() < 2e-3
