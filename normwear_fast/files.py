"""Files beside the recordings, of a user or that we left: read whole, or refused in one line.

Nothing is unpickled, and what JSON says is held to a form before anything uses it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from normwear_fast.errors import NormWearError, OutputError, one_line, reading

if TYPE_CHECKING:
    import pyarrow as pa

COUNT = range(2**63)
"""The form of a number of things."""


def read_json(path: Path, kind: type[NormWearError], what: str = "cannot be read as JSON") -> Any:
    """The value in a JSON file.

    Raises:
        kind: it is none, in one line that says ``what``.
    """
    with reading(path, kind, what):
        return json.loads(path.read_text(encoding="utf-8"))


def fits(value: Any, form: Any) -> bool:
    """Whether a JSON value has a form.

    Args:
        value: as ``json.loads`` gives it.
        form: ``None``, ``bool``, ``str``, ``list`` and ``dict`` stand for themselves, ``float`` for
            any finite number, a range for the integers in it, a tuple for any of its forms. A list
            of one form is a list of that, a list of several is one of as many. A dictionary says
            the names there must be and the form of each; under ``str``, the form of all.
    """
    if form is None:
        return value is None
    if isinstance(form, tuple):
        return any(fits(value, each) for each in form)
    if isinstance(form, range):
        return type(value) is int and value in form
    if form is float:
        return type(value) in (int, float) and abs(value) < 1e300  # NaN is not
    if isinstance(form, list):
        if not isinstance(value, list) or (len(form) > 1 and len(value) != len(form)):
            return False
        forms = form if len(form) > 1 else form * len(value)
        return all(map(fits, value, forms))
    if isinstance(form, dict):
        if not isinstance(value, dict):
            return False
        if str in form:
            return all(fits(each, form[str]) for each in value.values())
        return all(name in value and fits(value[name], each) for name, each in form.items())
    return isinstance(value, form)


def read_npy(path: Path, kind: type[NormWearError]) -> NDArray[Any]:
    """The array in an NPY file, not one of Python objects.

    Raises:
        kind: it is no such file, or damaged.
    """
    with reading(path, kind, "not a NumPy array of numbers"), path.open("rb") as file:
        return np.lib.format.read_array(file, allow_pickle=False)


def read_npz(path: Path, kind: type[NormWearError]) -> dict[str, NDArray[Any]]:
    """The arrays in an NPZ file by name, none of them of Python objects.

    Raises:
        kind: it is no such file, or damaged.
    """
    with (
        reading(path, kind, "not an NPZ file of plain arrays"),
        np.load(path, allow_pickle=False) as arrays,
    ):
        held = {name: arrays[name] for name in arrays.files}
        for name, value in held.items():
            if not isinstance(value, np.ndarray):  # NumPy gives what is no array as bytes
                raise ValueError(f"{name} is none")
    return held


def read_parquet(path: Path, kind: type[NormWearError]) -> pa.Table:
    """The table in a Parquet file: no two columns of one name, all text UTF-8.

    Raises:
        kind: it is no such file, or damaged.
    """
    import pyarrow.parquet as pq

    with reading(path, kind, "not a Parquet file"):
        table = pq.ParquetFile(path).read()
        table.validate(full=True)
        names = table.column_names
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise kind(f"{path}: two columns are named {twice}; one is right")
    return table


def check_writable(folder: str | Path) -> None:
    """An OutputError unless a file can be made in a folder, which need not be there yet: before long
    work, not after it. Leaves nothing."""
    folder = Path(folder)
    there = next((each for each in (folder, *folder.parents) if os.path.lexists(each)), folder)
    try:
        with tempfile.TemporaryFile(dir=there) as file:
            file.write(b" ")
            file.flush()
    except OSError as error:
        raise OutputError(f"{folder}: cannot be written ({one_line(error)})") from None


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A temporary beside a file, with its ending, that takes its place when all went well.

    What goes wrong leaves the file as it was and no temporary. The system's refusal is an OutputError.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.stem}.{secrets.token_hex(4)}{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        sync(temporary)
        temporary.replace(path)
    except OSError as error:
        raise OutputError(f"{path}: cannot be written ({one_line(error)})") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def sync(path: str | Path) -> None:
    """Waits until a file's or folder's content is on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def file_sha256(path: Path) -> str:
    """Hex digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
