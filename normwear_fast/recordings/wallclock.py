"""Wall-clock times: numbers that count from 1970, dates and times of day as text."""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
from numpy.typing import NDArray

Nanoseconds = NDArray[np.int64]
Moments = NDArray[np.datetime64] | NDArray[np.timedelta64]
"""Wall-clock times with a date, or times of day without one."""

DAY = 86_400 * 10**9  # ns
_HOUR = DAY // 24
_SLOWEST = 600.0  # s between times of a recording that count from 1970
_DATE = re.compile(r"\d{4}-\d\d-\d\d")
_ISO = re.compile(
    rf"{_DATE.pattern}([ T]\d\d(:?\d\d(:?\d\d(\.\d{{1,9}})?)?)?)?(Z|[+-]\d\d(:?\d\d)?)?"
)
_ZONED = re.compile(r".*:.*(Z|[+-]\d\d(:?\d\d)?)")
# h:mm, h:mm:ss, h:mm:ss.f, of the day or since the start; m:ss.f as PhysioNet writes them
_DAYTIME = re.compile(
    r"(?P<a>\d{1,3}):(?P<b>[0-5]\d)(?::(?P<c>[0-5]\d))?(?:\.(?P<f>\d{1,9}))?", re.ASCII
)


def wall_clock(seconds: float) -> bool:
    """Seconds since 1970 that fall between 2000-01-01 and 2100-01-01."""
    return 946_684_800 <= seconds <= 4_102_444_800


def wall_unit(times: NDArray[Any]) -> float | None:
    """The unit (s) in which numbers are times between 2000 and 2100, counted from 1970.

    Nanoseconds since a phone was switched on are as large after 16 minutes as ms since 1970, and in
    these hours apart.

    Args:
        times: the first of them, NaN where missing.
    """
    times = times[np.isfinite(times)]
    first = float(times[0]) if times.size else 0.0
    unit = next((unit for unit in (1.0, 1e-3, 1e-6, 1e-9) if wall_clock(first * unit)), None)
    steps = np.abs(np.diff(times)) if unit else times[:0]
    if steps.any() and unit and np.median(steps[steps > 0]) * unit > _SLOWEST:
        return None
    return unit


def since_1970(seconds: float) -> datetime:
    """The moment, in UTC, to a microsecond."""
    return datetime(1970, 1, 1, tzinfo=UTC) + timedelta(seconds=seconds)


def is_date(cell: str) -> bool:
    """A date without a time."""
    return _DATE.fullmatch(cell) is not None


def is_daytime(cell: str) -> bool:
    """A time of day, or since the start, without a date."""
    return _DAYTIME.fullmatch(cell) is not None


def is_time(cell: str) -> bool:
    """ISO 8601, or a time without a date."""
    return bool(_ISO.fullmatch(cell) or _DAYTIME.fullmatch(cell))


def is_since_start(cell: str) -> bool:
    """A time that no clock on the wall shows: 25:10:00, or minutes and seconds."""
    match = _DAYTIME.fullmatch(cell)
    return match is not None and (
        _passed(match) >= DAY or (match["c"] is None and match["f"] is not None)
    )


def are_digits(numbers: NDArray[np.float64]) -> bool:
    """Whether numbers are the digits of dates and times of day, which no unit makes steps of:
    20240531135858 (or with ms), or, where minutes pass, 135858.081."""
    whole = np.floor(numbers)
    days, time = np.divmod(whole // 1000 if whole.min() > 1e16 else whole, 1e6)
    hours, minutes, seconds = time // 1e4, time // 100 % 100, time % 100
    if not ((hours < 24) & (minutes < 60) & (seconds < 60)).all():
        return False
    passed = seconds.min() == 0 and seconds.max() == 59 and np.ptp(time) >= 100
    return are_dates(days) or bool(passed and (days == 0).all())


def are_dates(numbers: NDArray[Any]) -> bool:
    """Whether numbers are the digits of dates between 2000 and 2100, such as 20240531."""
    months, days = numbers // 100 % 100, numbers % 100
    dates = (numbers > 2000_00_00) & (numbers < 2100_00_00) & (months >= 1) & (months <= 12)
    return bool(numbers.size and (dates & (days >= 1) & (days <= 31)).all())


def is_zoned(cell: str) -> bool:
    """A time that says of which zone it is."""
    return _ZONED.fullmatch(cell) is not None


def moment(cell: str) -> datetime | None:
    """What a time with a date is, in UTC where it has a zone; None for what is none."""
    try:
        time = datetime.fromisoformat(cell) if _ISO.fullmatch(cell) else None
    except ValueError:  # no day of the calendar, or more digits than datetime takes
        return None
    return time.astimezone(UTC) if time is not None and is_zoned(cell) else time


def moments(cells: Sequence[str]) -> Moments:
    """Times in text to a microsecond, NaT for what is none. Where any is without a date all are
    times of day, which go on past midnight."""
    cells = [cell.strip() for cell in cells]
    days = [_DAYTIME.fullmatch(cell) for cell in cells]
    if any(days):
        there = [i for i, match in enumerate(days) if match]
        passed = np.array([_passed(match) for match in days if match])
        times = np.full(len(cells), np.timedelta64("NaT"), dtype="timedelta64[us]")
        times[there] = (Midnight(DAY)(passed) // 1000).astype("timedelta64[us]")
        return times
    dated = [moment(cell) for cell in cells]
    return np.array(
        [None if one is None else one.replace(tzinfo=None) for one in dated], dtype="datetime64[us]"
    )


def _passed(match: re.Match[str]) -> int:
    """Nanoseconds."""
    first, second = int(match["a"]), int(match["b"])
    if match["c"] is None and match["f"] is not None:
        seconds = first * 60 + second
    else:
        seconds = first * 3600 + second * 60 + int(match["c"] or 0)
    return seconds * 10**9 + int((match["f"] or "").ljust(9, "0"))


def daytimes(column: Any) -> tuple[Nanoseconds, int | None]:
    """Times without a date, of which Arrow's own parser reads neither 9:59:55 nor 25:10:00.

    Args:
        column: an Arrow array of strings, none missing.

    Returns:
        (ns, the place of the first that is none).
    """
    import pyarrow as pa
    from pyarrow import compute

    parts = compute.extract_regex(column, rf"^\s*{_DAYTIME.pattern}\s*$")
    if parts.null_count:
        return np.empty(0, np.int64), int(np.argmax(parts.is_null().to_numpy(False)))

    def number(name: str, digits: int) -> Nanoseconds:
        # what is not there counts as none
        text = compute.utf8_rpad(compute.utf8_lpad(parts.field(name), 1, "0"), digits, "0")
        return np.asarray(text.cast(pa.int64()).to_numpy(), dtype=np.int64)

    first, second, third, fraction = (
        number(*each) for each in zip("abcf", (1, 1, 1, 9), strict=True)
    )
    lengths = {name: compute.utf8_length(parts.field(name)).to_numpy() for name in "cf"}
    hours = (lengths["c"] > 0) | (lengths["f"] == 0)
    seconds = np.where(hours, first * 3600 + second * 60 + third, first * 60 + second)
    return seconds * 10**9 + fraction, None


class Midnight:
    """Times of day, without a date, as times that go on: after 23:59:59 comes 24:00:00.

    One that falls by more than half a day is the next day's. With days beside them, so are those of the
    first day alone: a recording may have no other day in its rows, and others are as they say.
    """

    def __init__(self, day: int) -> None:
        self._day = day  # in the column's unit
        self._days = 0
        self._last: int | None = None
        self._first: int | None = None  # day

    def __call__(self, times: Nanoseconds, days: NDArray[np.int64] | None = None) -> Nanoseconds:
        if not times.size:
            return times
        steps = np.diff(times, prepend=times[0] if self._last is None else self._last)
        passed = self._days + np.cumsum(steps < -(self._day // 2))
        self._last, self._days = int(times[-1]), int(passed[-1])
        if days is not None:
            self._first = int(days[0]) if self._first is None else self._first
            passed = days - self._first + np.where(days == self._first, passed, 0)
        return times + passed * self._day


def runs(times: Moments) -> bool:
    """Whether wall-clock times are a clock's: all there, never back but for midnight, and moving.
    A pace of 5:32 or a lap of 0:45 is written as times of day are."""
    if times.size < 2 or np.isnat(times).any():
        return False
    zero = np.timedelta64(0)
    if (np.diff(times) < zero).any() or times[-1] == times[0]:
        return False
    if times.dtype.kind == "M":
        return True
    numbers = times.astype("timedelta64[ns]").astype(np.int64)
    days, hours = np.divmod(numbers, DAY)
    past = np.flatnonzero(np.diff(days))
    return bool((hours[past] >= 23 * _HOUR).all() and (hours[past + 1] < _HOUR).all())
