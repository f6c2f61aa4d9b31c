"""What a table's columns turn out to be: the clock, channels, or what is left out.

`assign` tells by titles and the first rows, `Column` by all rows. A name tells most clocks. What is left
is told by values, and only by what no signal does: a signal is worth more than a clock that is read as
one.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from normwear_fast.errors import RecordingError
from normwear_fast.recordings.base import Array
from normwear_fast.recordings.clock import (
    FINE,
    SHORT_UNITS,
    TIME_WORDS,
    TimeColumn,
    choose_clock,
    is_date_title,
    name_words,
    time_column,
)
from normwear_fast.recordings.wallclock import are_dates, runs, since_1970, wall_unit

_POINTS = 16  # of a piece of the table, at which a column is held against the clock
_FEWEST = 4  # rows that tell anything
_COUNTERS = {
    *("index", "idx", "row", "sample", "counter", "seq", "sequence", "frame", "packet", "package"),
    *("number", "num", "no", "nr", "n", "id", "count", "rowid", "samplenumber", "sampleindex"),
    *("#", "interval", "logging", "unnamed"),
}
"""Words of which the name of a count of rows is made: "Sample Index", "packet_no", "sample #", and what
pandas calls an index that it has read."""
_OWNERS = {
    *("subject", "participant", "patient", "device", "sensor", "channel", "lead", "electrode"),
}
"""Words of the name of a column that says, by numbers, whose a row is."""
_PRESENT = 0.8  # of the devices, say, whose rows a table has, at a time
_REGULAR = 0.9  # of a count's steps are 1; the others wrap around, or leave out what was lost
_PACE = 0.01
"""Of the recording, by which a column whose name speaks of time may stray from the clock."""
_WALL_PACE, _WALL_LATE = 0.05, 5.0
"""The same of wall-clock times, and s: of when data arrived, say, which may be in bursts."""


@dataclass(frozen=True)
class FirstLook:
    """A column by its title and its first rows.

    Args:
        title: what a user calls it.
        kind: "time" has wall-clock times, "date" days alone; "empty" has no value yet.
        values: numbers, of whole ones integers, times with a date or without one, or text; there may be
            none.
        start: the moment of the first row, where it is a time with a date.
        of_day: the times are those of a clock on the wall, or of one that began at 0:00.
        index: it has no title of its own, as pandas' index has not.
        holds: what it does where it holds neither numbers nor the clock.
        example: a cell of it, if it is text.
    """

    title: str
    kind: Literal["number", "time", "date", "text", "empty"]
    values: NDArray[Any]
    start: datetime | None = None
    of_day: bool = False
    index: bool = False
    holds: str = "text"
    example: str = ""


@dataclass(frozen=True)
class Roles:
    """What the columns of a table are, as far as their first rows tell.

    Attributes:
        clock: the place of the time column, as which `time` is read; None where there is none.
        date: the place of the column of days that times of day are of.
        channels: places of columns of numbers, and of those without a value yet.
        start: the first moment of the clock, where it is a time with a date.
        second: that of another clock, after its title.
        others: there are other time columns than the clock.
        notes: one line for each column that is not what it might be.
    """

    clock: int | None
    time: TimeColumn | None
    date: int | None
    channels: list[int]
    start: datetime | None
    second: tuple[str, datetime] | None
    others: bool
    notes: tuple[str, ...]


def assign(
    path: Path, columns: Sequence[FirstLook], given: float | None, barred: Collection[str]
) -> Roles:
    """Find the time column and the channels.

    Args:
        path: for the error.
        columns: from left to right.
        given: the user's --rate.
        barred: titles of time columns that turned out to be no clock.

    Raises:
        RecordingError: the only time column is text, and there is no --rate; or several rows share each
            time and are of different devices, say.
    """
    notes: list[str] = []
    out = {i for i, one in enumerate(columns) if one.title in barred}
    counted = {i for i, one in enumerate(columns) if one.index and counts_rows(one.values)}
    times = _candidates(path, columns, given, out | counted)
    places = list(times)
    chosen, signals = choose_clock(list(times.values()), [columns[i].values for i in places], given)
    clock = None if chosen is None else places[chosen]
    for i in (places[signal] for signal in signals):
        del times[i]
        if columns[i].kind == "number" and not columns[i].index:
            notes.append(f"column {columns[i].title!r} is not taken for a clock: it is a channel")
    if not times:
        # without a name, wall-clock times still are what they are, if they run
        timely = (i for i, one in enumerate(columns) if one.kind == "time" and i not in out)
        clock = next((i for i in timely if _runs(columns, i)), None)
        if clock is not None:
            times[clock] = TimeColumn(columns[clock].title, None, weak=True)
    second = None
    for i, time in times.items():
        if i != clock:
            notes.append(f"column {time.title!r} is a second clock and left out")
            moment = columns[i].start or _moment(columns[i], time)
            second = second or (None if moment is None else (time.title, moment))
    read_as = date = start = None
    if clock is not None:
        _check_long(path, columns, clock)
        read_as, start = times[clock], columns[clock].start
        date = _date_of(columns, clock)
        if date is not None and columns[date].start is not None:
            first = columns[clock].values[0].astype("timedelta64[us]").item()
            start = columns[date].start + first if first else None
            notes.append(
                f"times in column {read_as.title!r} are of the days in {columns[date].title!r}"
                + ("" if first else "; from 0:00 on, perhaps since the start: no start time")
            )
    channels = []
    for i, one in enumerate(columns):
        if i in times or i in out or i == date:
            continue
        if one.kind in ("text", "time", "date"):
            notes.append(f"column {one.title!r} holds {one.holds} and is left out")
        elif i in counted:
            notes.append("the first column counts rows and is left out")
        elif is_date_title(one.title) and are_dates(one.values):
            notes.append(f"column {one.title!r} holds dates as numbers and is left out")
        else:
            channels.append(i)
    return Roles(clock, read_as, date, channels, start, second, len(times) > 1, tuple(notes))


def _candidates(
    path: Path, columns: Sequence[FirstLook], given: float | None, out: Collection[int]
) -> dict[int, TimeColumn]:
    """What may be the clock by its title, by place; where nothing is, pandas' index."""
    named = {i: time for i, one in enumerate(columns) if (time := time_column(one.title))}
    named = {i: time for i, time in named.items() if i not in out and columns[i].kind != "date"}
    times = {i: time for i, time in named.items() if columns[i].kind != "text"}
    if named and not times and given is None:
        text = columns[next(iter(named))]
        raise RecordingError(
            f"{path}: time column {text.title!r} holds {text.holds}"
            + (f" such as {text.example!r}" if text.example else "")
            + "; numbers or times are right, in CSV as ISO 8601: 2024-05-31 13:58:58.081"
        )
    if times:
        return times
    index = (i for i, one in enumerate(columns) if one.index and one.kind == "number")
    return {i: TimeColumn(columns[i].title, None, sure=False) for i in index if i not in out}


def tells_by_values(title: str) -> bool:
    """Whether a column of numbers is to be looked at, as it may say of what day or whose each row is."""
    return is_date_title(title) or _is_owner(title)


def _is_owner(title: str) -> bool:
    """ "device", "Subject ID"; not "channel 1"."""
    said = set(name_words(title))
    return not said.isdisjoint(_OWNERS) and said <= _OWNERS | _COUNTERS


def _check_long(path: Path, columns: Sequence[FirstLook], clock: int) -> None:
    """Refuse a table with several rows at a time, each of another channel or device. A clock that is
    coarser than its rows has several too, but no column of a few words that are all others in each."""
    times, time = np.unique(columns[clock].values, return_inverse=True)
    if time.size < max(_FEWEST, FINE * times.size):
        return
    for one in columns:
        owner = one.kind == "text" or (one.kind == "number" and _is_owner(one.title))
        if not owner or one.values.size != time.size:
            continue
        keys, key = np.unique(one.values, return_inverse=True)
        all_at_once = 1 < keys.size <= time.size / times.size / _PRESENT
        if all_at_once and np.unique(time * keys.size + key).size == time.size:
            raise RecordingError(
                f"{path}: rows that share a time in column {columns[clock].title!r} are each of another "
                f"{one.title!r} ({', '.join(map(str, keys[:3]))}{', ...' if keys.size > 3 else ''}); "
                f"a column or a file for each is right"
            )


def _date_of(columns: Sequence[FirstLook], clock: int) -> int | None:
    """The column of days whose times of day the clock has: by its title, for a date of birth is none.
    Of several that begin with different days it is not known which."""
    time = columns[clock]
    if not time.of_day or "elapsed" in name_words(time.title) or np.isnat(time.values[:1]).any():
        return None
    days = [i for i, one in enumerate(columns) if one.kind == "date" and is_date_title(one.title)]
    days = [i for i in days if not np.isnat(columns[i].values).any()]
    return days[0] if len({columns[i].start for i in days}) == 1 else None


def _runs(columns: Sequence[FirstLook], clock: int) -> bool:
    """Whether times are a clock's, where they have days with these."""
    times, date = columns[clock].values, _date_of(columns, clock)
    return runs(times) or (
        date is not None and runs(columns[date].values + times % np.timedelta64(1, "D"))
    )


def _moment(column: FirstLook, time: TimeColumn) -> datetime | None:
    """The first of numbers that count from 1970 in UTC."""
    if column.kind != "number" or time.local or not np.isfinite(column.values[0]):
        return None
    unit = wall_unit(column.values)
    return None if unit is None else since_1970(float(column.values[0]) * unit)


def counts_rows(values: NDArray[Any]) -> bool:
    """Row numbers, as pandas writes them: from 0 or 1 on, or some rows of a longer table. Those that
    count from 1970 are times."""
    if values.dtype.kind not in "iu" or values.size < 2 or wall_unit(values):
        return False
    steps = np.diff(values)
    # of rows that were filtered, some are left; a clock steps by more
    regular = (steps == steps[0]).all() or np.median(steps) <= 3
    return bool((values.size > 3 or values[0] in (0, 1)) and regular and steps.min() > 0)


class Column:
    """One column, seen piece by piece.

    Attributes:
        size: rows seen.
        empty: none of them had a value.
    """

    def __init__(self, name: str) -> None:
        self._named = not TIME_WORDS.isdisjoint(name_words(name))
        words = set(re.findall("[a-z]+|#", " ".join(name_words(name))))
        self._counter = bool(words - {"n"}) and words <= _COUNTERS
        self._wall: float | None = None  # unit, if it begins with a wall-clock time
        self._watched = True
        self._rises = True
        self._last: float | None = None
        self._steps = self._ones = 0  # of a count
        self._whole = True
        self._points: list[tuple[NDArray[np.generic], Array]] = []
        self.size = 0
        self.empty = True

    def add(self, times: NDArray[np.generic], values: Array) -> None:
        """The next piece.

        Args:
            times: (N,) of the rows, as stored.
            values: (N,), NaN where missing.
        """
        self.size += values.size
        if not self._watched or not values.size:
            return
        present = values[np.isfinite(values)]
        if not present.size:
            return
        if self.empty:
            self.empty = False
            self._wall = wall_unit(present)
            self._watched = self._named or self._counter or self._wall is not None
            if not self._watched:
                return
        before = present[:1] if self._last is None else np.array([self._last])
        steps = np.diff(np.concatenate([before, present]))[int(self._last is None) :]
        self._last = float(present[-1])
        self._rises = self._rises and not (steps < 0).any()
        if self._counter and steps.size:
            self._steps += steps.size
            self._ones += int((steps == 1).sum())
            self._whole = self._whole and bool((present == np.rint(present)).all())
        self._watched = self._rises or self._counter
        if not self._watched:
            self._points.clear()
            return
        places = np.unique(np.linspace(0, values.size - 1, _POINTS).astype(int))
        self._points.append((times[places], values[places]))

    def counts(self) -> bool:
        """Whether it counts rows: a name that says so, and whole numbers that go up by 1 but for a few.
        What goes up by 2 a row counts something else, as far as can be known."""
        return (
            self._counter
            and self._whole
            and self._steps >= _FEWEST - 1
            and self._ones >= _REGULAR * self._steps
        )

    def is_clock(self, origin: float | int, unit: float) -> bool:
        """Whether it is a second clock.

        It never goes back, and it keeps pace with the table's clock: in some unit if its name speaks
        of time, in its own if its numbers are wall-clock times. A ramp or a count of steps does
        neither, whatever it runs parallel to: a second on it is not a second.

        Args:
            origin: the first of the clock's times, as stored.
            unit: seconds, of the clock.
        """
        if not (self._points and self._rises and (self._named or self._wall)):
            return False
        values = np.concatenate([values for _, values in self._points])
        seconds = np.concatenate(
            [(times - np.asarray(origin)).astype(np.float64) for times, _ in self._points]
        )
        there = np.isfinite(values)
        values, seconds = values[there] - values[there][0], seconds[there] * unit
        if self.size < _FEWEST or values[-1] == 0:
            return False
        span = float(np.ptp(seconds))
        if self._wall is not None:
            limit = _WALL_PACE * span + _WALL_LATE
            return float(np.ptp(values * self._wall - seconds)) <= limit
        return any(np.ptp(values * each - seconds) <= _PACE * span for each in SHORT_UNITS.values())
