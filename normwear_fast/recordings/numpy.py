"""NPY and NPZ arrays; NPZ's layout is in `arrays`. Objects are never unpickled; NPY is mapped, NPZ
members are streamed."""

from __future__ import annotations

import zipfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from normwear_fast.errors import RecordingError, one_line
from normwear_fast.recordings.archive import DAMAGED
from normwear_fast.recordings.arrays import ArrayRecording, StoredArray, Tree, finite
from normwear_fast.recordings.base import Array, Channel, Recording, register

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
            yield [finite(data[c, start : start + step]) for c in channels]


@dataclass
class _Member(StoredArray):
    """An array of an NPZ file; its `array` is the header.

    Args:
        file: the NPZ file.
        member: its name in there.
    """

    file: Path = Path()
    member: str = ""

    @property
    def _header(self) -> _Header:
        header: _Header = self.array
        return header

    def whole(self) -> Any:
        with zipfile.ZipFile(self.file) as file, file.open(self.member) as member:
            return np.lib.format.read_array(member, allow_pickle=False)

    def first(self, count: int) -> NDArray[Any]:
        for (values,) in self.pieces([0], count):
            return values
        return np.empty(0)

    def pieces(self, rows: list[int], step: int) -> Iterator[list[NDArray[Any]]]:
        """A compressed member cannot be read at random, but it can be read through at several places
        at once: each row has a handle of its own. In Fortran order all rows are read in one go."""
        header = self._header
        count, length = (1, *header.shape)[-2:]
        if header.fortran and count > 1:
            values = self._values(0, count * length, count * max(1, _PIECE // count))
            for block in _regrouped(values, count * step):
                yield list(block.reshape(-1, count).T[rows])
            return
        streams = [self._values(row * length, length, step) for row in rows]
        yield from map(list, zip(*streams, strict=True))

    def _values(self, skip: int, count: int, step: int) -> Iterator[NDArray[Any]]:
        """Some of the member's values, in the order that they are stored in."""
        header = self._header
        item = header.dtype.itemsize
        with zipfile.ZipFile(self.file) as file, file.open(self.member) as member:
            left = header.offset + skip * item
            while left > 0:  # a seek would hold 16 MB at a time
                left -= len(member.read(min(left, _PIECE))) or left
            for start in range(0, count, step):
                wanted = min(step, count - start) * item
                raw = member.read(wanted)
                if len(raw) < wanted:
                    raise RecordingError(f"{self.file}: {self.path} is truncated")
                yield np.frombuffer(raw, header.dtype)


def _regrouped(pieces: Iterator[NDArray[Any]], size: int) -> Iterator[NDArray[Any]]:
    """The same values, `size` at a time."""
    held: list[NDArray[Any]] = []
    for piece in pieces:
        held.append(piece)
        while sum(one.size for one in held) >= size:
            together = np.concatenate(held)
            yield together[:size]
            held = [together[size:]]
    if held and any(one.size for one in held):
        yield np.concatenate(held)


@register(".npz")
class NpzRecording(ArrayRecording):
    """The layout of `arrays`: `data` (C, L), or one array a channel or (C, L) a signal. There are no
    attributes, so that `sampling_rate` and `units` may also have one entry for each of the arrays."""

    format = "NPZ"

    def __init__(self, path: Path, *, sampling_rate: float | None = None) -> None:
        self.path = path
        try:
            with zipfile.ZipFile(path) as file:
                members = [self._member(file, info) for info in file.infolist()]
        except DAMAGED as error:
            raise RecordingError(f"{path}: is no NPZ file: {one_line(error)}") from error
        counts = Counter(one.path for one in members)
        twice = [name for name, count in counts.items() if count > 1]
        if twice:
            raise RecordingError(f"{path}: has several arrays named {', '.join(twice)}")
        self._arrange(Tree(arrays=[*members]), sampling_rate)
        if not self.channels:
            held = ", ".join(f"{one.path} of shape {one.shape}" for one in members)
            raise RecordingError(
                f"{path}: has neither data (channels, samples) nor other arrays of numbers that are "
                f"signals; it has {held or 'nothing'}"
            )

    def _member(self, file: zipfile.ZipFile, info: zipfile.ZipInfo) -> _Member:
        name = info.filename.removesuffix(".npy")
        where = f"{self.path}: {name}"
        with file.open(info) as member:
            header = _read_header(member, where)
        _check(header, info.file_size - header.offset, where)
        return _Member(name, header, {}, file=self.path, member=info.filename)

    def _signals(self, numbers: list[StoredArray], tree: Tree) -> list[StoredArray]:
        signals = super()._signals(numbers, tree)
        if not signals or any(one.name == "data" for one in signals):
            return signals
        settings = tree.groups.get("", {})
        for key in ("sampling_rate", "units"):
            values = np.ravel(settings.get(key, ()))
            if values.size > 1:
                self._deal_out(key, values, signals)
                del settings[key]
        if "units" in settings:
            self._deal_out("units", np.repeat(settings.pop("units"), len(signals)), signals)
        return signals

    def _deal_out(self, key: str, values: NDArray[Any], signals: list[StoredArray]) -> None:
        """To each array the entry of a list that is its own, in the file's order."""
        if len(values) != len(signals):
            names = ", ".join(one.path for one in signals)
            raise RecordingError(
                f"{self.path}: {key} has {len(values)} entries for the arrays {names}; "
                f"one for all, or one for each, is right"
            )
        for one, value in zip(signals, values, strict=True):
            one.attributes[key] = value
