"""What CSV and Parquet share: columns of numbers, with or without a time column, streamed by rows."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Collection, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from normwear_fast.errors import RecordingError
from normwear_fast.recordings.base import (
    Array,
    Channel,
    ClockError,
    OtherRateError,
    Recording,
    rechunk,
)
from normwear_fast.recordings.clock import SHORT_UNITS, TimeColumn, infer_unit
from normwear_fast.recordings.columns import Column, Roles
from normwear_fast.recordings.rates import Clock, ClockReader, Resolution, Spread, resample
from normwear_fast.recordings.wallclock import Nanoseconds, since_1970, wall_clock

_PIECE = 65536  # grid points made at a time
_ALIKE = 0.1  # of the rows that share a time, at which a channel may move where they are one row


class TableRecording(Recording):
    """A table whose rows are samples.

    A subclass sets `_titles` (name and unit of each channel) and `_time`, then calls `_survey`.
    Opening reads the file once to check every cell and the clock, and the time column a second
    time unless all intervals are the same; where rows share times, the cells once more. `blocks`
    reads it again. Columns that turn out to be no channels are left out then: `_places` has the
    others' places among the titles.
    """

    _titles: list[tuple[str, str]]
    _time: TimeColumn | None
    _first_row = 1  # number of the first row of data, as a user counts
    _places: list[int]
    _rate_from = "--rate"  # where the rate is from that a survey is given

    _unit: float | None = None  # seconds
    _origin: Any = None  # first time, as stored
    _counting = False  # rows

    @abstractmethod
    def _rows(
        self, channels: list[int], *, time: bool
    ) -> Iterator[tuple[NDArray[Any], list[Array]]]:
        """Pieces of the table in order.

        Yields:
            (times, columns): raw times of the rows, numbers in the column's unit, or an array of
            the rows' length with anything in it for `time=False`; a float64 array a channel.
        """

    def _survey_on(
        self,
        choose: Callable[[Collection[str]], Roles],
        given: float | None,
    ) -> None:
        """The survey on the clock that is chosen; on the next where a weak one turns out to be none of
        the rows', or on the user's rate.

        Args:
            choose: sets `_titles` and `_time` to what the columns are, but for the titles that it is
                given.
            given: the user's --rate.
        """
        barred: list[str] = []
        before = self.notes
        while True:
            roles = choose(barred)
            self.start_time, self.notes = roles.start, before + roles.notes
            try:
                self._survey(given)
            except RecordingError as error:
                clock = self._time
                if clock is None or not clock.weak or (given is None and not roles.others):
                    raise
                if isinstance(error, OtherRateError) and self._keeps_time():
                    raise
                reason = str(error).removeprefix(f"{self.path}: ").split("; ")[0]
                barred.append(clock.title)
                before += (f"column {clock.title!r} is no clock and left out: {reason}",)
                self._unit = self._origin = None
                continue
            if self.start_time is None and roles.second is not None:
                title, self.start_time = roles.second
                self.notes += (f"the start time is the first in column {title!r}",)
            return

    def _keeps_time(self) -> bool:
        """Whether a clock of another rate than the user's is to be believed: even, in a known unit."""
        assert self._time is not None
        dated = wall_clock(float(self._origin) * (self._unit or 0.0))
        return self._clock.even and (self._time.seconds is not None or dated)

    def _survey(self, given: float | None) -> None:
        """Check the whole file; find rows, rate, channels and notes."""
        everything = list(range(len(self._titles)))
        self._look = [Column(name) for name, _ in self._titles]
        if self._time is None:
            rows = 0
            for times, columns in self._rows(everything, time=False):
                self._watch(np.arange(rows, rows + times.size), columns)
                rows += times.size
            if not rows:
                raise RecordingError(f"{self.path}: holds no rows")
            if given is None and everything:
                raise RecordingError(
                    f"{self.path}: has no time column (such as time, timestamp or time_ms); "
                    f"pass --rate HZ"
                )
            self._clock = Clock(True, given or 1.0, rows)
            self._unit, self._origin = 1 / (given or 1.0), 0
        else:
            self._read_clock(self._time, given)
        self._leave_out()
        self.channels = tuple(
            Channel(name, unit, self._clock.sampling_rate, self._clock.samples)
            for name, unit in self._named(self._places)
        )

    def _read_clock(self, column: TimeColumn, given: float | None) -> None:
        def times(resolution: Resolution | None) -> Iterator[Nanoseconds]:
            return self._nanoseconds(given, resolution)

        reader = ClockReader(
            self.path, column.title, self._first_row, times, given, self._rate_from
        )
        self._clock = reader.clock(lambda: self._counting, self._copied)
        self.notes += tuple(reader.notes)
        rate = self._clock.sampling_rate
        if given is not None and abs(given / rate - 1) > 0.01:
            sure = column.sure and not column.weak
            raise OtherRateError(
                f"{self.path}: --rate {given:g} contradicts the file's own {rate:g} Hz, by the times in "
                f"column {column.title!r}; leave --rate out"
                + ("" if sure else ", or rename the column if it is no clock")
            )

    def _copied(self) -> bool:
        """Whether rows that share a time are one row several times: no channel moves within a time, and
        one does from most times to the next. Counts of rows and second clocks say nothing."""
        assert self._unit is not None
        places = [
            place
            for place, look in enumerate(self._look)
            if not (look.counts() or look.is_clock(self._origin, self._unit))
        ]
        within, across = np.zeros(len(places)), np.zeros(len(places))  # moves of each channel
        shared = rows = 0
        before: list[NDArray[Any]] = []  # the last row
        for times, columns in self._rows(places, time=True):
            piece = [times, *columns]
            piece = list(map(np.concatenate, zip(before, piece, strict=True))) if before else piece
            same, *still = (
                (each[1:] == each[:-1]) | ((each != each)[1:] & (each != each)[:-1])
                for each in piece
            )
            before = [each[-1:] for each in piece]
            within += [float((same & ~each).sum()) for each in still]
            across += [float((~same & ~each).sum()) for each in still]
            shared, rows = shared + int(same.sum()), rows + same.size
            # that many will not be outdone
            if places and within.max() > max(_ALIKE * shared, 1000):
                return False
        most = (rows - shared) / 2
        return bool(places and within.max() <= _ALIKE * shared and across.max() >= most)

    def _watch(self, times: NDArray[Any], columns: list[Array]) -> None:
        for look, values in zip(self._look, columns, strict=True):
            look.add(times, values)

    def _leave_out(self) -> None:
        """Find the columns that are channels, and note what the others are."""
        assert self._unit is not None
        self._places = []
        for place, look in enumerate(self._look):
            name = f"column {self._titles[place][0]!r}"
            reason = self._no_channel(place)
            if reason is None and look.counts():
                reason = f"{name} counts rows and is left out"
            elif reason is None and look.is_clock(self._origin, self._unit):
                reason = f"{name} is a second clock and left out"
            if reason is None:
                self._places.append(place)
            else:
                self.notes += (reason,)
        self._look = []

    def _no_channel(self, place: int) -> str | None:
        """Why a column holds no signal; None for one with a value. An array that is not looked at on
        opening has none to show."""
        look = self._look[place]
        if not (look.size and look.empty):
            return None
        return f"column {self._titles[place][0]!r} has no value and is left out"

    def _named(self, places: list[int]) -> list[tuple[str, str]]:
        """Names and units of the channels."""
        return [self._titles[place] for place in places]

    def _nanoseconds(
        self, given: float | None, resolution: Resolution | None
    ) -> Iterator[Nanoseconds]:
        """The time column, ns after the first row, checked to be there; with a resolution, on opening,
        also a look at the columns and at what the times are written to."""
        assert self._time is not None
        row = self._first_row
        head: list[NDArray[Any]] = []  # rows before the unit is known
        channels = list(range(len(self._titles))) if resolution is not None else []
        for times, columns in self._rows(channels, time=True):
            if times.dtype.kind == "f" and not np.isfinite(times).all():
                bad = row + int(np.argmin(np.isfinite(times)))
                raise self._lacks_time(bad, self._time.title)
            row += times.size
            if resolution is not None:
                self._watch(times, columns)
            if not times.size:
                continue
            head.append(times)
            if self._unit is None:
                together = np.concatenate(head)
                if (together == together[0]).all():
                    continue
                self._set_unit(together, given)
            for part in head:
                if resolution is not None:
                    resolution.add(part, self._unit or 0.0)
                yield self._relative(part)
            head = []
        yield from (np.zeros(part.size, dtype=np.int64) for part in head)  # none that moves

    def _lacks_time(self, row: int, title: str) -> ClockError:
        return ClockError(f"{self.path}: row {row} has no time in column {title!r}")

    def _set_unit(self, times: NDArray[Any], given: float | None) -> None:
        assert self._time is not None
        title = repr(self._time.title)
        unit = infer_unit(self.path, self._time, times.astype(np.float64), given)
        self._counting = unit is None
        if unit is None:
            assert given is not None
            self._unit = 1 / given
            self.notes += (f"column {title} counts rows; {self._rate_from} is its clock",)
            return
        self._unit = unit
        if self._time.seconds is None:
            name = next(name for name, each in SHORT_UNITS.items() if each == unit)
            self.notes += (f"times in column {title} are read as {name}",)
        first = float(times[0]) * unit
        if self.start_time is None and wall_clock(first) and not self._time.local:
            self.start_time = since_1970(first)

    def _relative(self, times: NDArray[Any]) -> Nanoseconds:
        assert self._unit is not None
        if self._origin is None:
            self._origin = times[0]
        if times.dtype.kind != "f":
            times = times.astype(np.int64)
        # Subtract first: integer ns since 1970 do not fit a float64.
        seconds = (times - self._origin).astype(np.float64) * self._unit
        if seconds.size and abs(seconds[-1]) > 9e9:  # int64 ns end at 292 years
            raise RecordingError(
                f"{self.path}: the time column spans "
                f"{abs(seconds[-1]) / 3.15576e7:.0f} years: not a recording's clock"
            )
        return np.rint(seconds * 1e9).astype(np.int64)

    def _blocks(self, channels: list[int], seconds: float) -> Iterator[list[Array]]:
        channels = [self._places[channel] for channel in channels]
        size = max(1, round(seconds * self._clock.sampling_rate))
        if self._clock.even:
            pieces: Iterator[list[Array]] = (c for _, c in self._rows(channels, time=False))
        else:
            pieces = self._resampled(channels, min(size, _PIECE))
        return rechunk(pieces, size)

    def _resampled(self, channels: list[int], size: int) -> Iterator[list[Array]]:
        """The rows on the uniform grid, at most `size` samples at a time."""
        period = 1e9 / self._clock.sampling_rate
        point = 0
        times = np.empty(0, dtype=np.int64)
        values = np.empty((len(channels), 0))
        spread = Spread(period, self._clock.tick)
        for raw, columns in self._rows(channels, time=True):
            times = np.concatenate([times, spread(self._relative(raw))])
            times = np.maximum.accumulate(times)  # ticks may be shorter than their rows
            values = np.concatenate([values, np.stack(columns)], axis=1)
            fresh = np.diff(times, prepend=-1) > 0
            times, values = times[fresh], values[:, fresh]
            if times.size < 2:
                continue
            yield from self._grid(times, values, point, int(times[-1] / period) + 1, size)
            point = max(point, int(times[-1] / period) + 1)
            times, values = times[-1:], values[:, -1:]
        # the last point may lie a rounding error after the last row
        yield from self._grid(times, values, point, self._clock.samples, size)

    def _grid(
        self, times: NDArray[np.int64], values: Array, point: int, end: int, size: int
    ) -> Iterator[list[Array]]:
        period = 1e9 / self._clock.sampling_rate
        end = min(end, self._clock.samples)
        for start in range(point, end, size):
            grid = np.arange(start, min(start + size, end), dtype=np.float64) * period
            yield list(resample(times, values, grid, self._clock.gap))
