"""WFDB records (PhysioNet), through the wfdb package: .hea headers with .dat, .mat or FLAC signals.

Each channel keeps its own rate, frame rate times samples per frame. Invalid samples are NaN. Skew is
undone here, a channel at a time: wfdb reads a skewed channel right only when it reads the record whole.
"""

from __future__ import annotations

import contextlib
import math
import re
import shutil
import tempfile
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from normwear_fast.errors import RecordingError, one_line
from normwear_fast.recordings.base import (
    Array,
    Channel,
    Recording,
    check_rate,
    register,
    without_first,
)

# Bytes a sample takes in a signal file, https://physionet.org/physiotools/wag/signal-5.htm
_BYTES = {
    "8": Fraction(1),
    "16": Fraction(2),
    "24": Fraction(3),
    "32": Fraction(4),
    "61": Fraction(2),
    "80": Fraction(1),
    "160": Fraction(2),
    "212": Fraction(3, 2),
    "310": Fraction(4, 3),
    "311": Fraction(4, 3),
}
_FLAC = {"508", "516", "524"}
_HEADER_BYTES = 4 << 20  # read of a header: 100,000 segments
_NULL = "0"  # a signal that is declared and not stored

READ_VALUES = 1 << 20
"""Samples read at a time, 8 MB: wfdb parses the header at every read, which takes 15 ms, as long as
reading and preparing ten windows of a channel."""


def _lines(header: Path) -> list[str]:
    """A header's lines but for comments; none where it cannot be read."""
    try:
        if not header.is_file():  # opening a pipe waits for ever
            return []
        with header.open("rb") as file:
            lines = file.read(_HEADER_BYTES).decode("ascii", "ignore").splitlines()
    except OSError:
        return []
    return [line for line in lines if line.strip() and not line.startswith("#")]


def _segments_of(header: Path) -> Iterable[Path]:
    """The headers that a multi-segment header puts together: not recordings of their own."""
    lines = _lines(header)
    if not lines or not re.match(r"\s*\S+/\d+\s", lines[0]):
        return []
    names = [line.split()[0] for line in lines[1:]]
    return [header.with_name(f"{name}.hea") for name in names if _is_name(name)]


def files_of(header: Path) -> list[Path]:
    """The files of a record, there or not: its headers, the segments' included, and the signal files
    that they name."""
    segments = list(dict.fromkeys(_segments_of(header)))
    files = {header, *segments}
    for one in segments or [header]:
        names = {line.split()[0] for line in _lines(one)[1:]}
        files |= {one.with_name(name) for name in names if _is_name(name)}
    return sorted(files)


def _is_name(name: str) -> bool:
    """A file beside the header: no gap ("~"), no folder's, none that no file can have."""
    return name not in ("~", ".", "..") and "/" not in name and "\0" not in name


@dataclass(frozen=True)
class _Signal:
    """One signal line of a header."""

    name: str
    unit: str
    file: str
    storage: str  # WFDB storage format, such as "212"
    samples_per_frame: int
    skew: int  # frames
    first: float  # physical value of the header's initial value


@dataclass(frozen=True)
class _Segment:
    """A stretch of frames that lies in one single-segment record, or in none (path is None)."""

    start: int
    frames: int
    path: Path | None
    signals: tuple[_Signal, ...] = ()
    header: Path | None = None  # what wfdb reads; another than path where that has no length


@register(".hea", companions=_segments_of)
class WfdbRecording(Recording):
    """A WFDB record, of one segment or several."""

    format = "WFDB"

    def __init__(self, path: Path, *, sampling_rate: float | None = None) -> None:
        self.path = path
        self._folders = contextlib.ExitStack()
        weakref.finalize(self, self._folders.close)
        header = _read_header(path)
        self._rate = float(header.fs)
        if not self._rate > 0:
            raise RecordingError(f"{path}: sampling rate {header.fs}: must be above 0 Hz")
        self.start_time = header.base_datetime
        if getattr(header, "n_seg", None) is None:
            self._segments: tuple[_Segment, ...] = (self._single(path, header, start=0),)
        else:
            self._segments = self._several(header)
        self._frames = sum(segment.frames for segment in self._segments)
        layout = self._layout()
        # for every segment: where each of the record's channels is among the segment's signals
        self._places = [self._match(layout, segment) for segment in self._segments]
        self.channels = tuple(
            Channel(
                signal.name,
                signal.unit,
                self._rate * signal.samples_per_frame,
                self._frames * signal.samples_per_frame,
            )
            for signal in layout
        )
        self._per_frame = [signal.samples_per_frame for signal in layout]
        check_rate(path, sampling_rate, (channel.sampling_rate for channel in self.channels))

    def _single(self, path: Path, header: Any, *, start: int) -> _Segment:
        """A single-segment record, its signal files checked against what the header declares."""
        if header.fs is None or float(header.fs) != self._rate:
            raise RecordingError(f"{path}: is at {header.fs} Hz in a record of {self._rate:g} Hz")
        signals = _signals(path, header)
        stored = [signal for signal in signals if signal.storage != _NULL]
        declared: int | None = header.sig_len or None
        frames = [
            _check_file(path, name, [s for s in stored if s.file == name], header, declared)
            for name in dict.fromkeys(s.file for s in stored)
        ]
        if declared is None and frames:
            return _Segment(start, min(frames), path, signals, self._complete(path, min(frames)))
        return _Segment(start, declared or 0, path, signals, path)

    def _complete(self, path: Path, frames: int) -> Path:
        """A copy of a header that has no length, with its length. wfdb reads the former only whole."""
        folder = Path(tempfile.mkdtemp(prefix="normwear-fast-"))
        self._folders.callback(shutil.rmtree, folder, ignore_errors=True)
        lines = path.read_text(encoding="ascii", errors="ignore").splitlines()
        lines = [line for line in lines if line.strip() and not line.startswith("#")]
        fields = lines[0].split()
        fields[2:4] = [fields[2] if len(fields) > 2 else f"{self._rate:g}", str(frames)]
        header = folder / path.name
        header.write_text("\n".join([" ".join(fields), *lines[1:], ""]), encoding="ascii")
        for name in {line.split()[0] for line in lines[1:]}:
            if (path.parent / name).is_file():
                (folder / name).symlink_to((path.parent / name).absolute())
        return header

    def close(self) -> None:
        self._folders.close()

    def _several(self, header: Any) -> tuple[_Segment, ...]:
        segments: list[_Segment] = []
        start = 0
        self._declared: tuple[_Signal, ...] | None = None
        for place, (name, length) in enumerate(zip(header.seg_name, header.seg_len, strict=True)):
            if length is None:
                raise RecordingError(f"{self.path}: segment {name} has no length")
            path = self.path.with_name(f"{name}.hea")
            if place == 0 and length == 0:
                # variable layout: the first segment only lists the signals
                self._declared = _signals(path, _read_header(path))
                continue
            if name == "~":
                segments.append(_Segment(start, length, None))
            else:
                segment = self._single(path, _read_header(path), start=start)
                if segment.frames != length:
                    raise RecordingError(
                        f"{self.path}: declares {length} frames for segment {name}, "
                        f"whose header has {segment.frames}"
                    )
                segments.append(segment)
            start += length
        if header.n_seg != len(header.seg_name):
            raise RecordingError(
                f"{self.path}: declares {header.n_seg} segments and lists {len(header.seg_name)}"
            )
        if header.sig_len is not None and header.sig_len != start:
            raise RecordingError(
                f"{self.path}: declares {header.sig_len} frames; its segments have {start}"
            )
        return tuple(segments)

    def _layout(self) -> tuple[_Signal, ...]:
        """The record's channels; unit and name from the first segment that has the channel."""
        stored = [segment for segment in self._segments if segment.path is not None]
        declared = getattr(self, "_declared", None)
        if declared is None:
            return stored[0].signals if stored else ()
        known: dict[tuple[str, int], _Signal] = {}
        for segment in stored:
            for key, signal in zip(_numbered(segment.signals), segment.signals, strict=True):
                known.setdefault(key, signal)
        return tuple(
            known.get(key, signal)
            for key, signal in zip(_numbered(declared), declared, strict=True)
        )

    def _match(self, layout: tuple[_Signal, ...], segment: _Segment) -> list[int | None]:
        if segment.path is None:
            return [None] * len(layout)
        if getattr(self, "_declared", None) is None:
            if len(segment.signals) != len(layout):
                raise RecordingError(
                    f"{segment.path}: has {len(segment.signals)} signals in a record of {len(layout)}"
                )
            places: list[int | None] = list(range(len(layout)))
        else:
            places = self._match_names(layout, segment)
        for signal, place in zip(layout, places, strict=True):
            if place is None:
                continue
            other = segment.signals[place]
            if (other.samples_per_frame, other.unit) != (signal.samples_per_frame, signal.unit):
                raise RecordingError(
                    f"{segment.path}: channel {signal.name} has {other.samples_per_frame} samples "
                    f"a frame in {other.unit}, elsewhere {signal.samples_per_frame} in {signal.unit}"
                )
        return places

    def _match_names(self, layout: tuple[_Signal, ...], segment: _Segment) -> list[int | None]:
        """Where a segment of a record of variable layout has its signals: by name, those of one name
        in their order."""
        there = Counter(signal.name for signal in segment.signals)
        declared = Counter(signal.name for signal in layout)
        for name, count in there.items():
            # two for one, or one for two: nothing says which is which
            if declared[name] not in (0, count):
                raise RecordingError(
                    f"{segment.path}: has {count} signals named {name!r}, the record's layout "
                    f"{declared[name]}: as many, or other names, are right"
                )
        unknown = [name for name in there if not declared[name]]
        note = f"signal {', '.join(unknown)} is not in the layout and left out"
        if unknown and note not in self.notes:  # once, not for each of a thousand segments
            self.notes += (note,)
        places = {key: place for place, key in enumerate(_numbered(segment.signals))}
        return [places.get(key) for key in _numbered(layout)]

    def _blocks(self, channels: list[int], seconds: float) -> Iterator[list[Array]]:
        return self._blocks_from(channels, seconds, 0)

    def _blocks_after(
        self, channels: list[int], seconds: float, skip: list[int]
    ) -> Iterator[list[Array]]:
        sums = any(s.storage == "8" for segment in self._segments for s in segment.signals)
        per_frame = [self._per_frame[c] for c in channels]
        first = min(count // each for count, each in zip(skip, per_frame, strict=True))
        first = 0 if sums else first  # differences add up from the very beginning
        rest = [count - first * each for count, each in zip(skip, per_frame, strict=True)]
        return without_first(self._blocks_from(channels, seconds, first), rest)

    def _blocks_from(
        self, channels: list[int], seconds: float, first: int
    ) -> Iterator[list[Array]]:
        step = max(1, round(seconds * self._rate))
        per_frame = [self._per_frame[c] for c in channels]
        at_once = step * max(1, READ_VALUES // (step * sum(per_frame)))
        carry: dict[tuple[int, int], float] = {}
        for start in range(first, self._frames, at_once):
            stop = min(start + at_once, self._frames)
            block = [np.full((stop - start) * self._per_frame[c], np.nan) for c in channels]
            for number, segment in enumerate(self._segments):
                low = max(start, segment.start)
                high = min(stop, segment.start + segment.frames)
                wanted = {
                    row: place
                    for row, c in enumerate(channels)
                    if (place := self._places[number][c]) is not None
                }
                if low >= high or not wanted:
                    continue
                data = _read_frames(segment, set(wanted.values()), low, high)
                for row, place in wanted.items():
                    part = data[place]
                    signal = segment.signals[place]
                    if signal.storage == "8":
                        # Format 8 stores differences; wfdb starts every read at the header's
                        # initial value. The previous block's last sample says where it stood.
                        if (number, row) in carry:
                            part = part + (carry[number, row] - signal.first)
                        carry[number, row] = float(part[-1])
                    at = (low - start) * per_frame[row]
                    block[row][at : at + part.size] = part
            for low in range(0, stop - start, step):
                yield [
                    row[low * each : (low + step) * each]
                    for row, each in zip(block, per_frame, strict=True)
                ]


def _numbered(signals: Iterable[_Signal]) -> list[tuple[str, int]]:
    """Each signal's name, and how many of that name stand before it."""
    seen: Counter[str] = Counter()
    keys = []
    for signal in signals:
        keys.append((signal.name, seen[signal.name]))
        seen[signal.name] += 1
    return keys


def _read_header(path: Path) -> Any:
    import wfdb

    if not path.is_file():
        raise RecordingError(f"{path}: no such file")
    try:
        header = wfdb.rdheader(str(path.with_suffix("").absolute()))
    except Exception as error:  # the parser fails in many ways on text that is no header
        raise RecordingError(f"{path}: is no WFDB header: {one_line(error)}") from error
    if header.fs is None or header.n_sig is None:
        raise RecordingError(f"{path}: is no WFDB header: no sampling rate or number of signals")
    return header


def _signals(path: Path, header: Any) -> tuple[_Signal, ...]:
    files = header.file_name or []
    if header.n_sig != len(files):
        raise RecordingError(f"{path}: declares {header.n_sig} signals and lists {len(files)}")
    signals = []
    for i, file in enumerate(files):
        storage = header.fmt[i]
        if storage not in _BYTES and storage not in _FLAC and storage != _NULL:
            raise RecordingError(f"{path}: signal {i} has storage format {storage}: WFDB has none")
        skew = header.skew[i] or 0
        if storage == "8" and skew:
            raise RecordingError(f"{path}: signal {i} has skew in storage format 8: not readable")
        gain = header.adc_gain[i] or 200.0
        signals.append(
            _Signal(
                name=header.sig_name[i] or f"channel_{i + 1}",
                unit=header.units[i] or "",
                file=file,
                storage=storage,
                samples_per_frame=header.samps_per_frame[i] or 1,
                skew=skew,
                first=((header.init_value[i] or 0) - (header.baseline[i] or 0)) / gain,
            )
        )
    for name in dict.fromkeys(signal.file for signal in signals):
        storages = list(dict.fromkeys(s.storage for s in signals if s.file == name))
        if len(storages) > 1 and name != "~":
            raise RecordingError(
                f"{path}: signals of {name} have storage formats {' and '.join(storages)}; "
                f"one for all is right"
            )
    # wfdb takes a file's signals to be neighbours in the header
    order = [signal.file for signal in signals if signal.storage != _NULL]
    if [name for i, name in enumerate(order) if i == 0 or order[i - 1] != name] != list(
        dict.fromkeys(order)
    ):
        raise RecordingError(f"{path}: signals of one file are not listed together")
    return tuple(signals)


def _check_file(
    path: Path, name: str, signals: list[_Signal], header: Any, declared: int | None
) -> int:
    """Compare a signal file's size with the declared frames, before anything is read.

    Returns:
        The frames it holds.
    """
    file = path.with_name(name)
    if not file.is_file():
        raise RecordingError(f"{path}: its signal file {file} does not exist")
    storage = signals[0].storage
    per_frame = sum(signal.samples_per_frame for signal in signals)
    first = header.file_name.index(name)
    offset = header.byte_offset[first] or 0
    if storage in _FLAC:
        import soundfile  # type: ignore[import-untyped]

        try:
            info = soundfile.info(str(file))
        except Exception as error:
            raise RecordingError(f"{file}: is no FLAC file: {one_line(error)}") from error
        frames = max(0, info.frames - offset) // signals[0].samples_per_frame
        if declared is not None and frames < declared:
            raise RecordingError(
                f"{file}: holds {frames} frames; its header declares {declared}: truncated"
            )
        return frames
    size = file.stat().st_size
    if declared is not None:
        needed = offset + math.ceil(declared * per_frame * _BYTES[storage])
        if size < needed:
            raise RecordingError(
                f"{file}: has {size} bytes; its header declares {declared} frames, "
                f"{needed} bytes: truncated"
            )
    return int(max(0, size - offset) / (per_frame * _BYTES[storage]))


def _read_frames(segment: _Segment, places: set[int], low: int, high: int) -> dict[int, Array]:
    """Frames low..high-1 (counted in the record) of some of a segment's signals."""
    import wfdb

    assert segment.header is not None
    low, high = low - segment.start, high - segment.start
    result: dict[int, Array] = {}
    stored = [place for place in places if segment.signals[place].storage != _NULL]
    for place in places:
        result[place] = np.full((high - low) * segment.signals[place].samples_per_frame, np.nan)
    for skew in {segment.signals[place].skew for place in stored}:
        group = sorted(place for place in stored if segment.signals[place].skew == skew)
        begin, end = low + skew, min(high + skew, segment.frames)
        if begin >= end:
            continue
        try:
            record = wfdb.rdrecord(
                str(segment.header.with_suffix("").absolute()),
                sampfrom=begin,
                sampto=end,
                channels=group,
                smooth_frames=False,
                ignore_skew=True,
            )
        except Exception as error:
            raise RecordingError(
                f"{segment.path}: frames {begin} to {end} cannot be read: {one_line(error)}"
            ) from error
        for place, data in zip(group, record.e_p_signal, strict=True):
            result[place][: data.size] = data
    return result
