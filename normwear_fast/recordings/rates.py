"""At what rate the rows of a table come, by their times.

Times are carried as integer nanoseconds after the first row, so that a coarse clock shows as what it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from normwear_fast.errors import RecordingError
from normwear_fast.recordings.base import ClockError
from normwear_fast.recordings.clock import FINE
from normwear_fast.recordings.wallclock import DAY, Nanoseconds

_GAP = 4  # median intervals; longer ones are gaps
_NEAR = 0.03
"""By which an uneven clock's mean interval may be off a stated rate's."""


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


@dataclass(frozen=True)
class _Look:
    """A second look at times, against a straight line.

    Attributes:
        gaps: longer intervals than allowed, and ns `missing` in them.
        stray: ns from the earliest to the latest of the rows against the line.
        last: ns, of the last row.
        usual: number of intervals that are a row's, and the ns they `span` together.
        breaks: number of others.
    """

    gaps: int = 0
    missing: float = 0.0
    stray: float = 0.0
    last: int = 0
    usual: int = 0
    span: int = 0
    breaks: int = 0


@dataclass
class ClockReader:
    """Reads a time column, up to three times, for what it is.

    Args:
        path, title: of file and column, for errors.
        first_row: number of the first row of data, as a user counts.
        read: gives the times, ns after the first; with a resolution, tells it what they are written to.
        given: Hz, which uneven or coarse times take that are about as fast; None where there is none.
        called: where `given` is from, such as --rate.

    Attributes:
        notes: what a user should know about the clock.
    """

    path: Path
    title: str
    first_row: int
    read: Callable[[Resolution | None], Iterator[Nanoseconds]]
    given: float | None
    called: str
    notes: list[str] = field(default_factory=list)

    def clock(self, counting: Callable[[], bool], copied: Callable[[], bool]) -> Clock:
        """What the column turned out to be.

        Args:
            counting: whether it counts rows, once it has been read; no rounding blurs those.
            copied: whether rows that share a time are one row several times.

        Raises:
            ClockError: it goes back, or does not move.
            RecordingError: it is almost all gaps, or coarse and too short; or there are no rows.
        """
        intervals, shared = Intervals(), Intervals()  # shared: rows to a time
        resolution = Resolution()
        rows = ticks = quantum = 0
        smallest, largest = np.iinfo(np.int64).max, 0
        start = -1  # row of the last time's first; not of the first time, which may be cut off
        last: int | None = None
        for times in self.read(resolution):
            steps = np.diff(times, prepend=times[:1] if last is None else last)
            if (steps < 0).any():
                bad = int(np.argmax(steps < 0))
                raise ClockError(
                    f"{self.path}: row {self.first_row + rows + bad}: time in column "
                    f"{self.title!r} goes back by {-steps[bad] / 1e9:g} s; sort the rows, "
                    f"or split the file there"
                )
            starts = rows + np.flatnonzero(steps)
            if starts.size:
                shared.add(np.diff(starts) if start < 0 else np.diff(starts, prepend=start))
                start = int(starts[-1])
            steps = steps[int(last is None) :]
            moved = resolution.as_written(steps)
            moved = moved[moved > 0]
            intervals.add(moved)
            ticks += moved.size
            quantum = int(np.gcd.reduce(moved, initial=quantum))
            if steps.size:
                smallest, largest = min(smallest, steps.min()), max(largest, steps.max())
            rows += times.size
            last = int(times[-1])
        if last is None:
            raise RecordingError(f"{self.path}: holds no rows")
        if not ticks:
            raise ClockError(
                f"{self.path}: time in column {self.title!r} does not move in {rows} rows"
            )
        mean = last / (rows - 1)
        fits = self.given is not None and abs(1e9 / self.given / mean - 1) <= _NEAR
        coarse = rows >= FINE * (ticks + 1)
        copies = coarse and not fits and copied()
        if coarse and not copies:
            return self._coarse_clock(rows, last, intervals, shared)

        low, median, high = intervals.percentiles(5, 50, 95)
        same = smallest == largest
        look = _Look() if same else self._look(mean, _GAP * median, median, quantum)
        # Even: rows stray from a straight line by less than a tenth of a sample either way, or as
        # a clock that is only written to its own resolution does, or that is stored to it. But a clock
        # that is written to its interval and which hardly misses a beat has lost samples.
        missed = last / quantum - (rows - 1)
        to_interval = quantum >= 0.75 * median
        lost = missed > 0.5 and to_interval and abs(mean / median - 1) <= 0.05
        blur = max(quantum, resolution.spacing)
        blurred = look.stray <= 2 * blur and not (lost or copies or counting())
        if look.stray <= 0.2 * mean or blurred:
            # intervals that are all the same are not rounded to it
            return Clock(
                True, _round_rate(rows - 1, last, resolution.spacing if same else blur), rows
            )

        # lost rows, repeated ones and gaps apart
        blur = resolution.spacing if to_interval else blur
        rate = _round_rate(look.usual, look.span, blur * (look.breaks + 1)) or 1e9 / median
        source = "its mean rate"
        if self.given is not None:
            period = 1e9 / self.given
            if low <= period <= high or abs(1e9 / rate / period - 1) <= _NEAR:
                rate, source = self.given, self.called
        samples = self._samples(rows, rate, last)
        self.notes.append(
            f"uneven clock: resampled to {source} {rate:g} Hz (intervals {low / 1e6:g} to "
            f"{high / 1e6:g} ms from 5 to 95 %, median {median / 1e6:g} ms)"
        )
        repeated = rows - 1 - ticks
        if repeated:
            self.notes.append(
                f"{repeated} of {rows} rows repeat the time before them and are dropped; "
                f"all rows together make {1e9 / mean:g} Hz"
            )
        self._note_gaps(look, _GAP * median)
        return Clock(False, rate, samples, _GAP * median)

    def _coarse_clock(self, rows: int, last: int, ticks: Intervals, shared: Intervals) -> Clock:
        """A clock of which several rows share each time.

        The rate is that of the ticks between the first and the last, which may be cut off. Rows that
        share a time are spread over it: they are samples, where there are many.

        Args:
            rows: of the table.
            last: ns, of the last row.
            ticks: ns between times.
            shared: rows to a tick, of those that begin and end in the table.
        """
        fewest, most = shared.percentiles(5, 95) if shared else (1.0, 1.0)
        shortest, tick, longest = ticks.percentiles(5, 50, 95)
        # of ticks that come late some come early; where none does, the long ones have lost rows
        usual = longest <= 1.5 * tick or shortest >= tick / 2
        count, span = self._full_ticks((1.5 if usual else _GAP) * tick)
        # the first and the last row of the ticks are each known to a row, all others count
        uncertain = 2 * max(1.0, most - fewest) / count if count else tick / (last + tick)
        rate = 1e9 * count / span if count else 1e9 * rows / (last + tick)
        whole = float(round(rate))
        if whole and abs(whole / rate - 1) <= uncertain:
            rate = whole
        source = (
            f"{rate:g} Hz, give or take {100 * uncertain:.2g} %, from the rows that share a time"
        )
        if self.given is not None and abs(self.given / rate - 1) <= max(0.01, uncertain):
            rate, source = self.given, f"{self.called} is its rate"
        elif not count:
            advice = (
                "pass --rate HZ" if self.given is None else f"--rate {self.given:g} does not fit"
            )
            raise RecordingError(
                f"{self.path}: times in column {self.title!r} are written to {tick / 1e9:g} s and "
                f"change once in {rows} rows: no rate; {advice}"
            )
        self.notes.append(
            f"times in column {self.title!r} are written to {tick / 1e9:g} s: {source}"
        )

        period = 1e9 / rate
        if self._look(period, np.inf, period).stray <= 1.5 * tick:
            return Clock(True, rate, rows)
        gap = tick / 2 + _GAP * period
        look = self._look(period, gap, period, tick=tick)
        samples = self._samples(rows, rate, look.last)
        self.notes.append(f"uneven clock: resampled to {rate:g} Hz")
        self._note_gaps(look, gap)
        return Clock(False, rate, samples, gap, tick)

    def _full_ticks(self, longest: float) -> tuple[int, int]:
        """Rows and ns of the ticks that begin and end in the table and are no longer than this, but for
        those after a longer one, which may be cut off."""
        count, span, row = 0, 0, 0
        after = False  # a longer one
        rows, at = np.empty(0, np.int64), np.empty(0, np.int64)  # of the last tick's beginning
        last: int | None = None
        for times in self.read(None):
            moved = np.flatnonzero(np.diff(times, prepend=times[0] if last is None else last))
            rows, at = np.append(rows, row + moved), np.append(at, times[moved])
            steps = np.diff(at)
            long = np.append(after, steps > longest)
            full = ~(long[1:] | long[:-1])
            after = bool(long[-1])
            count += int(np.diff(rows)[full].sum())
            span += int(steps[full].sum())
            rows, at = rows[-1:], at[-1:]
            row += times.size
            last = int(times[-1])
        return count, span

    def _look(
        self, line: float, gap: float, median: float, quantum: int = 0, tick: float = 0.0
    ) -> _Look:
        """A second look at the times.

        Args:
            line: ns a row, of the straight line.
            gap: ns; longer intervals are gaps.
            median: ns, of the intervals.
            quantum: ns, what the clock is written to.
            tick: ns that rows sharing a time are spread over.
        """
        spread = Spread(line, tick)
        # a row's intervals: no gap, no lost row, none that is there twice
        low, high = (median - 0.9 * quantum) / 2, (3 * median + 0.9 * quantum) / 2
        rows, last = 0, 0
        gaps, missing, usual, span, breaks = 0, 0.0, 0, 0, 0
        early, late = 0.0, 0.0
        for times in map(spread, self.read(None)):
            steps = np.diff(times, prepend=last)[int(rows == 0) :]
            wide = steps[steps > gap]
            gaps += wide.size
            missing += float(wide.sum()) - wide.size * median
            one = steps[(low < steps) & (steps < high)]
            usual, span, breaks = (
                usual + one.size,
                span + int(one.sum()),
                breaks + steps.size - one.size,
            )
            off = times - np.arange(rows, rows + times.size) * line
            early, late = min(early, float(off.min())), max(late, float(off.max()))
            rows += times.size
            last = int(times[-1])
        return _Look(gaps, missing, late - early, last, usual, span, breaks)

    def _samples(self, rows: int, rate: float, last: int) -> int:
        """How many the grid has, from the first row to the last."""
        samples = int(last * rate / 1e9 + 1e-6) + 1
        if samples > max(10_000_000, 1000 * rows):
            raise RecordingError(
                f"{self.path}: {rows} rows at {rate:g} Hz span {last / DAY:.1f} days: "
                f"almost all of it is a gap; split the file at its gaps"
            )
        return samples

    def _note_gaps(self, look: _Look, gap: float) -> None:
        if look.gaps:
            self.notes.append(
                f"{look.gaps} gaps longer than {gap / 1e6:g} ms, {look.missing / 1e9:.3g} s in all, "
                f"are missing samples"
            )


def _round_rate(intervals: int, span: int, quantum: int) -> float:
    """Hz of so many intervals in span ns; the whole number of Hz where the clock cannot tell it from
    that."""
    rate = 1e9 * intervals / span if span else 0.0
    whole = float(round(rate))
    if not whole:
        return rate
    drift = abs(intervals * 1e9 / whole - span)
    return whole if drift <= max(quantum, 1) and drift <= 1e9 / rate else rate


class Resolution:
    """To what the numbers of a time column are written, over a stream of them.

    Seconds since 1970 with three decimals are multiples of 1 ms, but as float64 each is off by up
    to 1.2e-7 s, and a float32 after three hours knows no times between 1/1024 s. What two such
    numbers differ by says nothing finer.
    """

    _MOST = 9  # decimals

    def __init__(self) -> None:
        self._unit = 1.0
        self._spacing = 0.0  # the largest distance between neighbouring floats, in the unit
        self._decimals: int | None = 0  # of which all numbers so far have no more

    @property
    def spacing(self) -> int:
        """The largest distance between neighbouring floats, ns."""
        return round(self._spacing * self._unit * 1e9)

    def as_written(self, steps: Nanoseconds) -> Nanoseconds:
        """Steps as whole multiples of the decimal place, but for a float's own error."""
        place = 0.0 if self._decimals is None else 10.0**-self._decimals * self._unit * 1e9
        return np.rint(steps / round(place)).astype(np.int64) * round(place) if place > 1 else steps

    def add(self, times: NDArray[np.number], unit: float) -> None:
        """The next times as stored, in units of so many seconds."""
        self._unit = unit
        if times.dtype.kind != "f" or not times.size:
            return
        largest = times.dtype.type(np.abs(times).max())
        self._spacing = max(self._spacing, float(np.spacing(largest)))
        numbers = times.astype(np.float64)
        # a decimal place is one only where floats are much closer than that
        while self._decimals is not None and not self._whole(numbers):
            finer = self._decimals + 1
            near = 10.0**-finer < 8 * self._spacing
            self._decimals = None if near or finer > self._MOST else finer

    def _whole(self, numbers: NDArray[np.float64]) -> bool:
        assert self._decimals is not None
        scaled = numbers * 10.0**self._decimals
        off = np.abs(scaled - np.rint(scaled)).max()
        return bool(off <= min(0.25, 2 * self._spacing * 10.0**self._decimals))


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
