"""What CSV and Parquet share: columns of numbers, with or without a time column, streamed by rows."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Collection, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
from numpy.typing import NDArray

from normwear_fast.errors import RecordingError
from normwear_fast.recordings.base import (
    Array,
    Channel,
    OtherRateError,
    Recording,
    check_rate,
    rechunk,
)
from normwear_fast.recordings.clock import (
    SHARED,
    Clock,
    Intervals,
    Resolution,
    Spread,
    TimeColumn,
    infer_unit,
    resample,
    wall_clock,
)
from normwear_fast.recordings.columns import Column

_GAP = 4  # median intervals; longer ones are gaps
_PIECE = 65536  # grid points made at a time


class TableRecording(Recording):
    """A table whose rows are samples.

    A subclass sets `_titles` (name and unit of each channel) and `_time`, then calls `_survey`.
    Opening reads the file once to check every cell and the clock, and the time column a second
    time unless all intervals are the same; `blocks` reads it again. Columns that turn out to be no
    channels are left out then: `_places` has the others' places among the titles.
    """

    _titles: list[tuple[str, str]]
    _time: TimeColumn | None
    _first_row = 1  # number of the first row of data, as a user counts
    _places: list[int]

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
        choose: Callable[[Collection[str]], bool],
        survey: Callable[[float | None], None],
        given: float | None,
    ) -> None:
        """The survey on the clock that is chosen; on the next where a weak one turns out to be none of
        the rows', or on the user's rate.

        Args:
            choose: sets `_titles` and `_time`, but for the titles that it is given. Returns whether
                there are other clocks.
            survey: as `_survey`.
            given: the user's --rate.
        """
        barred: list[str] = []
        before = self.notes
        while True:
            others = choose(barred)
            try:
                survey(given)
                return
            except RecordingError as error:
                if self._time is None or not self._time.weak or (given is None and not others):
                    raise
                if isinstance(error, OtherRateError) and self._keeps_time():
                    raise
                reason = str(error).removeprefix(f"{self.path}: ").split("; ")[0]
                barred.append(self._time.title)
                before += (f"column {self._time.title!r} is no clock and left out: {reason}",)
                self.notes, self.start_time, self._unit, self._origin = before, None, None, None

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
            self._clock = self._read_clock(self._time, given)
            check_rate(self.path, given, [self._clock.sampling_rate])
        self._leave_out()
        self.channels = tuple(
            Channel(name, unit, self._clock.sampling_rate, self._clock.samples)
            for name, unit in self._named(self._places)
        )

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
        self, everything: bool, given: float | None, resolution: Resolution | None = None
    ) -> Iterator[NDArray[np.int64]]:
        """The time column, ns after the first row, checked to be there; and on opening, with
        everything, a look at the columns and at what the times are written to."""
        assert self._time is not None
        row = self._first_row
        head: list[NDArray[Any]] = []  # rows before the unit is known
        channels = list(range(len(self._titles))) if everything else []
        for times, columns in self._rows(channels, time=True):
            if times.dtype.kind == "f" and not np.isfinite(times).all():
                bad = row + int(np.argmin(np.isfinite(times)))
                raise RecordingError(
                    f"{self.path}: row {bad} has no time in column {self._time.title!r}"
                )
            row += times.size
            if everything:
                self._watch(times, columns)
            head.append(times)
            if self._unit is None:
                together = np.concatenate(head)
                if (together == together[0]).all():
                    continue
                self._set_unit(together, given)
            for part in head:
                if resolution is not None:
                    resolution.add(part)
                yield self._relative(part)
            head = []

    _unit: float | None = None  # seconds
    _origin: Any = None  # first time, as stored
    _counting = False  # rows; no rounding blurs those

    def _set_unit(self, times: NDArray[Any], given: float | None) -> None:
        assert self._time is not None
        title = repr(self._time.title)
        first = float(times[0])
        unit = infer_unit(self.path, self._time, times.astype(np.float64), given)
        self._counting = unit is None
        if unit is None:
            assert given is not None
            self._unit = 1 / given
            self.notes += (f"column {title} counts rows; --rate is its clock",)
            return
        self._unit = unit
        if self._time.seconds is None:
            names = {1.0: "s", 1e-3: "ms", 1e-6: "us", 1e-9: "ns"}
            self.notes += (f"times in column {title} are read as {names[unit]}",)
        if self.start_time is None and wall_clock(first * unit) and not self._time.local:
            self.start_time = datetime(1970, 1, 1, tzinfo=UTC) + timedelta(seconds=first * unit)

    def _relative(self, times: NDArray[Any]) -> NDArray[np.int64]:
        assert self._unit is not None
        if self._origin is None and times.size:
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

    def _read_clock(self, column: TimeColumn, given: float | None) -> Clock:
        intervals, runs = Intervals(), Intervals()  # runs: rows of times that begin and end
        resolution = Resolution()
        rows, repeated, quantum = 0, 0, 0
        start = -1  # row of the last time's first; not of the first time, which may be cut off
        smallest, largest = np.iinfo(np.int64).max, 0
        last = None
        for times in self._nanoseconds(True, given, resolution):
            if not times.size:
                continue
            steps = np.diff(times, prepend=times[:1] if last is None else last)
            if (steps < 0).any():
                bad = int(np.argmax(steps < 0))
                raise RecordingError(
                    f"{self.path}: row {self._first_row + rows + bad}: time in column "
                    f"{column.title!r} goes back by {-steps[bad] / 1e9:g} s; sort the rows, "
                    f"or split the file there"
                )
            starts = rows + np.flatnonzero(steps > 0)
            if starts.size:
                runs.add(np.diff(starts) if start < 0 else np.diff(starts, prepend=start))
                start = int(starts[-1])
            steps = steps[1:] if last is None else steps
            moved = self._as_written(steps[steps > 0], resolution.written)
            intervals.add(moved)
            repeated += steps.size - moved.size
            quantum = int(np.gcd.reduce(moved, initial=quantum))
            if steps.size:
                smallest, largest = min(smallest, steps.min()), max(largest, steps.max())
            rows += times.size
            last = int(times[-1])
        if not rows and self._unit is None:
            rows = sum(times.size for times, _ in self._rows([], time=True))
            if not rows:
                raise RecordingError(f"{self.path}: holds no rows")
        if not last:
            raise RecordingError(
                f"{self.path}: time in column {column.title!r} does not move in {rows} rows: no rate"
            )

        mean = last / (rows - 1)
        low, median, high = intervals.percentiles(5, 50, 95)
        if rows / (rows - repeated) >= SHARED:
            low_run, run, high_run = runs.percentiles(5, 50, 95) if runs else (1.0, 1.0, 1.0)
            if high_run - low_run <= max(1.0, run / 2):
                return self._coarse_clock(
                    column, given, rows, last, median, high, high_run - low_run
                )
        gap = _GAP * median
        gaps, missing, stray = 0, 0.0, 0.0
        if smallest != largest:
            gaps, missing, stray, _ = self._strays(mean, gap, median)
        # Even: rows stray from a straight line by less than a tenth of a sample either way, or as
        # a clock that is only written to its own resolution does, or that is stored to it. But a clock
        # that is written to its interval and which hardly misses a beat has lost samples.
        missed = quantum and last / quantum - (rows - 1)
        lost = missed > 0.5 and quantum >= 0.75 * median and abs(mean / median - 1) <= 0.05
        quantum = max(quantum, round(resolution.spacing * (self._unit or 0.0) * 1e9))
        if stray <= 0.2 * mean or (stray <= 2 * quantum and not (lost or self._counting)):
            return Clock(True, self._round_rate(1e9 / mean, rows, last, quantum), rows)

        rate = 1e9 / median
        samples = int(last / median + 1e-6) + 1
        self._check_length(samples, rows, rate, last)
        self.notes += (
            f"uneven clock: resampled to its median rate {rate:g} Hz (intervals {low / 1e6:g} to "
            f"{high / 1e6:g} ms from 5 to 95 %, median {median / 1e6:g} ms)",
        )
        if repeated:
            self.notes += (
                f"{repeated} of {rows} rows repeat the time before them and are dropped; "
                f"all rows together make {1e9 / mean:g} Hz",
            )
        self._note_gaps(gaps, gap, missing)
        return Clock(False, rate, samples, gap)

    def _as_written(self, steps: NDArray[np.int64], written: float) -> NDArray[np.int64]:
        """Steps (ns) of times that are whole multiples of `written`, but for a float's own error."""
        place = round(written * (self._unit or 0.0) * 1e9)
        return np.rint(steps / place).astype(np.int64) * place if place > 1 else steps

    def _check_length(self, samples: int, rows: int, rate: float, last: int) -> None:
        if samples > max(10_000_000, 1000 * rows):
            raise RecordingError(
                f"{self.path}: {rows} rows at {rate:g} Hz span {last / 8.64e13:.1f} days: "
                f"almost all of it is a gap; split the file at its gaps"
            )

    def _note_gaps(self, gaps: int, gap: float, missing: float) -> None:
        if gaps:
            self.notes += (
                f"{gaps} gaps longer than {gap / 1e6:g} ms, {missing / 1e9:.3g} s in all, "
                f"are missing samples",
            )

    def _coarse_clock(
        self,
        column: TimeColumn,
        given: float | None,
        rows: int,
        last: int,
        tick: float,
        longest: float,
        spread: float,
    ) -> Clock:
        """A clock of which many rows share each time.

        The rate is that of the ticks between the first and the last, which may be cut off.

        Args:
            column: the time column.
            given: the user's --rate.
            rows: of the table.
            last: ns, of the last row.
            tick: ns between times, the median.
            longest: ns, of 95 % of the ticks.
            spread: rows by which 90 % of the ticks differ.
        """
        count, span = self._full_ticks(1.5 * tick if longest <= 1.5 * tick else _GAP * tick)
        # the first and the last row of the ticks are each known to a row, all others count
        uncertain = 2 * max(1.0, spread) / count if count else tick / (last + tick)
        rate = 1e9 * count / span if count else 1e9 * rows / (last + tick)
        whole = float(round(rate))
        if whole and abs(whole / rate - 1) <= uncertain:
            rate = whole
        source = (
            f"{rate:g} Hz, give or take {100 * uncertain:.2g} %, from the rows that share a time"
        )
        if given is not None and abs(given / rate - 1) <= max(0.01, uncertain):
            rate, source = given, "--rate is its rate"
        elif not count:
            raise RecordingError(
                f"{self.path}: times in column {column.title!r} are written to {tick / 1e9:g} s and "
                f"change once in {rows} rows: no rate; "
                + ("pass --rate HZ" if given is None else f"--rate {given:g} does not fit them")
            )
        self.notes += (
            f"times in column {column.title!r} are written to {tick / 1e9:g} s: {source}",
        )

        period = 1e9 / rate
        gap = tick / 2 + _GAP * period
        _, _, stray, _ = self._strays(period, np.inf, period)
        if stray <= 1.5 * tick:
            return Clock(True, rate, rows)
        gaps, missing, _, end = self._strays(period, gap, period, tick)
        samples = int(end / period + 1e-6) + 1
        self._check_length(samples, rows, rate, last)
        self.notes += (f"uneven clock: resampled to {rate:g} Hz",)
        self._note_gaps(gaps, gap, missing)
        return Clock(False, rate, samples, gap, tick)

    def _full_ticks(self, longest: float) -> tuple[int, int]:
        """Rows and ns of the ticks that begin and end in the table and are no longer than this."""
        count, span, row = 0, 0, 0
        start: tuple[int, int] | None = None  # row and time
        last: int | None = None
        for times in self._nanoseconds(False, None):
            if not times.size:
                continue
            moved = np.flatnonzero(np.diff(times, prepend=times[0] if last is None else last))
            rows, at = row + moved, times[moved]
            if start is not None:
                rows, at = np.insert(rows, 0, start[0]), np.insert(at, 0, start[1])
            if rows.size:
                start = int(rows[-1]), int(at[-1])
            steps = np.diff(at)
            full = steps <= longest
            count += int(np.diff(rows)[full].sum())
            span += int(steps[full].sum())
            row += times.size
            last = int(times[-1])
        return count, span

    def _strays(
        self, mean: float, gap: float, median: float, tick: float = 0.0
    ) -> tuple[int, float, float, int]:
        """Second look at the times: gaps, ns missing in them, how far rows stray from a straight
        line (ns from the earliest to the latest), and the last time."""
        spread = Spread(mean, tick)
        rows, gaps, missing = 0, 0, 0.0
        early, late = 0.0, 0.0
        last = 0
        for times in map(spread, self._nanoseconds(False, None)):
            if not times.size:
                continue
            steps = np.diff(times, prepend=last)
            wide = steps[steps > gap]
            gaps += wide.size
            missing += float(wide.sum()) - wide.size * median
            off = times - np.arange(rows, rows + times.size) * mean
            early, late = min(early, float(off.min())), max(late, float(off.max()))
            rows += times.size
            last = int(times[-1])
        return gaps, missing, late - early, last

    @staticmethod
    def _round_rate(rate: float, rows: int, last: int, quantum: int) -> float:
        """The whole number of Hz, if the clock cannot tell it from the rate."""
        whole = float(round(rate))
        if not whole:
            return rate
        drift = abs((rows - 1) * 1e9 / whole - last)
        return whole if drift <= max(quantum, 1) and drift <= 1e9 / rate else rate

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
