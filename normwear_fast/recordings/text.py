"""CSV and TSV, streamed through pyarrow.csv in blocks of 1 MB.

Separators are comma, tab and semicolon (with a decimal comma where the cells have one); a header line
is one whose cells are not all numbers. Numbers are channels. A column that is text from the start,
such as a label, is left out and noted; text further down in a column of numbers is an error.
"""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from normwear_fast.errors import RecordingError, one_line
from normwear_fast.recordings.base import Array, register, split_units
from normwear_fast.recordings.clock import TimeColumn, choose_clock, time_column
from normwear_fast.recordings.e4 import is_e4_file
from normwear_fast.recordings.table import TableRecording

_SAMPLE_BYTES = 1 << 16
_BLOCK_BYTES = 1 << 20
_NULLS = {"", "nan", "-nan", "na", "n/a", "null", "none", "#n/a", "#na", "<na>"}
_ISO = re.compile(r"\d{4}-\d\d-\d\d([ T]\d\d(:?\d\d(:?\d\d(\.\d{1,9})?)?)?)?(Z|[+-]\d\d(:?\d\d)?)?")
_ZONED = re.compile(r".*:.*(Z|[+-]\d\d(:?\d\d)?)")
_DAYTIME = re.compile(r"\d\d:\d\d(:\d\d(\.\d{1,9})?)?")
_DECIMAL_COMMA = re.compile(r"\s*[+-]?\d*,\d+([eE][+-]?\d+)?\s*")


@register(".csv", ".tsv")
class TextRecording(TableRecording):
    """A CSV or TSV file; every row is a sample."""

    format = "CSV"

    def __init__(self, path: Path, *, sampling_rate: float | None = None) -> None:
        self.path = path
        if is_e4_file(path):
            raise RecordingError(
                f"{path}: is one sensor of an Empatica E4 session; give the folder {path.parent}"
            )
        self.format = path.suffix[1:].upper()
        rows = self._sniff()
        width = len(rows[0])
        if width == 1:
            self._check_separator([row[0] for row in rows if row])
        header = None if all(self._is_value(cell) for cell in rows[0]) else rows[0]
        body = rows[1:] if header else rows
        if not body:
            raise RecordingError(f"{path}: holds no rows, only a header")
        self._skip += bool(header)
        self._first_row = self._skip + 1
        columns = [[row[i] for row in body if i < len(row)] for i in range(width)]
        # what the column is called in the reader, where names must differ
        self._names = [f"{i}: {title.strip()}" for i, title in enumerate(header or [""] * width)]
        self._types: dict[str, Any] = {}
        kept = self._choose(header, columns, sampling_rate)
        self._columns = [self._names[i] for i in kept]
        self._titles = split_units([header[i] if header else "" for i in kept])
        self._survey(sampling_rate)

    def _sniff(self) -> list[list[str]]:
        """Cells of the first lines; sets separator, decimal point and the lines to skip."""
        with self.path.open("rb") as file:
            raw = file.read(_SAMPLE_BYTES)
        if b"\0" in raw:
            raise RecordingError(f"{self.path}: is not text; a CSV file is UTF-8 text")
        try:
            text = raw.decode(
                "utf-8-sig", errors="strict" if len(raw) < _SAMPLE_BYTES else "ignore"
            )
        except UnicodeDecodeError:
            text = raw.decode("latin-1")
        lines = text.splitlines()
        if len(raw) == _SAMPLE_BYTES and len(lines) > 2:
            lines.pop()  # cut off by the sample's end
        self._skip = 0
        while lines and (not lines[0].strip() or lines[0].startswith("#")):
            lines.pop(0)
            self._skip += 1
        lines = [line for line in lines if line.strip()]
        if not lines:
            raise RecordingError(f"{self.path}: holds no rows")
        self._separator = ","
        for separator in ("\t", ";", ","):
            if len(next(csv.reader(lines[:1], delimiter=separator))) > 1:
                self._separator = separator
                break
        rows = list(csv.reader(lines, delimiter=self._separator))
        self._decimal = "."
        if self._separator != ",":
            cells = [cell for row in rows[1:] for cell in row]
            if any(_DECIMAL_COMMA.fullmatch(cell) for cell in cells):
                self._decimal = ","
        return rows

    def _check_separator(self, lines: list[str]) -> None:
        """Refuse one column of cells that are several, all as many, with another separator."""
        body = lines[1:50]
        for name, separator in (("'|'", "|"), ("spaces", None)):
            parts = [line.strip().strip("|").split(separator) for line in body]
            if (
                parts
                and len(parts[0]) > 1
                and {len(part) for part in parts} == {len(parts[0])}
                and not any(self._is_value(line) for line in body)
                and any(self._is_number(cell) for cell in parts[-1])
            ):
                raise RecordingError(
                    f"{self.path}: columns are separated by {name}; comma, semicolon or tab is right"
                )

    def _number(self, cell: str) -> float:
        return float(cell.replace(self._decimal, ".") if self._decimal == "," else cell)

    def _is_number(self, cell: str) -> bool:
        try:
            self._number(cell)
        except ValueError:
            return False
        return "_" not in cell  # float() reads 1_000; a CSV reader does not

    def _is_value(self, cell: str) -> bool:
        """A number, a time or nothing: what a line of data is made of."""
        cell = cell.strip()
        return bool(
            cell.casefold() in _NULLS
            or self._is_number(cell)
            or _ISO.fullmatch(cell)
            or _DAYTIME.fullmatch(cell)
        )

    def _choose(
        self, header: list[str] | None, columns: list[list[str]], given: float | None
    ) -> list[int]:
        """Find the time column and the channels; returns the channels' places."""
        import pyarrow as pa

        kinds = [self._kind(cells) for cells in columns]
        self._time: TimeColumn | None = None
        self._time_name = ""
        times = {
            i: found
            for i, title in enumerate(header or [])
            if (found := time_column(title)) is not None
        }
        clock, channels = choose_clock(
            list(times.values()), [self._times(columns[i], kinds[i]) for i in times], given
        )
        titles = [(i, found) for i, found in times.items()]
        for place in channels:
            i, found = titles[place]
            del times[i]
            if kinds[i] == "number":
                self.notes += (f"column {found.title!r} is not taken for a clock: it is a channel",)
        for i, kind in enumerate(kinds):
            # without a name, wall-clock times still are what they are
            if kind == "time" and not times:
                times[i] = TimeColumn(header[i] if header else f"column {i + 1}", None)
                titles, clock = [(i, times[i])], 0
        if clock is not None:
            i, found = titles[clock]
            if kinds[i] == "text":
                cell = next(cell for cell in columns[i] if cell.strip())
                raise RecordingError(
                    f"{self.path}: time column {found.title!r} has {cell!r}; numbers or "
                    f"ISO 8601 times such as 2024-05-31 13:58:58.081 are right"
                )
            self._time, self._time_name = found, self._names[i]
            if kinds[i] == "time":
                self._set_wall_clock(found, columns[i])
            else:
                self._types[self._time_name] = pa.float64()
        for i, found in times.items():
            if self._names[i] != self._time_name:
                self.notes += (f"column {found.title!r} is a second clock and left out",)
        kept = []
        for i, kind in enumerate(kinds):
            title = header[i].strip() if header else f"column {i + 1}"
            if i in times:
                continue
            if kind in ("text", "time"):
                self.notes += (f"column {title!r} holds text and is left out",)
            elif (not header or not title) and len(kinds) > 1 and self._is_empty(i, columns[i]):
                self.notes += (f"column {i + 1} has no name and no value and is left out",)
            elif i == 0 and header and title in ("", "Unnamed: 0") and self._counts(columns[0]):
                self.notes += ("the first column counts rows and is left out",)
            else:
                kept.append(i)
                self._types[self._names[i]] = pa.float64()
        return kept

    def _times(self, cells: list[str], kind: str) -> NDArray[np.float64] | None:
        """The numbers of a time column's sample, none for text; None for wall-clock times."""
        if kind != "number":
            return None if kind == "time" else np.empty(0)
        return np.array([self._number(cell) if self._is_number(cell) else np.nan for cell in cells])

    def _kind(self, cells: list[str]) -> str:
        """ "number", "time" or "text": text if not one cell of the sample is a value."""
        cells = [cell.strip() for cell in cells if cell.strip().casefold() not in _NULLS]
        if not cells or any(self._is_number(cell) for cell in cells):
            return "number"
        if _ISO.fullmatch(cells[0]) or _DAYTIME.fullmatch(cells[0]):
            return "time"
        return "text"

    def _counts(self, cells: list[str]) -> bool:
        """Row numbers, as pandas writes them."""
        return len(cells) > 1 and [c.strip() for c in cells] in (
            [str(i) for i in range(len(cells))],
            [str(i + 1) for i in range(len(cells))],
        )

    def _is_empty(self, place: int, cells: list[str]) -> bool:
        """Whether a column has no value in the whole file."""
        if any(cell.strip().casefold() not in _NULLS for cell in cells):
            return False
        batches = self._batches([self._names[place]])
        return all(batch.column(0).null_count == batch.num_rows for batch in batches)

    def _set_wall_clock(self, column: TimeColumn, cells: list[str]) -> None:
        import pyarrow as pa

        first = next(cell.strip() for cell in cells if cell.strip())
        self._time = TimeColumn(column.title, 1e-9)
        if _DAYTIME.fullmatch(first):
            self._types[self._time_name] = pa.time64("ns")
            return
        zoned = _ZONED.fullmatch(first) is not None
        self._types[self._time_name] = pa.timestamp("ns", "UTC" if zoned else None)
        try:
            start = datetime.fromisoformat(first)
        except ValueError:
            return  # more digits than datetime takes
        self.start_time = start.astimezone(UTC) if zoned else start

    def _rows(
        self, channels: list[int], *, time: bool
    ) -> Iterator[tuple[NDArray[Any], list[Array]]]:
        import pyarrow as pa

        columns = [self._columns[c] for c in channels]
        wanted = [self._time_name, *columns] if time else columns or self._names[:1]
        row = self._first_row
        for batch in self._batches(wanted):
            times = np.zeros(batch.num_rows)
            if time:
                column = batch.column(0)
                if column.null_count:
                    bad = row + int(np.argmax(column.is_null().to_numpy(False)))
                    raise RecordingError(
                        f"{self.path}: row {bad} has no time in column "
                        f"{self._time.title if self._time else ''!r}"
                    )
                if self._types[self._time_name] != pa.float64():
                    column = column.cast(pa.int64())
                times = column.to_numpy(zero_copy_only=False)
            row += batch.num_rows
            yield times, [_floats(batch.column(name)) for name in columns]

    def _batches(self, wanted: list[str]) -> Iterator[Any]:
        """Record batches of some columns."""
        import pyarrow as pa
        from pyarrow import csv as reader

        nulls = [*_NULLS, *map(str.upper, _NULLS), "NaN", "-NaN", "None", "Null"]
        try:
            with reader.open_csv(
                pa.OSFile(os.fsencode(self.path)),  # a name need not be UTF-8
                # one thread: only then do errors name the row
                read_options=reader.ReadOptions(
                    use_threads=False,
                    block_size=_BLOCK_BYTES,
                    skip_rows=self._skip,
                    column_names=self._names,
                ),
                parse_options=reader.ParseOptions(
                    delimiter=self._separator,
                    # in a file of one column an empty line is a missing sample
                    ignore_empty_lines=len(self._names) > 1,
                ),
                convert_options=reader.ConvertOptions(
                    column_types={
                        name: self._types.get(name, pa.string()) for name in dict.fromkeys(wanted)
                    },
                    include_columns=list(dict.fromkeys(wanted)),
                    decimal_point=self._decimal,
                    null_values=nulls,
                    strings_can_be_null=True,
                ),
            ) as batches:
                yield from batches
        except pa.ArrowInvalid as error:
            raise RecordingError(self._explain(error)) from error

    def _explain(self, error: Exception) -> str:
        """pyarrow's message with the column's name instead of its place."""
        bad = re.search(
            r"CSV column #(\d+): Row #(\d+): .*? to (\S+):.*? '(.*)'", " ".join(str(error).split())
        )
        if bad:
            title = self._names[int(bad[1])].split(": ", 1)[1] or f"column {int(bad[1]) + 1}"
            right = "a number" if bad[3] == "double" else "a time like the first row's"
            return f"{self.path}: row {bad[2]}, column {title!r}: {one_line(bad[4], 60)!r} is not {right}"
        text = one_line(error)
        if "straddling" in text:
            return f"{self.path}: has a line of over 1 MB; one row is one sample of every channel"
        ragged = re.search(r"Row #(\d+): Expected (\d+) columns, got (\d+)", text)
        if ragged:
            return (
                f"{self.path}: row {ragged[1]} has {ragged[3]} columns, the first row {ragged[2]}"
            )
        return f"{self.path}: {text}"


def _floats(column: Any) -> Array:
    """A pyarrow column as float64 with NaN for nulls and infinities."""
    values: Array = np.array(column.to_numpy(zero_copy_only=False), dtype=np.float64)
    values[~np.isfinite(values)] = np.nan
    return values
