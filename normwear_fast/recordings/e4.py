"""Empatica E4 sessions: a folder, or the zip that the service gives, with a CSV a sensor.

The first row of a file is the UTC time of its first sample, the second its rate; each column of ACC
is an axis in 1/64 g. https://support.empatica.com (E4 data export formats).
"""

from __future__ import annotations

import io
import posixpath
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

import numpy as np

from normwear_fast.errors import RecordingError, one_line
from normwear_fast.recordings.archive import reading
from normwear_fast.recordings.base import (
    Array,
    Channel,
    Recording,
    check_rate,
    rechunk,
    refusing,
    register_folder,
)
from normwear_fast.recordings.parts import PartedRecording
from normwear_fast.recordings.wallclock import wall_clock

# file -> channels, unit, factor to that unit
SENSORS: dict[str, tuple[tuple[str, ...], str, float]] = {
    "BVP.csv": (("BVP",), "", 1.0),
    "EDA.csv": (("EDA",), "uS", 1.0),
    "ACC.csv": (("ACC_x", "ACC_y", "ACC_z"), "g", 1 / 64),
    "TEMP.csv": (("TEMP",), "degC", 1.0),
    "HR.csv": (("HR",), "bpm", 1.0),
}
_APART = 60.0  # seconds: HR begins 10 s after the others
_BLOCK = 1 << 20  # bytes parsed at a time
_HEAD = 1024  # bytes in which the first two rows end
_RATES = (1e-3, 1e4)  # Hz


def read_head(file: IO[bytes], columns: int) -> tuple[float, float] | None:
    """Start (seconds since 1970) and rate of a sensor's file, or None where it has no such rows."""
    try:
        rows = [file.readline(_HEAD).decode("ascii").strip().split(",") for _ in range(2)]
        times, rates = ([float(cell) for cell in row] for row in rows)
    except ValueError:
        return None
    if not (len(times) == len(rates) == columns and len({*times}) == len({*rates}) == 1):
        return None
    if not (wall_clock(times[0]) and _RATES[0] <= rates[0] <= _RATES[1]):
        return None
    return times[0], rates[0]


def _has_head(file: Path) -> bool:
    try:
        with file.open("rb") as opened:
            return read_head(opened, len(SENSORS[file.name][0])) is not None
    except OSError:
        return False


def is_e4_folder(path: Path) -> bool:
    """A folder with sensors' files that begin like an E4's, or with three or more of them, damaged."""
    there = [path / name for name in SENSORS if (path / name).is_file()]
    return len(there) >= 3 or any(_has_head(file) for file in there)


def is_e4_file(path: Path) -> bool:
    """One sensor's file of a session."""
    return path.name in SENSORS and _has_head(path)


def e4_prefix(members: dict[str, zipfile.ZipInfo]) -> list[str]:
    """The folders in a zip that hold sensors' files; "" is its top."""
    return sorted(
        {
            posixpath.dirname(name)
            for name in members
            if posixpath.basename(name) in SENSORS and not name.startswith("__MACOSX/")
        }
    )


@register_folder(is_e4_folder)
class E4Recording(PartedRecording):
    """An E4 session; a zip's is read where it lies."""

    format = "Empatica E4"

    def __init__(
        self,
        path: Path,
        *,
        sampling_rate: float | None = None,
        members: dict[str, zipfile.ZipInfo] | None = None,
        prefix: str = "",
    ) -> None:
        self.path = path
        parts: list[_Sensor] = []
        for name in SENSORS:
            if members is None:
                there = (path / name).is_file()
                member = None
            else:
                member = members.get(posixpath.join(prefix, name))
                there = member is not None
            if not there:
                self.notes += (f"{name} is not there",)
                continue
            sensor = _Sensor(path, name, member)
            if sensor.channels:
                parts.append(sensor)
            else:
                self.notes += (f"{name} holds no samples and is left out",)
        if not parts:
            raise RecordingError(
                f"{path}: none of its sensors' files holds samples: {', '.join(self.notes)}"
            )
        if (path / "IBI.csv").is_file() or posixpath.join(prefix, "IBI.csv") in (members or {}):
            self.notes += ("IBI.csv holds intervals between beats, no signal, and is left out",)
        first = min(parts, key=lambda part: part.start)
        last = max(parts, key=lambda part: part.start)
        if last.start - first.start > _APART:
            raise RecordingError(
                f"{path}: {last.name} begins {last.start - first.start:g} s after {first.name}; "
                f"the files of one session begin within {_APART:g} s"
            )
        self.start_time = datetime.fromtimestamp(first.start, UTC)
        self._combine(parts, [part.start - first.start for part in parts])
        ends = {part.name: part.start + part.duration for part in parts}
        for name, end in ends.items():
            early = max(ends.values()) - end
            if early > _APART:
                self.notes += (f"{name} ends {early:g} s before the session does",)
        check_rate(path, sampling_rate, (channel.sampling_rate for channel in self.channels))


def _is_bare(file: IO[bytes]) -> bool:
    """Whether a sensor's file ends within its two header rows, of which some may be missing: what is
    left where a sensor was off, or where the session ended before it gave anything."""
    rows = [file.readline(_HEAD) for _ in range(2)]
    if file.read(_HEAD).strip():
        return False
    try:
        cells = [cell for row in rows for cell in row.decode("ascii").split(",")]
        return all(np.isfinite(float(cell)) for cell in cells if cell.strip())
    except ValueError:
        return False


class _Sensor(Recording):
    """One sensor's file. Opening reads it once: its rows are counted and every cell is checked. One
    without samples has no channels."""

    def __init__(self, path: Path, name: str, member: zipfile.ZipInfo | None) -> None:
        self.path, self.name, self._member = path, name, member
        channels, unit, self._factor = SENSORS[name]
        with self._open() as file:
            head = read_head(file, len(channels))
        if head is None:
            with self._open() as file:
                if _is_bare(file):
                    return
            raise RecordingError(
                f"{path}: {name} begins with no time (seconds since 1970, UTC) and rate (Hz) in "
                f"{len(channels)} columns"
            )
        self.start, rate = head
        self._names = channels
        samples = sum(piece[0].size for piece in self._pieces())
        if not samples:
            return
        self.channels = tuple(Channel(channel, unit, rate, samples) for channel in channels)

    @contextmanager
    def _open(self) -> Iterator[IO[bytes]]:
        if self._member is None:
            with (self.path / self.name).open("rb") as file:
                yield file
        else:
            with (
                reading(self.path),
                zipfile.ZipFile(self.path) as archive,
                archive.open(self._member) as member,
            ):
                yield io.BufferedReader(_Raw(member))

    def _pieces(self) -> Iterator[list[Array]]:
        """All rows, as columns in the channels' unit."""
        import pyarrow as pa
        from pyarrow import csv

        types: dict[str, Any] = dict.fromkeys(self._names, pa.float64())
        with self._open() as file:
            for _ in range(2):
                file.readline(_HEAD)
            try:
                rows = csv.open_csv(
                    file,
                    read_options=csv.ReadOptions(
                        column_names=list(self._names), block_size=_BLOCK, use_threads=False
                    ),
                    convert_options=csv.ConvertOptions(column_types=types),
                )
                for batch in rows:
                    columns = [
                        np.array(column.to_numpy(zero_copy_only=False), dtype=np.float64)
                        for column in batch.columns
                    ]
                    for column in columns:
                        column *= self._factor
                        column[~np.isfinite(column)] = np.nan
                    yield columns
            except pa.ArrowInvalid as error:
                if "Empty CSV" in str(error):
                    return
                raise RecordingError(f"{self.path}: {self.name}: {one_line(error)}") from error

    def _blocks(self, channels: list[int], seconds: float) -> Iterator[list[Array]]:
        size = max(1, round(seconds * self.channels[0].sampling_rate))
        with refusing(self.path, f"{self.name} is damaged"):
            yield from rechunk(([piece[c] for c in channels] for piece in self._pieces()), size)


class _Raw(io.RawIOBase):
    """A zip's member as a raw file, so that it can be buffered and handed to pyarrow."""

    def __init__(self, member: IO[bytes]) -> None:
        self._member = member

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._member.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)
