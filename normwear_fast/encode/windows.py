"""Which windows a recording has, and their raw samples, streamed block by block."""

from __future__ import annotations

import csv
import hashlib
import math
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast, overload

import numpy as np
from numpy.typing import NDArray

from normwear_fast._native import gather_windows
from normwear_fast.config import MIN_SAMPLES, SAMPLING_RATE
from normwear_fast.encode.settings import check_duration, join_names
from normwear_fast.errors import RecordingError, UsageError, reading
from normwear_fast.recordings.base import Channel, Recording, first_sample

BLOCK_SECONDS = 60.0
"""Seconds of a recording read at a time."""

GATHER_BYTES = 16 * 2**20
"""Raw windows cut out together; overlapping windows repeat samples, so their number is bounded."""

EDGE = 1e-6
"""Samples (and seconds) by which a time may miss a sample's and still mean it: clocks are rounded."""


@dataclass(frozen=True)
class Window:
    """[start, start + duration) of a recording, in seconds after the recording's start."""

    id: str
    start: float
    duration: float


def lacks_too_much(duration: float, recording: float, max_missing: float) -> bool:
    """Whether a window is so much longer than its recording (s) that it lacks more than it may.

    One a thousand times as long always does: its samples need not fit into memory to be counted.
    """
    return duration * (1 - min(max_missing, 0.999)) > recording + EDGE


def planned_duration(duration: float, recording: float, max_missing: float) -> float:
    """Seconds of a window that can come to tokens: of one that lacks too much, the recording's."""
    if not lacks_too_much(duration, recording, max_missing):
        return duration
    return min(duration, max(recording, MIN_SAMPLES / SAMPLING_RATE))


class Tiling(Sequence[Window]):
    """Windows at k * hop while they end within the recording.

    Args:
        window, hop: seconds.
        count: how many.
    """

    def __init__(self, window: float, hop: float, count: int) -> None:
        self.window, self.hop, self._len = window, hop, count

    @classmethod
    def over(cls, duration: float, window: float, hop: float) -> Tiling:
        """All that fit into ``duration`` seconds; none where it is shorter than a window."""
        count = max(0, math.floor((duration - window + EDGE) / hop) + 1)
        while count and (count - 1) * hop + window > duration + EDGE:
            count -= 1
        return cls(window, hop, count)

    def __len__(self) -> int:
        return self._len

    @overload
    def __getitem__(self, index: int) -> Window: ...
    @overload
    def __getitem__(self, index: slice) -> list[Window]: ...
    def __getitem__(self, index: int | slice) -> Window | list[Window]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(self._len))]
        if not 0 <= index < self._len:
            raise IndexError(index)
        return Window(str(index), index * self.hop, self.window)


class ListedWindows(Sequence[Window]):
    """The windows of one recording in a list, in order of start."""

    def __init__(
        self, ids: Sequence[str], starts: NDArray[np.float64], durations: NDArray[np.float64]
    ) -> None:
        order = np.lexsort((durations, starts))  # stable: equal windows keep the list's order
        self.ids = [ids[i] for i in order]
        self.starts, self.durations = starts[order], durations[order]

    def __len__(self) -> int:
        return len(self.ids)

    @overload
    def __getitem__(self, index: int) -> Window: ...
    @overload
    def __getitem__(self, index: slice) -> list[Window]: ...
    def __getitem__(self, index: int | slice) -> Window | list[Window]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return Window(self.ids[index], float(self.starts[index]), float(self.durations[index]))


@dataclass(frozen=True)
class WindowList:
    """A list of windows, by recording, and the digest of what it says."""

    recordings: dict[str, ListedWindows]
    digest: str


def read_window_list(path: str | Path) -> WindowList:
    """Reads a list of windows.

    Args:
        path: CSV or Parquet with columns ``recording``, ``start_s``, ``duration_s`` or ``end_s`` (both
            must agree to a millisecond), and optionally ``window_id``; without it a window's id is
            its row's number, from 0.

    Raises:
        UsageError: no such file, a missing column, or a row that cannot be a window (named).
    """
    path = Path(path)
    if not path.is_file():
        raise UsageError(f"{path}: no such list of windows; name a CSV or Parquet file")
    known = ("recording", "start_s", "duration_s", "end_s", "window_id")
    rows = table_rows(path, lambda names: _check_columns(names, path), known)
    columns: dict[str, tuple[list[str], list[float], list[float]]] = {}
    seen: set[tuple[str, str]] = set()
    digest = hashlib.sha256()
    number = -1
    for number, (where, row) in enumerate(rows):
        recording = _text(row.get("recording"))
        if not recording:
            raise UsageError(f"{where}: no recording is named")
        start = _seconds(row.get("start_s"), "start_s", where)
        duration = duration_of(row, start, where)
        check_duration(duration, f"{where}: a window")
        window_id = _text(row["window_id"]) if "window_id" in row else str(number)
        if not window_id or (recording, window_id) in seen:
            wrong = f"{window_id!r} is there twice" if window_id else "is empty"
            raise UsageError(f"{where}: window_id {wrong} for recording {recording!r}")
        seen.add((recording, window_id))
        ids, starts, durations = columns.setdefault(recording, ([], [], []))
        ids.append(window_id)
        starts.append(start)
        durations.append(duration)
        digest.update(f"{recording}\0{window_id}\0{start!r}\0{duration!r}\n".encode())
    if number < 0:
        raise UsageError(f"{path} lists no windows")
    return WindowList(
        {
            recording: ListedWindows(ids, np.array(starts), np.array(durations))
            for recording, (ids, starts, durations) in columns.items()
        },
        digest.hexdigest(),
    )


def _check_columns(names: Iterable[str], path: Path) -> None:
    names = list(names)
    missing = [name for name in ("recording", "start_s") if name not in names]
    if "duration_s" not in names and "end_s" not in names:
        missing.append("duration_s or end_s")
    if missing:
        raise UsageError(
            f"{path}: no column {', '.join(missing)}; it has {', '.join(names) or 'none'}"
        )


def table_rows(
    path: Path, check: Callable[[Iterable[str]], None], known: Sequence[str] | None = None
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows of a CSV or Parquet table, each with the place to name in an error.

    Args:
        path: a Parquet file by its name, else CSV.
        check: given the names of its columns before any row is read; raises what is wrong with them.
        known: columns wanted of a Parquet file; all where None.

    Raises:
        UsageError: not such a file.
    """
    if path.suffix.lower() in (".parquet", ".pq"):
        return _parquet_rows(path, check, known)
    return _csv_rows(path, check)


def _csv_rows(
    path: Path, check: Callable[[Iterable[str]], None]
) -> Iterator[tuple[str, dict[str, Any]]]:
    with (
        reading(path, UsageError, "not a CSV file"),
        path.open(newline="", encoding="utf-8-sig") as file,
    ):
        sample = file.readline()
        file.seek(0)
        delimiter = max(",;\t", key=sample.count)
        reader = csv.DictReader(file, delimiter=delimiter, skipinitialspace=True)
        check(reader.fieldnames or ())
        for row in reader:
            where = f"{path}, line {reader.line_num}"
            more = cast("list[str]", row.pop(None, []))  # DictReader's place for them
            if any(cell.strip() for cell in more):
                names = reader.fieldnames or ()
                raise UsageError(
                    f"{where}: has {len(names) + len(more)} cells for the {len(names)} columns "
                    f"{', '.join(names)}; as many are right"
                )
            yield where, row


def _parquet_rows(
    path: Path, check: Callable[[Iterable[str]], None], known: Sequence[str] | None
) -> Iterator[tuple[str, dict[str, Any]]]:
    import pyarrow.parquet as pq

    with reading(path, UsageError, "not a Parquet file"):
        file = pq.ParquetFile(path)
        check(file.schema_arrow.names)
        wanted = [n for n in file.schema_arrow.names if known is None or n in known]
        number = 0
        for batch in file.iter_batches(columns=wanted):
            for row in batch.to_pylist():
                yield f"{path}, row {number}", row
                number += 1


def duration_of(row: Mapping[str, Any], start: float, where: str) -> float:
    """What a row of a list says with ``duration_s``, ``end_s`` or, alike, with both.

    Raises:
        UsageError: it says neither, or one that contradicts the other.
    """
    duration = None
    if _text(row.get("duration_s")) or "end_s" not in row:
        duration = _seconds(row.get("duration_s"), "duration_s", where)
        if not _text(row.get("end_s")):
            return duration
    end = _seconds(row.get("end_s"), "end_s", where)
    if duration is None:
        return round(end - start, 9)  # 12.6 - 6.6 is 5.999999999999999
    if abs(start + duration - end) > 1e-3:
        raise UsageError(
            f"{where}: start_s {start:g} and duration_s {duration:g} end at {start + duration:g}, but "
            f"end_s is {end:g}; leave one of them out"
        )
    return duration


def _text(value: Any) -> str:
    return "" if value is None else str(value).strip()


def _seconds(value: Any, name: str, where: str) -> float:
    try:
        seconds = float(value)
    except (TypeError, ValueError, OverflowError):
        seconds = math.nan
    if not math.isfinite(seconds):
        raise UsageError(f"{where}: {name} is {value!r}; it must be a number of seconds")
    return seconds


def select_channels(
    channels: Sequence[Channel], names: Sequence[str] | None, notes: Sequence[str] = ()
) -> list[int]:
    """Indices of the channels of these names, in the names' order; all channels where None.

    Args:
        channels: the recording's.
        names: those wanted.
        notes: the recording's; one that says why a name is left out is told.

    Raises:
        RecordingError: a name the recording does not have, or a recording without channels.
    """
    if not channels:
        raise RecordingError("holds no signal")
    if names is None:
        return list(range(len(channels)))
    selected = [i for name in names for i, channel in enumerate(channels) if channel.name == name]
    missing = sorted(set(names) - {channel.name for channel in channels})
    if missing:
        stems = {re.sub(r"_\d+$", "", name) for name in missing}  # acc_1 is of an array acc
        sought = "|".join(map(re.escape, sorted(stems.union(missing))))
        reasons = [
            note
            for note in notes
            if "left out" in note and re.search(rf"(?<!\w)(?:{sought})(?!\w)", note)
        ]
        raise RecordingError(
            f"has no channel {join_names(missing)}; it has {join_names(c.name for c in channels)}"
            + "".join(f"; {reason}" for reason in reasons[:3])
        )
    return selected


class RawChannel(NamedTuple):
    """A channel's samples of one window.

    ``samples`` (n,) float64, NaN where missing, ``rate`` in Hz, and ``offset``, the seconds from the
    window's start to ``samples[0]``, in [0, 1 / rate).
    """

    samples: NDArray[np.float64]
    rate: float
    offset: float


class _Stream:
    """What is held of one channel: samples ``base`` to ``received`` of the whole."""

    def __init__(self, channel: Channel, start: float) -> None:
        self.channel = channel
        self.base = self.received = first_sample(channel, start)
        self.buffer: NDArray[np.float64] = np.empty(0)

    def first_samples(self, times: NDArray[np.float64]) -> NDArray[np.int64]:
        """Index of the first sample at or after each time (s after the recording's start)."""
        channel = self.channel
        index = np.ceil((times - channel.start) * channel.sampling_rate - EDGE)
        # Windows far outside become empty ones just outside: their indices must stay int64.
        return np.clip(index, -(2**62), 2**62).astype(np.int64)

    def append(self, block: NDArray[np.float64]) -> None:
        skipped = min(max(self.base - self.received, 0), len(block))
        self.received += len(block)
        self.buffer = np.concatenate([self.buffer, block[skipped:]])

    def discard(self, before: int) -> None:
        if before > self.base:
            self.buffer = self.buffer[before - self.base :]
            self.base = before


class Extractor:
    """Cuts windows out of a recording while it streams by, in memory bounded by window and block.

    Args:
        recording: an open recording.
        channels: indices of the channels wanted.
        block_seconds: how much is read at a time.
        start: seconds before which no window begins.
        alive: called after each block read.
    """

    def __init__(
        self,
        recording: Recording,
        channels: Sequence[int],
        block_seconds: float = BLOCK_SECONDS,
        start: float = 0.0,
        alive: Callable[[], object] = lambda: None,
    ) -> None:
        self._streams = [_Stream(recording.channels[i], start) for i in channels]
        self._blocks = iter(recording.blocks(channels, block_seconds, start))
        self._alive = alive
        self._ended = False
        self.read_seconds = 0.0

    def extract(self, windows: Sequence[Window]) -> Iterator[list[RawChannel]]:
        """The channels of each window.

        Args:
            windows: in order of start; none may start before one extracted earlier.

        Raises:
            RecordingError: the recording holds fewer samples than it declares.
        """
        first = 0
        while first < len(windows):
            stop = self._batch_end(windows, first)
            yield from self._gather(windows[first:stop])
            first = stop

    def _batch_end(self, windows: Sequence[Window], first: int) -> int:
        rate = sum(stream.channel.sampling_rate for stream in self._streams)
        total = 0.0
        for stop in range(first, len(windows)):
            total += windows[stop].duration * rate * 8
            late = windows[stop].start > windows[first].start + BLOCK_SECONDS
            if stop > first and (total > GATHER_BYTES or late):
                return stop
        return len(windows)

    def _gather(self, windows: Sequence[Window]) -> Iterator[list[RawChannel]]:
        starts = np.array([window.start for window in windows])
        ends = starts + np.array([window.duration for window in windows])
        firsts = [stream.first_samples(starts) for stream in self._streams]
        stops = [stream.first_samples(ends) for stream in self._streams]
        for stream, begin in zip(self._streams, firsts, strict=True):
            stream.discard(int(begin[0]))
        self._read_until([int(stop.max()) for stop in stops])
        cut: list[list[RawChannel]] = [[] for _ in windows]
        for stream, begin, stop in zip(self._streams, firsts, stops, strict=True):
            rate, origin = stream.channel.sampling_rate, stream.channel.start
            offsets = np.maximum(origin + begin / rate - starts, 0.0)
            lengths = stop - begin
            local = np.clip(begin - stream.base, -(2**40), 2**40)
            raw: list[NDArray[np.float64] | None] = [None] * len(windows)
            for length in np.unique(lengths).tolist():
                members = np.flatnonzero(lengths == length)
                samples, _ = gather_windows(stream.buffer, local[members], length)
                for member, row in zip(members.tolist(), samples, strict=True):
                    raw[member] = row
            for channels, samples_of, offset in zip(cut, raw, offsets.tolist(), strict=True):
                assert samples_of is not None
                channels.append(RawChannel(samples_of, rate, offset))
        yield from cut

    def _read_until(self, stops: Sequence[int]) -> None:
        started = time.perf_counter()
        while any(
            stream.received < min(stop, stream.channel.samples)
            for stream, stop in zip(self._streams, stops, strict=True)
        ):
            block = None if self._ended else next(self._blocks, None)
            if block is None:
                self._ended = True
                short = next(s for s in self._streams if s.received < s.channel.samples)
                raise RecordingError(
                    f"channel {short.channel.name} ends after {short.received} of its "
                    f"{short.channel.samples} samples; the file is cut short"
                )
            for stream, samples in zip(self._streams, block, strict=True):
                stream.append(samples)
            self._alive()
        self.read_seconds += time.perf_counter() - started

    def close(self) -> None:
        close = getattr(self._blocks, "close", None)
        if close is not None:
            close()
