"""What the sets' readers share: windows of a recording, tables, checksums, the way to 65 Hz."""

from __future__ import annotations

import csv
import hashlib
import re
import warnings
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
from numpy.typing import NDArray

from normwear_fast.errors import InputError, RecordingError, reading

Label = int | float | tuple[float, ...]


@dataclass(frozen=True)
class Piece:
    """One labelled piece of a raw recording.

    Attributes:
        subject: whose it is.
        channels: (samples, rate in Hz) of each channel, of one duration.
        labels: one a task: a class, a target, or a tuple of targets.
        is_test: which half it is in, if the set says.
    """

    subject: str
    channels: tuple[tuple[NDArray[np.float64], float], ...]
    labels: tuple[Label, ...]
    is_test: bool | None = None


def to_model_rate(piece: Piece, target_rate: float = 65.0) -> tuple[NDArray[np.float64], int]:
    """The piece through the reference preprocessing (C, L), and how many channels were flat.

    Channels of different rates can end a sample apart, by the rounding up in the definition; the
    longer ones are cut at the end.
    """
    from normwear_fast.preprocess import FlatChannelWarning, fill_missing, preprocess

    channels = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", FlatChannelWarning)
        for values, rate in piece.channels:
            filled = np.nan_to_num(fill_missing(values)[0])
            channels.append(preprocess(filled, rate, target_rate))
    length = min(len(channel) for channel in channels)
    flat = sum(issubclass(warning.category, FlatChannelWarning) for warning in caught)
    return np.stack([channel[:length] for channel in channels]), flat


def cut(
    channels: Sequence[tuple[NDArray[np.float64], float]], duration: float
) -> Iterator[tuple[float, tuple[tuple[NDArray[np.float64], float], ...]]]:
    """Whole windows of `duration` s, one after another: (start in s, channels of the window).

    Channels may have different rates; a rest shorter than a window is left out.
    """
    whole = min(len(values) / rate for values, rate in channels)
    # Rounded down, so that windows of any rate give the same number of samples at 65 Hz.
    lengths = [int(duration * rate + 1e-9) for _, rate in channels]
    for index in range(int(whole / duration + 1e-9)):
        start = index * duration
        yield (
            start,
            tuple(
                (values[round(start * rate) :][:length], rate)
                for (values, rate), length in zip(channels, lengths, strict=True)
            ),
        )


def find_root(raw: Path, name: str, what: str) -> Path:
    """The folder at or below `raw`, at most two levels, that holds the entry `name`."""
    for pattern in ("", "*", "*/*"):
        for folder in sorted(raw.glob(pattern)) if pattern else [raw]:
            if (folder / name).exists():
                return folder
    raise RecordingError(f"{raw}: no {name} in it or two folders below; it should hold {what}")


def read_columns(path: Path, delimiter: str | None = None) -> NDArray[np.float64]:
    """A text file of numbers (rows, columns), whitespace-separated or by `delimiter`."""
    with (
        reading(path, RecordingError, "not a table of numbers"),
        path.open(encoding="utf-8-sig") as file,
    ):
        values = np.loadtxt(file, delimiter=delimiter, ndmin=2)
    if not values.size:
        raise RecordingError(f"{path}: no numbers in it")
    return values


def read_csv(path: Path) -> tuple[list[str], list[list[str]]]:
    """Header and rows of a CSV, names stripped."""
    with (
        reading(path, RecordingError, "not a CSV in UTF-8"),
        path.open(encoding="utf-8-sig", newline="") as file,
    ):
        rows = [row for row in csv.reader(file) if any(field.strip() for field in row)]
    if len(rows) < 2:
        raise RecordingError(f"{path}: no rows in it")
    return [name.strip() for name in rows[0]], rows[1:]


def column(header: Sequence[str], pattern: str, path: Path) -> int:
    """Index of the one column whose name matches `pattern`, regardless of case."""
    found = [i for i, name in enumerate(header) if re.search(pattern, name, re.IGNORECASE)]
    if len(found) != 1:
        raise RecordingError(
            f"{path}: {len(found)} columns like {pattern!r} among {', '.join(header)}; one is right"
        )
    return found[0]


def number(text: str, where: str) -> float:
    """A finite number of a table's cell."""
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not np.isfinite(value):
        raise InputError(f"{where}: {text!r}; a number is right")
    return value


_SHEET = "{http://schemas.openxmlformats.org/spreadsheetml/2006/main}"
# The largest table of these sets unpacks to 100 KB; a small file that unpacks to more than this is
# a trap.
_MAX_PART = 64 * 2**20


def read_xlsx(path: Path) -> list[list[str]]:
    """The first sheet of a workbook as text, row by row; empty cells are "".

    Enough of the format for a plain table: shared and inline strings, and numbers.
    """

    def part(archive: zipfile.ZipFile, name: str) -> Any:
        if archive.getinfo(name).file_size > _MAX_PART:
            raise RecordingError(f"{path}: {name} unpacks to more than {_MAX_PART >> 20} MB")
        data = archive.read(name)
        if b"<!DOCTYPE" in data or b"<!ENTITY" in data:
            raise RecordingError(f"{path}: {name} declares entities; a plain workbook is right")
        return ElementTree.fromstring(data)

    def text(node: Any) -> str:
        return "".join(piece.text or "" for piece in node.iter(f"{_SHEET}t"))

    with (
        reading(path, RecordingError, "not a plain .xlsx workbook"),
        zipfile.ZipFile(path) as archive,
    ):
        names = archive.namelist()
        shared = (
            [text(item) for item in part(archive, "xl/sharedStrings.xml")]
            if "xl/sharedStrings.xml" in names
            else []
        )
        sheets = [name for name in names if re.fullmatch(r"xl/worksheets/[^/]+\.xml", name)]
        if not sheets:
            raise RecordingError(f"{path}: not a plain .xlsx workbook (no sheet in it)")
        rows = []
        for row in part(archive, min(sheets)).iter(f"{_SHEET}row"):
            cells: dict[int, str] = {}
            for cell in row.iter(f"{_SHEET}c"):
                letters = re.match(r"[A-Z]+", cell.get("r", ""))
                index = len(cells)
                if letters:
                    index = 0
                    for letter in letters.group():
                        index = index * 26 + ord(letter) - 64
                    index -= 1
                value = cell.find(f"{_SHEET}v")
                if cell.get("t") == "inlineStr":
                    cells[index] = text(cell)
                elif value is not None and value.text is not None:
                    cells[index] = shared[int(value.text)] if cell.get("t") == "s" else value.text
            width = max(cells, default=-1) + 1
            if width > 10_000:
                raise RecordingError(f"{path}: a row of more than 10,000 cells")
            rows.append([cells.get(index, "").strip() for index in range(width)])
    return rows


def check_sums(folder: Path, files: Sequence[Path]) -> None:
    """Compare files with PhysioNet's SHA256SUMS.txt beside them, where it is there.

    Raises:
        RecordingError: a file differs from its published checksum.
    """
    listing = folder / "SHA256SUMS.txt"
    if not listing.is_file():
        return
    sums = {}
    for line in listing.read_text(encoding="utf-8", errors="replace").splitlines():
        digest, _, name = line.partition(" ")
        sums[name.strip().lstrip("*")] = digest.lower()
    for file in files:
        published = sums.get(file.relative_to(folder).as_posix())
        if published is None:
            continue
        with file.open("rb") as stream:
            found = hashlib.file_digest(stream, "sha256").hexdigest()
        if found != published:
            raise RecordingError(
                f"{file}: its SHA-256 is not the one in {listing.name}; download it again"
            )
