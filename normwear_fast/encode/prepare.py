"""From recordings to the windows of work units, ready for the model. Runs here or in a reader process."""

from __future__ import annotations

import contextlib
import math
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, cast

import numpy as np
from numpy.typing import NDArray

from normwear_fast.config import LARGEST_SAMPLE
from normwear_fast.encode.settings import EncodeSettings, window_samples
from normwear_fast.encode.survey import reason
from normwear_fast.encode.windows import (
    BLOCK_SECONDS,
    Extractor,
    RawChannel,
    Window,
    lacks_too_much,
    select_channels,
)
from normwear_fast.errors import InputError, NormWearError, RecordingError
from normwear_fast.preprocess import RunningStatistics, prepare_window
from normwear_fast.recordings import open_recording
from normwear_fast.recordings.base import Recording

OK = "ok"
MISSING = "missing data"
NO_DATA = "no data in a channel"
TOO_LARGE = "values beyond float32"
"""Or beyond what its sums hold."""
NOT_FINITE = "values beyond the model's range"

Statistics = list[tuple[float, float]]


@dataclass(frozen=True)
class Source:
    """A recording and where its windows come from."""

    id: str
    path: str
    channels: tuple[str, ...]
    windows: Sequence[Window]


@dataclass(frozen=True)
class JobUnit:
    """A work unit of a job: (place in ``Job.sources``, first, stop) of each span."""

    index: int
    spans: tuple[tuple[int, int, int], ...]


@dataclass(frozen=True)
class Job:
    """Units that one pass serves: several of one recording, or one of several recordings.

    Args:
        failed: places in ``sources`` that have been given up, and why.
    """

    sources: tuple[Source, ...]
    units: tuple[JobUnit, ...]
    failed: Mapping[int, str] = field(default_factory=dict)


class Watch:
    """Told how a job gets on; here by nobody."""

    def at(self, place: int) -> None:
        """The source at that place in the job is worked on from now on."""

    def alive(self) -> None:
        """Something was read or prepared."""

    def refused(self, error: Exception) -> None:
        """A recording could not be read; may end the process instead of returning."""


@dataclass
class Row:
    """A window of the output, still without its embedding."""

    recording: str
    window: Window
    channels: tuple[str, ...]
    status: str
    missing_fraction: float


@dataclass
class PreparedUnit:
    """A work unit, ready for the model.

    Args:
        index: of the unit.
        rows: in order; those whose status is "ok" have an array in ``data``, in the same order.
        data: (C_i, L_i) float32 at 65 Hz.
        failed: recordings that could not be read, and why.
        statistics: mean and standard deviation of the channels of recordings, where they were asked
            for.
        flat: windows that hold a channel without variation.
        lacking: windows skipped for missing data in which a channel lacked too much, by its name.
        read_seconds, prepare_seconds: spent on this unit.
    """

    index: int
    rows: list[Row] = field(default_factory=list)
    data: list[NDArray[np.float32]] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    statistics: dict[str, Statistics] = field(default_factory=dict)
    flat: int = 0
    lacking: Counter[str] = field(default_factory=Counter)
    read_seconds: float = 0.0
    prepare_seconds: float = 0.0


def prepare_job(
    job: Job, settings: EncodeSettings, watch: Watch | None = None
) -> Iterator[PreparedUnit]:
    """Reads, cuts and prepares the units of a job, in order.

    A recording that fails has no rows in the unit where it failed and in later ones: what a unit
    holds is decided by the input, not by how far the reading got.
    """
    watch = watch or Watch()
    if len(job.units) > 1 or len(job.sources) == 1:
        watch.at(0)
        yield from _prepare_stretch(job.sources[0], job.units, settings, watch, job.failed.get(0))
        return
    (unit,) = job.units
    merged = PreparedUnit(unit.index)
    for place, first, stop in unit.spans:
        part = JobUnit(unit.index, ((0, first, stop),))
        watch.at(place)
        failed = job.failed.get(place)
        for prepared in _prepare_stretch(job.sources[place], (part,), settings, watch, failed):
            _merge(merged, prepared)
    yield merged


def _merge(into: PreparedUnit, other: PreparedUnit) -> None:
    into.rows += other.rows
    into.data += other.data
    into.failed |= other.failed
    into.statistics |= other.statistics
    into.flat += other.flat
    into.lacking += other.lacking
    into.read_seconds += other.read_seconds
    into.prepare_seconds += other.prepare_seconds


def _prepare_stretch(
    source: Source,
    units: Sequence[JobUnit],
    settings: EncodeSettings,
    watch: Watch,
    failure: str | None,
) -> Iterator[PreparedUnit]:
    """Units of one recording, which is opened once and read once (twice for its statistics)."""
    with contextlib.ExitStack() as stack:
        opened: _Opened | None = None
        for unit in units:
            ((_, first, stop),) = unit.spans
            prepared = PreparedUnit(unit.index)
            if failure is None:
                try:
                    if opened is None:
                        opened = stack.enter_context(
                            _Opened(source, settings, source.windows[first].start, watch)
                        )
                    opened.fill(prepared, source.windows[first:stop])
                # Readers are other people's code on damaged files: any error is this recording's.
                except Exception as error:
                    watch.refused(error)
                    failure = reason(error, source.path)
            if failure is not None:
                prepared.rows.clear()
                prepared.data.clear()
                prepared.flat = 0
                prepared.lacking.clear()
                prepared.failed[source.id] = failure
            yield prepared


class _Opened:
    """One recording while its windows are taken out of it, from ``start`` seconds on."""

    def __init__(
        self, source: Source, settings: EncodeSettings, start: float, watch: Watch
    ) -> None:
        self.source, self.settings = source, settings
        self.start, self.watch = start, watch
        self.statistics: Statistics | None = None

    def __enter__(self) -> _Opened:
        started = time.perf_counter()
        rate = self.settings.rate
        self.recording: Recording = open_recording(
            Path(self.source.path), sampling_rate=rate, own_clock=True
        )
        try:
            self.channels = select_channels(self.recording.channels, self.settings.channels)
            names = tuple(self.recording.channels[c].name for c in self.channels)
            if names != self.source.channels:
                raise RecordingError("changed while it was being encoded")
            if self.settings.normalize == "recording":
                self.statistics = self._statistics()
            self.extractor = Extractor(
                self.recording, self.channels, start=self.start, alive=self.watch.alive
            )
        except BaseException:
            self.recording.close()
            raise
        self.opening_seconds = time.perf_counter() - started
        return self

    def __exit__(self, *exc: object) -> None:
        self.extractor.close()
        self.recording.close()

    def _statistics(self) -> Statistics:
        running = RunningStatistics(len(self.channels))
        for block in self.recording.blocks(self.channels, BLOCK_SECONDS):
            running.update(block)
            self.watch.alive()
        return running.statistics()

    def fill(self, unit: PreparedUnit, windows: Sequence[Window]) -> None:
        """Adds these windows' rows and data to the unit."""
        started = time.perf_counter()
        read_before = self.extractor.read_seconds
        taken = [self._within(window) for window in windows]
        for window, raw in zip(windows, self.extractor.extract(taken), strict=True):
            self._add(unit, window, raw)
            self.watch.alive()
        if self.statistics is not None:
            unit.statistics[self.source.id] = self.statistics
        read = self.extractor.read_seconds - read_before
        unit.read_seconds += read + self.opening_seconds
        unit.prepare_seconds += time.perf_counter() - started - read
        self.opening_seconds = 0.0

    def _within(self, window: Window) -> Window:
        """A window, or what of one that lacks too much lies in the recording: the rest is not there."""
        whole = self.recording.duration
        if not lacks_too_much(window.duration, whole, self.settings.max_missing):
            return window
        start, stop = max(window.start, -1.0), min(window.start + window.duration, whole + 1)
        return replace(window, start=start, duration=max(stop - start, 0.0))

    def _add(self, unit: PreparedUnit, window: Window, raw: list[RawChannel]) -> None:
        row = Row(self.source.id, window, self.source.channels, OK, 0.0)
        unit.rows.append(row)
        lacking = lacks_too_much(
            window.duration, self.recording.duration, self.settings.max_missing
        )
        fractions = []
        for channel in raw:
            absent = np.count_nonzero(~np.isfinite(channel.samples))
            if lacking:
                there = len(channel.samples) - absent
                fractions.append(max(0.0, 1 - there / (window.duration * channel.rate)))
            else:
                fractions.append(absent / len(channel.samples) if len(channel.samples) else 1.0)
        row.missing_fraction = max(fractions)
        if lacking or row.missing_fraction > self.settings.max_missing:
            row.status = MISSING
        elif row.missing_fraction == 1:
            row.status = NO_DATA
        if row.status != OK:
            allowed = min(self.settings.max_missing, math.nextafter(1, 0))  # all of it is too much
            unit.lacking.update(
                name
                for name, fraction in zip(self.source.channels, fractions, strict=True)
                if fraction > allowed
            )
            return
        try:
            prepared = prepare_window(
                raw,
                window_samples(window.duration),
                preprocess=cast('Literal["none", "reference"]', self.settings.preprocess),
                normalize=cast('Literal["none", "window", "recording"]', self.settings.normalize),
                statistics=self.statistics,
            )
        except InputError:
            row.status = TOO_LARGE
            return
        if prepared.data is not None and np.abs(prepared.data).max() > LARGEST_SAMPLE:
            row.status = TOO_LARGE
            return
        if prepared.data is None:
            raise NormWearError(f"window {window.id} has no data")  # fractions above say it has
        unit.data.append(prepared.data)
        unit.flat += bool(prepared.flat)
