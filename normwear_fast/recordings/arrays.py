"""What HDF5 and Zarr share: a tree of stored arrays, and which of them are channels on which clock.

The layout, for both:

* an array `data` (C, L) holds a group's channels, named by an attribute `channels`;
* in a group without one, every array (L,) of real numbers is a channel of its own name, and every
  array (C, L) is C channels;
* `sampling_rate` (Hz) is an attribute of the array, of its group, or of a group above; or the group
  has a time array (L,), named as a CSV's time column would be. It may be uneven.
* `units` may be an attribute of the array: one text, or one a channel.

`sampling_rate`, `channels` and `units` may also be small arrays beside the data.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from normwear_fast.errors import RecordingError
from normwear_fast.recordings.base import (
    Array,
    Channel,
    Recording,
    check_rate,
    rechunk,
    refusing,
)
from normwear_fast.recordings.clock import TimeColumn, choose_clock, time_column, wall_clock
from normwear_fast.recordings.parts import PartedRecording
from normwear_fast.recordings.table import TableRecording

_PIECE = 65536  # samples read at a time, or a chunk of the file where that is longer
_FIRST = 4096  # values of which a clock is told from a channel
_SMALL = 65536  # bytes an array beside the data (rates, names) may have
_SETTINGS = ("sampling_rate", "channels", "units")
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


@dataclass
class Tree:
    """The arrays of a file, and the attributes of its groups by path ("" is the root)."""

    arrays: list[StoredArray] = field(default_factory=list)
    groups: dict[str, dict[str, Any]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


class ArrayRecording(PartedRecording):
    """A file of named arrays. A subclass reads the tree and calls `_arrange`."""

    def _arrange(self, tree: Tree, given: float | None) -> None:
        self.notes += tuple(tree.notes)
        signals = self._signals(tree)
        if not signals:
            return
        parts: list[Recording] = []
        origins: list[float | None] = []  # seconds, of the parts that have times
        unrated: list[str] = []
        clocks: dict[str, StoredArray] = {}
        timed: dict[str, list[StoredArray]] = {}
        for one in signals:
            rate = self._rate(one, tree)
            clock = self._clock(one, tree)
            one.check()
            if clock is not None:
                clock.check()
                clocks[clock.path] = clock
                timed.setdefault(clock.path, []).append(one)
            elif rate is None and given is None:
                unrated.append(one.path)
            else:
                if rate is not None:
                    check_rate(self.path, given, [rate])
                names, units = self._titles(one, tree)
                parts.append(_Even(self.path, one, names, units, rate or given or 1.0))
                origins.append(None)
        for place, members in timed.items():
            rate = self._rate(members[0], tree)
            part = _Timed(
                self.path, clocks[place], members, [self._titles(m, tree) for m in members]
            )
            part._survey(given if rate is None else rate)
            check_rate(self.path, given, (c.sampling_rate for c in part.channels))
            parts.append(part)
            origins.append(part.origin)
            self.start_time = part.start_time if len(timed) == 1 else self.start_time
        if not parts:
            raise RecordingError(
                f"{self.path}: {unrated[0]} has neither an attribute sampling_rate (Hz) nor a time "
                f"array beside it; pass --rate HZ"
            )
        self.notes += tuple(f"{name} has no sampling_rate and is left out" for name in unrated)
        self._combine(parts, self._starts(origins))

    def _signals(self, tree: Tree) -> list[StoredArray]:
        """The arrays that are channels; small arrays of settings go to their group's attributes."""
        numeric: list[StoredArray] = []
        for one in tree.arrays:
            if one.name in _SETTINGS and len(one.shape) < 2:
                if int(np.prod(one.shape)) * one.array.dtype.itemsize > _SMALL:
                    raise RecordingError(f"{self.path}: {one.path} {one.shape}: too long a list")
                with refusing(self.path, f"{one.path} cannot be read"):
                    tree.groups.setdefault(one.group, {}).setdefault(one.name, one.array[()])
            elif one.array.dtype.kind not in "iufb":
                self.notes += (f"{one.path} holds {one.array.dtype} and is left out",)
            elif len(one.shape) not in (1, 2):
                self.notes += (f"{one.path} has shape {one.shape} and is left out",)
            elif 0 in one.shape:
                self.notes += (f"{one.path} is empty and left out",)
            else:
                numeric.append(one)
        whole = {one.group for one in numeric if one.name == "data"}
        signals: list[StoredArray] = []
        for one in numeric:
            if len(one.shape) == 1 and self._time_column(one) is not None:
                continue
            if one.group in whole and one.name != "data":
                self.notes += (f"{one.path} stands beside data and is left out",)
                continue
            if len(one.shape) == 2 and one.shape[0] > one.shape[1]:
                raise RecordingError(
                    f"{self.path}: {one.path} has shape {one.shape}; (channels, samples) is right"
                )
            signals.append(one)
        return signals

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
            rate = float(np.asarray(value, dtype=np.float64).reshape(-1)[0])
            single = np.size(value) == 1
        except (TypeError, ValueError, IndexError):
            rate, single = 0.0, False
        if not (single and np.isfinite(rate) and rate > 0):
            raise RecordingError(
                f"{self.path}: sampling_rate of {one.path} is {str(value)[:60]!r}; "
                f"a number of Hz above 0 is right"
            )
        return rate

    def _time_column(self, one: StoredArray) -> TimeColumn | None:
        """A time array by its name; by its first values too, if the name may mean a channel."""
        column = time_column(one.name)
        if (
            column is None
            or column.sure
            or len(one.shape) != 1
            or one.array.dtype.kind not in "iuf"
        ):
            return column
        one.check()
        with refusing(self.path, f"{one.path} is damaged"):
            values = np.asarray(one.array[:_FIRST], dtype=np.float64)
        return None if choose_clock([column], [values], None)[0] is None else column

    def _clock(self, one: StoredArray, tree: Tree) -> StoredArray | None:
        """The time array of the same group and length; of several, the one with the best name."""
        found = [
            (column.sure, column.seconds is not None, other)
            for other in tree.arrays
            if other.group == one.group
            and other.shape == one.shape[-1:]
            and other is not one
            and other.array.dtype.kind in "iuf"
            and (column := self._time_column(other)) is not None
        ]
        return max(found, key=lambda each: each[:2])[2] if found else None

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


def _pieces(one: StoredArray) -> Iterator[slice]:
    """Stretches of the last axis that hold whole chunks, so that no chunk is read twice."""
    step = max(1, _PIECE // one.chunk) * one.chunk
    length = one.shape[-1]
    return (slice(start, min(start + step, length)) for start in range(0, length, step))


def _finite(data: NDArray[Any]) -> Array:
    values: Array = np.array(data, dtype=np.float64)
    values[~np.isfinite(values)] = np.nan
    return values


def _rows(path: Path, one: StoredArray, part: slice, rows: list[int]) -> list[Array]:
    """Some rows of an array (C, L) in one read, so that a chunk of several channels is read once."""
    with refusing(path, f"{one.path} is damaged at sample {part.start}"):
        if len(one.shape) == 1:
            data = np.asarray(one.array[part])
            result = [_finite(data) for _ in rows]
        else:
            low, high = min(rows), max(rows) + 1
            data = np.asarray(one.array[low:high, part])
            result = [_finite(data[row - low]) for row in rows]
    if any(values.size != part.stop - part.start for values in result):
        raise RecordingError(f"{path}: {one.path} ends before sample {part.stop}")
    return result


class _Even(Recording):
    """An array at an even rate."""

    def __init__(
        self, path: Path, one: StoredArray, names: list[str], units: list[str], rate: float
    ) -> None:
        self.path = path
        self._one = one
        self.channels = tuple(
            Channel(name, unit, rate, one.shape[-1])
            for name, unit in zip(names, units, strict=True)
        )

    def _blocks(self, channels: list[int], seconds: float) -> Iterator[list[Array]]:
        size = max(1, round(seconds * self.channels[0].sampling_rate))
        pieces = (_rows(self.path, self._one, part, channels) for part in _pieces(self._one))
        return rechunk(pieces, size)


class _Timed(TableRecording):
    """Arrays of one length with a time array."""

    def __init__(
        self,
        path: Path,
        clock: StoredArray,
        members: list[StoredArray],
        titles: list[tuple[list[str], list[str]]],
    ) -> None:
        self.path = path
        self._first_row = 0
        self._clock_array = clock
        self._titles = []
        self._sources: list[tuple[StoredArray, int]] = []
        for one, (names, units) in zip(members, titles, strict=True):
            self._titles += list(zip(names, units, strict=True))
            self._sources += [(one, row) for row in range(len(names))]
        unit = clock.attributes.get("units")
        text = unit.decode("latin-1") if isinstance(unit, bytes) else str(unit or "")
        self._time: TimeColumn | None = time_column(clock.name)
        assert self._time is not None
        if self._time.seconds is None and text:
            self._time = time_column(f"{clock.name} [{text}]") or self._time
        self._opened = False

    @property
    def origin(self) -> float:
        """Seconds that the clock shows at the first row."""
        return float(self._origin) * float(self._unit or 1.0)

    def _survey(self, given: float | None) -> None:
        with refusing(self.path):
            super()._survey(given)
        self._opened = True

    def _rows(
        self, channels: list[int], *, time: bool
    ) -> Iterator[tuple[NDArray[Any], list[Array]]]:
        # Opening looks at the times alone.
        wanted: dict[str, list[int]] = {}
        for place, channel in enumerate(channels if self._opened else []):
            wanted.setdefault(self._sources[channel][0].path, []).append(place)
        longest = max(
            [self._clock_array, *(one for one, _ in self._sources)], key=lambda one: one.chunk
        )
        for part in _pieces(longest):
            columns: list[Array] = [np.empty(0)] * len(channels)
            for places in wanted.values():
                one = self._sources[channels[places[0]]][0]
                rows = [self._sources[channels[place]][1] for place in places]
                for place, data in zip(places, _rows(self.path, one, part, rows), strict=True):
                    columns[place] = data
            with refusing(self.path, f"{self._clock_array.path} is damaged"):
                times = np.asarray(self._clock_array.array[part]) if time else np.empty(0)
            if times.dtype.kind == "f":
                times = times.astype(np.float64)
            yield times if time else np.zeros(part.stop - part.start), columns


def check_storage(path: Path, name: str, declared: tuple[int, ...], item: int, chunk: int) -> None:
    """Refuse a chunk too large to hold, before anything of it is read."""
    if chunk * item > CHUNK_BYTES:
        raise RecordingError(
            f"{path}: {name} {declared} is stored in chunks of {chunk * item / 2**20:.0f} MB; "
            f"at most {CHUNK_BYTES >> 20} MB are right"
        )


def as_plain(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """The attributes that the layout knows."""
    return {name: attributes[name] for name in _SETTINGS if name in attributes}
