"""CSV and TSV, streamed through pyarrow.csv in blocks of 1 MB.

Separators are comma, tab and semicolon (with a decimal comma where the cells have one); a header line
is one whose cells are not all numbers, or that numbers its columns as pandas does (headers.py).
Numbers are channels. A column of text, such as a label, is left out and noted; text in a column of
numbers is an error of that column, and of no other: of the file only where no channel is left.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from normwear_fast.errors import RecordingError, one_line
from normwear_fast.recordings.base import Array, register, split_units
from normwear_fast.recordings.columns import FirstLook, Roles, assign
from normwear_fast.recordings.e4 import is_e4_file
from normwear_fast.recordings.headers import NULL_CELLS, Head, is_null
from normwear_fast.recordings.table import TableRecording
from normwear_fast.recordings.wallclock import (
    DAY,
    Midnight,
    daytimes,
    is_date,
    is_daytime,
    is_since_start,
    is_time,
    is_zoned,
    moment,
    moments,
)

_BLOCK_BYTES = 1 << 20
_BLANK = " \t"  # what Arrow trims of a number
_INTEGER = re.compile(r"\s*[+-]?\d{1,18}\s*", re.ASCII)
_DIGITS = r"^[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?$"


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
        self._head = head = Head(path)
        self.notes += head.notes
        self._first_row = head.skip + 1
        # no row of data, and not of units either
        self._titled_twice = head.titles is not None and not any(map(head.is_value, head.rows[0]))
        titles = [title.strip() for title in head.titles or [""] * len(head.rows[0])]
        # by what the column is called in the reader, where names must differ
        self._headings = {f"{i}: {title}": title for i, title in enumerate(titles)}
        self._names = list(self._headings)
        looks = [self._first_look(place) for place in range(len(self._names))]
        self._survey_on(lambda barred: self._choose(looks, sampling_rate, barred), sampling_rate)

    def _title(self, name: str) -> str:
        """What a user calls a column: its title, or its place."""
        return self._headings[name] or f"column {self._names.index(name) + 1}"

    def _first_look(self, place: int) -> FirstLook:
        """A column by its title and its cells in the sample: text if not one of them is a value."""
        head, title = self._head, self._title(self._names[place])
        cells = [row[place].strip() for row in head.rows if place < len(row)]
        there = [cell for cell in cells if not is_null(cell)]
        if not there:
            return FirstLook(title, "empty", np.full(len(cells), np.nan))
        if any(map(head.is_number, there)):
            index = place == 0 and head.titles is not None
            index = index and self._headings[self._names[0]] in ("", "Unnamed: 0")
            numbers: NDArray[Any] = np.array(
                [head.number(cell) if head.is_number(cell) else np.nan for cell in cells]
            )
            if all(map(_INTEGER.fullmatch, cells)):
                numbers = np.array(cells, dtype=np.int64)
            return FirstLook(title, "number", numbers, index=index)
        if all(map(is_date, there)):
            return FirstLook(title, "date", moments(cells), moment(cells[0]))
        if is_time(there[0]):
            of_day = is_daytime(there[0]) and not is_since_start(there[0])
            return FirstLook(
                title, "time", moments(cells), moment(cells[0]), of_day, example=there[0]
            )
        return FirstLook(title, "text", np.array(cells), example=there[0])

    def _choose(
        self, looks: list[FirstLook], given: float | None, barred: Collection[str]
    ) -> Roles:
        """Take the columns for what their first rows say."""
        import pyarrow as pa

        roles = assign(self.path, looks, given, barred)
        self._time = roles.time
        self._clock_names: list[str] = []  # the time column, and its column of days
        # those without a value yet may turn out to hold text
        self._late = {self._names[i] for i in roles.channels if looks[i].kind == "empty"}
        self._columns = [self._names[i] for i in roles.channels]
        self._titles = [(looks[i].title, "") for i in roles.channels]
        self._types: dict[str, Any] = {
            name: pa.string() if name in self._late else pa.float64() for name in self._columns
        }
        if roles.clock is None or roles.time is None:
            return roles
        look, name = looks[roles.clock], self._names[roles.clock]
        self._clock_names = [name]
        self._types[name] = pa.float64()
        if look.kind == "time":
            self._time = replace(roles.time, seconds=1e-9)
            zone = "UTC" if is_zoned(look.example) else None
            dated = not is_daytime(look.example)
            self._types[name] = pa.timestamp("ns", zone) if dated else pa.time64("ns")
        if roles.date is not None:
            self._clock_names.append(self._names[roles.date])
            self._types[self._names[roles.date]] = pa.date32()
        return roles

    def _survey(self, given: float | None) -> None:
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
                super()._survey(given)
                break
            except _TextError as error:
                again = (
                    self._clock_names[:1] if error.column in self._clock_names else self._columns
                )
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

    def _no_channel(self, place: int) -> str | None:
        name = self._columns[place]
        if name in self._faults:
            number = name in self._numbers
            return None if number else f"column {self._title(name)!r} holds text and is left out"
        reason = super()._no_channel(place)
        if reason is not None and not self._headings[name]:
            return f"{self._title(name)} has no name and no value and is left out"
        return reason

    def _named(self, places: list[int]) -> list[tuple[str, str]]:
        return split_units([self._headings[self._columns[place]] for place in places])

    def _blocks(self, channels: list[int], seconds: float) -> Iterator[list[Array]]:
        for channel in channels:
            fault = self._faults.get(self._columns[self._places[channel]])
            if fault is not None:
                raise RecordingError(f"{self.path}: {fault}{self._advice}")
        return super()._blocks(channels, seconds)

    def _rows(
        self, channels: list[int], *, time: bool
    ) -> Iterator[tuple[NDArray[Any], list[Array]]]:
        columns = [self._columns[c] for c in channels]
        clock = self._clock_names if time else []
        row = self._first_row
        midnight = Midnight(DAY)
        for batch in self._batches([*clock, *columns] or self._names[:1]):
            times = np.zeros(batch.num_rows)
            if clock:
                for name in clock:
                    nulls = batch.column(name).is_null().to_numpy(False)
                    if nulls.any():
                        raise self._lacks_time(row + int(np.argmax(nulls)), self._title(name))
                times = self._times([batch.column(name) for name in clock], row, midnight)
            yield times, [self._values(batch.column(name), name, row) for name in columns]
            row += batch.num_rows

    def _times(self, columns: list[Any], row: int, midnight: Midnight) -> NDArray[Any]:
        """Times as stored; those without a date, after that of their column of days or past midnight.

        Args:
            columns: of a batch: the clock, and its column of days if there is one.
            row: the batch's first.
            midnight: of the whole file.
        """
        import pyarrow as pa

        column, kind = columns[0], columns[0].type
        if kind == pa.float64():
            return np.asarray(column.to_numpy(zero_copy_only=False))
        if kind == pa.string():
            times, bad = daytimes(column)
            if bad is not None:
                cell = column[bad].as_py()
                reason = self._no_value(row + bad, self._clock_names[0], cell, "a time")
                raise RecordingError(f"{self.path}: {reason}")
        else:
            times = np.asarray(column.cast(pa.int64()).to_numpy(zero_copy_only=False))
        if pa.types.is_timestamp(kind):
            return times
        days = [column.cast(pa.int32()).to_numpy().astype(np.int64) for column in columns[1:]]
        return midnight(times, *days)

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
        if self._head.decimal == ",":
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
                    encoding=self._head.encoding,
                    skip_rows=self._head.skip,
                    column_names=self._names,
                ),
                parse_options=reader.ParseOptions(
                    delimiter=self._head.separator,
                    quote_char=self._head.quote,
                    # in a file of one column an empty line is a missing sample
                    ignore_empty_lines=len(self._names) > 1,
                ),
                convert_options=reader.ConvertOptions(
                    column_types={
                        name: self._types.get(name, pa.string()) for name in dict.fromkeys(wanted)
                    },
                    include_columns=list(dict.fromkeys(wanted)),
                    decimal_point=self._head.decimal,
                    null_values=NULL_CELLS,
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
