"""The CPU's native operators with, beside each, its definition in NumPy.

Each function takes the native version where `normwear_fast._C` was built and the definition where
it was not, with one warning. The two agree to rounding.
"""

from __future__ import annotations

import functools
import importlib
import warnings
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from normwear_fast.errors import InputError


@functools.cache
def load() -> tuple[ModuleType | None, str | None]:
    """The native module, or None and why it could not be had."""
    try:
        return importlib.import_module("normwear_fast._C"), None
    except ModuleNotFoundError as error:
        if error.name != "normwear_fast._C":
            raise
        return None, "it was not built"
    except ImportError as error:
        return None, str(error).splitlines()[0]


@functools.cache
def _module() -> ModuleType | None:
    module, why_not = load()
    if module is None:
        warnings.warn(
            f"normwear_fast._C cannot be used ({why_not}); the plain NumPy code runs instead. "
            "To build it, install a C++17 compiler and reinstall normwear-fast.",
            RuntimeWarning,
            stacklevel=3,
        )
    return module


def gather_windows(
    block: NDArray[np.float64], starts: ArrayLike, length: int, *, fill: bool = False
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Cuts windows out of one channel.

    Args:
        block: (n,) float64, any stride; NaN and infinite samples are missing.
        starts: (W,) integers, index into `block` of each window's first sample. A window may begin
            before the block and run past its end: what lies outside is missing.
        length: samples a window.
        fill: also fill the missing samples, as `fill_missing` does.

    Returns:
        The windows (W, length) float64, missing samples outside the block as NaN; and (W,) int64,
        how many samples of each were missing, before any filling.

    Raises:
        InputError: another dtype or shape.
    """
    block, starts, length = _checked(block, starts, length)
    module = _module()
    if module is None:
        return gather_windows_definition(block, starts, length, fill=fill)
    windows = np.empty((len(starts), length))
    missing = np.empty(len(starts), np.int64)
    module.gather_windows(
        block=block.ctypes.data,
        n=len(block),
        stride=block.strides[0] // block.itemsize,
        starts=starts.ctypes.data,
        count=len(starts),
        length=length,
        windows=windows.ctypes.data,
        missing=missing.ctypes.data,
        fill=fill,
    )
    return windows, missing


def gather_windows_definition(
    block: NDArray[np.float64], starts: NDArray[np.int64], length: int, *, fill: bool = False
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """`gather_windows` in NumPy."""
    windows = np.full((len(starts), length), np.nan)
    for window, start in zip(windows, starts.tolist(), strict=True):
        first, last = max(start, 0), min(start + length, len(block))
        if first < last:
            window[first - start : last - start] = block[first:last]
    if fill:
        return windows, fill_missing_definition(windows)
    return windows, np.count_nonzero(~np.isfinite(windows), axis=1)


def fill_missing(windows: NDArray[np.float64]) -> NDArray[np.int64]:
    """Fills the NaN and infinite samples of each row, in place.

    Linear between the nearest valid samples; the first and last valid values are held to the ends.
    A row with no valid sample becomes NaN throughout.

    Args:
        windows: (W, length) float64, writeable, rows contiguous.

    Returns:
        (W,) int64, how many samples of each row were missing.

    Raises:
        InputError: another dtype, shape or layout.
    """
    if windows.dtype != np.float64 or windows.ndim != 2:
        raise InputError(
            f"fill_missing: windows are {windows.dtype} {windows.shape}, not float64 (W, length)"
        )
    rows_contiguous = windows.size == 0 or (
        windows.shape[1] == 1 or windows.strides[1] == windows.itemsize
    )
    whole_stride = windows.strides[0] % windows.itemsize == 0
    if not (windows.flags.writeable and windows.flags.aligned and rows_contiguous and whole_stride):
        raise InputError("fill_missing: windows must be writeable, aligned, with contiguous rows")
    module = _module()
    if module is None:
        return fill_missing_definition(windows)
    missing = np.empty(len(windows), np.int64)
    module.fill_missing(
        windows=windows.ctypes.data,
        count=len(windows),
        length=windows.shape[1],
        stride=windows.strides[0] // windows.itemsize,
        missing=missing.ctypes.data,
    )
    return missing


def fill_missing_definition(windows: NDArray[np.float64]) -> NDArray[np.int64]:
    """`fill_missing` in NumPy."""
    valid = np.isfinite(windows)
    sample = np.arange(windows.shape[1])
    for window, ok in zip(windows, valid, strict=True):
        if not ok.any():
            window[:] = np.nan
        elif not ok.all():
            window[~ok] = np.interp(sample[~ok], sample[ok], window[ok])
    return np.count_nonzero(~valid, axis=1)


def _checked(
    block: Any, starts: Any, length: Any
) -> tuple[NDArray[np.float64], NDArray[np.int64], int]:
    if not isinstance(block, np.ndarray) or block.dtype != np.float64 or block.ndim != 1:
        found = f"{block.dtype} {block.shape}" if isinstance(block, np.ndarray) else type(block)
        raise InputError(f"gather_windows: the block is {found}, not a float64 array (n,)")
    if not block.flags.aligned or block.strides[0] % block.itemsize:
        block = block.copy()
    starts = np.asarray(starts)
    if starts.size == 0:
        starts = starts.astype(np.int64)
    if starts.ndim != 1 or not np.can_cast(starts.dtype, np.int64, "safe"):
        raise InputError(
            f"gather_windows: starts are {starts.dtype} {starts.shape}, not int64 (W,)"
        )
    if length < 0:
        raise InputError(f"gather_windows: length {length} is negative")
    return block, np.ascontiguousarray(starts, np.int64), int(length)
