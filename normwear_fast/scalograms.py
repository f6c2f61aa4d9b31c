"""From a series to its scalogram: three derivatives, 65 wavelet scales."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from normwear_fast.config import MIN_SAMPLES
from normwear_fast.errors import InputError
from normwear_fast.wavelets import ScalogramMethod, scalogram_rows, wavelet_bank

LONG_FILTER = 512
"""Taps above which ``conv`` sums in float64: a float32 chain of 640 products is 4e-7 of the largest
value off, and the reference numbers at that length are themselves 1.9e-6 off with a tolerance of 2e-6."""


def derivatives(x: Tensor) -> Tensor:
    """The series and its first two differences, aligned: (..., L) -> (..., 3, L - 2), in x's dtype.

    The second is a difference of differences, as upstream computes it: in float32 the order of the
    subtractions decides the last bits.
    """
    first = x[..., 1:] - x[..., :-1]
    return torch.stack((x[..., 2:], first[..., 1:], first[..., 1:] - first[..., :-1]), dim=-2)


def scalogram(
    x: Tensor, method: ScalogramMethod = "conv", *, wavelet: str = "mexh", num_scales: int = 65
) -> Tensor:
    """Wavelet scalogram of every series, differentiable, on the device of ``x``.

    Args:
        x: (B, C, L) floating point, L >= 11 samples at the model's rate.
        method: ``conv``, float32 filters of one length for all scales (upstream's
            ``optimized_cwt=True``, what pretraining used), or ``scipy``, SciPy <= 1.14's
            ``signal.cwt`` with ``signal.ricker`` in float64 (upstream's default). They differ
            grossly at the smallest scales.
        wavelet: PyWavelets' name of a real mother wavelet; ``mexh`` is the Ricker wavelet.
        num_scales: scales a = 0.1, 1.1, ...

    Returns:
        (B, C, 3, rows, num_scales): x, its first and its second difference; rows are L - 2, or
        L - 1 where ``conv`` filters have an even width. In x's dtype for ``conv``, float64 for ``scipy``.

    Raises:
        InputError: not (B, C, L), an unknown method, or fewer than 11 samples.

    Source: Luo et al. 2026, section 3.1; upstream commit 07517fc.
    """
    if method not in ("conv", "scipy"):
        raise InputError(f"scalogram method is {method!r}; it must be 'conv' or 'scipy'")
    if x.ndim != 3 or not x.is_floating_point():
        raise InputError(
            f"scalogram takes a floating-point (B, C, L) tensor, not {x.dtype} {tuple(x.shape)}"
        )
    if x.shape[-1] < MIN_SAMPLES:
        raise InputError(
            f"a series of {x.shape[-1]} samples is too short; {MIN_SAMPLES} are needed"
        )
    series = derivatives(x)
    batch, channels, _, samples = series.shape
    filters = wavelet_bank(samples, method, wavelet, num_scales)
    width = filters.shape[1]
    if method == "scipy" or width > LONG_FILTER:
        series = series.double()
    bank = torch.tensor(filters, dtype=series.dtype, device=x.device)
    rows = scalogram_rows(samples, method)
    y = F.conv1d(series.reshape(-1, 1, samples), bank.unsqueeze(1), padding=width // 2)
    y = y[..., :rows].transpose(1, 2).reshape(batch, channels, 3, rows, num_scales)
    return y.to(x.dtype) if method == "conv" else y
