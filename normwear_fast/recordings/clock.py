"""Time columns: which column is one, its unit, and whether it is even.

Times are carried as integer nanoseconds after the first row, so that a coarse clock shows as what it is.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
LONG_UNITS = {
    "min": 60.0,
    "minute": 60.0,
    "h": 3600.0,
    "hr": 3600.0,
    "hour": 3600.0,
    "d": 86400.0,
    "day": 86400.0,
}
"""In the singular; those above have their plurals."""
# In a name, not in brackets, the singular may be a part of a date: "timestamp_hour".
_LONG_NAMES = {"min": 60.0, "mins": 60.0, "minutes": 60.0, "h": 3600.0, "hrs": 3600.0} | {
    "hours": 3600.0,
    "days": 86400.0,
}
# Units of time in brackets that no recording counts in, or that may be two.
_UNKNOWN_UNITS = {
    *("m", "w", "week", "weeks", "month", "months", "y", "yr", "yrs", "year", "years"),
    *("ds", "cs", "centiseconds", "deciseconds", "ps", "picoseconds", "fs"),
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
    "elapsed",
    "clock",
    "epoch",
    "unix",
    "utc",
    "localtime",
}
# A name of several words is a time's if one of these is among them ...
_TIMES = {"time", "times", "timestamp", "timestamps", "ts", "datetime", "clock", "epoch", "elapsed"}
# ... and the others say whose or which time it is: "phone_timestamp", "unix_ts", "sensor_time".
_WHOSE = {
    *("sensor", "phone", "device", "watch", "host", "server", "system", "machine", "gps", "lsl"),
    *("recording", "sample", "local", "utc", "gmt", "unix", "posix", "epoch", "iso", "wall"),
    *("relative", "rel", "absolute", "abs", "elapsed"),
}
# Names of two words that are a time's as much as one is; one that only says whose time it is may be a
# sensor's own count, or a fix of GPS now and then.
_OWN = {
    *("elapsed time", "unix time", "unix timestamp", "utc time", "local time", "system time"),
    "recording time",
}
# These make a "ts" or an "epoch" a time.
_SINCE_1970 = {"unix", "posix", "utc", "gmt", "local", "iso", "time", "timestamp", "elapsed"}
# Words by which a name may speak of time. Then the values decide (columns.py).
TIME_WORDS = {
    *_TIMES,
    *("stamp", "unix", "utc", "date", "received", "tick", "ticks"),
    *("seconds", "sec", "secs", "millis", "milliseconds", "msec", "micros", "microseconds"),
    *("nanos", "nanoseconds", "ms", "ns"),
}
# Unit words that are a time column's name on their own; "s" and "us" alone could be anything.
_UNIT_NAMES = {unit for unit in _UNITS if len(unit) > 2} | {"ms"}
# Also the names of a temperature, a skin temperature and a counter of epochs, without a unit of time.
_AMBIGUOUS = {"t", "ts", "epoch"}


@dataclass(frozen=True)
class TimeColumn:
    """A column title read as a time column.

    Attributes:
        title: as the file has it.
        seconds: the unit; None where the title names none.
        sure: the title is a time's and nothing else's. A "t" may be a temperature.
        weak: a time, but perhaps not the rows': the title says whose it is ("sensor_time"), or is
            none of a time's.
        strange: what the title has for a unit of time that is not known here.
    """

    title: str
    seconds: float | None
    sure: bool = True
    weak: bool = False
    strange: str = ""

    @property
    def local(self) -> bool:
        """Counted from 1970 on a clock of some zone: no moment that is known."""
        return not {"local", "localtime"}.isdisjoint(name_words(self.title))


def name_words(title: str) -> list[str]:
    """A title's words in lower case: "dataReceived", "data received" and "Data-Received" are two."""
    apart = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", title.strip()).casefold()
    apart = re.sub(r"[\s.\-_]+", "_", apart).strip("_")
    return re.sub(r"time_(stamps?)(?=_|$)|date_(time)(?=_|$)", _joined, apart).split("_")


def _joined(match: re.Match[str]) -> str:
    return match[0].replace("_", "")


def time_column(title: str) -> TimeColumn | None:
    """ "time", "Timestamp (ms)", "seconds_elapsed", "t [us]", "unix_ts_ms", ...; or None."""
    match = re.fullmatch(r"\s*([^\[(]*?)\s*(?:[\[(]\s*([^\])]*?)\s*[\])])?\s*", title)
    if match is None:
        return None
    words = ["epoch" if word == "epoc" else word for word in _own_words(name_words(match[1]))]
    # "time (UTC)" says nothing about the unit
    bracket = None if match[2] is None else match[2].casefold()
    unit = _bracket_unit(bracket or "")
    strange = bracket if bracket in _UNKNOWN_UNITS else ""
    if len(words) == 1 and words[0] in _UNIT_NAMES and bracket is None:
        return TimeColumn(title, _UNITS[words[0]])
    by_name = ""
    named = _UNITS | _LONG_NAMES
    if len(words) > 1 and words[-1] in named:
        *words, by_name = words
    elif len(words) > 1 and words[0] in _UNIT_NAMES | {"minutes", "hours", "days"}:
        by_name, *words = words
    unit = named.get(by_name) if unit is None else unit
    # upper case is a temperature, whatever stands below it: T, T_s
    if words == ["t"] and title.lstrip().startswith("T") and (unit is None or by_name == "s"):
        return None
    if len(words) == 1 and words[0] in _NAMES:
        sure = unit is not None or words[0] not in _AMBIGUOUS
        return TimeColumn(title, unit, sure, strange=strange)
    said = set(words)
    if not said & _TIMES or not said <= _TIMES | _WHOSE:
        return None
    sure = unit is not None or bool(said & (_TIMES - _AMBIGUOUS)) or bool(said & _SINCE_1970)
    return TimeColumn(title, unit, sure, " ".join(words) not in _OWN, strange)


def _bracket_unit(word: str) -> float | None:
    long = LONG_UNITS.get(word.removesuffix("s") if len(word) > 2 else word)
    return _UNITS.get(word, long)


def _own_words(words: list[str]) -> list[str]:
    """Without what "seconds since start" counts from and what Shimmer puts around each name:
    "Shimmer_D5B8_Timestamp_Unix_CAL"."""
    if words[0] == "shimmer" and len(words) > 2:
        words = words[2:-1] if words[-1] in ("cal", "raw", "uncal") else words[2:]
    if "since" in words[1:] and words[-1] in (
        "start",
        "boot",
        "reboot",
        "epoch",
        "1970",
        "midnight",
    ):
        words = words[: words.index("since")]
    return words


def choose_clock(
    candidates: Sequence[TimeColumn],
    times: Sequence[NDArray[np.float64] | NDArray[np.datetime64] | None],
    given: float | None,
) -> tuple[int | None, list[int]]:
    """Which of a table's time columns is its clock, and which are none.

    In this order: a column that is full, that never goes back, that moves, that gives each row a time
    of its own, whose title is a time's and nothing else's, whose steps are regular, whose unit is
    known, whose title is not weak, that stands further left. A column whose title may mean something
    else ("t") has to be a clock by its values: it never goes back, moves, and is of wall-clock size, or
    its steps are regular, without repeats; with the user's rate they are all but equal.

    Args:
        candidates: from left to right.
        times: the first values of each, of wall-clock times as datetime64; None for such as are what
            they are.
        given: the user's --rate.

    Returns:
        (the clock's place or None, places of candidates that are channels).
    """
    ranks: list[tuple[bool, ...]] = []
    channels: list[int] = []
    for place, (column, values) in enumerate(zip(candidates, times, strict=True)):
        full = forward = moves = fine = regular = known = steady = True
        if values is not None:
            dated = values.dtype.kind == "M"
            values = _seconds(values)
            full = values.size > 0 and bool(np.isfinite(values).all())
            values = values[np.isfinite(values)]
            steps = np.diff(values)
            moved = np.abs(steps[steps != 0])
            forward, moves = not (steps < 0).any(), moved.size > 0
            if moves:
                fine = steps.size < FINE * moved.size
                low, median, high = np.percentile(moved, [5, 50, 95])
                regular = median / 4 <= low and high <= 4 * median
                first = float(values[0])
                wall = dated or wall_unit(first) is not None
                known = wall or column.seconds is not None
                even = given is None or high - low <= 0.1 * median
                steady = wall or (regular and even and steps.size < SHARED * moved.size)
        ranks.append((full, forward, moves, fine, column.sure, regular, known, not column.weak))
        if not column.sure and not (forward and moves and steady):
            channels.append(place)
    clocks = [place for place in range(len(candidates)) if place not in channels]
    return max(clocks, key=lambda place: ranks[place], default=None), channels


def _seconds(values: NDArray[Any]) -> NDArray[np.float64]:
    """Wall-clock times in seconds after the first, NaN where missing; numbers as they are."""
    if values.dtype.kind != "M":
        return values
    there = values[~np.isnat(values)]
    if not there.size:
        return np.full(values.size, np.nan)
    return np.asarray((values - there[0]) / np.timedelta64(10**9, "ns"), dtype=np.float64)


_PLAUSIBLE_HZ = 4.0
_SLOWEST = 60.0  # s; a signal with fewer samples would not be one
FINE = 1.2
"""Rows to a time, up to which they are repeats of a clock that is as fine as its rows."""
SHARED = 1.9
"""Rows to a time, from which on a clock's resolution is coarser than its rows."""


def wall_clock(seconds: float) -> bool:
    """Seconds since 1970 that fall between 2000-01-01 and 2100-01-01."""
    return 946_684_800 <= seconds <= 4_102_444_800


def wall_unit(value: float) -> float | None:
    """The unit (s) in which a number is a time between 2000 and 2100, counted from 1970."""
    return next((u for u in (1.0, 1e-3, 1e-6, 1e-9) if wall_clock(value * u)), None)


def infer_unit(
    path: Path, column: TimeColumn, times: NDArray[np.float64], rate: float | None
) -> float | None:
    """The unit of a time column in seconds, or None for a column that counts rows.

    The title's, or, in this order: wall-clock size (seconds, ms, us or ns since 1970 that fall
    between 2000 and 2100); the user's rate, if one unit gives it; the largest of s, ms, us, ns in
    which the interval means at least 4 Hz, unless it may as well mean a slow signal in the unit
    above: 10 may be 10 s or 10 ms. Times that step by exactly 1 may be seconds, milliseconds or a
    row counter. Then only the user's rate can tell.

    Args:
        path: for the error.
        column: its title, and the title's unit.
        times: the first of them, in the column's unit; they move.
        rate: the user's --rate.

    Raises:
        RecordingError: nothing tells which of two units it is, or it is none that is known.
    """
    if column.seconds is not None:
        return column.seconds
    wall = wall_unit(float(times[0]))
    if wall is not None:
        return wall
    if column.strange:
        raise RecordingError(
            f"{path}: times in column {column.title!r} have a unit that is not known; ns, us, ms, s, "
            f"min, h and days are"
        )
    advice = "pass --rate, or name" if rate is None else f"--rate {rate:g} is neither; name"
    steps = np.diff(times)
    moved = np.abs(steps[steps != 0])
    interval = float(np.median(moved))
    shared = steps.size / moved.size  # rows to a time
    coarse = shared >= SHARED
    title = repr(column.title)
    if interval == 1 and not coarse:
        # A count of rows does not repeat: 1024 Hz in whole ms do, and those of 900 Hz skip.
        mean = float(np.abs(steps).mean())
        for unit in (1.0, 1e-3, 1e-6, 1e-9) if mean != 1 and rate is not None else ():
            if abs(1 / (mean * unit) / (rate or 1.0) - 1) <= 0.01:
                return unit
        # a row that is there twice
        if rate is not None and steps.size - moved.size > max(1, 0.01 * moved.size):
            raise RecordingError(
                f"{path}: times in column {title} step by 1 and repeat: {1 / mean:.4g} Hz in s, "
                f"{1e3 / mean:.4g} Hz in ms, and --rate {rate:g} is neither; name the column time_s or "
                f"time_ms, or row if it counts rows"
            )
        if rate is None:
            raise RecordingError(
                f"{path}: times in column {title} step by 1: seconds, ms or a row counter? "
                f"pass --rate, or name the column time_s or time_ms"
            )
        return None
    step = interval / shared if coarse else interval
    for unit in (1.0, 1e-3, 1e-6, 1e-9):
        if rate is not None and abs(1 / (step * unit) / rate - 1) <= (0.25 if coarse else 0.01):
            return unit
    names = {1.0: "s", 1e-3: "ms", 1e-6: "us", 1e-9: "ns"}
    for unit, finer in ((1.0, 1e-3), (1e-3, 1e-6), (1e-6, 1e-9)):
        period = step * unit
        if 1 / period >= _PLAUSIBLE_HZ or (unit == 1 and interval < 1):  # no clock counts 0.5 ms
            return unit
        if coarse or _slow(period, moved / interval):
            raise RecordingError(
                f"{path}: times in column {title} step by {interval:g}: "
                f"{names[unit]} ({1 / period:.4g} Hz) or {names[finer]} ({1e3 / period:.4g} Hz)? "
                f"{advice} the column time_{names[unit]} or time_{names[finer]}"
            )
    return 1e-9


def _slow(period: float, moved: NDArray[np.float64]) -> bool:
    """Whether a slow signal may have this period (s), above 0.25.

    A whole number of seconds up to a minute, half ones below 4, a whole rate below 1; below 4 also
    any that varies. Not 15.625 s, which is 64 Hz in ms, nor whole steps that vary as those of
    an even clock do that is rounded to them.

    Args:
        period: s.
        moved: the steps, in their median.
    """
    if period > _SLOWEST * 1.01:
        return False
    kinds = np.unique(moved.round(9))
    if kinds.size == 2 and moved.size >= 20:
        stray = np.ptp(np.cumsum(moved - moved.mean()))
        often = float(np.mean(moved < moved.mean()))
        if stray <= 1.5 * (kinds[1] - kinds[0]) and 0.05 <= often <= 0.95:
            return False
    low, high = np.percentile(moved, [5, 95])
    if period < 4 and high - low > 0.01:
        return True
    if period < 1:
        return bool(
            abs(1000 * period - round(1000 * period)) <= 0.01
            or abs(1 / period - round(1 / period)) <= 0.01
        )
    near = (0.01 if period < 4 else 0.002) * period
    halves = 2 if period < 4 else 1
    return abs(halves * period - round(halves * period)) <= halves * near


class Resolution:
    """To what the numbers of a time column are written, over a stream of them.

    Seconds since 1970 with three decimals are multiples of 1 ms, but as float64 each is off by up
    to 1.2e-7 s, and a float32 after three hours knows no times between 1/1024 s. What two such
    numbers differ by says nothing finer.
    """

    _MOST = 9  # decimals

    def __init__(self) -> None:
        self.spacing = 0.0
        """The largest distance between neighbouring floats, in the column's unit."""
        self._decimals: int | None = 0

    @property
    def written(self) -> float:
        """The decimal place that all numbers so far are whole multiples of; 0 where none is."""
        return 0.0 if self._decimals is None else 10.0**-self._decimals

    def add(self, times: NDArray[np.number]) -> None:
        if times.dtype.kind != "f" or not times.size:
            return
        largest = times.dtype.type(np.abs(times).max())
        self.spacing = max(self.spacing, float(np.spacing(largest)))
        numbers = times.astype(np.float64)
        # a decimal place is one only where floats are much closer than that
        while self._decimals is not None and not self._whole(numbers):
            finer = self._decimals + 1
            near = 10.0**-finer < 8 * self.spacing
            self._decimals = None if near or finer > self._MOST else finer

    def _whole(self, numbers: NDArray[np.float64]) -> bool:
        assert self._decimals is not None
        scaled = numbers * 10.0**self._decimals
        off = np.abs(scaled - np.rint(scaled)).max()
        return bool(off <= min(0.25, 2 * self.spacing * 10.0**self._decimals))


class Midnight:
    """Times of day, without a date, as times that go on: after 23:59:59 comes 24:00:00.

    One that falls by more than half a day is the next day's.
    """

    def __init__(self, day: int) -> None:
        self._day = day  # in the column's unit
        self._days = 0
        self._last: int | None = None

    def __call__(self, times: Nanoseconds) -> Nanoseconds:
        if not times.size:
            return times
        steps = np.diff(times, prepend=times[0] if self._last is None else self._last)
        days = self._days + np.cumsum(steps < -(self._day // 2))
        self._last, self._days = int(times[-1]), int(days[-1])
        return times + days * self._day


class Intervals:
    """Order statistics of a stream of intervals: exact up to 2**20 of them, of an even sample
    beyond."""

    LIMIT = 2**20

    def __init__(self) -> None:
        self._kept: list[NDArray[np.int64]] = []
        self._held = 0
        self._seen = 0
        self._stride = 1

    def __bool__(self) -> bool:
        return self._held > 0

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
        tick: ns that rows sharing a time are spread over; 0 where each has a time of its own.
    """

    even: bool
    sampling_rate: float
    samples: int
    gap: float = np.inf
    tick: float = 0.0


class Spread:
    """Rows that share a time, put a period apart after it, within the clock's tick."""

    def __init__(self, period: float, tick: float) -> None:
        self._period, self._tick = period, tick
        self._last: int | None = None
        self._count = 0  # rows so far at the last time

    def __call__(self, times: Nanoseconds) -> Nanoseconds:
        """The next times (ns), spread; they never go back."""
        if not times.size or not self._tick:
            return times
        fresh = np.diff(times, prepend=times[0] - 1 if self._last is None else self._last) > 0
        place = np.arange(times.size)
        start = np.maximum.accumulate(np.where(fresh, place, -1))
        within = np.where(start >= 0, place - start, self._count + place)
        self._last, self._count = int(times[-1]), int(within[-1]) + 1
        end = self._tick - self._period / 2
        later = within * self._period
        # rows that are too many for the tick follow a nanosecond apart
        offset = np.where(later <= end, later, end + within)
        return times + np.rint(offset).astype(np.int64)


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
