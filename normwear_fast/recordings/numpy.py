"""NPY and NPZ arrays. Objects are never unpickled; NPY is mapped, NPZ members are streamed."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from normwear_fast.errors import RecordingError, one_line
from normwear_fast.recordings.base import (
    Array,
    Channel,
    Recording,
    check_rate,
    rechunk,
    register,
)
from normwear_fast.recordings.clock import choose_clock, time_column

_SMALL = 1 << 20  # bytes an array beside the data (rates, names) may have
_PIECE = 65536  # samples read at a time from a member


@dataclass(frozen=True)
class _Header:
    """The header of one .npy array."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    fortran: bool
    offset: int  # bytes before the data

    @property
    def size(self) -> int:
        """Bytes of data that the header declares."""
        size = self.dtype.itemsize
        for n in self.shape:
            size *= n  # Python integers: a lying shape must not wrap around
        return size


def _read_header(file: IO[bytes], where: str) -> _Header:
    try:
        version = np.lib.format.read_magic(file)
        if version == (1, 0):
            shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
        else:
            shape, fortran, dtype = np.lib.format.read_array_header_2_0(file)
    except Exception as error:  # NumPy parses the header as Python, which fails in many ways
        raise RecordingError(f"{where}: is no NumPy array: {one_line(error)}") from error
    return _Header(shape, dtype, fortran, file.tell())


def _check(header: _Header, actual: int, where: str) -> None:
    if header.dtype.hasobject:
        raise RecordingError(
            f"{where}: holds Python objects, which are never read; numbers are right"
        )
    if header.size != actual:
        raise RecordingError(
            f"{where}: declares {header.dtype} {header.shape}, {header.size} bytes; has {actual}"
        )


def _check_signal(header: _Header, where: str) -> None:
    if header.dtype.kind not in "iufb":
        raise RecordingError(f"{where}: holds {header.dtype}; real numbers are right")
    shape = header.shape
    if len(shape) not in (1, 2) or 0 in shape or (len(shape) == 2 and shape[0] > shape[1]):
        raise RecordingError(f"{where}: has shape {shape}; (channels, samples) is right")


def _finite(data: NDArray[Any]) -> Array:
    values: Array = np.array(data, dtype=np.float64)
    values[~np.isfinite(values)] = np.nan
    return values


@register(".npy")
class NpyRecording(Recording):
    """One array (C, L), or (L,); --rate is its clock."""

    format = "NPY"

    def __init__(self, path: Path, *, sampling_rate: float | None = None) -> None:
        self.path = path
        with path.open("rb") as file:
            header = _read_header(file, str(path))
        _check(header, path.stat().st_size - header.offset, str(path))
        _check_signal(header, str(path))
        if sampling_rate is None:
            raise RecordingError(f"{path}: an NPY file has no sampling rate; pass --rate HZ")
        channels, samples = (1, *header.shape)[-2:]
        self.channels = tuple(
            Channel(f"channel_{i + 1}", "", sampling_rate, samples) for i in range(channels)
        )

    def _blocks(self, channels: list[int], seconds: float) -> Iterator[list[Array]]:
        return self._blocks_after(channels, seconds, [0] * len(channels))

    def _blocks_after(
        self, channels: list[int], seconds: float, skip: list[int]
    ) -> Iterator[list[Array]]:
        data = np.load(self.path, mmap_mode="r", allow_pickle=False)
        data = data.reshape(-1, data.shape[-1])
        step = max(1, round(seconds * self.channels[0].sampling_rate))
        for start in range(skip[0], data.shape[1], step):  # one rate: skipped alike
            yield [_finite(data[c, start : start + step]) for c in channels]


@register(".npz")
class NpzRecording(Recording):
    """`data` (C, L) with `sampling_rate` and optionally `channels` and `units`; or one array (L_i,) a
    channel with `sampling_rate`, a number or one a channel in the file's order."""

    format = "NPZ"

    def __init__(self, path: Path, *, sampling_rate: float | None = None) -> None:
        self.path = path
        try:
            with zipfile.ZipFile(path) as file:
                members = {i.filename.removesuffix(".npy"): i for i in file.infolist()}
                headers = {name: self._header(file, info) for name, info in members.items()}
                small: dict[str, NDArray[Any]] = {
                    name: self._small(file, members[name], headers[name])
                    for name in ("sampling_rate", "channels", "units")
                    if name in members
                }
        except (zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError) as error:
            raise RecordingError(f"{path}: is no NPZ file: {one_line(error)}") from error
        self._members = {name: info.filename for name, info in members.items()}
        self._headers = headers

        if "data" in headers:
            _check_signal(headers["data"], f"{path}: data")
            count, length = (1, *headers["data"].shape)[-2:]
            # channel -> member, row in it
            self._places = [("data", row) for row in range(count)]
            lengths = [length] * count
            names = [f"channel_{i + 1}" for i in range(count)]
        else:
            names = []
            for name, header in headers.items():
                if name in small or len(header.shape) != 1 or header.dtype.kind not in "iufb":
                    continue
                if self._is_clock(name):
                    self.notes += (f"array {name!r} is a clock and left out",)
                    continue
                _check_signal(header, f"{path}: {name}")
                names.append(name)
            if not names:
                raise RecordingError(
                    f"{path}: has neither data (channels, samples) nor one-dimensional arrays of "
                    f"numbers; it has {', '.join(headers) or 'nothing'}"
                )
            self._places = [(name, 0) for name in names]
            lengths = [headers[name].shape[0] for name in names]
        names = self._texts(small, "channels", names)
        units = self._texts(small, "units", [""] * len(names))
        rates = self._rates(small.get("sampling_rate"), sampling_rate, len(names))
        self.channels = tuple(map(Channel, names, units, rates, lengths))

    def _is_clock(self, name: str) -> bool:
        """By its name; by its first values too, if the name may mean a channel."""
        column = time_column(name)
        if column is None or column.sure:
            return column is not None
        first = next(self._stream(name, 0), np.empty(0))
        return choose_clock([column], [first], None)[0] is not None

    def _header(self, file: zipfile.ZipFile, info: zipfile.ZipInfo) -> _Header:
        where = f"{self.path}: {info.filename.removesuffix('.npy')}"
        with file.open(info) as member:
            header = _read_header(member, where)
        _check(header, info.file_size - header.offset, where)
        return header

    def _small(self, file: zipfile.ZipFile, info: zipfile.ZipInfo, header: _Header) -> NDArray[Any]:
        if header.size > _SMALL:
            raise RecordingError(f"{self.path}: {info.filename} has {header.size} bytes: too many")
        with file.open(info) as member:
            return np.lib.format.read_array(member, allow_pickle=False)

    def _texts(self, small: dict[str, NDArray[Any]], key: str, default: list[str]) -> list[str]:
        if key not in small:
            return default
        texts = [str(text) for text in small[key].ravel()]
        if len(texts) != len(default):
            raise RecordingError(
                f"{self.path}: {key} has {len(texts)} entries for {len(default)} channels"
            )
        return texts

    def _rates(self, own: NDArray[Any] | None, given: float | None, count: int) -> list[float]:
        if own is None:
            if given is None:
                raise RecordingError(f"{self.path}: has no array sampling_rate; pass --rate HZ")
            return [given] * count
        usable = own.dtype.kind in "iuf" and own.size in (1, count)
        if not (usable and np.isfinite(own).all() and (own > 0).all()):
            raise RecordingError(
                f"{self.path}: sampling_rate is {own.tolist()}; "
                f"a number of Hz above 0, or {count} of them, is right"
            )
        rates = [float(rate) for rate in np.broadcast_to(own.ravel(), count)]
        check_rate(self.path, given, rates)
        return rates

    def _blocks(self, channels: list[int], seconds: float) -> Iterator[list[Array]]:
        streams = []
        for c in channels:
            name, row = self._places[c]
            size = max(1, round(seconds * self.channels[c].sampling_rate))
            streams.append(rechunk(([piece] for piece in self._stream(name, row)), size))
        # channels of one length end together; of several, the shorter ones go on empty
        while True:
            block = [next(stream, None) for stream in streams]
            if all(part is None for part in block):
                return
            yield [np.empty(0) if part is None else part[0] for part in block]

    def _stream(self, name: str, row: int) -> Iterator[Array]:
        """One row of a member, in pieces. Each row has a handle of its own: a compressed member
        cannot be read at random, but it can be read through at several places at once."""
        header = self._headers[name]
        item = header.dtype.itemsize
        rows, length = (1, *header.shape)[-2:]
        # in Fortran order the rows' samples alternate
        stride = rows if header.fortran else 1
        skip = row * item if header.fortran else row * length * item
        try:
            with zipfile.ZipFile(self.path) as file, file.open(self._members[name]) as member:
                left = header.offset + skip
                while left > 0:  # a seek would hold 16 MB at a time
                    left -= len(member.read(min(left, _PIECE))) or left
                step = max(1, _PIECE // stride)
                for start in range(0, length, step):
                    count = min(step, length - start)
                    wanted = ((count - 1) * stride + 1) * item
                    raw = member.read(wanted)
                    if len(raw) < wanted:
                        raise RecordingError(
                            f"{self.path}: {name} ends at sample {start}: truncated"
                        )
                    yield _finite(np.frombuffer(raw, header.dtype)[::stride])
                    if start + count < length:
                        member.seek((stride - 1) * item, 1)
        except (zipfile.BadZipFile, zlib.error, EOFError) as error:
            raise RecordingError(f"{self.path}: {name} is damaged: {one_line(error)}") from error
