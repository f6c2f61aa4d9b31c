"""HDF5 files, through h5py; the layout is in `arrays`.

Datasets are read by slices of whole chunks. Nothing outside the file is opened: external links,
external storage and virtual datasets are refused.
"""

from __future__ import annotations

import math
import mmap
from pathlib import Path
from typing import Any

from normwear_fast.errors import RecordingError
from normwear_fast.recordings.arrays import (
    ArrayRecording,
    StoredArray,
    Tree,
    as_plain,
    check_storage,
)
from normwear_fast.recordings.base import refusing, register

_OBJECTS = 10_000
_DEPTH = 32
_SEARCHED = 64 * 2**20
"""Bytes at either end of a file that are searched for damaged heaps; attributes' texts lie near one."""


@register(".h5", ".hdf5", ".hdf", ".he5")
class Hdf5Recording(ArrayRecording):
    """An HDF5 file of datasets."""

    format = "HDF5"

    def __init__(self, path: Path, *, sampling_rate: float | None = None) -> None:
        import h5py

        self.path = path
        with refusing(path, "is no HDF5 file, or damaged"):
            _check_heaps(path)
            # No lock: archives are often mounted read-only or without locks.
            self._file = h5py.File(path, "r", locking=False)
        try:
            tree = Tree()
            self._seen: set[Any] = set()
            with refusing(path):
                self._walk(self._file, "", tree, 0)
                self._arrange(tree, sampling_rate)
        except BaseException:
            self._file.close()
            raise

    def close(self) -> None:
        self._file.close()

    def _walk(self, group: Any, above: str, tree: Tree, depth: int) -> None:
        import h5py

        self._seen.add(group.id)
        tree.groups[above] = as_plain(group.attrs)
        if depth > _DEPTH or len(self._seen) > _OBJECTS:
            raise RecordingError(f"{self.path}: has groups {_DEPTH} deep or {_OBJECTS} objects")
        for name in group:
            place = f"{above}/{name}" if above else name
            link = group.get(name, getlink=True)
            if isinstance(link, h5py.ExternalLink):
                raise RecordingError(
                    f"{self.path}: {place} is a link to another file, {link.filename!r}; "
                    f"data in the file itself is right"
                )
            if not isinstance(link, h5py.HardLink):
                tree.notes.append(f"{place} is a soft link and left out")
                continue
            member = group[name]
            if isinstance(member, h5py.Group):
                if member.id not in self._seen:
                    self._walk(member, place, tree, depth + 1)
            elif isinstance(member, h5py.Dataset):
                tree.arrays.append(self._array(member, place))

    def _array(self, dataset: Any, place: str) -> StoredArray:
        shape = dataset.shape
        if shape is None:  # a null dataspace
            shape = (0,)
        if dataset.dtype.kind not in "iufb" or not math.prod(shape) > 0:
            return StoredArray(place, _NotRead(dataset, shape), as_plain(dataset.attrs))
        chunk = 1 if dataset.chunks is None else dataset.chunks[-1]
        return StoredArray(
            place, dataset, as_plain(dataset.attrs), chunk, lambda: self._check(dataset, place)
        )

    def _check(self, dataset: Any, place: str) -> None:
        if dataset.external or dataset.is_virtual:
            raise RecordingError(
                f"{self.path}: {place} is stored in other files; data in the file itself is right"
            )
        shape, item = dataset.shape, dataset.dtype.itemsize
        if dataset.chunks is None:
            size, stored = math.prod(shape) * item, dataset.id.get_storage_size()
            if stored != size:
                raise RecordingError(
                    f"{self.path}: {place} declares {dataset.dtype} {shape}, {size} bytes; "
                    f"{stored} are stored"
                )
            return
        check_storage(self.path, place, shape, item, math.prod(dataset.chunks))
        chunks = math.prod(
            -(-length // chunk) for length, chunk in zip(shape, dataset.chunks, strict=True)
        )
        there = dataset.id.get_num_chunks()
        if there != chunks:
            raise RecordingError(
                f"{self.path}: {place} declares {chunks} chunks for shape {shape}; {there} are "
                f"stored: an interrupted writer's file"
            )


class _NotRead:
    """Shape and type of a dataset that is no signal; small texts (names) can still be read."""

    def __init__(self, dataset: Any, shape: tuple[int, ...]) -> None:
        self._dataset = dataset
        self.shape, self.dtype = shape, dataset.dtype

    def __getitem__(self, key: Any) -> Any:
        return self._dataset[key]


def _check_heaps(path: Path) -> None:
    """Refuses a file whose texts' heap holds free space of no size: the library walks it for ever.

    Seen with HDF5 1.14 where 200 bytes of a file were zeroed; it cannot be interrupted. A global heap
    (HDF5 File Format Specification, III.E): "GCOL", version 1, three zeros, its size, then objects
    of index, 2 bytes, count, 2, zeros, 4, size, 8, and so many bytes to a multiple of 8; index 0 is
    free space, its size that of all of it.
    """
    with path.open("rb") as file:
        start = file.read(16)
        if len(start) < 16 or start[:8] != b"\x89HDF\r\n\x1a\n":
            return  # no HDF5, which the library says, or behind a user block: rare, not searched
        if start[14 if start[8] < 2 else 10] != 8:
            return  # lengths of other than 8 bytes: likewise
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            for first in {0, max(0, len(data) - _SEARCHED)}:
                place = data.find(b"GCOL\1\0\0\0", first, first + _SEARCHED)
                while place >= 0:
                    _check_heap(path, data, place)
                    place = data.find(b"GCOL\1\0\0\0", place + 8, first + _SEARCHED)


def _check_heap(path: Path, data: mmap.mmap, place: int) -> None:
    stop = min(len(data), place + int.from_bytes(data[place + 8 : place + 16], "little"))
    at = place + 16
    while at + 16 <= stop:
        size = int.from_bytes(data[at + 8 : at + 16], "little")
        free = data[at : at + 2] == b"\0\0"
        if free and size == 0:
            raise RecordingError(f"{path}: is damaged: the heap at byte {place} is cut by zeros")
        at += size if free else 16 + -(-size // 8) * 8
