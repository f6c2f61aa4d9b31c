"""From a window's raw samples to the model's: gaps, resampling, reference preprocessing, scale.

Everything is NumPy in float64; no bit of a channel's result depends on the channels beside it.

* `resample_window` is the project's definition of band-limited resampling; a faster version on
  another device is held against it.
* `resample_sinc` is the other resampling, the one inside upstream's `get_embedding`.
* `preprocess` is what pretraining data went through.
* `prepare_window` puts them in order for one window; `RunningStatistics` is the streaming pass
  that its ``normalize="recording"`` needs.
"""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from numbers import Real
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from normwear_fast.errors import InputError, UsageError

if TYPE_CHECKING:
    from torch import Tensor

TARGET_RATE = 65.0
"""The rate NormWear was trained at, Hz."""

Normalization = Literal["none", "window", "recording"]
Preprocessing = Literal["none", "reference"]
Floats = NDArray[np.float64]
Signal = TypeVar("Signal", "NDArray[Any]", "Tensor")

ROUNDING = 64 * np.finfo(np.float64).eps
"""A channel whose spread is below this part of its largest value holds rounding errors only."""


class FlatChannelWarning(UserWarning):
    """A channel without any variation, which the reference preprocessing would divide by zero."""


# Gaps


def as_float_array(values: ArrayLike) -> NDArray[Any]:
    """Real numbers as NumPy's floating point.

    Returns:
        floats of up to 64 bits as they are, in this machine's byte order; all else as float64. What
        a masked array masks is NaN. Of a tensor its values: bfloat16, which NumPy lacks, as float32.

    Raises:
        InputError: complex numbers, text, objects, lists of different lengths.
    """
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(values, torch.Tensor):
        narrow = values.is_floating_point() and values.dtype.itemsize <= 2
        values = (values.float() if narrow and values.dtype != torch.float16 else values).numpy(
            force=True
        )
    masked = isinstance(values, np.ma.MaskedArray)
    try:
        array: Any = np.ma.asarray(values) if masked else np.asarray(values)
    except ValueError:
        raise InputError("values are lists of different lengths; they must be one array") from None
    if array.dtype.kind not in "fiub":
        raise InputError(f"values are {array.dtype}; they must be real numbers")
    if array.dtype.kind != "f" or array.dtype.itemsize > 8:
        array = array.astype(np.float64)
    elif not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="))
    return array.filled(np.nan) if masked else array


def fill_missing(x: ArrayLike) -> tuple[Floats, Floats]:
    """Interpolate linearly over NaN and infinite samples, ends held.

    Args:
        x: (..., L), any real dtype.

    Returns:
        The filled signal (..., L) float64 and the missing fraction (...,), 0 to 1. A channel
        without a finite sample stays NaN, with fraction 1; no samples at all are fraction 1 too.
    """
    x = as_float_array(x).astype(np.float64, copy=False)
    finite = np.isfinite(x)
    if x.shape[-1] == 0:
        return x, np.ones(x.shape[:-1])
    if finite.all():
        return x, np.zeros(x.shape[:-1])
    fraction = np.asarray((~finite).mean(axis=-1))
    some = finite.any(axis=-1)
    filled = np.full(x.shape, np.nan)
    index = np.arange(x.shape[-1])
    before, after = _neighbours(finite[some])
    known = np.where(finite, x, 0.0)[some]
    low = np.take_along_axis(known, before, axis=-1)
    high = np.take_along_axis(known, after, axis=-1)
    weight = np.where(before == after, 0.0, (index - before) / np.maximum(after - before, 1))
    # Weighted, not low + weight * (high - low): the difference of two huge values can overflow.
    filled[some] = np.where(finite[some], known, (1 - weight) * low + weight * high)
    return filled, fraction


def _neighbours(keep: NDArray[np.bool_]) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Of every index, the nearest kept one at or before it and at or after it, along the last axis.

    Where one side has none it is the other side's. Each row keeps at least one.
    """
    samples = keep.shape[-1]
    index = np.arange(samples)
    before = np.maximum.accumulate(np.where(keep, index, -1), axis=-1)
    after = np.minimum.accumulate(np.where(keep, index, samples)[..., ::-1], axis=-1)[..., ::-1]
    return np.where(before < 0, after, before), np.where(after == samples, before, after)


# Reference preprocessing


def preprocess(
    x: ArrayLike,
    sampling_rate: float,
    target_rate: float = TARGET_RATE,
    *,
    offset: float = 0.0,
    samples: int | None = None,
) -> Floats:
    """The preprocessing of NormWear's pretraining and evaluation data.

    Per channel: drop samples followed by a jump above the 95th percentile of jumps; interpolate the
    rest linearly at the target rate, ends held; remove the linear trend; smooth with a Gaussian of
    0.02 s; divide by the mean absolute value. There is no anti-alias filter.

    Args:
        x: (..., L) finite values, L >= 1.
        sampling_rate: of x, Hz.
        target_rate: of the result, Hz.
        offset: time of x[..., 0] after the result's first sample, s.
        samples: length of the result; ceil(target_rate * L / sampling_rate) by default.

    Returns:
        (..., samples) float64. A channel that is constant, which leaves nothing to divide by, is zero,
        with a `FlatChannelWarning` that says which. So is a straight line all of whose outputs lie
        between samples that were kept; a held end bends it, and the bend is scaled like any signal.

    Raises:
        InputError: no samples, NaN or inf (the channel is named), values whose sums overflow
            float64, an offset of more than a sample, or a rate that is no positive number.

    Source: Luo et al. 2026, data preprocessing; upstream commit 07517fc.
    """
    sampling_rate, target_rate = _rates(sampling_rate, target_rate)
    x = _signal(x, sampling_rate, target_rate, offset)
    bad = np.asarray(~np.isfinite(x).all(axis=-1))
    if bad.any():
        raise InputError(
            f"channel {_indices(bad)} holds NaN or inf; fill it first, e.g. with fill_missing"
        )
    if samples is None:
        samples = sinc_samples(x.shape[-1], sampling_rate, target_rate)
    y, flat = _reference(x, sampling_rate, samples, offset=offset, target_rate=target_rate)
    overflowed = np.asarray(~np.isfinite(y).all(axis=-1))
    if overflowed.any():
        raise InputError(
            f"channel {_indices(overflowed)} is too large for float64 sums; check its unit or scale"
        )
    if flat.any():
        warnings.warn(
            f"channel {_indices(flat)} is flat: nothing to scale it by, so it stays zero",
            FlatChannelWarning,
            stacklevel=2,
        )
    return y


def _reference(
    x: Floats, sampling_rate: float, samples: int, *, offset: float, target_rate: float
) -> tuple[Floats, NDArray[np.bool_]]:
    """`preprocess` of checked input: (..., samples) and which channels (...,) are flat."""
    from scipy.ndimage import gaussian_filter1d

    length = x.shape[-1]
    keep = np.ones(x.shape, dtype=bool)
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        if length > 1:
            jump = np.abs(np.diff(x, axis=-1))
            keep[..., :-1] = ~(jump > np.quantile(jump, 0.95, axis=-1, keepdims=True))
        # The kept samples either side of every output: numpy.interp of ragged channels at once.
        position = (np.arange(samples) / target_rate - offset) * sampling_rate
        position = np.clip(position, 0, length - 1)
        floor = position.astype(np.intp)
        before, after = _neighbours(keep)
        # np.take, here and below: indexing leaves the samples of a row apart in memory, and sums
        # over them then depend on how many rows there are.
        left = before.take(floor, axis=-1)
        right = after.take(np.minimum(floor + 1, length - 1), axis=-1)
        low = np.take_along_axis(x, left, axis=-1)
        high = np.take_along_axis(x, right, axis=-1)
        y = low + (high - low) * ((position - left) / np.maximum(right - left, 1))
        largest = np.abs(y).max(axis=-1)
        # scipy.signal.detrend in closed form: its least squares over all channels at once would
        # let a channel's last bits depend on its neighbours.
        time = np.arange(samples) - (samples - 1) / 2
        y = y - y.mean(axis=-1, keepdims=True)
        slope = (y * time).sum(axis=-1, keepdims=True) / (float(time @ time) or 1.0)
        y = gaussian_filter1d(y - slope * time, 0.02 * target_rate, axis=-1)
        scale = np.abs(y).mean(axis=-1)
        flat = np.asarray(scale <= ROUNDING * largest)
        y = y / np.where(flat, 1.0, scale)[..., None]
    y[flat] = 0.0
    return y, flat


# Upstream's resampling


def resample_sinc(x: Signal, sampling_rate: float, target_rate: float = TARGET_RATE) -> Signal:
    """The resampling inside upstream's `get_embedding`: a sinc of six zeros under a squared cosine.

    With o / m the ratio of the rates in lowest terms and b = 0.99 min(o, m),
    y[j] = (b / o) sum_i x[i] sinc(t) cos^2(pi t / 12), t = clip(b (i / o - j / m), -6, 6), zeros
    outside x: the first and last 6 / 0.99 samples of the slower rate fade in and out.

    Args:
        x: (..., L), a NumPy array or a tensor, which may require gradients; half precision is
            summed in float32.
        sampling_rate: of x, Hz.
        target_rate: of the result, Hz. The same rate returns x itself.

    Returns:
        (..., ceil(m L / o)) of x's kind, device and floating dtype (integers become float64).

    Raises:
        InputError: no samples, or a rate that is no positive number.

    Source: torchaudio.functional.resample's defaults, which upstream calls.
    """
    import torch

    sampling_rate, target_rate = _rates(sampling_rate, target_rate)
    if not isinstance(x, torch.Tensor):
        series = torch.tensor(as_float_array(x), device="cpu")
        return resample_sinc(series, sampling_rate, target_rate).numpy()
    _check_samples(x.shape)
    if not x.is_floating_point():
        x = x.double()
    dtype = x.dtype
    if dtype in (torch.float16, torch.bfloat16):
        x = x.float()
    ratio = _rational(sampling_rate) / _rational(target_rate)
    if ratio == 1:
        return x.to(dtype)
    down, up = ratio.numerator, ratio.denominator
    outputs = sinc_samples(x.shape[-1], sampling_rate, target_rate)
    if up * (down + 2 * _sinc_width(down, up)) <= LARGEST_KERNEL:
        kernel = torch.tensor(_sinc_kernel(down, up), dtype=x.dtype, device=x.device).unsqueeze(1)
        width = _sinc_width(down, up)
        padded = torch.nn.functional.pad(x.reshape(-1, 1, x.shape[-1]), (width, width + down))
        y = torch.nn.functional.conv1d(padded, kernel, stride=down)  # (series, phases, periods)
        y = y.transpose(1, 2).reshape(*x.shape[:-1], -1)[..., :outputs]
    else:
        # Into one tensor: a list of the blocks' small results, each freed of the large ones before
        # it, leaves the C library's heap 1 GB larger over eight series of an hour.
        y = x.new_empty((*x.shape[:-1], outputs))
        start = 0
        half = 6 / 0.99 * max(1.0, float(ratio))
        block = _block(2 * half * (x.numel() // x.shape[-1]))
        for index, distance in _taps(0.0, float(ratio), outputs, half, block):
            inside = (index >= 0) & (index < x.shape[-1])
            weights = np.where(inside, _sinc_window(distance, float(ratio)), 0.0)
            gather = torch.from_numpy(index.clip(0, x.shape[-1] - 1).ravel()).to(x.device)
            nearby = x.index_select(-1, gather).unflatten(-1, index.shape)
            y[..., start : start + len(index)] = (
                nearby * torch.tensor(weights, device="cpu").to(x)
            ).sum(-1)
            start += len(index)
    return y.to(dtype)


def sinc_samples(samples: int, sampling_rate: float, target_rate: float = TARGET_RATE) -> int:
    """How many samples `resample_sinc` makes of ``samples``."""
    sampling_rate, target_rate = _rates(sampling_rate, target_rate)
    return math.ceil(samples * _rational(target_rate) / _rational(sampling_rate))


LARGEST_KERNEL = 1 << 22
"""Taps over all phases above which `resample_sinc` weighs each output by itself: whole rates up to
60 kHz stay below it; 1000.123 Hz, with 65,000 phases of a million samples, would need 520 GB."""


def _sinc_width(down: int, up: int) -> int:
    return math.ceil(6 * down / (0.99 * min(down, up)))


@lru_cache(maxsize=8)
def _sinc_kernel(down: int, up: int) -> Floats:
    """(up, down + 2 width): one filter a phase; all move on by ``down`` samples a period."""
    width = _sinc_width(down, up)
    distance = np.arange(-width, down + width) - np.arange(up)[:, None] * (down / up)
    return _sinc_window(distance, down / up)


def _sinc_window(distance: Floats, ratio: float) -> Floats:
    """The weight of an input sample ``distance`` samples from an output; ratio = rate / target."""
    bandwidth = 0.99 * min(1.0, 1 / ratio)
    t = np.clip(bandwidth * distance, -6, 6)
    return bandwidth * np.sinc(t) * np.cos(np.pi * t / 12) ** 2


# Band-limited resampling of a window

HALF_WIDTH = 10
"""Zero crossings of the anti-alias filter each side: scipy.signal.resample_poly's default."""

DRIFT = 1e-3
"""Samples by which the last output of a window may be early or late for its rate made rational."""

TICKS = 1 << 20
"""Offsets are rounded to this part of a sample, so that rounding errors of a window's start neither
change its result nor miss the filter cache. It shifts a sine at the band edge by at most 1.5e-6 of
its size."""


def resample_window(
    x: ArrayLike,
    sampling_rate: float,
    samples: int,
    *,
    offset: float = 0.0,
    target_rate: float = TARGET_RATE,
) -> Floats:
    """A window's raw samples at the model's rate: the definition everything else is held against.

    At or above the target rate it is band-limited: scipy.signal.resample_poly's default filter
    (ideal low-pass to the target's Nyquist frequency under a Kaiser window of beta 5, ten zeros
    each side), moved by the offset, every output's taps scaled to a sum of one: resample_poly scales
    them all by one number, so that its gain for a constant differs between outputs, by 1e-3 near
    65 Hz and 2e-4 at 100 Hz, and a raw PPG's constant, 200 times its pulse, comes out with a
    tremor of 20 % and 4 % of the pulse. A rate that is no simple fraction of the target's becomes the
    simplest one that drifts by less than 1e-3 sample over the window; where even that has more
    phases than the window has outputs, each output gets its own exact filter. The target rate
    itself without offset is the identity. Below the target rate it is linear interpolation.

    Edges: the filter needs 10 / target_rate seconds (0.15 s) each side. Beyond its ends x continues
    along the straight line through its first and last sample (resample_poly's ``padtype="line"``),
    so nothing from outside the window is used, and a signal that is not such a line is bent within
    0.15 s of the ends. Below the target rate the first and last values are held. One sample is a
    constant.

    Args:
        x: (..., L) without NaN, L >= 1.
        sampling_rate: of x, Hz.
        samples: length of the result; more than x spans continues as beyond the edges.
        offset: time of x[..., 0] after the result's first sample, s; less than a sample either way.
        target_rate: of the result, Hz.

    Returns:
        (..., samples) float64, at offset -, 1 / target_rate -, 2 / target_rate - ... seconds after
        x[..., 0], that is at k / target_rate after the window's start.

    Raises:
        InputError: no samples, a rate that is no positive number, or an offset of a sample or more.
    """
    sampling_rate, target_rate = _rates(sampling_rate, target_rate)
    x = _signal(x, sampling_rate, target_rate, offset)
    if samples < 1:
        raise InputError(f"a window of {samples} samples; at least 1 is needed")
    delay = round(offset * sampling_rate * TICKS)
    if sampling_rate < target_rate:
        return _linear(x, sampling_rate / target_rate, samples, delay / TICKS)
    down, up = _simple_ratio(sampling_rate, target_rate, samples)
    if down == up and delay == 0:
        return _extend(x, 0, samples - 1)
    if up > samples:
        return _resample_by_output(x, sampling_rate, target_rate, samples, delay / TICKS)
    from scipy.signal import upfirdn

    taps, lowest, highest = _polyphase_filter(down, up, delay)
    first, last = -(highest // up), ((samples - 1) * down - lowest) // up
    skip = (-lowest - first * up) // down
    return upfirdn(taps, _extend(x, first, last), up, down)[..., skip : skip + samples]


def _linear(x: Floats, ratio: float, samples: int, delay: float) -> Floats:
    last = x.shape[-1] - 1
    position = np.clip(np.arange(samples) * ratio - delay, 0, last)
    left = position.astype(np.intp)
    low = x.take(left, axis=-1)
    return low + (position - left) * (x.take(np.minimum(left + 1, last), axis=-1) - low)


def _extend(x: Floats, first: int, last: int) -> Floats:
    """x[..., first : last + 1], beyond its ends along the line through them; first <= 0 <= last."""
    length = x.shape[-1]
    y = np.empty((*x.shape[:-1], last - first + 1))
    inside = min(length, last + 1)
    y[..., -first : inside - first] = x[..., :inside]
    slope = (x[..., -1:] - x[..., :1]) / max(length - 1, 1)
    y[..., :-first] = x[..., :1] + slope * np.arange(first, 0)
    y[..., inside - first :] = x[..., -1:] + slope * np.arange(1, last - inside + 2)
    return y


@lru_cache(maxsize=256)
def _simple_ratio(sampling_rate: float, target_rate: float, samples: int) -> tuple[int, int]:
    """(down, up): the fraction with the smallest terms whose drift over the window is tolerated."""
    ratio = Fraction(sampling_rate) / Fraction(target_rate)
    tolerance = Fraction(DRIFT) / samples
    simple = _simplest(ratio - tolerance, ratio + tolerance)
    return simple.numerator, simple.denominator


def _simplest(low: Fraction, high: Fraction) -> Fraction:
    """The fraction of smallest terms in [low, high], 0 < low: by continued fractions."""
    whole = math.ceil(low)
    if whole <= high:
        return Fraction(whole)
    return whole - 1 + 1 / _simplest(1 / (high - (whole - 1)), 1 / (low - (whole - 1)))


def _polyphase_filter(down: int, up: int, delay: int) -> tuple[Floats, int, int]:
    """Taps at ``up`` times the input's rate, and the numbers of the first and the last of them.

    Tap m weighs input i in output j where m = j down - i up; zeros in front let upfirdn's outputs
    fall on the window's.
    """
    # 128 filters of 32,768 taps are 34 MB, the most that stays; larger ones belong to long windows.
    make = _cached_filter if 2 * HALF_WIDTH * down <= 32768 else _make_filter
    return make(down, up, delay)


def _make_filter(down: int, up: int, delay: int) -> tuple[Floats, int, int]:
    centre = delay * up / TICKS
    lowest = math.ceil(centre - HALF_WIDTH * down)
    highest = math.floor(centre + HALF_WIDTH * down)
    taps = _low_pass((np.arange(lowest, highest + 1) - centre) / down)
    padding = (lowest - highest // up * up) % down
    taps = np.concatenate((np.zeros(padding), taps))
    # An output takes every up-th tap.
    sums = np.pad(taps, (0, -len(taps) % up)).reshape(-1, up).sum(axis=0)
    return taps / np.resize(sums, len(taps)), lowest - padding, highest


_cached_filter = lru_cache(maxsize=128)(_make_filter)


def _low_pass(u: Floats) -> Floats:
    """sinc(u) under the Kaiser window of beta 5, zero beyond ten zeros; u in output samples."""
    # I0(beta sqrt(v)) by its power series, whose terms are all positive: at beta 5 the eighteenth
    # is 2e-19 of the sum. Less than half the time of scipy.special.i0.
    v = 6.25 * (1 - (u / HALF_WIDTH) ** 2)
    window = np.zeros_like(v)
    for k in range(18, 0, -1):
        window += 1
        window *= v
        window /= k * k
    window += 1
    window *= np.sinc(u)
    window /= KAISER_PEAK
    return np.where(v >= 0, window, 0.0)


KAISER_PEAK = 27.239871823604442
"""I0(5)."""


def _resample_by_output(
    x: Floats, sampling_rate: float, target_rate: float, samples: int, delay: float
) -> Floats:
    """The same filter at every output's own place: for rates whose phases would not recur."""
    ratio = sampling_rate / target_rate
    half = HALF_WIDTH * ratio
    first = math.floor(-delay - half)
    extended = _extend(x, first, math.ceil((samples - 1) * ratio - delay + half) + 1)
    y = np.empty((*x.shape[:-1], samples))
    block = _block(2 * half * max(1, x[..., 0].size))
    start = 0
    for index, distance in _taps(-delay, ratio, samples, half, block):
        weights = _low_pass(distance / ratio)
        weights /= weights.sum(axis=1, keepdims=True)
        weighted = extended.take(index - first, axis=-1) * weights
        y[..., start : start + len(index)] = weighted.sum(axis=-1)
        start += len(index)
    return y


def _taps(
    start: float, step: float, outputs: int, half: float, block: int
) -> Iterator[tuple[NDArray[np.int64], Floats]]:
    """Blocks of outputs at start + j step: the inputs within ``half`` of them, their distances.

    Both (outputs of the block, taps); a few lie just beyond ``half``.
    """
    taps = np.arange(math.ceil(2 * half) + 1)
    for begin in range(0, outputs, block):
        position = start + step * np.arange(begin, min(begin + block, outputs))[:, None]
        index = np.floor(position - half).astype(np.int64) + taps
        yield index, index - position


def _block(taps: float) -> int:
    """Outputs whose taps over all channels fit in a million values, 8 MB."""
    return max(1, int(1e6 / max(taps, 1)))


# One window

Channels = Sequence[tuple[NDArray[Any], float, float]]


@dataclass(frozen=True)
class PreparedWindow:
    """What `prepare_window` returns.

    Attributes:
        data: (C, samples) float32 at the model's rate; None where a channel has no finite sample.
        missing_fraction: the largest over the channels, before filling.
        flat: channels that do not vary, by index.
    """

    data: NDArray[np.float32] | None
    missing_fraction: float
    flat: tuple[int, ...]


def prepare_window(
    channels: Channels,
    samples: int,
    *,
    preprocess: Preprocessing = "none",
    normalize: Normalization = "none",
    statistics: Sequence[tuple[float, float]] | None = None,
) -> PreparedWindow:
    """A window's raw channels, each at its own rate, as the model takes them.

    In order: gaps are filled (`fill_missing`), each channel comes to 65 Hz (`resample_window`, or
    the reference preprocessing), and is normalized. Only the window's own samples are used.

    Args:
        channels: per channel its raw samples (L,) in physical units with NaN or inf where they
            are missing, their rate in Hz, and the time of the first of them after the window's
            start in s.
        samples: round(duration * 65).
        preprocess: ``reference`` for `preprocess` in place of resampling alone.
        normalize: ``window`` for (x - mean) / std of the window's own resampled samples,
            ``recording`` for ``statistics``. What does not vary becomes zero.
        statistics: per channel mean and standard deviation of its recording
            (`RunningStatistics`).

    Raises:
        InputError: a channel whose result is too large for float32, or as `resample_window`.
        UsageError: an unknown choice, statistics missing, or ``normalize="recording"`` after the
            reference preprocessing, which leaves nothing of the recording's mean and scale.
    """
    _check_choices(len(channels), preprocess, normalize, statistics)
    data = np.empty((len(channels), samples))
    flat = np.zeros(len(channels), dtype=bool)
    missing = 0.0
    empty = False
    for (sampling_rate, offset, _), members in _groups(channels).items():
        raw = np.stack([channels[member][0] for member in members])
        filled, fraction = fill_missing(raw)
        missing = max(missing, float(fraction.max()))
        if (fraction == 1).any():
            empty = True
            continue
        flat[members] = filled.min(axis=-1) == filled.max(axis=-1)
        if preprocess == "reference":
            filled = _signal(filled, sampling_rate, TARGET_RATE, offset)
            data[members], still = _reference(
                filled, sampling_rate, samples, offset=offset, target_rate=TARGET_RATE
            )
            flat[members] |= still
        else:
            with np.errstate(over="ignore", invalid="ignore"):
                data[members] = resample_window(filled, sampling_rate, samples, offset=offset)
    if empty:
        return PreparedWindow(None, missing, tuple(np.flatnonzero(flat).tolist()))
    if normalize != "none":
        data, constant = _standardize(data, flat, statistics if normalize == "recording" else None)
        flat |= constant
    # NaN compares false: it comes of sums beyond float64 and is refused alike.
    too_large = ~(np.abs(data).max(axis=-1) <= np.finfo(np.float32).max)
    if too_large.any():
        raise InputError(
            f"channel {_indices(too_large)} is too large for float32 (3.4e38); "
            "check its unit or scale"
        )
    return PreparedWindow(data.astype(np.float32), missing, tuple(np.flatnonzero(flat).tolist()))


def _check_choices(
    channels: int,
    preprocess: str,
    normalize: str,
    statistics: Sequence[tuple[float, float]] | None,
) -> None:
    if channels == 0:
        raise InputError("a window without channels; at least 1 is needed")
    if preprocess not in ("none", "reference"):
        raise UsageError(f"preprocess is {preprocess!r}; it must be 'none' or 'reference'")
    if normalize not in ("none", "window", "recording"):
        raise UsageError(f"normalize is {normalize!r}; it must be 'none', 'window' or 'recording'")
    if normalize != "recording":
        return
    if preprocess == "reference":
        raise UsageError(
            "normalize='recording' after preprocess='reference' has no meaning: the reference "
            "removes the trend and scales by the window's own size; choose one of them"
        )
    if statistics is None or len(statistics) != channels:
        given = 0 if statistics is None else len(statistics)
        raise UsageError(
            f"normalize='recording' needs the statistics of {channels} channels, not of {given}"
        )


def _groups(channels: Channels) -> dict[tuple[float, float, int], list[int]]:
    """Channels of the same rate, offset and length, which are worked on together."""
    groups: dict[tuple[float, float, int], list[int]] = {}
    for index, (raw, sampling_rate, offset) in enumerate(channels):
        if np.ndim(raw) != 1:
            raise InputError(
                f"channel {index} has shape {np.shape(raw)}; it must be one series (L,)"
            )
        rate = as_rate(sampling_rate)
        groups.setdefault((rate, offset, len(raw)), []).append(index)
    return groups


def _standardize(
    x: Floats, flat: NDArray[np.bool_], statistics: Sequence[tuple[float, float]] | None
) -> tuple[Floats, NDArray[np.bool_]]:
    """(x - mean) / std per channel (C, L), and the channels whose std is zero: they are zero.

    A raw channel that was constant is not scaled by its own, since all it has left is the filter's.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        if statistics is None:
            mean = x.mean(axis=-1)
            std = x.std(axis=-1)
            constant = flat | (std <= ROUNDING * np.abs(mean))
        else:
            mean, std = np.asarray(statistics, dtype=np.float64).T
            constant = std <= ROUNDING * np.abs(mean)
        # An infinite std would turn what it scales into zeros.
        std = np.where(np.isfinite(std), std, np.nan)
        y = (x - mean[:, None]) / np.where(constant, 1.0, std)[:, None]
    y[constant] = 0.0
    return y, constant


class RunningStatistics:
    """Count, mean and standard deviation of every channel of a recording, block by block.

    NaN and inf do not count. Blocks are merged as in Chan, Golub and LeVeque 1979, each taken
    relative to its first sample, so that an offset far above the signal costs no digits and a
    constant channel has a standard deviation of exactly zero.
    """

    def __init__(self, channels: int) -> None:
        self.count = np.zeros(channels, dtype=np.int64)
        self.mean = np.zeros(channels)
        self._squares = np.zeros(channels)  # sum of squared differences from the mean

    def update(self, block: Sequence[NDArray[Any]]) -> None:
        """Add one block: a series of each channel, of any lengths, none included."""
        if len(block) != len(self.count):
            raise InputError(f"a block of {len(block)} channels; this has {len(self.count)}")
        other = RunningStatistics(len(block))
        for channel, series in enumerate(block):
            values = np.asarray(series, dtype=np.float64)
            values = values[np.isfinite(values)]
            if values.size == 0:
                continue
            with np.errstate(over="ignore", invalid="ignore"):
                centred = values - values[0]
                shift = centred.mean()
                other.count[channel] = values.size
                other.mean[channel] = values[0] + shift
                other._squares[channel] = np.square(centred - shift).sum()
        self.merge(other)

    def merge(self, other: RunningStatistics) -> None:
        """Add what another one has seen."""
        count = self.count + other.count
        share = other.count / np.maximum(count, 1)
        with np.errstate(over="ignore", invalid="ignore"):
            apart = other.mean - self.mean
            self.mean = np.where(self.count == 0, other.mean, self.mean + share * apart)
            self._squares = self._squares + other._squares + apart**2 * share * self.count
        self.count = count

    @property
    def std(self) -> Floats:
        """(C,) population standard deviation; 0 where nothing was seen."""
        return np.sqrt(self._squares / np.maximum(self.count, 1))

    def statistics(self) -> list[tuple[float, float]]:
        """Mean and standard deviation per channel, as `prepare_window` takes them."""
        return list(zip(self.mean.tolist(), self.std.tolist(), strict=True))


# Shared


def _rational(rate: float) -> Fraction:
    """The rate a float was meant to be: 117.096 is 14637/125, and 1 / 0.0077 is 10000/77.

    The float itself is a hair off, so that 65 L / r computed with it can step over a whole number
    and its ceiling be one too many. A denominator of a million holds what recorders write, a
    decimal rate or a period in microseconds; any other moves by less than 1e-6 Hz or s.
    """
    if rate >= 1:
        return Fraction(rate).limit_denominator(10**6)
    return 1 / (1 / Fraction(rate)).limit_denominator(10**6)


def _signal(x: ArrayLike, sampling_rate: float, target_rate: float, offset: float) -> Floats:
    x = as_float_array(x).astype(np.float64, copy=False)
    _check_samples(x.shape)
    if not abs(offset) * sampling_rate <= 1:
        raise InputError(
            f"the first sample is {offset:g} s off the window's start; at {sampling_rate:g} Hz "
            f"it must be within one sample, {1 / sampling_rate:g} s"
        )
    return x


def as_rate(rate: Any, name: str = "sampling rate") -> float:
    """A rate in Hz as a float: Python's numbers, NumPy's, and tensors and arrays of no dimension.

    Raises:
        InputError: what is no positive, finite real number.
    """
    value: Any = rate.item() if getattr(rate, "ndim", None) == 0 else rate
    real = isinstance(value, Real) and not isinstance(value, bool)
    if real and 0 < value <= sys.float_info.max:
        return float(value)
    raise InputError(f"{name} is {value!r}; it must be a positive number of Hz")


def _rates(sampling_rate: Any, target_rate: Any) -> tuple[float, float]:
    return as_rate(sampling_rate), as_rate(target_rate, "target rate")


def _check_samples(shape: Sequence[int]) -> None:
    if len(shape) == 0 or shape[-1] == 0:
        raise InputError(f"a signal of shape {tuple(shape)} has no samples; at least 1 is needed")


def _indices(mask: NDArray[np.bool_]) -> str:
    """'2' or '0, 2' of a mask over channels; '(1, 0)' where there are windows too."""
    if mask.ndim < 2:
        return ", ".join(str(index) for index in np.flatnonzero(mask))
    return ", ".join(str(tuple(index)) for index in np.argwhere(mask).tolist())
