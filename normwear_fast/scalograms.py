"""From a series to its scalogram: three derivatives, 65 wavelet scales."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from normwear_fast.config import MIN_SAMPLES
from normwear_fast.errors import InputError
from normwear_fast.wavelets import CONV_WIDTH, ScalogramMethod, scalogram_rows, wavelet_bank

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
    bank = _bank(samples, method, wavelet, num_scales)
    width = bank.shape[1]
    if method == "scipy" or width > LONG_FILTER:
        series = series.double()
    bank = bank.to(series)
    rows = scalogram_rows(samples, method)
    with _exact(x.device.type):
        y = F.conv1d(series.reshape(-1, 1, samples), bank.unsqueeze(1), padding=width // 2)
    y = y[..., :rows].transpose(1, 2).reshape(batch, channels, 3, rows, num_scales)
    return y.to(x.dtype) if method == "conv" else y


def _exact(kind: str) -> AbstractContextManager[Any]:
    """Without autocast, whose 8 bits would leave nothing of a second difference."""
    known = torch.amp.is_autocast_available(kind)
    return torch.autocast(kind, enabled=False) if known else nullcontext()


def _bank(samples: int, method: str, wavelet: str, num_scales: int) -> Tensor:
    """(num_scales, W) float64 filters; under ``torch.compile`` one node, for its NumPy is no graph."""
    if torch.compiler.is_compiling():
        return cast(Tensor, torch.ops.normwear.wavelet_bank(samples, method, wavelet, num_scales))
    bank = wavelet_bank(samples, cast(ScalogramMethod, method), wavelet, num_scales)
    return torch.tensor(bank, device="cpu")


@torch.library.custom_op("normwear::wavelet_bank", mutates_args=())
def _wavelet_bank(samples: int, method: str, wavelet: str, num_scales: int) -> Tensor:
    bank = wavelet_bank(samples, cast(ScalogramMethod, method), wavelet, num_scales)
    return torch.tensor(bank, device="cpu")


@_wavelet_bank.register_fake
def _(samples: int, method: str, wavelet: str, num_scales: int) -> Tensor:
    longest = CONV_WIDTH if method == "conv" else 10 * num_scales - 9
    return torch.empty((num_scales, min(longest, samples)), dtype=torch.float64, device="cpu")
