"""Raw samples to windows at the model's rate, all windows of a recording's channels in one call.

Three implementations of one definition:

* ``scipy``, on the CPU: :func:`normwear_fast.preprocess.prepare_window`, window by window.
* ``cupy``, on a GPU: the same steps with ``cupyx.scipy.signal`` and ``cupyx.scipy.ndimage``, plain and
  slow. Its code runs with NumPy and SciPy in the tests.
* ``cuda``, on a GPU: one kernel, csrc/cuda/ingest.cuh. Its arithmetic is tested on the host.

All work in float64 and agree to its rounding.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from normwear_fast.errors import InputError, UsageError
from normwear_fast.preprocess import (
    HALF_WIDTH,
    ROUNDING,
    TARGET_RATE,
    TICKS,
    Floats,
    Normalization,
    Preprocessing,
    _check_choices,
    _low_pass,
    _polyphase_filter,
    _signal,
    _simple_ratio,
    _taps,
    prepare_window,
)

Implementation = Literal["scipy", "cupy", "cuda"]

RAW_TYPES = (torch.int16, torch.int32, torch.float32)

NO_CODE = np.iinfo(np.int64).min
"""Stands for "no code means missing"."""

SHARED_VALUES = 12288
"""Values of a window that the kernel keeps in shared memory (csrc/cuda/launch.h)."""

FLAT, EMPTY, TOO_LARGE = 1, 2, 4
"""``flag_*`` of csrc/cuda/launch.h."""


@dataclass(frozen=True)
class IngestedWindows:
    """What `ingest` returns; tensors on the device of the raw samples.

    Attributes:
        data: (W, C, samples) float32 at the model's rate; a channel without a valid sample is NaN.
        missing_fraction: (W, C) float32, before filling.
        flat: (W, C) bool, channels that do not vary.
    """

    data: Tensor
    missing_fraction: Tensor
    flat: Tensor


@dataclass(frozen=True)
class _Call:
    """Checked arguments, on the host but for ``raw``."""

    raw: Tensor  # (C, n)
    sampling_rate: float
    starts: NDArray[np.int64]  # (W,)
    lengths: NDArray[np.int32]  # (W,)
    offsets: Floats  # (W,)
    samples: int
    gain: Floats  # (C,)
    baseline: Floats  # (C,)
    invalid: NDArray[np.int64]  # (C,)
    preprocess: Preprocessing
    normalize: Normalization
    statistics: Floats  # (C, 2)

    @property
    def shape(self) -> tuple[int, int, int]:
        return len(self.starts), len(self.raw), self.samples


def ingest(
    raw: Tensor | NDArray[Any],
    sampling_rate: float,
    starts: ArrayLike,
    lengths: ArrayLike,
    samples: int,
    *,
    offsets: ArrayLike = 0.0,
    gain: ArrayLike = 1.0,
    baseline: ArrayLike = 0.0,
    invalid: ArrayLike | None = None,
    preprocess: Preprocessing = "none",
    normalize: Normalization = "none",
    statistics: Sequence[tuple[float, float]] | None = None,
    implementation: Implementation | None = None,
) -> IngestedWindows:
    """Cuts, scales, fills, resamples and normalizes the windows of channels that share a rate.

    Args:
        raw: (C, n) int16, int32 or float32 as recorded, any strides; NaN and inf are missing.
        sampling_rate: of raw, Hz.
        starts: (W,) integers, raw sample each window begins with; what lies outside is missing.
        lengths: (W,) or one integer, raw samples of each window, 1 or more.
        samples: of a window at 65 Hz.
        offsets: (W,) or one number, time of a window's first raw sample after its start, s.
        gain, baseline: (C,) or one number; a physical value is raw * gain + baseline.
        invalid: (C,) or one integer, the code of a missing sample; None where there is none.
        preprocess, normalize, statistics: as of `preprocess.prepare_window`.
        implementation: by default ``scipy`` on the CPU, and on a GPU ``cuda`` where it was built for it,
            else ``cupy``.

    Raises:
        InputError: samples of another type or shape, lengths below 1, or a channel whose result is
            too large for float32.
        UsageError: an unknown choice, or an implementation that the device or installation lacks.
    """
    call = _checked(
        raw, sampling_rate, starts, lengths, samples, offsets, gain, baseline, invalid,
        preprocess, normalize, statistics,
    )  # fmt: skip
    on_gpu = call.raw.device.type == "cuda"
    if implementation is None:
        implementation = ("cuda" if _cuda_runs(call.raw.device) else "cupy") if on_gpu else "scipy"
    if implementation not in _IMPLEMENTATIONS:
        raise UsageError(
            f"ingest: implementation is {implementation!r}; it must be 'scipy', 'cupy' or 'cuda'"
        )
    if (implementation == "scipy") == on_gpu:
        raise UsageError(
            f"ingest: implementation {implementation!r} does not run on {call.raw.device}"
        )
    return _IMPLEMENTATIONS[implementation](call)


def _checked(
    raw: Tensor | NDArray[Any],
    sampling_rate: float,
    starts: ArrayLike,
    lengths: ArrayLike,
    samples: int,
    offsets: ArrayLike,
    gain: ArrayLike,
    baseline: ArrayLike,
    invalid: ArrayLike | None,
    preprocess: Preprocessing,
    normalize: Normalization,
    statistics: Sequence[tuple[float, float]] | None,
) -> _Call:
    tensor = raw if isinstance(raw, Tensor) else torch.from_numpy(np.asarray(raw))
    if tensor.dtype not in RAW_TYPES or tensor.ndim != 2 or tensor.shape[1] == 0:
        raise InputError(
            f"ingest: raw samples are {tensor.dtype} {tuple(tensor.shape)}; they must be int16, int32 "
            "or float32 (C, n)"
        )
    _check_choices(len(tensor), preprocess, normalize, statistics)
    first = np.asarray(starts)
    if first.ndim != 1 or not (first.size == 0 or np.issubdtype(first.dtype, np.integer)):
        raise InputError(
            f"ingest: starts are {first.dtype} {first.shape}; they must be integers (W,)"
        )
    if samples < 1:
        raise InputError(f"ingest: windows of {samples} samples; at least 1 is needed")
    windows, channels = len(first), len(tensor)
    lasting = np.broadcast_to(np.asarray(lengths, dtype=np.int32), (windows,)).copy()
    delays = np.broadcast_to(np.asarray(offsets, dtype=np.float64), (windows,)).copy()
    if windows and lasting.min() < 1:
        raise InputError(f"ingest: a window of {lasting.min()} raw samples; at least 1 is needed")
    for offset in set(delays.tolist()):
        _signal(np.zeros(1), sampling_rate, TARGET_RATE, offset)
    codes: ArrayLike = NO_CODE if invalid is None else invalid
    return _Call(
        raw=tensor,
        sampling_rate=float(sampling_rate),
        starts=first.astype(np.int64),
        lengths=lasting,
        offsets=delays,
        samples=samples,
        gain=np.broadcast_to(np.asarray(gain, dtype=np.float64), (channels,)).copy(),
        baseline=np.broadcast_to(np.asarray(baseline, dtype=np.float64), (channels,)).copy(),
        invalid=np.broadcast_to(np.asarray(codes, dtype=np.int64), (channels,)).copy(),
        preprocess=preprocess,
        normalize=normalize,
        statistics=np.asarray(statistics or [(0.0, 1.0)] * channels, dtype=np.float64),
    )


@lru_cache(maxsize=16)
def _cuda_runs(device: torch.device) -> bool:
    """Whether the CUDA operators were built, for this device, with no newer CUDA than its driver's."""
    from normwear_fast import _native

    module, _ = _native.load()
    if module is None or not module.CUDA:
        return False
    with torch.cuda.device(device):
        return bool(module.cuda_ingest_runs())


def _too_large(window: int, channel: int) -> InputError:
    return InputError(
        f"window {window}, channel {channel} is too large for float32 (3.4e38); "
        "check its unit or scale"
    )


# SciPy: the definition


def _physical(call: _Call, channel: int, values: Any, xp: Any) -> Any:
    """Raw values of one channel as float64, missing ones NaN; xp is NumPy or CuPy."""
    physical = values.astype(np.float64) * float(call.gain[channel]) + float(call.baseline[channel])
    valid = xp.isfinite(physical)
    if values.dtype.kind == "i":
        valid &= values != int(call.invalid[channel])
    return xp.where(valid, physical, xp.nan)


def _cut(call: _Call, window: int, series: Any, xp: Any) -> Any:
    """One window of a channel's physical values, NaN where the recording has none."""
    start, length = int(call.starts[window]), int(call.lengths[window])
    cut = xp.full(length, xp.nan)
    first, last = min(max(start, 0), len(series)), max(min(start + length, len(series)), 0)
    if first < last:
        cut[first - start : last - start] = series[first:last]
    return cut


def _ingest_scipy(call: _Call) -> IngestedWindows:
    windows, channels, samples = call.shape
    data = np.full((windows, channels, samples), np.nan, dtype=np.float32)
    missing = np.empty((windows, channels), dtype=np.float32)
    flat = np.zeros((windows, channels), dtype=bool)
    raw = call.raw.numpy()
    for channel in range(channels):
        series = _physical(call, channel, raw[channel], np)
        mean, std = call.statistics[channel].tolist()
        for window in range(windows):
            cut = _cut(call, window, series, np)
            try:
                prepared = prepare_window(
                    [(cut, call.sampling_rate, float(call.offsets[window]))],
                    samples,
                    preprocess=call.preprocess,
                    normalize=call.normalize,
                    statistics=[(mean, std)],
                )
            except InputError as error:
                raise InputError(f"window {window}, channel {channel}: {error}") from None
            missing[window, channel] = prepared.missing_fraction
            flat[window, channel] = bool(prepared.flat)
            if prepared.data is not None:
                data[window, channel] = prepared.data[0]
    return IngestedWindows(*map(torch.from_numpy, (data, missing, flat)))


# CuPy


def _ingest_cupy(call: _Call) -> IngestedWindows:
    try:
        cupy = importlib.import_module("cupy")
    except ImportError:
        raise UsageError(
            "ingest: implementation 'cupy' needs CuPy; install normwear-fast[cuda]"
        ) from None
    signal = importlib.import_module("cupyx.scipy.signal")
    ndimage = importlib.import_module("cupyx.scipy.ndimage")
    stream = torch.cuda.current_stream(call.raw.device)
    with cupy.cuda.Device(call.raw.device.index), cupy.cuda.ExternalStream(stream.cuda_stream):
        results = _ingest_arrays(call, cupy.from_dlpack(call.raw), cupy, signal, ndimage)
    return IngestedWindows(*(torch.utils.dlpack.from_dlpack(result) for result in results))


def _ingest_arrays(
    call: _Call, raw: Any, xp: Any, signal: Any, ndimage: Any
) -> tuple[Any, Any, Any]:
    """The steps in the array library xp, with its SciPy: data, missing fractions, flat channels."""
    windows, channels, samples = call.shape
    data = xp.full((windows, channels, samples), xp.nan, dtype=np.float32)
    missing = np.zeros((windows, channels), dtype=np.float32)
    flat = np.zeros((windows, channels), dtype=bool)
    for channel in range(channels):
        series = _physical(call, channel, raw[channel], xp)
        for window in range(windows):
            x = _cut(call, window, series, xp)
            valid = xp.flatnonzero(xp.isfinite(x))
            missing[window, channel] = 1 - len(valid) / len(x)
            if len(valid) == 0:
                continue
            if len(valid) < len(x):
                x = _filled_array(x, valid, xp)
            still = bool(x.min() == x.max())
            offset = float(call.offsets[window])
            if call.preprocess == "reference":
                y = _reference_array(call, x, offset, xp, signal, ndimage)
                still = still or not bool(y.any())
            else:
                y = _resampled_array(call, x, offset, xp, signal)
            mean, std = 0.0, 1.0
            if call.normalize == "window":
                mean, std = float(y.mean()), float(y.std())
            elif call.normalize == "recording":
                mean, std = call.statistics[channel].tolist()
            constant = bool(call.normalize != "none" and std <= ROUNDING * abs(mean))
            constant = constant or (call.normalize == "window" and still)
            y = (
                xp.zeros(samples)
                if constant
                else (y - mean) / (std if np.isfinite(std) else np.nan)
            )
            flat[window, channel] = still or constant
            if not bool(xp.abs(y).max() <= np.finfo(np.float32).max):
                raise _too_large(window, channel)
            data[window, channel] = y.astype(np.float32)
    return data, xp.asarray(missing), xp.asarray(flat)


def _filled_array(x: Any, valid: Any, xp: Any) -> Any:
    """`preprocess.fill_missing`, rounded as it is: interp would part equal jumps by a last bit."""
    index, finite = xp.arange(len(x)), xp.isfinite(x)
    seen = xp.cumsum(finite)
    before = valid[xp.maximum(seen - 1, 0)]
    after = valid[xp.minimum(seen - finite, len(valid) - 1)]
    weight = (index - before) / xp.maximum(after - before, 1)
    return xp.where(finite, x, (1 - weight) * x[before] + weight * x[after])


def _reference_array(call: _Call, x: Any, offset: float, xp: Any, signal: Any, ndimage: Any) -> Any:
    """`preprocess.preprocess`; a flat channel is zero."""
    kept = xp.ones(len(x), dtype=bool)
    if len(x) > 1:
        jump = xp.abs(xp.diff(x))
        kept[:-1] = ~(jump > xp.quantile(jump, 0.95))
    index = xp.flatnonzero(kept)
    position = (xp.arange(call.samples) / TARGET_RATE - offset) * call.sampling_rate
    y = xp.interp(position, index, x[index])
    largest = float(xp.abs(y).max())
    y = signal.detrend(y) if len(y) > 1 else y - y
    y = ndimage.gaussian_filter1d(y, 0.02 * TARGET_RATE)
    scale = float(xp.abs(y).mean())
    return xp.zeros(len(y)) if scale <= ROUNDING * largest else y / scale


def _resampled_array(call: _Call, x: Any, offset: float, xp: Any, signal: Any) -> Any:
    """`preprocess.resample_window`."""
    rate, samples = call.sampling_rate, call.samples
    delay = round(offset * rate * TICKS)
    first, phase, weights, hold = _filter(rate, samples, delay)
    # The raw samples from `low` on, held or continued along the line beyond the window's ends.
    low = min(0, int(first.min()))
    index = np.arange(low, max(len(x), int(first.max()) + len(weights)))
    inside = index.clip(0, len(x) - 1)
    slope = 0.0 if hold else float(x[-1] - x[0]) / max(len(x) - 1, 1)
    extended = x[xp.asarray(inside)] + slope * xp.asarray(index - inside)
    down, up = (1, 1) if rate < TARGET_RATE else _simple_ratio(rate, TARGET_RATE, samples)
    if rate >= TARGET_RATE and up <= samples and not (down == up and delay == 0):
        taps, lowest, highest = _polyphase_filter(down, up, delay)
        # Output j takes tap m = j down - i up of input i: from the first input that any output needs.
        start = -(highest // up)
        skip = (-lowest - start * up) // down
        filtered = signal.upfirdn(xp.asarray(taps), extended[start - low :], up, down)
        return filtered[skip : skip + samples]
    places = first + np.arange(len(weights))[:, None] - low  # (taps, outputs)
    return (extended[xp.asarray(places)] * xp.asarray(weights[:, phase])).sum(axis=0)


# CUDA

Filter = tuple[NDArray[np.int32], NDArray[np.int32], Floats, bool]


@lru_cache(maxsize=128)
def _filter(rate: float, samples: int, delay: int) -> Filter:
    """`preprocess.resample_window` as a table: what each output takes of which inputs.

    Returns:
        first input of each output (samples,); its column of the weights (samples,); weights (taps,
        columns); whether the ends of a window are held, instead of continued along their line.
    """
    outputs = np.arange(samples)
    if rate < TARGET_RATE:
        position = outputs * (rate / TARGET_RATE) - delay / TICKS
        first = np.floor(position)
        weights = np.stack((1 - (position - first), position - first))
        return first.astype(np.int32), outputs.astype(np.int32), weights, True
    down, up = _simple_ratio(rate, TARGET_RATE, samples)
    if down == up and delay == 0:
        return outputs.astype(np.int32), np.zeros(samples, np.int32), np.ones((1, 1)), False
    if up > samples:
        ratio = rate / TARGET_RATE
        half = HALF_WIDTH * ratio
        (block,) = _taps(-delay / TICKS, ratio, samples, half, samples)
        weights = _low_pass(block[1] / ratio)
        weights /= weights.sum(axis=1, keepdims=True)
        return block[0][:, 0].astype(np.int32), outputs.astype(np.int32), weights.T.copy(), False
    taps, lowest, highest = _polyphase_filter(down, up, delay)
    # Outputs `up` apart take the same taps, `down` inputs further on.
    phases = np.arange(min(up, samples))
    start = -((highest - phases * down) // up)  # ceil((phase down - highest) / up)
    count = int(((phases * down - lowest) // up - start).max()) + 1
    place = phases * down - (start + np.arange(count)[:, None]) * up - lowest
    weights = np.where((place >= 0) & (place < len(taps)), taps[place.clip(0, len(taps) - 1)], 0.0)
    phase = outputs % up
    first = start[phase] + outputs // up * down
    return first.astype(np.int32), phase.astype(np.int32), weights, False


def _filters(call: _Call) -> dict[str, Any]:
    """The tables of the distinct offsets of a call, and which of them each window takes."""
    delays = [round(offset * call.sampling_rate * TICKS) for offset in call.offsets]
    distinct = sorted(set(delays))
    tables = [_filter(call.sampling_rate, call.samples, delay) for delay in distinct]
    taps = max(len(weights) for _, _, weights, _ in tables)
    weights = [np.pad(w, ((0, taps - len(w)), (0, 0))) for _, _, w, _ in tables]
    return {
        "filters": np.array([distinct.index(delay) for delay in delays], dtype=np.int32),
        "first": np.stack([first for first, _, _, _ in tables]),
        "phase": np.stack([phase for _, phase, _, _ in tables]),
        "weights": np.stack(weights),
        "taps": taps,
        "phases": weights[0].shape[1],
        "hold": int(tables[0][3]),
    }


def _smoothing() -> Floats:
    """The 11 weights of scipy.ndimage.gaussian_filter1d at sigma 0.02 s (1.3 samples)."""
    weights = np.exp(-0.5 / (0.02 * TARGET_RATE) ** 2 * np.arange(-5, 6) ** 2)
    return np.asarray(weights / weights.sum())


def _ingest_cuda(call: _Call) -> IngestedWindows:
    from normwear_fast import cuda_backend

    device = call.raw.device
    windows, channels, samples = call.shape
    data = torch.empty(call.shape, dtype=torch.float32, device=device)
    missing = torch.empty((windows, channels), dtype=torch.int32, device=device)
    flags = torch.empty_like(missing)
    if windows:
        longest = int(call.lengths.max())
        values = longest + 2 * samples
        scratch = None
        if values > SHARED_VALUES:
            scratch = torch.empty(windows * channels * values, dtype=torch.float64, device=device)
        tables = {
            name: torch.from_numpy(value).to(device) if isinstance(value, np.ndarray) else value
            for name, value in {
                **_filters(call),
                "starts": call.starts,
                "lengths": call.lengths,
                "offsets": call.offsets,
                "gain": call.gain,
                "baseline": call.baseline,
                "invalid": call.invalid,
                "statistics": call.statistics,
                "smoothing": _smoothing(),
            }.items()
        }
        cuda_backend.launch(
            "ingest",
            device,
            {
                **tables,
                "raw": call.raw,
                "channel_stride": call.raw.stride(0),
                "sample_stride": call.raw.stride(1),
                "samples": call.raw.shape[1],
                "out": data,
                "missing": missing,
                "flags": flags,
                "scratch": scratch,
                "windows": windows,
                "channels": channels,
                "outputs": samples,
                "longest": longest,
                "raw_type": cuda_backend.TYPES[call.raw.dtype],
                "reference": int(call.preprocess == "reference"),
                "normalize": ("none", "window", "recording").index(call.normalize),
                "rate": call.sampling_rate,
                "target_rate": TARGET_RATE,
            },
        )
    # The one wait for the device, after its work: the tables live until here.
    refused = (flags & TOO_LARGE).nonzero().tolist()
    if refused:
        raise _too_large(*refused[0])
    lengths = torch.from_numpy(call.lengths).to(device)[:, None]
    return IngestedWindows(data, missing / lengths, (flags & FLAT) != 0)


_IMPLEMENTATIONS = {"scipy": _ingest_scipy, "cupy": _ingest_cupy, "cuda": _ingest_cuda}
