"""Time columns: which column is one, its unit, and whether it is even.

Times are carried as integer nanoseconds after the first row, so that a coarse clock shows as what it is.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from normwear_fast.errors import RecordingError

Nanoseconds = NDArray[np.int64]

_UNITS = {
    "s": 1.0,
    "sec": 1.0,
    "secs": 1.0,
    "second": 1.0,
    "seconds": 1.0,
    "ms": 1e-3,
    "msec": 1e-3,
    "millis": 1e-3,
    "millisecond": 1e-3,
    "milliseconds": 1e-3,
    "us": 1e-6,
    "µs": 1e-6,  # micro sign
    "μs": 1e-6,  # Greek mu: both are written
    "usec": 1e-6,
    "micros": 1e-6,
    "microseconds": 1e-6,
    "ns": 1e-9,
    "nanos": 1e-9,
    "nanoseconds": 1e-9,
}
_NAMES = {
    "t",
    "time",
    "times",
    "timer",
    "timestamp",
    "timestamps",
    "ts",
    "datetime",
    "date_time",
    "elapsed",
    "elapsed_time",
    "clock",
    "epoch",
    "unix",
    "unix_time",
    "unix_timestamp",
    "utc",
    "utc_time",
    "local_time",
    "localtime",
    "system_time",
    "recording_time",
}
# Unit words that are a time column's name on their own; "s" and "us" alone could be anything.
_UNIT_NAMES = {unit for unit in _UNITS if len(unit) > 2} | {"ms"}


@dataclass(frozen=True)
class TimeColumn:
    """A column title read as a time column; seconds is None where the title names no unit."""

    title: str
    seconds: float | None


def time_column(title: str) -> TimeColumn | None:
    """ "time", "Timestamp (ms)", "elapsed_s", "t [us]", "seconds", ...: a time column, or None."""
    match = re.fullmatch(r"\s*([^\[(]*?)\s*(?:[\[(]\s*([^\])]*?)\s*[\])])?\s*", title.casefold())
    if match is None:
        return None
    name, bracket = re.sub(r"[\s.\-]+", "_", match[1]), match[2]
    if name in _UNIT_NAMES and bracket is None:
        return TimeColumn(title, _UNITS[name])
    stem, _, last = name.rpartition("_")
    if name in _NAMES:
        # "time (UTC)" says nothing about the unit
        return TimeColumn(title, _UNITS.get(bracket) if bracket else None)
    if stem in _NAMES and last in _UNITS:
        return TimeColumn(title, _UNITS[last])
    return None


_PLAUSIBLE_HZ = 4.0


def wall_clock(seconds: float) -> bool:
    """Seconds since 1970 that fall between 2000-01-01 and 2100-01-01."""
    return 946_684_800 <= seconds <= 4_102_444_800


def infer_unit(
    path: Path, column: TimeColumn, first: float, interval: float, rate: float | None
) -> float | None:
    """The unit of a time column in seconds, or None for a column that counts rows.

    The title's, or, in this order: wall-clock size (seconds, ms, us or ns since 1970 that fall
    between 2000 and 2100); the user's rate, if one unit gives it; the largest of s, ms, us, ns in
    which the median interval means at least 4 Hz. Times that step by exactly 1 may be seconds,
    milliseconds or a row counter: only the user's rate can tell.

    Args:
        path: for the error.
        column: its title, and the title's unit.
        first: first time, in the column's unit.
        interval: median interval between times, in the column's unit.
        rate: the user's --rate.

    Raises:
        RecordingError: times step by 1, and nothing tells what that is.
    """
    if column.seconds is not None:
        return column.seconds
    for unit in (1.0, 1e-3, 1e-6, 1e-9):
        if wall_clock(first * unit):
            return unit
    if interval == 1:
        if rate is None:
            raise RecordingError(
                f"{path}: times in column {column.title!r} step by 1: seconds, ms or a row counter? "
                f"pass --rate, or name the column time_s or time_ms"
            )
        return None
    for unit in (1.0, 1e-3, 1e-6, 1e-9):
        if rate is not None and abs(1 / (interval * unit) / rate - 1) <= 0.01:
            return unit
    for unit in (1.0, 1e-3, 1e-6):
        if 1 / (interval * unit) >= _PLAUSIBLE_HZ:
            return unit
    return 1e-9


class Intervals:
    """Order statistics of a stream of intervals: exact up to 2**20 of them, of an even sample
    beyond."""

    LIMIT = 2**20

    def __init__(self) -> None:
        self._kept: list[NDArray[np.int64]] = []
        self._held = 0
        self._seen = 0
        self._stride = 1

    def add(self, intervals: NDArray[np.int64]) -> None:
        skip = -self._seen % self._stride
        self._seen += intervals.size
        self._kept.append(intervals[skip :: self._stride].copy())
        self._held += self._kept[-1].size
        while self._held > self.LIMIT:
            together = np.concatenate(self._kept)[::2].copy()
            self._kept, self._held = [together], together.size
            self._stride *= 2

    def percentiles(self, *which: float) -> list[float]:
        return [float(p) for p in np.percentile(np.concatenate(self._kept), which)]


@dataclass(frozen=True)
class Clock:
    """What a time column turned out to be.

    Attributes:
        even: rows are samples. Otherwise they are interpolated onto a grid at `sampling_rate`.
        sampling_rate: Hz.
        samples: on the uniform axis.
        gap: ns; a longer interval is a gap, not interpolated across.
    """

    even: bool
    sampling_rate: float
    samples: int
    gap: float = np.inf


def resample(
    times: Nanoseconds,
    values: NDArray[np.float64],
    grid: NDArray[np.float64],
    gap: float,
) -> NDArray[np.float64]:
    """Linear interpolation that leaves gaps missing.

    Args:
        times: (N,) ns, strictly rising.
        values: (C, N), NaN where missing.
        grid: (K,) ns, within times.
        gap: ns; between rows further apart the result is NaN.

    Returns:
        (C, K). A grid point on a row has exactly that row's value.
    """
    if times.size == 1:
        return np.repeat(values, grid.size, axis=1)
    left = np.clip(np.searchsorted(times, grid, side="right") - 1, 0, times.size - 2)
    step = (times[left + 1] - times[left]).astype(np.float64)
    weight = (grid - times[left]) / step
    on_left, on_right = weight < 1e-6, weight > 1 - 1e-6
    weight = np.where(step > gap, np.nan, weight)
    before, after = values[:, left], values[:, left + 1]
    between = before + weight * (after - before)
    return np.where(on_left, before, np.where(on_right, after, between))
