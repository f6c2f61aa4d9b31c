"""EDF, EDF+ and BDF, through edfio.

A block is read as bytes and given to edfio behind the file's own header, so that any length streams:
edfio itself reads a BDF file whole. A discontinuous file (EDF+D) becomes one time axis with NaN in
its gaps.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from normwear_fast.errors import RecordingError, one_line
from normwear_fast.recordings.base import Array, Channel, Recording, check_rate, register

_FIXED = 256  # bytes of the header before the signals', and of each signal's part
_RECORDS = slice(236, 244)  # where the number of data records is written


@dataclass(frozen=True)
class _Run:
    """Data records that follow each other without a gap."""

    first: int
    records: int
    start: float  # seconds


@register(".edf", ".bdf")
class EdfRecording(Recording):
    """An EDF, EDF+ or BDF file. Annotation signals are not channels."""

    def __init__(self, path: Path, *, sampling_rate: float | None = None) -> None:
        self.path = path
        size = path.stat().st_size
        with path.open("rb") as file:
            fixed = file.read(_FIXED)
            if len(fixed) < _FIXED:
                raise RecordingError(f"{path}: has {size} bytes; an EDF header has {_FIXED}")
            self._bdf = fixed[:8] == b"\xffBIOSEMI"
            if not self._bdf and fixed[:8].strip() != b"0":
                raise RecordingError(f"{path}: is no EDF or BDF file: it does not begin like one")
            signals = self._integer(fixed[252:256], "number of signals", least=0)
            header_bytes = self._integer(fixed[184:192], "header size", least=_FIXED)
            if header_bytes != _FIXED * (signals + 1) or size < header_bytes:
                raise RecordingError(
                    f"{path}: header declares {header_bytes} bytes of header for {signals} signals "
                    f"({_FIXED * (signals + 1)} are right); the file has {size}"
                )
            self._header = fixed + file.read(header_bytes - _FIXED)
        kind = fixed[192:236].decode("latin-1").strip()
        self.format = kind[:5] if kind[:4] in ("EDF+", "BDF+") else "BDF" if self._bdf else "EDF"

        labels = self._fields(signals, 0, 16)
        self._annotations = [label in ("EDF Annotations", "BDF Annotations") for label in labels]
        self._lengths = [
            self._integer(text.encode("latin-1"), f"samples a record of signal {i}", least=1)
            for i, text in enumerate(self._fields(signals, 216, 8))
        ]
        self._record_bytes = sum(self._lengths) * (3 if self._bdf else 2)
        self._record_seconds = self._number(fixed[244:252], "duration of a data record")
        self._check_size(size)
        if all(self._annotations):
            self.notes = ("holds annotations and no signal",)
            return
        if not self._record_seconds > 0:
            raise RecordingError(
                f"{path}: a data record lasts {self._record_seconds} s: must be above 0"
            )
        self._runs = self._continuous_runs()
        self.start_time = self._start_time()
        self._read_channels()
        check_rate(path, sampling_rate, (channel.sampling_rate for channel in self.channels))

    def _fields(self, signals: int, offset: int, width: int) -> list[str]:
        """One field of all signals; `offset` is its place within a signal's 256 bytes."""
        start = _FIXED + signals * offset
        raw = self._header[start : start + signals * width].decode("latin-1")
        return [raw[i : i + width].strip() for i in range(0, len(raw), width)]

    def _integer(self, raw: bytes, what: str, least: int) -> int:
        try:
            value = int(raw.decode("ascii").strip(" \0"))
        except ValueError:
            value = least - 1
        if value < least:
            text = raw.decode("latin-1").strip()
            raise RecordingError(f"{self.path}: header has {text!r} as {what}: an integer is right")
        return value

    def _number(self, raw: bytes, what: str) -> float:
        try:
            value = float(raw.decode("ascii").strip(" \0"))
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            text = raw.decode("latin-1").strip()
            raise RecordingError(f"{self.path}: header has {text!r} as {what}: a number is right")
        return value

    def _check_size(self, size: int) -> None:
        """The declared number of data records against the bytes there are."""
        declared = self._integer(self._header[_RECORDS], "number of data records", least=-1)
        data = size - len(self._header)
        present = data // self._record_bytes if self._record_bytes else 0
        if declared == -1:  # "unknown", as written while recording
            self.notes = (
                f"the header leaves the number of data records open; {present} are there",
            )
            declared = present
        expected = len(self._header) + declared * self._record_bytes
        if declared != present or (not self._record_bytes and declared and data):
            raise RecordingError(
                f"{self.path}: header declares {declared} data records, {expected} bytes; "
                f"the file has {size}"
            )
        if data % max(1, self._record_bytes):
            self.notes += (f"{size - expected} bytes after the last data record are left out",)
        self._records = declared

    def _read_records(self, first: int, records: int) -> Any:
        """edfio's view of some data records."""
        import edfio

        with self.path.open("rb") as file:
            file.seek(len(self._header) + first * self._record_bytes)
            raw = file.read(records * self._record_bytes)
        if len(raw) < records * self._record_bytes:
            raise RecordingError(f"{self.path}: ends within data record {first + records - 1}")
        header = bytearray(self._header)
        header[_RECORDS] = f"{records:<8d}".encode()
        read = edfio.read_bdf if self._bdf else edfio.read_edf
        try:
            # Physical units such as "µV" are Latin-1 in the wild, though the format says ASCII.
            return read(bytes(header) + raw, header_encoding="latin-1")
        except Exception as error:  # whatever edfio meets in a damaged header
            raise RecordingError(f"{self.path}: edfio cannot read it: {one_line(error)}") from error

    def _continuous_runs(self) -> list[_Run]:
        if self.format[4:5] != "D":
            return [_Run(0, self._records, 0.0)]
        onsets = self._onsets()
        runs: list[_Run] = []
        first = 0
        tolerance = 0.5 * min(
            self._record_seconds / n
            for n, annotation in zip(self._lengths, self._annotations, strict=True)
            if not annotation
        )
        for i in range(1, self._records + 1):
            end = onsets[first] + (i - first) * self._record_seconds
            if i < self._records and onsets[i] < end - tolerance:
                raise RecordingError(
                    f"{self.path}: data record {i} begins at {onsets[i]} s, "
                    f"before the one before it ends at {end} s"
                )
            if i == self._records or onsets[i] > end + tolerance:
                runs.append(_Run(first, i - first, float(onsets[first] - onsets[0])))
                first = i
        gaps = len(runs) - 1
        if gaps:
            missing = onsets[-1] - onsets[0] - (self._records - 1) * self._record_seconds
            self.notes += (
                f"discontinuous: {gaps} gaps, {missing:g} s in all, are missing samples",
            )
        return runs

    def _onsets(self) -> Array:
        """Seconds at which each data record begins: the first annotation in it, as EDF+ requires."""
        if not any(self._annotations):
            raise RecordingError(
                f"{self.path}: is discontinuous and has no annotations to place it"
            )
        sample = 3 if self._bdf else 2
        place = self._annotations.index(True)
        skip = sum(self._lengths[:place]) * sample
        onsets = np.empty(self._records)
        with self.path.open("rb") as file:
            for i in range(self._records):
                file.seek(len(self._header) + i * self._record_bytes + skip)
                raw = file.read(self._lengths[place] * sample)
                onsets[i] = self._number(raw.split(b"\x14", 1)[0], f"onset of data record {i}")
        return onsets

    def _start_time(self) -> datetime | None:
        if not self._records:
            return None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                return self._read_records(0, 1).startdatetime
            except Exception:  # anonymised or malformed dates: a recording without a date is fine
                return None

    def _read_channels(self) -> None:
        end = self._runs[-1].start + self._runs[-1].records * self._record_seconds
        signals = self._read_records(0, 0).signals
        lengths = [n for n, a in zip(self._lengths, self._annotations, strict=True) if not a]
        channels = []
        for signal, length in zip(signals, lengths, strict=True):
            rate = length / self._record_seconds
            try:
                flat = (
                    signal.digital_min == signal.digital_max
                    or signal.physical_min == signal.physical_max
                )
            except ValueError as error:
                raise RecordingError(
                    f"{self.path}: channel {signal.label} has no calibration: {one_line(error)}"
                ) from error
            unit = signal.physical_dimension
            if flat:
                unit = ""
                self.notes += (f"channel {signal.label} has no calibration: values as stored",)
            channels.append(Channel(signal.label, unit, rate, _nearest(end * rate)))
        self.channels = tuple(channels)

    def _blocks(self, channels: list[int], seconds: float) -> Iterator[list[Array]]:
        return self._blocks_after(channels, seconds, [0] * len(channels))

    def _blocks_after(
        self, channels: list[int], seconds: float, skip: list[int]
    ) -> Iterator[list[Array]]:
        rates = [self.channels[c].sampling_rate for c in channels]
        lengths = [round(rate * self._record_seconds) for rate in rates]  # samples a record
        step = max(1, round(seconds / self._record_seconds))
        done = [0] * len(channels)

        def wanted(block: list[Array]) -> list[Array]:
            return [
                data[max(0, count - have) :]
                for data, count, have in zip(block, skip, done, strict=True)
            ]

        for run in self._runs:
            starts = [_nearest(run.start * rate) for rate in rates]
            while any(have < start for have, start in zip(done, starts, strict=True)):
                fill = [
                    min(start - have, max(1, round(seconds * rate)))
                    for have, start, rate in zip(done, starts, rates, strict=True)
                ]
                yield wanted([np.full(n, np.nan) for n in fill])
                done = [have + n for have, n in zip(done, fill, strict=True)]
            missed = min(
                max(0, count - have) // n
                for count, have, n in zip(skip, done, lengths, strict=True)
            )
            missed = min(missed, run.records)  # whole records before the first sample wanted
            done = [have + missed * n for have, n in zip(done, lengths, strict=True)]
            for first in range(run.first + missed, run.first + run.records, step):
                records = min(step, run.first + run.records - first)
                signals = self._read_records(first, records).signals
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # uncalibrated channels: noted at opening
                    block = [np.array(signals[c].data, dtype=np.float64) for c in channels]
                yield wanted(block)
                done = [have + data.size for have, data in zip(done, block, strict=True)]


def _nearest(value: float) -> int:
    """Halves up, always: gaps and lengths then add up to the sample."""
    return math.floor(value + 0.5)
