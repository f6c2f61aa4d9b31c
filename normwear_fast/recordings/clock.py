"""Time columns: what a title says, which of several is the clock, and in what unit it counts."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from normwear_fast.errors import RecordingError
from normwear_fast.recordings.wallclock import are_digits, wall_unit

SHORT_UNITS = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "ns": 1e-9}
"""Seconds of the units that times without one may be in."""
_UNITS = SHORT_UNITS | {
    **dict.fromkeys(("sec", "secs", "second", "seconds"), 1.0),
    **dict.fromkeys(("msec", "millisec", "millis", "millisecond", "milliseconds"), 1e-3),
    **dict.fromkeys(("µs", "μs"), 1e-6),  # micro sign, Greek mu: both are written
    **dict.fromkeys(("usec", "micros", "microsecond", "microseconds"), 1e-6),
    **dict.fromkeys(("nsec", "nsecs", "nanos", "nanosecond", "nanoseconds"), 1e-9),
}
_LONG_UNITS = {
    **dict.fromkeys(("min", "mins", "minute", "minutes"), 60.0),
    **dict.fromkeys(("h", "hr", "hrs", "hour", "hours"), 3600.0),
    **dict.fromkeys(("d", "day", "days"), 86_400.0),
}
# In a name, not in brackets, the singular may be a part of a date: "timestamp_hour".
_NAMED_UNITS = _UNITS | {
    word: _LONG_UNITS[word] for word in ("min", "mins", "minutes", "h", "hrs", "hours", "days")
}
# Unit words that are a time column's name on their own; "s" and "us" alone could be anything.
_UNIT_NAMES = {unit for unit in _UNITS if len(unit) > 2} | {"ms"}
# So are these if the values are a clock's: "min" may be a minimum.
_LONG_NAMES = {"min", "minutes", "hours", "days"}
# Units of time in brackets that no recording counts in, or that may be two.
_UNKNOWN_UNITS = {
    *("m", "w", "week", "weeks", "month", "months", "y", "yr", "yrs", "year", "years"),
    *("ds", "cs", "centiseconds", "deciseconds", "ps", "picoseconds", "fs"),
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
# A name of one word.
_NAMES = _TIMES | {"t", "timer", "unix", "utc", "localtime"}
# Of those, also a temperature, a skin temperature and a count of epochs, without a unit of time ...
_AMBIGUOUS = {"t", "ts", "epoch"}
# ... or one of these words.
_SINCE_1970 = {"unix", "posix", "utc", "gmt", "local", "iso"}
_DATES = {"date", "dates", "day", "datum"}
_STARTS = {"start", "boot", "reboot", "epoch", "1970", "midnight"}
TIME_WORDS = {
    *_TIMES,
    *("stamp", "unix", "utc", "date", "received", "tick", "ticks"),
    *("seconds", "sec", "secs", "millis", "milliseconds", "msec", "micros", "microseconds"),
    *("nanos", "nanoseconds", "ms", "ns"),
}
"""Words by which a name may speak of time. Then the values decide (columns.py)."""

FINE = 1.2
"""Rows to a time, up to which they are repeats of a clock that is as fine as its rows."""
SHARED = 1.9
"""Rows to a time, from which on a clock's resolution is coarser than its rows."""
_PLAUSIBLE_HZ = 4.0
_SLOWEST = 60.0  # s; a signal with fewer samples would not be one


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
    joined = r"(time_stamps?|date_time|milli_sec)(?=_|$)"
    return re.sub(joined, lambda match: match[0].replace("_", ""), apart).split("_")


def unit_seconds(word: str) -> float | None:
    """A unit of time as it stands in brackets or in an array's `units`."""
    return (_UNITS | _LONG_UNITS).get(word.casefold())


def time_column(title: str) -> TimeColumn | None:
    """ "time", "Timestamp (ms)", "seconds_elapsed", "t [us]", "unix_ts_ms", ...; or None."""
    match = re.fullmatch(r"\s*([^\[(]*?)\s*(?:[\[(]\s*([^\])]*?)\s*[\])])?\s*", title)
    if match is None:
        return None
    words = ["epoch" if word == "epoc" else word for word in _own_words(name_words(match[1]))]
    # "time (UTC)" says nothing about the unit
    bracket = (match[2] or "").casefold()
    unit = unit_seconds(bracket)
    strange = bracket if bracket in _UNKNOWN_UNITS else ""
    if len(words) == 1 and words[0] in _UNIT_NAMES | _LONG_NAMES and match[2] is None:
        return TimeColumn(title, _NAMED_UNITS[words[0]], sure=words[0] in _UNIT_NAMES)
    by_name = ""
    if len(words) > 1 and words[-1] in _NAMED_UNITS:
        *words, by_name = words
    elif len(words) > 1 and words[0] in _UNIT_NAMES | _LONG_NAMES - {"min"}:
        by_name, *words = words
    unit = _NAMED_UNITS.get(by_name) if unit is None else unit
    # upper case is a temperature, whatever stands below it: T, T_s
    if words == ["t"] and title.lstrip().startswith("T") and (unit is None or by_name == "s"):
        return None
    said = set(words)
    one = len(words) == 1 and words[0] in _NAMES
    if not one and (not said & _TIMES or not said <= _TIMES | _WHOSE):
        return None
    sure = unit is not None or bool(said & ((_NAMES - _AMBIGUOUS) | _SINCE_1970))
    weak = not one and " ".join(words) not in _OWN
    return TimeColumn(title, unit, sure, weak, strange)


def is_date_title(title: str) -> bool:
    """ "Date", "recording_date", "local day"; not "date of birth"."""
    said = set(name_words(title))
    return not said.isdisjoint(_DATES) and said <= _DATES | _WHOSE


def _own_words(words: list[str]) -> list[str]:
    """Without what "seconds since start" counts from and what Shimmer puts around each name:
    "Shimmer_D5B8_Timestamp_Unix_CAL"."""
    if words[0] == "shimmer" and len(words) > 2:
        words = words[2:-1] if words[-1] in ("cal", "raw", "uncal") else words[2:]
    if "since" in words[1:] and words[-1] in _STARTS:
        words = words[: words.index("since")]
    return words


def choose_clock(
    candidates: Sequence[TimeColumn],
    times: Sequence[NDArray[Any]],
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
        times: the first values of each; none where they are text.
        given: the user's --rate.

    Returns:
        (the clock's place or None, places of candidates that are channels).
    """
    ranks: list[tuple[bool, ...]] = []
    channels: list[int] = []
    for place, (column, values) in enumerate(zip(candidates, times, strict=True)):
        dated = values.dtype.kind in "Mm"
        numbers = _numbers(values)
        there = numbers[np.isfinite(numbers)]
        steps = np.diff(there)
        moved = np.abs(steps[steps != 0])
        full = values.size > 0 and there.size == values.size
        forward, moves = not (steps < 0).any(), moved.size > 0
        fine = regular = known = steady = True
        if moves:
            fine = steps.size < FINE * moved.size
            low, median, high = np.percentile(moved, [5, 50, 95])
            regular = median / 4 <= low and high <= 4 * median
            wall = dated or wall_unit(there) is not None
            known = wall or column.seconds is not None
            even = given is None or high - low <= 0.1 * median
            steady = wall or (regular and even and steps.size < SHARED * moved.size)
        ranks.append((full, forward, moves, fine, column.sure, regular, known, not column.weak))
        if not column.sure and not (forward and moves and steady):
            channels.append(place)
    clocks = [place for place in range(len(candidates)) if place not in channels]
    return max(clocks, key=lambda place: ranks[place], default=None), channels


def _numbers(values: NDArray[Any]) -> NDArray[np.float64]:
    """Numbers as they are; wall-clock times in seconds after the first, NaN where missing."""
    if values.dtype.kind not in "Mm":
        return np.asarray(values, dtype=np.float64)
    there = values[~np.isnat(values)]
    if not there.size:
        return np.full(values.size, np.nan)
    return np.asarray((values - there[0]) / np.timedelta64(10**9, "ns"), dtype=np.float64)


def infer_unit(
    path: Path, column: TimeColumn, times: NDArray[np.float64], rate: float | None
) -> float | None:
    """The unit of a time column in seconds, or None for a column that counts rows.

    The title's, or, in this order: wall-clock size (seconds, ms, us or ns since 1970 that fall
    between 2000 and 2100); the rate, if one unit makes the times about as fast; the largest of s, ms,
    us, ns in which the interval means at least 4 Hz, unless it may as well mean a slow signal in the
    unit above: 10 may be 10 s or 10 ms. Times that step by exactly 1 may be seconds, milliseconds or
    a count of rows. Then only the rate can tell.

    Args:
        path: for the error.
        column: its title, and the title's unit.
        times: the first of them, in the column's unit; they move.
        rate: the user's --rate, or the file's own beside its times.

    Raises:
        RecordingError: nothing tells which of two units it is, or it is none that is known.
    """
    if column.seconds is not None:
        return column.seconds
    wall = wall_unit(times)
    if wall is not None:
        return wall
    title = repr(column.title)
    if column.strange:
        raise RecordingError(
            f"{path}: times in column {title} have a unit that is not known; ns, us, ms, s, min, h "
            f"and days are"
        )
    if are_digits(times):
        raise RecordingError(
            f"{path}: times in column {title} are the digits of times of day; 13:58:58.081 or, with a "
            f"date, 2024-05-31 13:58:58.081 is right"
        )
    steps = np.abs(np.diff(times))
    moved = steps[steps > 0]
    interval, mean = float(np.median(moved)), float(steps.mean())
    shared = steps.size / moved.size  # rows to a time
    coarse = shared >= SHARED
    counts = interval == 1 and not coarse
    # A count of rows does not repeat; 1024 Hz in whole ms do. Of others a jittered or a coarse clock
    # is near the rate in one unit alone: they are too far apart for two.
    steps_of, near = ((mean,), 0.01) if counts else ((mean, interval / shared), 0.25)
    for unit in SHORT_UNITS.values() if rate is not None else ():
        if any(abs(step * unit * (rate or 1.0) - 1) <= near for step in steps_of):
            return unit
    if counts and rate is None:
        raise RecordingError(
            f"{path}: times in column {title} step by 1: seconds, ms or a row counter? "
            f"pass --rate, or name the column time_s or time_ms"
        )
    if counts and steps.size - moved.size > max(1, 0.01 * moved.size):  # more than a row or two
        raise RecordingError(
            f"{path}: times in column {title} step by 1 and repeat: {1 / mean:.4g} Hz in s, "
            f"{1e3 / mean:.4g} Hz in ms, and --rate {rate:g} is neither; name the column time_s or "
            f"time_ms, or row if it counts rows"
        )
    if counts:
        return None
    step = interval / shared if coarse else interval
    for (name, unit), (finer, _) in pairwise(SHORT_UNITS.items()):
        period = step * unit
        if 1 / period >= _PLAUSIBLE_HZ or (unit == 1 and interval < 1):  # no clock counts 0.5 ms
            return unit
        if coarse or _slow(period, moved / interval):
            advice = "pass --rate, or name" if rate is None else f"--rate {rate:g} is neither; name"
            raise RecordingError(
                f"{path}: times in column {title} step by {interval:g}: {name} ({1 / period:.4g} Hz) "
                f"or {finer} ({1e3 / period:.4g} Hz)? {advice} the column time_{name} or time_{finer}"
            )
    return SHORT_UNITS["ns"]


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
