"""Zarr stores of version 2 and 3, folders and zips, through zarr; the layout is in `arrays`.

The metadata is checked here before zarr sees it: a codec that is not in the list is refused (Zarr 2
has one that unpickles), and so is an array most of whose chunks are not there.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import struct
import zipfile
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from normwear_fast.errors import RecordingError
from normwear_fast.recordings.archive import reading
from normwear_fast.recordings.arrays import (
    CHUNK_BYTES,
    ArrayRecording,
    StoredArray,
    Tree,
    as_plain,
    check_storage,
)
from normwear_fast.recordings.base import refusing, register, register_folder

METADATA = ("zarr.json", ".zarray", ".zgroup")
_METADATA_BYTES = 64 << 20
_ABSENT = 2**64 - 1  # in a shard's index, a chunk that is not stored
_CODECS = {
    *("bytes", "transpose", "sharding_indexed", "blosc", "gzip", "zstd", "crc32c", "zlib", "lz4"),
    *("lzma", "bz2", "delta", "fixedscaleoffset", "quantize", "shuffle", "bitround", "astype"),
    *("packbits", "crc32", "adler32", "fletcher32", "jenkins_lookup3", "zfpy", "pcodec"),
}


def is_zarr_folder(path: Path) -> bool:
    """A folder named .zarr, or that holds a Zarr store's metadata."""
    return path.suffix.lower() == ".zarr" or any((path / name).is_file() for name in METADATA)


class _Files(ABC):
    """The files of a store, by their names below it."""

    @abstractmethod
    def text(self, name: str) -> bytes | None:
        """A metadata file, or None."""

    @abstractmethod
    def metadata(self) -> list[str]:
        """Paths ("" is the root) that have metadata, parents first."""

    @abstractmethod
    def count(self, place: str) -> int:
        """Files below a path that are not metadata: the stored chunks of an array."""


class _FolderFiles(_Files):
    def __init__(self, path: Path) -> None:
        self.path = path
        self.counts: dict[str, int] = {}
        root = os.path.realpath(path)
        for top, folders, files in os.walk(path):
            place = Path(top).relative_to(path).as_posix().removeprefix(".")
            has_metadata = any(name in METADATA for name in files)
            if has_metadata:
                self.counts[place] = 0
            for name in (*folders, *files):
                entry = os.path.join(top, name)
                if os.path.islink(entry) and not _inside(os.path.realpath(entry), root):
                    raise RecordingError(
                        f"{path}: {os.path.relpath(entry, path)} is a link out of the store"
                    )
            chunks = sum(not name.startswith(".") and name != "zarr.json" for name in files)
            owner = place
            while owner and owner not in self.counts:
                owner = owner.rpartition("/")[0]
            if owner in self.counts:
                self.counts[owner] += chunks

    def text(self, name: str) -> bytes | None:
        file = self.path / name
        if not file.is_file():
            return None
        if file.stat().st_size > _METADATA_BYTES:
            raise RecordingError(f"{self.path}: {name} has {file.stat().st_size} bytes: too many")
        return file.read_bytes()

    def metadata(self) -> list[str]:
        return sorted(self.counts)

    def count(self, place: str) -> int:
        return self.counts[place]


def _inside(path: str, root: str) -> bool:
    return path == root or path.startswith(root + os.sep)


class _ZipFiles(_Files):
    def __init__(self, path: Path, members: dict[str, zipfile.ZipInfo]) -> None:
        self.path, self.members = path, members
        places = {
            name.rpartition("/")[0] for name in members if name.rpartition("/")[2] in METADATA
        }
        self.counts = dict.fromkeys(places, 0)
        for name in members:
            last = name.rpartition("/")[2]
            if last.startswith(".") or last == "zarr.json":
                continue
            owner = name.rpartition("/")[0]
            while owner and owner not in self.counts:
                owner = owner.rpartition("/")[0]
            if owner in self.counts:
                self.counts[owner] += 1

    def text(self, name: str) -> bytes | None:
        info = self.members.get(name)
        if info is None:
            return None
        if info.file_size > _METADATA_BYTES:
            raise RecordingError(f"{self.path}: {name} has {info.file_size} bytes: too many")
        with reading(self.path), zipfile.ZipFile(self.path) as file:
            return file.read(info)

    def metadata(self) -> list[str]:
        return sorted(self.counts)

    def count(self, place: str) -> int:
        return self.counts[place]


@dataclass(frozen=True)
class _Compressed:
    """How an array's files are compressed, as far as that needs a look before numcodecs has one.

    Args:
        codec: zstd, blosc, or "" for all others, which notice a chunk cut short themselves.
        trailing: bytes of a checksum behind each chunk.
        shard_chunks: chunks in a shard, 0 without shards.
    """

    codec: str
    trailing: int = 0
    shard_chunks: int = 0


def _compressed(array: dict[str, Any], chunk_shape: tuple[int, ...]) -> _Compressed:
    compressor = array.get("compressor")
    if isinstance(compressor, dict):
        name = compressor.get("id")
        return _Compressed(name if name in ("zstd", "blosc") else "")
    codecs = [one for one in array.get("codecs") or [] if isinstance(one, dict)]
    if codecs and codecs[0].get("name") == "sharding_indexed":
        inner = codecs[0].get("configuration") or {}
        own = _compressed({"codecs": inner.get("codecs")}, ())
        counts = zip(chunk_shape, inner.get("chunk_shape") or [], strict=True)
        return replace(own, shard_chunks=math.prod(-(-n // max(1, m)) for n, m in counts))
    names = [str(one.get("name")).removeprefix("numcodecs.") for one in codecs]
    codec = next((name for name in names if name in ("zstd", "blosc")), "")
    return _Compressed(codec, 4 * ("crc32c" in names))


def _check_chunk(value: bytes, how: _Compressed) -> None:
    """Raise unless a chunk is all there and unpacks to what may be held: of one cut short, numcodecs
    0.16 gives back memory that was never written (zstd) or lies behind it (blosc)."""
    size = len(value) - how.trailing
    if size <= 0:
        raise ValueError("a chunk is empty")
    if how.codec == "blosc":
        # https://github.com/Blosc/c-blosc/blob/main/README_CHUNK_FORMAT.rst
        sizes = struct.unpack_from("<III", value, 4) if size >= 16 else (0, 0, 0)
        if sizes[2] != size or sizes[0] > CHUNK_BYTES:
            raise ValueError("a chunk is cut short, or no blosc")
    elif how.codec == "zstd":
        _check_zstd(value, size)


def _check_zstd(value: bytes, size: int) -> None:
    """https://datatracker.ietf.org/doc/html/rfc8878#section-3.1.1"""
    place = 0
    while place < size:
        if value[place : place + 4] != b"\x28\xb5\x2f\xfd" or place + 5 > size:
            raise ValueError("a chunk is no zstd frame")
        descriptor = value[place + 4]
        single = descriptor >> 5 & 1
        place += 6 - single + (0, 1, 2, 4)[descriptor & 3]
        width = (single, 2, 4, 8)[descriptor >> 6]
        if int.from_bytes(value[place : place + width], "little") > CHUNK_BYTES:
            raise ValueError("a chunk unpacks to more than may be held")
        place += width
        last = False
        while not last:
            if place + 3 > size:
                raise ValueError("a chunk is cut short")
            head = int.from_bytes(value[place : place + 3], "little")
            last = bool(head & 1)
            place += 3 + (1 if head >> 1 & 3 == 1 else head >> 3)
        place += 4 * (descriptor >> 2 & 1)
    if place != size:
        raise ValueError("a chunk is cut short")


def _check_stored(value: bytes, how: _Compressed, part: Any) -> None:
    """A chunk, a shard (`part` None) or a stretch of one, as zarr asked for it."""
    if not how.shard_chunks:
        _check_chunk(value, how)
    elif part is None:
        entries = 16 * how.shard_chunks
        index = value[-entries - 4 : -4]  # zarr checks its CRC
        if len(index) != entries:
            raise ValueError("a shard is cut short")
        for start, length in struct.iter_unpack("<QQ", index):
            if length != _ABSENT:
                _check_chunk(value[start : start + length], how)
    elif hasattr(part, "start"):
        _check_chunk(value, how)


def _checking(store: Any, arrays: dict[str, _Compressed]) -> Any:
    """The store, with every chunk of these arrays looked at before zarr decompresses it."""
    from zarr.storage import WrapperStore

    class Checking(WrapperStore):
        async def get(self, key: str, prototype: Any, byte_range: Any = None) -> Any:
            value = await super().get(key, prototype, byte_range)
            owner = key.rpartition("/")[0]
            while owner and owner not in arrays:
                owner = owner.rpartition("/")[0]
            name = key.rpartition("/")[2]
            if value is not None and owner in arrays and name not in (*METADATA, ".zattrs"):
                _check_stored(value.to_bytes(), arrays[owner], byte_range)
            return value

    return Checking(store)


@register(".zarr")
@register_folder(is_zarr_folder)
class ZarrRecording(ArrayRecording):
    """A Zarr store: a folder, or a zip that `zips` gives here."""

    format = "Zarr"

    def __init__(
        self,
        path: Path,
        *,
        sampling_rate: float | None = None,
        members: dict[str, zipfile.ZipInfo] | None = None,
    ) -> None:
        import zarr
        from zarr.storage import LocalStore, ZipStore

        self.path = path
        self._store: Any = None
        self._compressed: dict[str, _Compressed] = {}
        files = _FolderFiles(path) if members is None else _ZipFiles(path, members)
        places = files.metadata()
        if "" not in places:
            raise RecordingError(f"{path}: is no Zarr store: {' or '.join(METADATA)} is missing")
        try:
            with refusing(path):
                self._store = _checking(
                    LocalStore(path, read_only=True)
                    if members is None
                    else ZipStore(path, mode="r", read_only=True),
                    self._compressed,
                )
                tree = Tree()
                for place in places:
                    self._read_place(zarr, files, place, tree)
                self._arrange(tree, sampling_rate)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        # A zip that zarr could not open cannot be closed either: it has no lock yet.
        with contextlib.suppress(AttributeError):
            self._store.close()

    def _read_place(self, zarr: Any, files: _Files, place: str, tree: Tree) -> None:
        """One group or array: its own metadata, never a consolidated copy of it."""
        prefix = place + "/" if place else ""
        modern = self._json(files, prefix + "zarr.json")
        array = modern if modern is not None else self._json(files, prefix + ".zarray")
        if modern is not None:
            attributes = modern.get("attributes") or {}
        else:
            attributes = self._json(files, prefix + ".zattrs") or {}
        if not isinstance(attributes, dict):
            raise RecordingError(f"{self.path}: attributes of {place or 'the root'} are no table")
        group = self._json(files, prefix + ".zgroup") if array is None else None
        expected = 3 if modern is not None else 2
        if (array or group or {}).get("zarr_format") != expected:
            raise RecordingError(f"{self.path}: {place or 'the root'} is not of Zarr {expected}")
        is_group = array is None or (modern is not None and modern.get("node_type") == "group")
        if is_group or array is None:
            tree.groups[place] = as_plain(attributes)
            return
        name = place or "data"
        self._check_codecs(array, name)
        shape = self._lengths(array.get("shape"), name, "shape")
        if modern is not None:
            grid = array.get("chunk_grid")
            inner = grid.get("configuration") if isinstance(grid, dict) else None
            chunks = inner.get("chunk_shape") if isinstance(inner, dict) else None
        else:
            chunks = array.get("chunks")
        chunk_shape = self._lengths(chunks, name, "chunks")
        if len(chunk_shape) != len(shape) or 0 in chunk_shape:
            raise RecordingError(
                f"{self.path}: {name} has shape {shape} in chunks of {chunk_shape}"
            )
        self._compressed[place] = _compressed(array, chunk_shape)
        opened = zarr.open_array(
            self._store, path=place, mode="r", zarr_format=2 if modern is None else 3
        )
        if tuple(opened.shape) != shape:
            raise RecordingError(f"{self.path}: {name} has shape {shape}; zarr has {opened.shape}")
        chunk = chunk_shape[-1] if chunk_shape else 1
        there = files.count(place)
        tree.arrays.append(
            StoredArray(
                name,
                opened,
                as_plain(attributes),
                chunk,
                lambda: self._check_chunks(there, shape, chunk_shape, opened, name),
            )
        )

    def _json(self, files: _Files, name: str) -> dict[str, Any] | None:
        text = files.text(name)
        if text is None:
            return None
        with refusing(self.path, f"{name} is no metadata"):
            value = json.loads(text)
        if not isinstance(value, dict):
            raise RecordingError(f"{self.path}: {name} is no metadata: a JSON object is right")
        return value

    def _lengths(self, value: Any, name: str, what: str) -> tuple[int, ...]:
        if not isinstance(value, list) or not all(type(n) is int and n >= 0 for n in value):
            raise RecordingError(f"{self.path}: {name} has {str(value)[:60]} as {what}")
        return tuple(value)

    def _check_codecs(self, value: Any, name: str) -> None:
        """Every codec of an array, those inside a shard and the index's included."""
        pending = [value.get(key) for key in ("codecs", "filters", "compressor")]
        while pending:
            one = pending.pop()
            if isinstance(one, list):
                pending.extend(one)
            elif isinstance(one, dict):
                codec = str(one.get("id", one.get("name", ""))).removeprefix("numcodecs.")
                if codec not in _CODECS:
                    raise RecordingError(f"{self.path}: {name} has codec {codec!r}: not read here")
                inner = one.get("configuration")
                if isinstance(inner, dict):
                    pending += [inner.get("codecs"), inner.get("index_codecs")]
            elif isinstance(one, str):
                pending.append({"name": one})
            elif one is not None:
                raise RecordingError(f"{self.path}: {name} has codecs that are no list")

    def _check_chunks(
        self,
        there: int,
        shape: tuple[int, ...],
        chunk_shape: tuple[int, ...],
        array: Any,
        name: str,
    ) -> None:
        """Zarr leaves out chunks that hold nothing but the fill value, so a few may be missing."""
        check_storage(self.path, name, shape, array.dtype.itemsize, math.prod(chunk_shape))
        declared = math.prod(-(-n // chunk) for n, chunk in zip(shape, chunk_shape, strict=True))
        if 2 * there < declared:
            raise RecordingError(
                f"{self.path}: {name} declares {declared} chunks for shape {shape}; {there} are "
                f"stored: an interrupted writer's or copy's store"
            )
        if there < declared:
            self.notes += (
                f"{declared - there} of {declared} chunks of {name} are not stored and hold its "
                f"fill value, {array.fill_value}",
            )
