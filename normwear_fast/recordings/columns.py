"""What a table's columns of numbers turn out to be, once all their rows have been seen.

A name tells most clocks. What is left is told by values, and only by what no signal does: a signal is
worth more than a clock that is read as one.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from normwear_fast.recordings.base import Array
from normwear_fast.recordings.clock import TIME_WORDS, name_words, wall_unit

_POINTS = 16  # of a piece of the table, at which a column is held against the clock
_FEWEST = 4  # rows that tell anything
_COUNTERS = {
    *("index", "idx", "row", "sample", "counter", "seq", "sequence", "frame", "packet", "package"),
    *("number", "num", "no", "nr", "id", "count", "rowid", "samplenumber", "sampleindex"),
}
"""Words of which the name of a count of rows is made: "Sample Index", "packet_no", "index"."""
_REGULAR = 0.9  # of a count's steps are 1; the others wrap around, or leave out what was lost
_PACE = 0.01
"""Of the recording, by which a column whose name speaks of time may stray from the clock."""
_WALL_PACE, _WALL_LATE = 0.05, 5.0
"""The same of wall-clock times, and s: of when data arrived, say, which may be in bursts."""


class Column:
    """One column, seen piece by piece.

    Attributes:
        size: rows seen.
        empty: none of them had a value.
    """

    def __init__(self, name: str) -> None:
        words = set(name_words(name))
        self._named = bool(words & TIME_WORDS)
        self._counter = bool(words) and words <= _COUNTERS
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
            self._wall = wall_unit(float(present[0]))
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
        return any(
            np.ptp(values * each - seconds) <= _PACE * span for each in (1.0, 1e-3, 1e-6, 1e-9)
        )
