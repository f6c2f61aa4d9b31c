"""Wavelet banks of the two scalograms NormWear's checkpoint works with.

A bank holds one filter a scale, so that the transform of a series s of N samples is one correlation,
``y[n] = sum_k bank[i, k] s[n - width // 2 + k]`` with zeros outside the series.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from normwear_fast.errors import UsageError

ScalogramMethod = Literal["conv", "scipy"]

CONV_WIDTH = 640
"""Filter length of the ``conv`` scalogram, for every scale, where the series is that long."""

NEGLIGIBLE = 1e-13
"""Share of its peak below which the fast scalograms leave a wavelet's tails out: 8.3 a for the Ricker
wavelet. float32's rounding, 6e-8, would be too much: it acts where a sample's weight is large, and what
is cut is missing far from it too. At 3e-8 a fill value of a million times the signal put tokens off by
5e-3, 1,000 times float32's own error. 1e-13 costs 6 % more taps at 390 samples."""


def mother_wavelet(name: str, t: NDArray[np.float64]) -> NDArray[np.float64]:
    """The mother wavelet psi(t), sampled on an evenly spaced grid symmetric about zero.

    The Ricker wavelet (``mexh``) is written out. PyWavelets' function is the same one to 1.1e-16, but
    it keeps the bounds of its grid in float32: the grid moves by 6e-8 of itself, the bank by 2e-8,
    and the ``scipy`` reference scalograms by 3e-6, over their tolerance of 1e-6. Other wavelets have
    no reference numbers and come from PyWavelets as they are.

    Args:
        name: PyWavelets' name of a real continuous wavelet: ``mexh`` (Ricker), ``morl``, ``gaus1``...
        t: (W,) evenly spaced, ``t[0] == -t[-1]``.

    Raises:
        UsageError: no real continuous wavelet of that name.
    """
    if name == "mexh":
        peak = 2 / (math.sqrt(3) * math.pi**0.25)
        return np.asarray(peak * (1 - t**2) * np.exp(-(t**2) / 2), dtype=np.float64)
    import pywt

    if name not in pywt.wavelist(kind="continuous"):
        raise UsageError(f"wavelet {name!r} is not one of PyWavelets' continuous wavelets")
    wavelet = pywt.ContinuousWavelet(name)
    if wavelet.complex_cwt:
        raise UsageError(f"wavelet {name!r} is complex; the scalogram takes real ones, as 'mexh'")
    # PyWavelets samples `length` points between the bounds: the bounds are set to our own grid.
    wavelet.lower_bound, wavelet.upper_bound = float(t[0]), float(t[-1])
    values, _ = wavelet.wavefun(length=len(t))
    return np.asarray(values, dtype=np.float64)


def scales(count: int = 65) -> NDArray[np.float64]:
    """The scales a = 0.1, 1.1, ..., in samples."""
    return np.arange(count, dtype=np.float64) + 0.1


def filter_widths(samples: int, method: ScalogramMethod, count: int = 65) -> NDArray[np.int64]:
    """(count,) taps of each scale's filter for a series of ``samples`` values."""
    if method == "conv":
        return np.full(count, min(CONV_WIDTH, samples))
    # SciPy's cwt: min(10 * width, N) points, and numpy.arange(0.1, 65) as widths: 10 i + 1.
    return np.minimum(10 * np.arange(count) + 1, samples)


def scalogram_rows(samples: int, method: ScalogramMethod) -> int:
    """Rows of the scalogram of a series of ``samples`` values: one more for an even ``conv`` width."""
    if method == "conv":
        width = min(CONV_WIDTH, samples)
        return samples + 2 * (width // 2) - width + 1
    return samples


@lru_cache(maxsize=64)
def wavelet_bank(
    samples: int, method: ScalogramMethod, wavelet: str = "mexh", count: int = 65
) -> NDArray[np.float64]:
    """Filters of every scale on a common grid.

    Args:
        samples: length N of the series the bank is for.
        method: ``conv`` (upstream's ``optimized_cwt=True``) or ``scipy`` (SciPy <= 1.14's ``cwt``).
        wavelet: PyWavelets' name of the mother wavelet.
        count: number of scales.

    Returns:
        (count, W) float64, read-only; a shorter filter of width w sits at ``W // 2 - w // 2``, so one
        correlation with padding ``W // 2`` serves every scale.
    """
    widths = filter_widths(samples, method, count)
    longest = int(widths.max())
    bank = np.zeros((count, longest))
    for i, (scale, width) in enumerate(zip(scales(count), widths, strict=True)):
        t = np.arange(width) - (width - 1) / 2
        first = longest // 2 - width // 2
        bank[i, first : first + width] = mother_wavelet(wavelet, t / scale) / np.sqrt(scale)
    bank.setflags(write=False)
    return bank
