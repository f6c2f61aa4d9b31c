"""CSV and TSV, streamed through pyarrow.csv in blocks of 1 MB.

Separators are comma, tab and semicolon (with a decimal comma where the cells have one); a header line
is one whose cells are not all numbers, or that numbers its columns as pandas does (headers.py).
Numbers are channels. A column of text, such as a label, is left out and noted; text in a column of
numbers is an error of that column, and of no other: of the file only where no channel is left.
"""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Collection, Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from normwear_fast.errors import RecordingError, one_line
from normwear_fast.recordings.base import Array, register, split_units
from normwear_fast.recordings.clock import (
    Midnight,
    TimeColumn,
    choose_clock,
    time_column,
    wall_unit,
)
from normwear_fast.recordings.e4 import is_e4_file
from normwear_fast.recordings.headers import counts_rows, is_numbered_header, with_units
from normwear_fast.recordings.table import TableRecording

_SAMPLE_BYTES = 1 << 16
_BLOCK_BYTES = 1 << 20
_NULLS = {"", "nan", "-nan", "na", "n/a", "null", "none", "#n/a", "#na", "<na>"}
_NULL_CELLS = [*_NULLS, *map(str.upper, _NULLS), "NaN", "-NaN", "None", "Null"]  # for Arrow
_BLANK = " \t"  # what Arrow trims of a number
_ISO = re.compile(r"\d{4}-\d\d-\d\d([ T]\d\d(:?\d\d(:?\d\d(\.\d{1,9})?)?)?)?(Z|[+-]\d\d(:?\d\d)?)?")
_ZONED = re.compile(r".*:.*(Z|[+-]\d\d(:?\d\d)?)")
# a time of day, or hours since the start
_DAYTIME = re.compile(
    r"(?P<h>\d{1,3}):(?P<m>[0-5]\d)(?::(?P<s>[0-5]\d)(?:\.(?P<f>\d{1,9}))?)?", re.ASCII
)
_DAY = 86_400 * 10**9  # ns
_HOUR_US = 3_600 * 10**6
_SEPARATOR_LINE = re.compile(
    r'"?sep=([\t,;]|\\t)"?', re.IGNORECASE
)  # for Excel; Shimmer writes it too
_DIGITS = r"^[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?$"
_BOMS = (b"\xff\xfe", b"\xfe\xff")  # of UTF-16
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
        header, body = self._header(rows)
        if not body:
            raise RecordingError(f"{path}: holds no rows, only a header")
        above = len(rows) - len(body)
        self._skip = self._line_of[above - 1] + 1 if above else self._line_of[0]
        self._first_row = self._skip + 1
        # no row of data, and not of units either
        self._titled_twice = header is not None and not any(map(self._is_value, body[0]))
        columns = [[row[i] for row in body if i < len(row)] for i in range(width)]
        # what the column is called in the reader, where names must differ
        self._names = [f"{i}: {title.strip()}" for i, title in enumerate(header or [""] * width)]

        def choose(barred: Collection[str]) -> bool:
            self._types: dict[str, Any] = {}
            kept, others = self._choose(header, columns, sampling_rate, barred)
            self._columns = [self._names[i] for i in kept]
            self._headings = [header[i] if header else "" for i in kept]
            self._titles = [(self._title(name), "") for name in self._columns]
            return others

        self._survey_on(choose, self._survey_columns, sampling_rate)

    def _header(self, rows: list[list[str]]) -> tuple[list[str] | None, list[list[str]]]:
        """The titles, with their units where a row below has them, or None; and the rows of data.

        A line that begins with % is a comment, or begins with a title such as %SpO2.
        """
        values = all(self._is_value(cell) for cell in rows[0])
        if self._is_percent_header(rows[0]):
            return self._percent, rows
        if not values:
            if len(rows) > 2 and (titled := with_units(rows, self._is_value)):
                return titled, rows[2:]
            return rows[0], rows[1:]
        if is_numbered_header(rows[0], rows[1:]):
            if rows[0][0].strip():
                self.notes += (
                    f"row {self._line_of[0] + 1} ({one_line(self._separator.join(rows[0]), 40)}) is read "
                    f"as pandas' column numbers, not as a sample",
                )
            return rows[0], rows[1:]
        return None, rows

    def _is_percent_header(self, first: list[str]) -> bool:
        """Whether the line above the first, which begins with %, is the header: it has as many cells,
        and the first line is data. A lone one is a title if it is a word."""
        if len(self._percent) != len(first):
            return False
        if len(first) == 1 and not re.fullmatch(r"%\s?\w+", self._percent[0].strip()):
            return False
        # Na is sodium
        return "" in map(str.strip, first[1:]) or any(
            cell in _NULL_CELLS or (self._is_value(cell) and cell.casefold() not in _NULLS)
            for cell in map(str.strip, first)
            if cell
        )

    def _title(self, name: str) -> str:
        """What a user calls a column: its title, or its place."""
        place, title = name.split(": ", 1)
        return title or f"column {int(place) + 1}"

    def _survey_columns(self, given: float | None) -> None:
        """The survey; again if a column of numbers turns out to hold text, or one of times of day such
        as Arrow does not read.

        Then every cell is looked at as text, so that each column's first fault is known and costs
        that column alone. Columns without a value in the sample are read so from the start.
        """
        import pyarrow as pa

        self._numbers: set[str] = set(self._columns) - self._late
        self._faults: dict[str, str] = {}  # columns with text, and what and where it is
        before = self.notes, self.start_time
        while True:
            try:
                self._survey(given)
                break
            except _TextError as error:
                again = [self._time_name] if error.column == self._time_name else self._columns
                self._types.update(dict.fromkeys(again, pa.string()))
                self.notes, self.start_time = before
                self._unit = self._origin = None
        faults = [self._faults.get(self._columns[place]) for place in self._places]
        if faults and all(faults):
            raise RecordingError(f"{self.path}: {faults[0]}")
        self.unreadable = tuple(place for place, fault in enumerate(faults) if fault)
        if any(faults):
            sound = [c.name for c, fault in zip(self.channels, faults, strict=True) if not fault]
            named = ",".join(sound) if len(sound) <= 8 else "A,B,..."
            self._advice = f"; name the channels you want: --channels {named!r}"
            self.notes += tuple(fault for fault in faults if fault)
        for name in self._columns:
            self._types[name] = pa.float64()
        if self.start_time is None and self._second_start is not None:
            title, self.start_time = self._second_start
            self.notes += (f"the start time is the first in column {title!r}",)

    def _no_channel(self, place: int) -> str | None:
        name = self._columns[place]
        if name in self._faults:
            number = name in self._numbers
            return None if number else f"column {self._title(name)!r} holds text and is left out"
        reason = super()._no_channel(place)
        if reason is not None and not self._headings[place].strip():
            title = self._title(f"{name.split(':')[0]}: ")
            return f"{title} has no name and no value and is left out"
        return reason

    def _named(self, places: list[int]) -> list[tuple[str, str]]:
        return split_units([self._headings[place] for place in places])

    def _blocks(self, channels: list[int], seconds: float) -> Iterator[list[Array]]:
        for channel in channels:
            fault = self._faults.get(self._columns[self._places[channel]])
            if fault is not None:
                raise RecordingError(f"{self.path}: {fault}{self._advice}")
        return super()._blocks(channels, seconds)

    def _sniff(self) -> list[list[str]]:
        """Cells of the first lines; sets separator, decimal point and the lines to skip."""
        with self.path.open("rb") as file:
            raw = file.read(_SAMPLE_BYTES)
        lines = self._decoded(raw).splitlines()
        if len(raw) == _SAMPLE_BYTES and len(lines) > 2:
            lines.pop()  # cut off by the sample's end
        skip, declared, percent = 0, "", ""
        while skip < len(lines):
            line = lines[skip].strip()
            if match := _SEPARATOR_LINE.fullmatch(lines[skip]):
                declared = "\t" if match[1] == "\\t" else match[1]
            elif line and not line.startswith(("#", "%")):
                break
            percent = line if line.startswith("%") else ""
            skip += 1
        # rows of the sample -> lines of the file above them
        self._line_of = [i for i in range(skip, len(lines)) if lines[i].strip()]
        lines = [lines[i] for i in self._line_of]
        if not lines:
            raise RecordingError(f"{self.path}: holds no rows")
        self._separator = ","
        for separator in (declared, "\t", ";", ","):
            if separator and len(next(csv.reader(lines[:1], delimiter=separator))) > 1:
                self._separator = separator
                break
        self._check_preamble(lines)
        self._percent = next(csv.reader([percent], delimiter=self._separator), [])
        rows = list(csv.reader(lines, delimiter=self._separator))
        self._decimal = "."
        if self._separator != ",":
            cells = [cell for row in rows[1:] for cell in row]
            if any(_DECIMAL_COMMA.fullmatch(cell) for cell in cells):
                self._decimal = ","
        return rows

    def _decoded(self, raw: bytes) -> str:
        """The sample as text; sets the encoding."""
        whole = len(raw) < _SAMPLE_BYTES
        self._encoding = "utf-16" if raw.startswith(_BOMS) else "utf8"
        if self._encoding == "utf-16":
            try:
                return raw.decode("utf-16", errors="strict" if whole else "ignore")
            except UnicodeDecodeError as error:
                reason = f"is damaged UTF-16: {one_line(error)}"
                raise RecordingError(f"{self.path}: {reason}") from error
        if b"\0" in raw:
            raise RecordingError(f"{self.path}: is not text; a CSV file is UTF-8 text")
        try:
            return raw.decode("utf-8-sig", errors="strict" if whole else "ignore")
        except UnicodeDecodeError:
            return raw.decode("latin-1")

    def _check_preamble(self, lines: list[str]) -> None:
        """Refuse lines above the table that are no part of it, as some devices write them."""
        for separator in (self._separator, "\t", ";", ","):
            widths = [len(row) for row in csv.reader(lines, delimiter=separator)]
            if separator == self._separator and len(set(widths)) == 1 < widths[0]:
                return
            if len(widths) == len(lines) and widths[-1] > max(1, widths[0]):
                above = next(i for i in range(len(widths), 0, -1) if widths[i - 1] != widths[-1])
                if above > 1 and len(widths) - above > 2 and widths[:above].count(widths[-1]) == 0:
                    raise RecordingError(
                        f"{self.path}: the table begins in row {self._line_of[above] + 1}, with "
                        f"{widths[-1]} columns; delete the rows above it, or begin each with #"
                    )

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
        self,
        header: list[str] | None,
        columns: list[list[str]],
        given: float | None,
        barred: Collection[str],
    ) -> tuple[list[int], bool]:
        """Find the time column and the channels.

        Returns:
            (the channels' places, whether there are other time columns than the clock)
        """
        import pyarrow as pa

        kinds = [self._kind(cells) for cells in columns]
        self._late = {self._names[i] for i, kind in enumerate(kinds) if kind == "empty"}
        index = (header or ["."])[0].strip() in ("", "Unnamed: 0") and kinds[0] == "number"
        counted = index and counts_rows(columns[0])
        times = self._choose_clock(header, columns, kinds, given, index and not counted, barred)
        others = len([i for i in times if self._title(self._names[i]) not in barred]) > 1
        kept = []
        for i, kind in enumerate(kinds):
            title = self._title(self._names[i])
            if i in times:
                continue
            if kind in ("text", "time"):
                self.notes += (f"column {title!r} holds text and is left out",)
            elif i == 0 and counted:
                self.notes += ("the first column counts rows and is left out",)
            else:
                kept.append(i)
                self._types[self._names[i]] = pa.string() if kind == "empty" else pa.float64()
        return kept, others

    def _choose_clock(
        self,
        header: list[str] | None,
        columns: list[list[str]],
        kinds: list[str],
        given: float | None,
        index: bool,
        barred: Collection[str],
    ) -> dict[int, TimeColumn]:
        """Find the time column, and the start time where only another clock tells it.

        Args:
            header: the titles.
            columns: their cells in the sample.
            kinds: theirs.
            given: the user's --rate.
            index: the first column, which has no name, may be the clock by its values.
            barred: titles of such as turned out to be none.

        Returns:
            All time columns by their places.
        """
        import pyarrow as pa

        self._time: TimeColumn | None = None
        self._time_name = ""
        self._second_start: tuple[str, datetime] | None = None
        every = {
            i: found
            for i, title in enumerate(header or [])
            if (found := time_column(title.strip())) is not None
        }
        times = {i: found for i, found in every.items() if found.title not in barred}
        out = {i: found for i, found in every.items() if found.title in barred}
        if index and not times:
            times[0] = TimeColumn(self._title(self._names[0]), None, sure=False)
        clock, channels = choose_clock(
            list(times.values()), [self._times(columns[i], kinds[i]) for i in times], given
        )
        titles = [(i, found) for i, found in times.items()]
        for place in channels:
            i, found = titles[place]
            del times[i]
            if kinds[i] == "number" and header and header[i].strip():
                self.notes += (f"column {found.title!r} is not taken for a clock: it is a channel",)
        for i, kind in enumerate(kinds):
            # without a name, wall-clock times still are what they are, if they run
            if kind == "time" and not times and i not in out:
                unnamed = TimeColumn(self._title(self._names[i]), None, weak=True)
                if unnamed.title in barred:
                    out[i] = unnamed
                elif self._runs(columns[i]):
                    times[i] = unnamed
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
                if self._second_start is None and columns[i]:
                    cell = columns[i][0].strip()
                    local = found.local and self._is_number(cell)
                    start = None if local else self._wall_clock(cell)
                    self._second_start = None if start is None else (found.title, start)
        return times | out

    def _wall_clock(self, cell: str) -> datetime | None:
        """The moment that a time with a date, or seconds and the like since 1970, is."""
        if self._is_number(cell):
            unit = wall_unit(self._number(cell))
            if unit is None:
                return None
            return datetime(1970, 1, 1, tzinfo=UTC) + timedelta(seconds=self._number(cell) * unit)
        try:
            start = datetime.fromisoformat(cell) if _ISO.fullmatch(cell) else None
        except ValueError:
            return None  # more digits than datetime takes
        return start.astimezone(UTC) if start is not None and _ZONED.fullmatch(cell) else start

    def _times(self, cells: list[str], kind: str) -> NDArray[np.float64] | NDArray[np.datetime64]:
        """The numbers of a time column's sample, none for text, or its wall-clock times."""
        if kind == "time":
            return _moments(cells)
        if kind == "text":
            return np.empty(0)
        return np.array([self._number(cell) if self._is_number(cell) else np.nan for cell in cells])

    def _runs(self, cells: list[str]) -> bool:
        """Whether wall-clock times are a clock's: all there, never back but for midnight, and moving.
        A pace of 5:32 or a lap of 0:45 is written as they are."""
        times = _moments(cells)
        days = [_daytime(cell) for cell in cells]
        falls = [(a, b) for a, b in pairwise(days) if a is not None and b is not None and b < a]
        return bool(
            not np.isnat(times).any()
            and (np.diff(times) >= np.timedelta64(0)).all()
            and times[-1] > times[0]
            and all(a >= 23 * _HOUR_US and b < _HOUR_US for a, b in falls)
        )

    def _kind(self, cells: list[str]) -> str:
        """ "number", "time", "text" or "empty": text if not one cell of the sample is a value."""
        cells = [cell.strip() for cell in cells if cell.strip().casefold() not in _NULLS]
        if not cells:
            return "empty"
        if any(self._is_number(cell) for cell in cells):
            return "number"
        if _ISO.fullmatch(cells[0]) or _DAYTIME.fullmatch(cells[0]):
            return "time"
        return "text"

    def _set_wall_clock(self, column: TimeColumn, cells: list[str]) -> None:
        import pyarrow as pa

        first = next(cell.strip() for cell in cells if cell.strip())
        self._time = replace(column, seconds=1e-9)
        if _DAYTIME.fullmatch(first):
            self._types[self._time_name] = pa.time64("ns")
            return
        zoned = _ZONED.fullmatch(first) is not None
        self._types[self._time_name] = pa.timestamp("ns", "UTC" if zoned else None)
        self.start_time = self._wall_clock(first)

    def _rows(
        self, channels: list[int], *, time: bool
    ) -> Iterator[tuple[NDArray[Any], list[Array]]]:
        import pyarrow as pa

        columns = [self._columns[c] for c in channels]
        wanted = [self._time_name, *columns] if time else columns or self._names[:1]
        row = self._first_row
        midnight = Midnight(_DAY)
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
                kind = column.type
                if kind == pa.string():
                    times = self._daytimes(column, row)
                else:
                    column = column if kind == pa.float64() else column.cast(pa.int64())
                    times = column.to_numpy(zero_copy_only=False)
                if kind in (pa.string(), pa.time64("ns")):
                    times = midnight(times)
            yield times, [self._values(batch.column(name), name, row) for name in columns]
            row += batch.num_rows

    def _daytimes(self, column: Any, row: int) -> NDArray[np.int64]:
        """Times of day, or since the start, as ns. Arrow reads neither 9:59:55 nor 25:10:00.

        Args:
            column: strings, none missing.
            row: of the first.
        """
        import pyarrow as pa
        from pyarrow import compute

        parts = compute.extract_regex(column, rf"^\s*{_DAYTIME.pattern}\s*$")
        if parts.null_count:
            bad = int(np.argmax(parts.is_null().to_numpy(False)))
            reason = self._no_value(row + bad, self._time_name, column[bad].as_py(), "a time")
            raise RecordingError(f"{self.path}: {reason}")
        hours, minutes, seconds, fraction = (
            # what is not there counts as none: "10:00" has no seconds
            compute.utf8_rpad(compute.utf8_lpad(parts.field(name), least, "0"), width, "0")
            .cast(pa.int64())
            .to_numpy()
            for name, least, width in (("h", 1, 1), ("m", 1, 1), ("s", 1, 1), ("f", 0, 9))
        )
        times: NDArray[np.int64] = (hours * 3600 + minutes * 60 + seconds) * 10**9 + fraction
        return times

    def _values(self, column: Any, name: str, row: int) -> Array:
        """A column as numbers. Of one that is read as text it is found out on the way whether it holds
        any, and whether anything else.

        Args:
            column: of a batch.
            name: the column's.
            row: the batch's first.
        """
        import pyarrow as pa
        from pyarrow import compute

        if column.type != pa.string():
            return _floats(column)
        if column.null_count == len(column):
            return np.full(len(column), np.nan)
        column = compute.utf8_trim(column, _BLANK)
        if self._decimal == ",":
            column = compute.replace_substring(column, ",", ".")
        try:
            values = _floats(column.cast(pa.float64()))
        except pa.ArrowInvalid:
            if name not in self._faults:
                place, cell = next(
                    (i, cell)
                    for i, cell in enumerate(column.to_pylist())
                    if cell is not None and not _is_float(cell)
                )
                self._faults[name] = self._no_value(row + place, name, cell, "a number")
            if compute.any(compute.match_substring_regex(column, _DIGITS)).as_py():
                self._numbers.add(name)
            return np.full(len(column), np.nan)
        self._numbers.add(name)
        return values

    def _batches(self, wanted: list[str]) -> Iterator[Any]:
        """Record batches of some columns."""
        import pyarrow as pa
        from pyarrow import csv as reader

        try:
            with reader.open_csv(
                pa.OSFile(os.fsencode(self.path)),  # a name need not be UTF-8
                # one thread: only then do errors name the row
                read_options=reader.ReadOptions(
                    use_threads=False,
                    block_size=_BLOCK_BYTES,
                    encoding=self._encoding,
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
                    null_values=_NULL_CELLS,
                    strings_can_be_null=True,
                ),
            ) as batches:
                yield from batches
        except (pa.ArrowInvalid, UnicodeError) as error:
            raise self._explain(error) from error

    def _explain(self, error: Exception) -> RecordingError:
        """pyarrow's message with the column's name instead of its place."""
        bad = re.search(
            r"CSV column #(\d+): Row #(\d+): .*? to (\S+):.*? '(.*)'", " ".join(str(error).split())
        )
        if bad:
            name = self._names[int(bad[1])]
            right = "a number" if bad[3] == "double" else "a time like the first row's"
            reason = f"{self.path}: {self._no_value(int(bad[2]), name, bad[4], right)}"
            if name in self._columns or bad[3].startswith("time64"):
                return _TextError(reason, name)
            return RecordingError(reason)
        text = one_line(error)
        if "straddling" in text:
            text = "has a line of over 1 MB; one row is one sample of every channel"
        ragged = re.search(r"Row #(\d+): Expected (\d+) columns, got (\d+)", text)
        if ragged:
            text = f"row {ragged[1]} has {ragged[3]} columns, the first row {ragged[2]}"
        return RecordingError(f"{self.path}: {text}")

    def _no_value(self, row: int, name: str, cell: str, right: str) -> str:
        hint = (
            "; one row of titles is right" if self._titled_twice and row == self._first_row else ""
        )
        title = self._title(name)
        return f"row {row}, column {title!r}: {one_line(cell, 60)!r} is not {right}{hint}"


class _TextError(RecordingError):
    """A column holds what Arrow does not read as what it was taken for."""

    def __init__(self, reason: str, column: str) -> None:
        super().__init__(reason)
        self.column = column


def _daytime(cell: str) -> int | None:
    """A time of day, us."""
    match = _DAYTIME.fullmatch(cell.strip())
    if match is None:
        return None
    seconds = int(match["h"]) * 3600 + int(match["m"]) * 60 + int(match["s"] or 0)
    return seconds * 10**6 + int((match["f"] or "").ljust(6, "0")[:6])


def _moments(cells: list[str]) -> NDArray[np.datetime64]:
    """Wall-clock times to a microsecond, those of day without a date going on past midnight."""
    moments = np.full(len(cells), np.datetime64("NaT"), dtype="datetime64[us]")
    days = {i: at for i, cell in enumerate(cells) if (at := _daytime(cell)) is not None}
    if days:
        times = Midnight(_DAY // 1000)(np.array(list(days.values()), dtype=np.int64))
        moments[list(days)] = times.astype("datetime64[us]")
        return moments
    for i, cell in enumerate(map(str.strip, cells)):
        try:
            moment = datetime.fromisoformat(cell) if _ISO.fullmatch(cell) else None
        except ValueError:
            continue
        if moment is not None and moment.tzinfo is not None:
            moment = moment.astimezone(UTC).replace(tzinfo=None)
        if moment is not None:
            moments[i] = np.datetime64(moment, "us")
    return moments


def _is_float(cell: str) -> bool:
    """Whether Arrow takes a cell for a number: Python does more, such as 1_000."""
    import pyarrow as pa

    try:
        pa.scalar(cell).cast(pa.float64())
    except pa.ArrowInvalid:
        return False
    return True


def _floats(column: Any) -> Array:
    """A pyarrow column as float64 with NaN for nulls and infinities."""
    values: Array = np.array(column.to_numpy(zero_copy_only=False), dtype=np.float64)
    values[~np.isfinite(values)] = np.nan
    return values
