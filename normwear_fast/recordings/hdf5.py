"""HDF5 files, through h5py; the layout is in `arrays`.

Datasets are read by slices of whole chunks. Nothing outside the file is opened: external links,
external storage and virtual datasets are refused.
"""

from __future__ import annotations

import math
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


@register(".h5", ".hdf5", ".hdf", ".he5")
class Hdf5Recording(ArrayRecording):
    """An HDF5 file of datasets."""

    format = "HDF5"

    def __init__(self, path: Path, *, sampling_rate: float | None = None) -> None:
        import h5py

        self.path = path
        with refusing(path, "is no HDF5 file, or damaged"):
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
