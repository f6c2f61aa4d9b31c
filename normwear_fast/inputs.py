"""Windows as users hand them over: checked, named where they are wrong, brought to the model's rate."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from normwear_fast.config import LARGEST_SAMPLE, MIN_SAMPLES, SAMPLING_RATE
from normwear_fast.errors import InputError
from normwear_fast.preprocess import as_float_array, as_rate

Resample = Literal["upstream", "always", "never"]

UPSTREAM_RESAMPLES_ABOVE = 256.0
"""Hz; the published ``get_embedding`` feeds anything at or below this rate as it is."""


def window_list(windows: Any) -> list[NDArray[Any]]:
    """(windows, channels, samples), or a sequence of (channels, samples) of any lengths, as a list."""
    if isinstance(windows, Tensor):
        windows = as_float_array(windows)
    if isinstance(windows, np.ndarray) and windows.dtype != object:
        if windows.ndim != 3:
            raise InputError(
                f"windows is an array {windows.shape}; it must be (windows, channels, samples)"
            )
        windows = list(windows)
    items = []
    for i, window in enumerate(windows):
        array = as_float_array(window)
        if array.ndim != 2 or array.shape[0] == 0:
            raise InputError(f"window {i} is {array.shape}; it must be (channels, samples)")
        items.append(array)
    return items


def rate_list(sampling_rate: float | Sequence[float], count: int) -> list[float]:
    """One rate a window, from one for all or one for each."""
    if np.ndim(sampling_rate) == 0:
        return [as_rate(sampling_rate, "sampling_rate")] * count
    rates = [as_rate(rate, "sampling_rate") for rate in cast(Sequence[float], sampling_rate)]
    if len(rates) != count:
        raise InputError(f"sampling_rate has {len(rates)} values for {count} windows")
    return rates


def check_finite(x: Tensor) -> None:
    """An InputError that names the first window and channel with a missing value, or one too large."""
    finite = torch.isfinite(x).all(-1)
    if not bool(finite.all()):
        window, channel = (int(i) for i in (~finite).nonzero()[0])
        raise InputError(
            f"window {window}, channel {channel} holds NaN or inf; fill it, or use "
            "encode(..., missing='interpolate')"
        )
    largest = x.abs().amax(-1)
    if bool((largest > LARGEST_SAMPLE).any()):
        window, channel = (int(i) for i in (largest > LARGEST_SAMPLE).nonzero()[0])
        raise InputError(_too_large(f"window {window}, channel {channel}", largest.max()))


def _too_large(what: str, largest: float | Tensor) -> str:
    return (
        f"{what} holds values beyond float32's sums, up to {float(largest):.3g} ({LARGEST_SAMPLE:g} is "
        "right): rescale it, or make fill values NaN"
    )


def samples_at_model_rate(samples: int, rate: float, resample: str) -> int:
    """Length of a window of so many samples once it is at the model's rate, by `Resample`."""
    if resample == "always":
        return round(samples / rate * SAMPLING_RATE)
    if resample == "never":
        return samples
    if resample != "upstream":
        raise InputError(f"resample is {resample!r}; it must be 'always', 'never' or 'upstream'")
    if rate <= UPSTREAM_RESAMPLES_ABOVE:
        return samples
    from normwear_fast.preprocess import sinc_samples

    return sinc_samples(samples, rate)


def at_model_rate(x: Tensor, rate: float, resample: str) -> Tensor:
    """Equal windows (B, C, L) brought to the model's rate, by `Resample`; ``upstream`` differentiably.

    Raises:
        InputError: another word, or ``always`` for what requires gradients.
    """
    samples = samples_at_model_rate(x.shape[-1], rate, resample)
    if resample == "upstream" and rate > UPSTREAM_RESAMPLES_ABOVE:
        from normwear_fast.preprocess import resample_sinc

        return resample_sinc(x, rate)
    if resample == "always" and rate != SAMPLING_RATE:
        from normwear_fast.preprocess import resample_window

        if x.requires_grad:
            raise InputError("resample='always' is not differentiable; resample beforehand")
        y = resample_window(x.cpu().double().numpy(), rate, samples)
        return torch.from_numpy(y).to(x.device, x.dtype)
    return x


def prepare(
    window: NDArray[Any], rate: float, samples: int, resample: str, missing: str, index: int
) -> NDArray[np.float32]:
    """One window, checked and brought to the model's rate."""
    finite = np.isfinite(window).all(axis=1)
    if not finite.all():
        channel = int(np.flatnonzero(~finite)[0])
        if missing == "error":
            raise InputError(
                f"window {index}, channel {channel} holds NaN or inf; fill it, or pass "
                "missing='interpolate'"
            )
        from normwear_fast.preprocess import fill_missing

        window, fractions = fill_missing(window)
        if (fractions == 1).any():
            channel = int(np.flatnonzero(fractions == 1)[0])
            raise InputError(
                f"window {index}, channel {channel} holds no value to interpolate from"
            )
    if samples < MIN_SAMPLES:
        raise InputError(
            f"window {index} has {samples} samples at {SAMPLING_RATE:g} Hz; {MIN_SAMPLES} are needed"
        )
    if resample == "always" and (rate != SAMPLING_RATE or window.shape[1] != samples):
        from normwear_fast.preprocess import resample_window

        window = resample_window(window, rate, samples)
    elif resample == "upstream" and rate > UPSTREAM_RESAMPLES_ABOVE:
        from normwear_fast.preprocess import resample_sinc

        window = resample_sinc(np.asarray(window, np.float32), rate)
    largest = float(np.abs(window).max())  # float16 cannot hold the limit
    if not largest <= LARGEST_SAMPLE:
        raise InputError(_too_large(f"window {index}", largest))
    return np.ascontiguousarray(window, dtype=np.float32)
