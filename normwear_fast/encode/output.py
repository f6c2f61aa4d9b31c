"""The output folder: one writer, parts that appear whole or not at all, and what is already there."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

from normwear_fast.errors import OutputError, one_line, reading
from normwear_fast.files import COUNT, fits, read_json, sync

if TYPE_CHECKING:
    import pyarrow as pa

    from normwear_fast.encode.prepare import Row

MANIFEST = "manifest.json"
PATCHES = "patches.zarr"
MANIFEST_FORMAT = "normwear-fast encode"
METADATA_KEY = b"normwear_fast"
SCHEMA_VERSION = 1
"""Of the Parquet columns and of the JSON under ``METADATA_KEY``; raised when either changes."""

TALLY = {
    "ok": COUNT,
    "skipped": {str: COUNT},
    "flat": COUNT,
    "lacking": {str: COUNT},
    "failed": {str: str},
    "statistics": {str: [[(float, None), (float, None)]]},
    "seconds": {str: float},
}
"""The form (`normwear_fast.files.fits`) of what `Tally.to_dict` gives."""

INPUT = {
    "recording": str,
    "path": str,
    "size": COUNT,
    "mtime_ns": range(-(2**63), 2**63),
    "windows": COUNT,
    "duration_s": float,
    "channels": [str],
    "notes": [str],
    "error": (str, None),
}
"""The form of what `Surveyed.to_dict` gives."""

SETTINGS = {
    "window": (float, None),
    "hop": (float, None),
    "channels": ([str], None),
    "normalize": str,
    "preprocess": str,
    "pool": str,
    "channel_pool": str,
    "scalogram": str,
    "max_missing": float,
    "rate": (float, None),
}
"""The form of the settings that are used where a manifest is read; a resumed run compares the others."""

RUN = {
    "schema": COUNT,
    "version": str,
    "run": str,
    "state": str,
    "started": str,
    "inputs": [INPUT],
}
"""The form of what every manifest says of its run."""

_TOKENS = range(1, 2**40)

_PART = re.compile(r"part-(\d{6,})\.(?:parquet|arrow)")
_TEMPORARY = re.compile(r"\.(part-\d{6,}\.(?:parquet|arrow)|manifest\.json)\.tmp")
_LOCK = ".lock"


@dataclass(frozen=True)
class Embedding:
    """The form of the embedding column.

    ``keep``: a list a channel, each of ``width`` values; otherwise one list of ``width`` values, or
    of any number where channels are concatenated and recordings differ in their number (None).
    """

    per_channel: bool
    width: int | None

    def arrow_type(self) -> pa.DataType:
        import pyarrow as pa

        if self.width is None:
            return pa.list_(pa.float32())
        row = pa.list_(pa.float32(), self.width)
        return pa.list_(row) if self.per_channel else row

    @property
    def leaf(self) -> str:
        """The Parquet column that holds the values."""
        return "embedding.list.element" + (".list.element" if self.per_channel else "")

    def array(self, values: Sequence[NDArray[np.float32] | None]) -> pa.Array:
        """A column of one value a row: (C, width) per channel, else (n,); None becomes null."""
        import pyarrow as pa

        null = pa.array([value is None for value in values], pa.bool_())
        if self.width is not None and not self.per_channel:
            flat = np.zeros((len(values), self.width), np.float32)
            for row, value in zip(flat, values, strict=True):
                if value is not None:
                    row[:] = value
            items = pa.array(flat.reshape(-1), pa.float32())
            return pa.FixedSizeListArray.from_arrays(items, self.width, mask=null)
        present = [value for value in values if value is not None]
        joined = np.concatenate([v.reshape(-1) for v in present]) if present else np.empty(0)
        items = pa.array(joined, pa.float32())
        if self.width is not None:
            items = pa.FixedSizeListArray.from_arrays(items, self.width)
        lengths = [0 if value is None else len(value) for value in values]
        offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int32())
        return pa.ListArray.from_arrays(offsets, items, mask=null)


def schema(embedding: Embedding | None) -> pa.Schema:
    """Columns of a part, one row a window; no embedding where those are patches, in Zarr."""
    import pyarrow as pa

    columns = pa.schema(
        [
            pa.field("recording", pa.string(), nullable=False),
            pa.field("window_id", pa.string(), nullable=False),
            pa.field("start_s", pa.float64(), nullable=False),
            pa.field("duration_s", pa.float64(), nullable=False),
            pa.field("channels", pa.list_(pa.string()), nullable=False),
            pa.field("status", pa.string(), nullable=False),
            pa.field("missing_fraction", pa.float64(), nullable=False),
        ]
    )
    if embedding is None:
        return columns
    return columns.append(pa.field("embedding", embedding.arrow_type()))


def build_table(
    rows: Sequence[Row], embeddings: Sequence[NDArray[np.float32] | None], form: Embedding | None
) -> pa.Table:
    """The rows of a work unit."""
    import pyarrow as pa

    columns = [
        pa.array([row.recording for row in rows], pa.string()),
        pa.array([row.window.id for row in rows], pa.string()),
        pa.array([row.window.start for row in rows], pa.float64()),
        pa.array([row.window.duration for row in rows], pa.float64()),
        pa.array([list(row.channels) for row in rows], pa.list_(pa.string())),
        pa.array([row.status for row in rows], pa.string()),
        pa.array([row.missing_fraction for row in rows], pa.float64()),
    ]
    if form is not None:
        columns.append(form.array(embeddings))
    return pa.Table.from_arrays(columns, schema=schema(form))


def check_columns(found: pa.Schema, path: Path) -> None:
    """An OutputError unless the columns of a part are of the kinds that `schema` gives them."""
    import pyarrow as pa

    kinds = {field.name: [field.type] for field in schema(None)}
    kinds["embedding"] = [pa.list_(pa.float32())]
    for field in found:
        if field.name == "embedding":
            inner = field.type.value_type if pa.types.is_list(field.type) else field.type
            if pa.types.is_fixed_size_list(inner):
                row = pa.list_(pa.float32(), inner.list_size)
                kinds["embedding"] += [row, pa.list_(row)]
        if field.type not in kinds.get(field.name, [field.type]):
            raise OutputError(
                f"{path}: column {field.name} is {field.type}, which encode does not write; remove it "
                "and run again"
            )


ROW_GROUP_BYTES = 16 * 2**20


def encode_part(table: pa.Table, form: Embedding | None, metadata: Mapping[str, Any]) -> bytes:
    """A part as Parquet: embeddings byte-split under zstd, no dictionary; the rest as usual."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    described = {METADATA_KEY: json.dumps(metadata, separators=(",", ":")).encode()}
    sink = pa.BufferOutputStream()
    per_row = max(1, table.nbytes // max(1, len(table)))
    with pq.ParquetWriter(
        sink,
        table.schema.with_metadata(described),
        compression="zstd",
        use_dictionary=["recording", "status", "channels.list.element"],
        column_encoding=None if form is None else {form.leaf: "BYTE_STREAM_SPLIT"},
        write_statistics=["recording", "window_id", "start_s", "duration_s", "status"],
    ) as writer:
        writer.write_table(table, row_group_size=max(1, ROW_GROUP_BYTES // per_row))
    return sink.getvalue().to_pybytes()


@dataclass(frozen=True)
class Part:
    """A part that is there, and what it says about itself."""

    path: Path
    metadata: dict[str, Any]


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turns what the operating system refuses into one line that says what would help."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            what = "no space left on its device; free some and run the same command again"
        elif error.errno in (errno.EACCES, errno.EPERM):
            what = "no permission to write there"
        elif error.errno == errno.EROFS:
            what = "it is on a read-only file system"
        elif error.errno in (errno.ENOTDIR, errno.EEXIST):
            what = "a file is in the way of that folder"
        else:
            what = one_line(error)
        raise OutputError(f"output {folder}: {what}") from error


class OutputFolder:
    """An output folder with its lock held; a context manager.

    Raises:
        OutputError: it cannot be made, another process writes to it, or it holds other things.
    """

    command = "encode"
    manifest_format = MANIFEST_FORMAT
    manifest_form: Mapping[str, Any] = RUN | {
        "settings": SETTINGS | {"batch_tokens": _TOKENS, "unit_tokens": _TOKENS},
        "model": {"weights": dict, "threads": range(1, 2**16)},
    }
    part_form: Mapping[str, Any] = {"run": str, "units": [[COUNT, COUNT]], "tally": TALLY}
    part_suffix = ".parquet"

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._lock = -1
        self._made: list[Path] = []

    def __enter__(self) -> Self:
        with writing(self.path):
            self._refuse_foreign()
            missing = [self.path, *self.path.parents]
            self._made = [folder for folder in missing if not folder.exists()]
            self.path.mkdir(parents=True, exist_ok=True)
            try:
                self._acquire()
                self.remove_temporaries()
            except BaseException:
                self._release()
                raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._release()

    def _names(self) -> list[str]:
        return sorted(os.listdir(self.path))

    def _refuse_foreign(self) -> None:
        if not self.path.exists():
            return
        names = [n for n in self._names() if n != _LOCK and not _TEMPORARY.fullmatch(n)]
        if names and MANIFEST not in names:
            raise OutputError(
                f"output {self.path} holds {names[0]}, but no {MANIFEST}: it is not an output of "
                f"{self.command}; choose a new folder"
            )

    def _acquire(self) -> None:
        lock = self.path / _LOCK
        while True:
            self._lock = os.open(lock, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno not in (errno.EAGAIN, errno.EACCES):
                    raise
                holder = os.read(self._lock, 32).decode(errors="replace").strip()
                os.close(self._lock)
                self._lock = -1
                raise OutputError(
                    f"output {self.path} is being written by another run (process {holder or '?'}); "
                    "wait for it, or choose another folder"
                ) from None
            # A run that has just ended removes its lock file: only a lock that is still there counts.
            with contextlib.suppress(FileNotFoundError):
                if os.stat(lock).st_ino == os.fstat(self._lock).st_ino:
                    break
            os.close(self._lock)
        os.truncate(self._lock, 0)
        os.write(self._lock, str(os.getpid()).encode())

    def _release(self) -> None:
        if self._lock >= 0:
            with contextlib.suppress(OSError):
                os.unlink(self.path / _LOCK)
            os.close(self._lock)
            self._lock = -1
        # A run that was refused leaves no empty folders behind.
        for folder in self._made:
            with contextlib.suppress(OSError):
                folder.rmdir()
        self._made = []

    def remove_temporaries(self) -> None:
        """Removes what a killed run was writing; its rows are written again."""
        for name in self._names():
            if _TEMPORARY.fullmatch(name):
                os.unlink(self.path / name)

    def read_manifest(self) -> dict[str, Any] | None:
        """The manifest that is there, or None.

        Raises:
            OutputError: it is damaged, or not one of this command.
        """
        path = self.path / MANIFEST
        if not path.exists():
            return None
        what = f"is not a manifest of {self.command}; choose a new folder"
        manifest = read_json(path, OutputError, what)
        if not fits(manifest, {"format": str}) or manifest["format"] != self.manifest_format:
            raise OutputError(f"{path}: {what}")
        if not fits(manifest, self.manifest_form):
            raise OutputError(f"{path}: is damaged, or of another version; choose a new folder")
        return manifest

    def parts(self, run: str | None = None) -> list[Part]:
        """The parts that are there, in order.

        Args:
            run: the run they must belong to.

        Raises:
            OutputError: a part that is damaged, or belongs to another run.
        """
        parts = []
        what = "is damaged or not a part of this output; remove it and run again"
        for name in self._names():
            if not _PART.fullmatch(name):
                continue
            path = self.path / name
            with reading(path, OutputError, what):
                metadata = json.loads(self._stored(path)[METADATA_KEY])
                metadata["tally"].setdefault("lacking", {})  # in parts from before it was counted
            if not fits(metadata, self.part_form):
                raise OutputError(f"{path}: {what}")
            if run is not None and metadata["run"] != run:
                raise OutputError(
                    f"{path} belongs to another run than {self.path / MANIFEST}; remove it, or start "
                    "anew with --overwrite"
                )
            parts.append(Part(path, metadata))
        return parts

    def _stored(self, path: Path) -> Mapping[bytes, bytes]:
        """A part's own metadata."""
        import pyarrow.parquet as pq

        return pq.read_metadata(path).metadata or {}

    def clear(self) -> None:
        """Removes an earlier run: its parts first, its manifest last, and nothing else."""
        with writing(self.path):
            for part in self.parts():
                part.path.unlink()
            if (self.path / PATCHES).is_dir():
                shutil.rmtree(self.path / PATCHES)
            (self.path / MANIFEST).unlink(missing_ok=True)
            sync(self.path)

    def write_manifest(self, manifest: Mapping[str, Any]) -> None:
        text = json.dumps(manifest, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
        # A byte of a folder's name that is no UTF-8 becomes JSON's own escape of it.
        self._write(MANIFEST, text.encode(errors="backslashreplace"))

    def write_part(self, content: bytes) -> None:
        """Adds a part; when this returns it survives a power cut."""
        numbers = [int(found[1]) for name in self._names() if (found := _PART.fullmatch(name))]
        self._write(f"part-{max(numbers, default=-1) + 1:06d}{self.part_suffix}", content)

    def write_patches(self, files: Mapping[str, bytes]) -> None:
        """Puts files in their order into the Zarr store; when this returns they survive a power cut.

        Args:
            files: content by path below the store. One that is there is replaced at once.
        """
        root = self.path / PATCHES
        with writing(self.path):
            folders = {self.path}
            for name, content in files.items():
                path = root / name
                path.parent.mkdir(parents=True, exist_ok=True)
                _replace(path, content)
                while path != self.path:
                    path = path.parent
                    folders.add(path)
            for folder in folders:
                sync(folder)

    def _write(self, name: str, content: bytes) -> None:
        with writing(self.path):
            _replace(self.path / name, content)
            sync(self.path)
            if self._made:
                sync(self.path.parent)
                self._made = []


def _replace(path: Path, content: bytes) -> None:
    """Makes ``path`` hold ``content``: whole or, after a kill, as it was before."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
