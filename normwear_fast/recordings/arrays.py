"""What HDF5, Zarr and NPZ share: a tree of stored arrays, and which of them are channels on which clock.

The layout, for all three:

* an array `data` (C, L) holds a group's channels, named by an attribute `channels`;
* in a group without one, every array (L,) of real numbers is a channel of its own name, and every
  array (C, L) is C channels, unless it is far shorter than its neighbours and has no rate of its own;
* `sampling_rate` (Hz) is an attribute of the array, of its group, or of a group above; or the group
  has a time array (L,), named as a CSV's time column would be. It may be uneven. Where both are
  there, the rate tells the time array's unit, and stands in for one that can be no clock.
* `units` may be an attribute of the array: one text, or one a channel; of a time array "ms", or what
  xarray writes, "milliseconds since 2024-01-01".
* `scale_factor`, `add_offset` and `_FillValue` may be attributes of the array, as xarray packs numbers:
  one number, or one a channel.

`sampling_rate`, `channels` and `units` may also be small arrays beside the data. What is neither
channel, clock nor setting is left out with a note.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
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
    check_rate,
    rechunk,
    refusing,
)
from normwear_fast.recordings.clock import TimeColumn, choose_clock, time_column, unit_seconds
from normwear_fast.recordings.parts import PartedRecording
from normwear_fast.recordings.table import TableRecording
from normwear_fast.recordings.wallclock import since_1970, wall_clock, wall_unit

_PIECE = 65536  # samples read at a time, or a chunk of the file where that is longer
_VALUES = 1 << 20  # of all rows together
_FIRST = 4096  # values of which a clock is told from a channel
_SMALL = 1 << 20  # bytes an array beside the data (rates, names) may have
_SETTINGS = ("sampling_rate", "channels", "units")
_PACKING = ("scale_factor", "add_offset", "_FillValue", "missing_value")
_SHORT = 10
"""Times shorter than its neighbours, an array at their rate is no signal: labels, a list of rates."""
_EARLY = 0.01  # of the recording; a channel that ends earlier is told of
CHUNK_BYTES = 512 << 20
"""The largest chunk that is read: one is in memory whole, however short the block."""


@dataclass
class StoredArray:
    """One array of a file.

    Args:
        path: names from the root down, with slashes.
        array: sliced like a NumPy array; has shape and dtype.
        attributes: its own.
        chunk: samples along the last axis that are stored together.
        check: raises if the file does not hold what the array declares; called for arrays in use.
    """

    path: str
    array: Any
    attributes: dict[str, Any]
    chunk: int = 1
    check: Callable[[], None] = lambda: None

    @property
    def group(self) -> str:
        return self.path.rpartition("/")[0]

    @property
    def name(self) -> str:
        return self.path.rpartition("/")[2]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.array.shape)

    @property
    def kind(self) -> str:
        return str(self.array.dtype.kind)

    def whole(self) -> Any:
        """All of a small array."""
        return self.array[()]

    def first(self, count: int) -> NDArray[Any]:
        """The first values of an array (L,)."""
        return np.asarray(self.array[:count])

    def pieces(self, rows: list[int], step: int) -> Iterator[list[NDArray[Any]]]:
        """Some rows of an array (C, L), or the only one of (L,), `step` samples at a time, as stored.

        All in one read, so that a chunk of several channels is read once.
        """
        low, high = min(rows), max(rows) + 1
        for start in range(0, self.shape[-1], step):
            part = slice(start, min(start + step, self.shape[-1]))
            if len(self.shape) == 1:
                yield [np.asarray(self.array[part])] * len(rows)
            else:
                data = np.asarray(self.array[low:high, part])
                yield [data[row - low] for row in rows]


@dataclass
class Tree:
    """The arrays of a file, and the attributes of its groups by path ("" is the root)."""

    arrays: list[StoredArray] = field(default_factory=list)
    groups: dict[str, dict[str, Any]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Time:
    """What a time array is read as.

    Args:
        column: its name and unit, as a CSV's time column.
        since: the moment that it counts from, seconds since 1970; None where the file has none.
    """

    column: TimeColumn
    since: float | None = None


class ArrayRecording(PartedRecording):
    """A file of named arrays. A subclass reads the tree and calls `_arrange`."""

    def _arrange(self, tree: Tree, given: float | None) -> None:
        self.notes += tuple(tree.notes)
        numbers = self._numbers(tree)
        times = {one.path: time for one in numbers if (time := self._time(one)) is not None}
        signals = self._signals([one for one in numbers if one.path not in times], tree)
        found = {one.path: self._clock(one, numbers, times) for one in signals}
        signals = self._long(signals, {name for name, clock in found.items() if clock is not None})
        used = {clock.path for clock in found.values() if clock is not None}
        second = [one for one in numbers if one.path in times and one.path not in used]
        self.notes += tuple(
            f"time array {one.path} is not the clock of any array and left out" for one in second
        )
        self._note_settings(tree, signals)
        if not signals:
            return
        parts: list[Recording] = []
        origins: list[float | None] = []  # seconds, of the parts that have times
        unrated: list[str] = []
        timed: dict[str, tuple[StoredArray, list[StoredArray]]] = {}
        for one in signals:
            rate = self._rate(one, tree)
            clock = found[one.path]
            one.check()
            if clock is not None:
                timed.setdefault(clock.path, (clock, []))[1].append(one)
            elif rate is None and given is None:
                unrated.append(one.path)
            else:
                if rate is not None:
                    check_rate(self.path, given, [rate])
                parts.append(self._even(one, tree, rate or given or 1.0))
                origins.append(None)
        for clock, members in timed.values():
            part = self._timed(clock, times[clock.path], members, tree, given)
            if isinstance(part, dict):
                for one in members:
                    if one.path in part:
                        parts.append(self._even(one, tree, part[one.path]))
                        origins.append(None)
                    else:
                        unrated.append(one.path)
                continue
            parts.append(part)
            origins.append(part.origin)
            self.start_time = part.start_time if len(timed) == 1 else self.start_time
        if not parts:
            raise RecordingError(
                f"{self.path}: {unrated[0]} has neither a sampling_rate (Hz) nor a time array of its "
                f"length beside it; pass --rate HZ"
            )
        self.notes += tuple(f"{name} has no sampling_rate and is left out" for name in unrated)
        self._combine(parts, self._starts(origins))
        self._note_ends()
        if self.start_time is None and len(timed) == 1:
            self._begin_by(second, times)

    def _numbers(self, tree: Tree) -> list[StoredArray]:
        """The arrays of signals and times; small ones of settings go to their group's attributes."""
        numbers: list[StoredArray] = []
        for one in tree.arrays:
            size = int(np.prod(one.shape))
            if one.name in _SETTINGS and (len(one.shape) < 2 or size == 1):
                if size * one.array.dtype.itemsize > _SMALL:
                    raise RecordingError(f"{self.path}: {one.path} {one.shape}: too long a list")
                with refusing(self.path, f"{one.path} cannot be read"):
                    tree.groups.setdefault(one.group, {}).setdefault(one.name, one.whole())
            elif one.kind not in "iufb" and not _has_dates(one):
                self.notes += (f"{one.path} holds {one.array.dtype} and is left out",)
            elif len(one.shape) not in (1, 2):
                self.notes += (f"{one.path} has shape {one.shape} and is left out",)
            elif 0 in one.shape:
                self.notes += (f"{one.path} is empty and left out",)
            else:
                numbers.append(one)
        return numbers

    def _signals(self, numbers: list[StoredArray], tree: Tree) -> list[StoredArray]:
        """Of the arrays that are no times, those that are channels."""
        whole = {one.group for one in numbers if one.name == "data"}
        signals: list[StoredArray] = []
        for one in numbers:
            if one.group in whole and one.name != "data":
                self.notes += (f"{one.path} stands beside data and is left out",)
            else:
                signals.append(one)
        return signals

    def _long(self, signals: list[StoredArray], clocked: set[str]) -> list[StoredArray]:
        """Without the arrays that would be at the rate of far longer ones in their group."""
        shared = [one for one in signals if "sampling_rate" not in one.attributes]
        kept: list[StoredArray] = []
        upright: list[str] = []
        for one in signals:
            beside = (other for other in shared if other.group == one.group)
            other = max(beside, key=lambda each: max(each.shape), default=one)
            bare = "sampling_rate" not in one.attributes and one.path not in clocked
            if bare and _SHORT * max(one.shape) <= max(other.shape):
                self.notes += (
                    f"{one.path} {one.shape} is far shorter than {other.path} {other.shape}, has no "
                    f"sampling_rate of its own, and is left out",
                )
                continue
            if len(one.shape) == 2 and one.shape[0] > one.shape[1]:
                upright.append(f"{one.path} has shape {one.shape}; (channels, samples) is right")
            else:
                kept.append(one)
        if upright and not kept:
            raise RecordingError(f"{self.path}: {upright[0]}")
        self.notes += tuple(f"{text}: left out" for text in upright)
        return kept

    def _even(self, one: StoredArray, tree: Tree, rate: float) -> _Even:
        names, units = self._titles(one, tree)
        return _Even(self.path, one, names, units, rate)

    def _note_settings(self, tree: Tree, signals: list[StoredArray]) -> None:
        """Names and units that stand in a group are for an array `data` in it or below."""
        for group, settings in tree.groups.items():
            below = group + "/" if group else ""
            if any(one.name == "data" and one.path.startswith(below) for one in signals):
                continue
            names = [one.name for one in signals if one.group == group]
            for key in ("channels", "units"):
                texts = self._texts(settings.get(key))
                if texts is None or (key == "channels" and sorted(texts) == sorted(names)):
                    continue
                place = f"{below}{key}"
                self.notes += (f"{place} belongs to an array data, which is not there: left out",)

    def _note_ends(self) -> None:
        for channel in self.channels:
            early = self.duration - channel.start - channel.samples / channel.sampling_rate
            if early > _EARLY * self.duration:
                self.notes += (f"{channel.name} ends {early:.4g} s before the recording does",)

    def _setting(self, one: StoredArray, tree: Tree, name: str) -> Any:
        """An attribute of the array, or of the nearest group above that has it; or None."""
        if name in one.attributes:
            return one.attributes[name]
        group = one.path
        while group:
            group = group.rpartition("/")[0]
            if name in tree.groups.get(group, {}):
                return tree.groups[group][name]
        return None

    def _rate(self, one: StoredArray, tree: Tree) -> float | None:
        value = self._setting(one, tree, "sampling_rate")
        if value is None:
            return None
        try:
            # several that are the same are one
            rates = np.unique(np.asarray(value, dtype=np.float64))
            rate = float(rates[0]) if rates.size == 1 else 0.0
        except (TypeError, ValueError):
            rate = 0.0
        if not (np.isfinite(rate) and rate > 0):
            raise RecordingError(
                f"{self.path}: sampling_rate of {one.path} is {str(value)[:60]!r}; "
                f"a number of Hz above 0 is right"
            )
        return rate

    def _time(self, one: StoredArray) -> _Time | None:
        """A time array by its name, and its type or its unit; by its first values too, if the name
        may mean a channel."""
        if len(one.shape) != 1 or one.kind not in "iufMm":
            return None
        text = "".join(self._texts(one.attributes.get("units")) or [])
        unit, since = _time_unit(text)
        column = time_column(one.name)
        if column is None or column.seconds is None:
            # "t [ms]" is a time's name where "t" alone need not be
            column = time_column(f"{one.name} [ms]") if unit else column
            column = column and replace(column, title=one.name, seconds=unit)
        elif unit is not None and unit != column.seconds:
            raise RecordingError(
                f"{self.path}: {one.path} has units {text[:60]!r}, which contradict its name"
            )
        if column is None:
            return None
        if one.kind in "Mm":
            return _Time(replace(column, seconds=_date_unit(one)), 0.0 if one.kind == "M" else None)
        if since is None and _SINCE.fullmatch(text):
            self.notes += (f"{one.path} counts {text[:60]!r}: no date that is known here",)
        if not column.sure:
            one.check()
            if choose_clock([column], [self._first(one)], None)[0] is None:
                return None
        return _Time(column, since)

    def _first(self, one: StoredArray) -> NDArray[Any]:
        with refusing(self.path, f"{one.path} is damaged"):
            first = one.first(_FIRST)
            return first if one.kind in "Mm" else np.asarray(first, dtype=np.float64)

    def _clock(
        self, one: StoredArray, numbers: list[StoredArray], times: Mapping[str, _Time]
    ) -> StoredArray | None:
        """The time array of the same group and length; of several, the one that a table would have."""
        found = [
            other
            for other in numbers
            if other.path in times and other.group == one.group and other.shape == one.shape[-1:]
        ]
        if len(found) < 2:
            return found[0] if found else None
        for other in found:
            other.check()
        columns = [times[other.path].column for other in found]
        firsts = [self._first(other) for other in found]
        return found[choose_clock(columns, firsts, None)[0] or 0]

    def _begin_by(self, clocks: list[StoredArray], times: Mapping[str, _Time]) -> None:
        """The start time of the first of these, second clocks, that knows the date."""
        for one in clocks:
            time, first = times[one.path], self._first(one)
            since = time.since
            unit = wall_unit(first) if since is None and one.kind in "iuf" else time.column.seconds
            if one.kind == "M":
                first = np.where(np.isnat(first), 0, first.astype(np.int64))
            origin = (since or 0.0) + float(first[0]) * (unit or 0.0)
            if one.kind != "m" and wall_clock(origin):
                self.start_time = since_1970(origin)
                self.notes += (f"the start time is the first in {one.path}",)
                return

    def _timed(
        self,
        clock: StoredArray,
        time: _Time,
        members: list[StoredArray],
        tree: Tree,
        given: float | None,
    ) -> _Timed | dict[str, float]:
        """Arrays on their clock, which must agree with a sampling_rate that the file gives them too.
        Of a clock that is none, with a note, the arrays' rates as far as they are known."""
        clock.check()
        rates = {one.path: rate for one in members if (rate := self._rate(one, tree)) is not None}
        titles = [self._titles(one, tree) for one in members]
        stated = next(iter(rates.values()), None)
        part = _Timed(self.path, clock, time, members, titles)
        if stated is not None:
            part._rate_from = "sampling_rate"
        try:
            part._survey(stated or given)
        except RecordingError as error:
            if rates and isinstance(error, ClockError):
                for rate in set(rates.values()):
                    check_rate(self.path, given, [rate])
                reason = str(error).removeprefix(f"{self.path}: ").split("; ")[0]
                self.notes += (f"{reason}: no clock, sampling_rate stands in for it",)
                alike = dict.fromkeys((one.path for one in members), stated or 1.0)
                return {**(alike if len(set(rates.values())) == 1 else {}), **rates}
            if rates and part._unit is None:
                raise RecordingError(
                    f"{self.path}: sampling_rate {stated:g} of {next(iter(rates))} contradicts the "
                    f"times in {clock.path}, in whatever unit; one of the two is right"
                ) from error
            if not rates or not isinstance(error, OtherRateError):
                raise
        own = part._clock.sampling_rate
        for name, rate in rates.items():
            if abs(own / rate - 1) > 0.01:
                raise RecordingError(
                    f"{self.path}: sampling_rate {rate:g} of {name} contradicts the {own:g} Hz of its "
                    f"times in {clock.path}; one of the two is right"
                )
        check_rate(self.path, given, [own])
        return part

    def _titles(self, one: StoredArray, tree: Tree) -> tuple[list[str], list[str]]:
        """Names and units of an array's channels."""
        count = 1 if len(one.shape) == 1 else one.shape[0]
        above = one.group + "/" if one.group else ""
        names = self._texts(self._setting(one, tree, "channels")) if one.name == "data" else None
        if one.name != "data":
            names = self._texts(one.attributes.get("channels"))
            above = "" if names is None else above
        if names is None:
            stem = "channel" if one.name == "data" else one.path
            single = count == 1 and one.name != "data"
            names = [one.path] if single else [f"{stem}_{i + 1}" for i in range(count)]
        units = self._texts(
            self._setting(one, tree, "units") if one.name == "data" else one.attributes.get("units")
        )
        units = [""] * count if units is None else units
        if len(units) == 1:
            units = units * count
        for what, texts in (("channels", names), ("units", units)):
            if len(texts) != count:
                raise RecordingError(
                    f"{self.path}: {what} of {one.path} has {len(texts)} entries for {count} channels"
                )
        return [above + name if one.name == "data" else name for name in names], units

    @staticmethod
    def _texts(value: Any) -> list[str] | None:
        if value is None:
            return None
        if isinstance(value, str | bytes):
            value = [value]
        values = np.asarray(value).reshape(-1).tolist()
        return [v.decode("utf-8", "replace") if isinstance(v, bytes) else str(v) for v in values]

    def _starts(self, origins: list[float | None]) -> list[float]:
        """When the parts begin, from the first times of their clocks."""
        times = [origin for origin in origins if origin is not None]
        if len({wall_clock(origin) for origin in times}) > 1:
            self.notes += (
                "time arrays count from different moments: all are taken to begin together",
            )
            return [0.0] * len(origins)
        first = min(times, default=0.0)
        if times and max(times) - first > 3.15576e7:
            raise RecordingError(
                f"{self.path}: its time arrays begin {(max(times) - first) / 3.15576e7:.3g} years "
                f"apart: not one recording"
            )
        return [0.0 if origin is None else origin - first for origin in origins]


_SINCE = re.compile(r"\s*(\w+)\s+since\s+(\S.*?)\s*", re.IGNORECASE)
_DATE_UNITS = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "ns": 1e-9, "m": 60.0, "h": 3600.0, "D": 86400.0}


def _time_unit(text: str) -> tuple[float | None, float | None]:
    """A time array's `units`, such as "ms" or, as xarray writes it, "milliseconds since 2024-01-01".

    https://cfconventions.org/cf-conventions/cf-conventions.html#time-coordinate

    Returns:
        Seconds, and the moment counted from in seconds since 1970; None for each that it lacks.
    """
    since = _SINCE.fullmatch(text)
    word = (since[1] if since else text).strip()
    seconds = unit_seconds(word)
    if since is None or seconds is None:
        return seconds, None
    # "2000-1-1 0:0:0" is allowed there and not in ISO 8601
    date = re.sub(r"(?<![\d.])\d(?!\d)", r"0\g<0>", since[2].removesuffix("UTC").rstrip())
    try:
        moment = datetime.fromisoformat(date)
    except ValueError:
        return seconds, None
    return seconds, (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


def _date_unit(one: StoredArray) -> float | None:
    """Seconds that datetime64 or timedelta64 counts in."""
    unit, count = np.datetime_data(one.array.dtype)
    return _DATE_UNITS[unit] * count if unit in _DATE_UNITS else None


def _has_dates(one: StoredArray) -> bool:
    """Whether an array is a time array by its type and its name."""
    return (
        one.kind in "Mm"
        and len(one.shape) == 1
        and time_column(one.name) is not None
        and _date_unit(one) is not None
    )


def _step(one: StoredArray) -> int:
    """Samples to read at a time: whole chunks, so that none is read twice."""
    rows = 1 if len(one.shape) == 1 else one.shape[0]
    return max(1, min(_PIECE, _VALUES // rows) // one.chunk) * one.chunk


def finite(data: NDArray[Any]) -> Array:
    """A copy as float64, infinities NaN."""
    values: Array = np.array(data, dtype=np.float64)
    values[~np.isfinite(values)] = np.nan
    return values


def _rows(path: Path, one: StoredArray, rows: list[int], step: int) -> Iterator[list[NDArray[Any]]]:
    """`StoredArray.pieces`, checked; any error on the way is the file's."""
    pieces = one.pieces(rows, step)
    for start in range(0, one.shape[-1], step):
        stop = min(start + step, one.shape[-1])
        with refusing(path, f"{one.path} is damaged at sample {start}"):
            piece = next(pieces, None)
        if piece is None or any(values.size != stop - start for values in piece):
            raise RecordingError(f"{path}: {one.path} ends before sample {stop}")
        yield piece


@dataclass(frozen=True)
class _Packing:
    """How stored numbers stand for physical ones: stored * scale + offset, NaN where one is a fill value.

    https://cfconventions.org/cf-conventions/cf-conventions.html#packed-data
    """

    scale: Array  # (C,), as all of these
    offset: Array
    fills: tuple[Array, ...]

    @classmethod
    def of(cls, path: Path, one: StoredArray) -> _Packing:
        """By the array's attributes, each one number or one a channel; a RecordingError where they
        are not, or no samples come of them."""
        count = 1 if len(one.shape) == 1 else one.shape[0]
        found: dict[str, Array] = {"scale_factor": np.ones(count), "add_offset": np.zeros(count)}
        for name in (name for name in _PACKING if name in one.attributes):
            value = one.attributes[name]
            try:
                numbers = np.asarray(value, dtype=np.float64).reshape(-1)
            except (TypeError, ValueError):
                numbers = np.empty(0)
            if name in _PACKING[:2]:
                what = "a number is right" if count == 1 else "a number, or one a channel, is right"
                if numbers.size not in (1, count):
                    raise RecordingError(f"{path}: {name} of {one.path} is {_short(value)}; {what}")
                if not np.isfinite(numbers).all() or (name == "scale_factor" and 0 in numbers):
                    raise RecordingError(
                        f"{path}: {name} of {one.path} is {_short(value)}: no sample can be told by it"
                    )
            if numbers.size in (1, count):
                # xarray writes a float's fill value as base64 in Zarr: it is NaN in the data too
                found[name] = np.broadcast_to(numbers, count)
        fills = tuple(found[name] for name in _PACKING[2:] if name in found)
        return cls(found["scale_factor"], found["add_offset"], fills)

    def physical(self, data: NDArray[Any], row: int) -> Array:
        """Samples of one of the array's channels."""
        values = finite(data)
        for fill in self.fills:
            values[data == fill[row]] = np.nan
        scale, offset = float(self.scale[row]), float(self.offset[row])
        if (scale, offset) != (1.0, 0.0):
            values = values * scale + offset
        return values


def _short(value: Any) -> str:
    plain = value.tolist() if isinstance(value, np.ndarray | np.generic) else value
    return repr(plain)[:60]


class _Even(Recording):
    """An array at an even rate."""

    def __init__(
        self, path: Path, one: StoredArray, names: list[str], units: list[str], rate: float
    ) -> None:
        self.path = path
        self._one = one
        self._packing = _Packing.of(path, one)
        self.channels = tuple(
            Channel(name, unit, rate, one.shape[-1])
            for name, unit in zip(names, units, strict=True)
        )

    def _blocks(self, channels: list[int], seconds: float) -> Iterator[list[Array]]:
        size = max(1, round(seconds * self.channels[0].sampling_rate))
        pieces = _rows(self.path, self._one, channels, _step(self._one))
        return rechunk(
            (list(map(self._packing.physical, piece, channels)) for piece in pieces), size
        )


class _Timed(TableRecording):
    """Arrays of one length with a time array."""

    def __init__(
        self,
        path: Path,
        clock: StoredArray,
        time: _Time,
        members: list[StoredArray],
        titles: list[tuple[list[str], list[str]]],
    ) -> None:
        self.path = path
        self._first_row = 0
        self._clock_array = clock
        self._titles = []
        self._sources: list[tuple[StoredArray, int]] = []
        self._packing = {one.path: _Packing.of(path, one) for one in members}
        for one, (names, units) in zip(members, titles, strict=True):
            self._titles += list(zip(names, units, strict=True))
            self._sources += [(one, row) for row in range(len(names))]
        self._time: TimeColumn | None = time.column
        self._since = time.since
        self._opened = False

    @property
    def origin(self) -> float:
        """Seconds that the clock shows at the first row; since 1970, where it is known since when."""
        return (self._since or 0.0) + float(self._origin) * float(self._unit or 1.0)

    def _survey(self, given: float | None) -> None:
        with refusing(self.path):
            super()._survey(given)
        if self._since is not None and wall_clock(self.origin):
            self.start_time = since_1970(self.origin)
        self._opened = True

    def _copied(self) -> bool:
        self._opened = True
        try:
            return super()._copied()
        finally:
            self._opened = False

    def _rows(
        self, channels: list[int], *, time: bool
    ) -> Iterator[tuple[NDArray[Any], list[Array]]]:
        # Opening looks at the times alone, unless several rows share each.
        wanted: dict[str, list[int]] = {}
        for place, channel in enumerate(channels if self._opened else []):
            wanted.setdefault(self._sources[channel][0].path, []).append(place)
        step = max(_step(one) for one in (self._clock_array, *(one for one, _ in self._sources)))
        streams = [
            _rows(
                self.path,
                self._sources[channels[places[0]]][0],
                [self._sources[channels[place]][1] for place in places],
                step,
            )
            for places in wanted.values()
        ]
        length = self._clock_array.shape[0]
        clock = _rows(self.path, self._clock_array, [0], step) if time else None
        for start in range(0, length, step):
            columns: list[Array] = [np.empty(0)] * len(channels)
            for (name, places), stream in zip(wanted.items(), streams, strict=True):
                for place, data in zip(places, next(stream), strict=True):
                    row = self._sources[channels[place]][1]
                    columns[place] = self._packing[name].physical(data, row)
            if clock is None:
                yield np.zeros(min(step, length - start)), columns
            else:
                yield self._as_numbers(next(clock)[0], start), columns

    def _as_numbers(self, times: NDArray[Any], start: int) -> NDArray[Any]:
        if times.dtype.kind == "f":  # a float32 as it is: its spacing says to what it was stored
            return times if times.dtype.itemsize >= 4 else times.astype(np.float64)
        if times.dtype.kind in "Mm":
            if np.isnat(times).any():
                row = start + int(np.argmax(np.isnat(times)))
                raise self._lacks_time(row, self._clock_array.path)
            return times.astype(np.int64)
        return times


def check_storage(path: Path, name: str, declared: tuple[int, ...], item: int, chunk: int) -> None:
    """Refuse a chunk too large to hold, before anything of it is read."""
    if chunk * item > CHUNK_BYTES:
        raise RecordingError(
            f"{path}: {name} {declared} is stored in chunks of {chunk * item / 2**20:.0f} MB; "
            f"at most {CHUNK_BYTES >> 20} MB are right"
        )


def as_plain(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """The attributes that the layout knows."""
    return {name: attributes[name] for name in (*_SETTINGS, *_PACKING) if name in attributes}
