"""Zip archives as others made them: checked before anything is read, and never unpacked."""

from __future__ import annotations

import posixpath
import stat
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from normwear_fast.errors import RecordingError, one_line

# An archive that would unpack to more than both is a bomb. Flat signals pack 500:1 as text.
_TIMES = 100
_BYTES = 1 << 30
_MEMBERS = 5_000_000
# zarr writes these anew at every change; the last one counts, as it does for zipfile.
_REWRITTEN = {"zarr.json", ".zarray", ".zgroup", ".zattrs", ".zmetadata"}


DAMAGED = (
    *(zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError),
    UnicodeDecodeError,  # of a member's name
)
"""What zipfile and zlib raise on damaged archives."""


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """`DAMAGED` as one line."""
    try:
        yield
    except DAMAGED as error:
        raise RecordingError(f"{path}: is a damaged zip: {one_line(error)}") from error


def safe_members(path: Path) -> dict[str, zipfile.ZipInfo]:
    """The files in a zip by name.

    Raises:
        RecordingError: no zip; names that lead out of it; links; two members of one name; encrypted
            members; or a size when unpacked that only a bomb has.
    """
    with reading(path), zipfile.ZipFile(path) as file:
        infos = file.infolist()
    if len(infos) > _MEMBERS:
        raise RecordingError(f"{path}: has {len(infos)} members: at most {_MEMBERS} are right")
    members: dict[str, zipfile.ZipInfo] = {}
    for info in infos:
        name = info.filename
        parts = name.replace("\\", "/").split("/")
        if name.startswith(("/", "\\")) or ".." in parts or (len(name) > 1 and name[1] == ":"):
            raise RecordingError(
                f"{path}: member {name!r} leads out of the archive; names below it are right"
            )
        if stat.S_ISLNK(info.external_attr >> 16):
            raise RecordingError(f"{path}: member {name!r} is a link; plain files are right")
        if info.flag_bits & 1:
            raise RecordingError(f"{path}: member {name!r} is encrypted")
        if name.endswith("/"):  # what is_dir() asks, but a name may be empty
            continue
        if posixpath.normpath(name) in members and parts[-1] not in _REWRITTEN:
            raise RecordingError(f"{path}: has two members named {name!r}")
        members[posixpath.normpath(name)] = info
    size = path.stat().st_size
    total = sum(info.file_size for info in members.values())
    if total > _BYTES and total > _TIMES * size:
        raise RecordingError(
            f"{path}: {size} bytes that unpack to {total / 2**30:.3g} GB are no recording"
        )
    return members
