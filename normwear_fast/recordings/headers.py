"""What the first rows of a CSV file are: separators, comments, titles, column numbers, units, or data."""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from normwear_fast.errors import RecordingError, one_line
from normwear_fast.recordings.wallclock import is_time

_SAMPLE_BYTES = 1 << 16
_BOMS = (b"\xff\xfe", b"\xfe\xff")  # of UTF-16
_NULLS = {"", "nan", "-nan", "na", "n/a", "null", "none", "#n/a", "#na", "<na>"}
NULL_CELLS = [*_NULLS, *map(str.upper, _NULLS), "NaN", "-NaN", "None", "Null"]
"""Cells without a value, as Arrow wants them."""
# for Excel; Shimmer writes it too
_SEPARATOR_LINE = re.compile(r'"?sep=([\t,;]|\\t)"?', re.IGNORECASE)
_DECIMAL_COMMA = re.compile(r"\s*[+-]?\d*,\d+([eE][+-]?\d+)?\s*")
_INTEGER = re.compile(r"[+-]?\d+")
_UNIT = re.compile(
    r"[\[(]?(?:(?:[pnuµμmckMG]?(?:V|A|S|s|sec|Hz|g|m|T|Pa|Ohms?|Ω|siemens|gauss|W|K)|volts?|Gauss|"
    r"seconds?|deg|°|rad|rpm|degC|°C|C|°F|degF|%|bpm|BPM|mmHg|counts?|cnts?|lsb|LSB|raw|adc|a\.?u\.?|"
    r"local_flux|no_?units?|no units|unitless|none|n/?a)"
    r"(?:\s?(?:/|\*|per)\s?\(?(?:s|sec|min|h|Hz|m|V|K)(?:\^?2|²|\*\*2)?\)?)*(?:\^?2|²)?)?[\])]?"
)


def is_null(cell: str) -> bool:
    """Whether a cell stands for no value."""
    return cell.strip().casefold() in _NULLS


class Head:
    """How a CSV file is written, and what its first 64 KB hold.

    Attributes:
        encoding: "utf8", or "utf-16" where the file has its mark.
        separator: "," ";" or a tab.
        decimal: "." or ",".
        quote: around a cell.
        titles: of the columns, with their units where a row of them is below; None without a header.
        rows: of data, as cells.
        skip: lines of the file above these.
        notes: what a user should know.

    Raises:
        RecordingError: it is no text, holds no rows, or lines that are no part of the table.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.notes: tuple[str, ...] = ()
        with path.open("rb") as file:
            raw = file.read(_SAMPLE_BYTES)
        lines = self._decoded(raw).splitlines()
        if len(raw) == _SAMPLE_BYTES and len(lines) > 2:
            lines.pop()  # cut off by the sample's end
        above, declared, comment = 0, "", ""
        while above < len(lines):
            line = lines[above].strip()
            if match := _SEPARATOR_LINE.fullmatch(lines[above]):
                declared = "\t" if match[1] == "\\t" else match[1]
            elif line and not line.startswith(("#", "%")):
                break
            comment = line if line.startswith(("#", "%")) else ""
            above += 1
        # rows of the sample -> lines of the file above them
        self._line_of = [i for i in range(above, len(lines)) if lines[i].strip()]
        lines = [lines[i] for i in self._line_of]
        if not lines:
            raise RecordingError(f"{path}: holds no rows")
        self.quote = "'" if re.match("'[^']+'", lines[0]) else '"'  # as PhysioNet's are
        self.separator = next(
            (
                each
                for each in (declared, "\t", ";")
                if each and len(self._cells(lines[:1], each)[0]) > 1
            ),
            ",",
        )
        self._check_preamble(lines)
        rows = self._cells(lines, self.separator)
        cells = [cell for row in rows[1:] for cell in row] if self.separator != "," else []
        self.decimal = "," if any(map(_DECIMAL_COMMA.fullmatch, cells)) else "."
        if len(rows[0]) == 1:
            self._check_separator([row[0] for row in rows if row])
        self._comment = self._cells([comment], self.separator)[0] if comment else []
        self.titles, self.rows = self._header(rows)
        if not self.rows:
            raise RecordingError(f"{path}: holds no rows, only a header")
        first = len(rows) - len(self.rows)
        self.skip = self._line_of[first - 1] + 1 if first else self._line_of[0]

    def _cells(self, lines: Sequence[str], separator: str) -> list[list[str]]:
        return list(csv.reader(lines, delimiter=separator, quotechar=self.quote))

    def number(self, cell: str) -> float:
        return float(cell.replace(self.decimal, ".") if self.decimal == "," else cell)

    def is_number(self, cell: str) -> bool:
        try:
            self.number(cell)
        except ValueError:
            return False
        return "_" not in cell  # float() reads 1_000; a CSV reader does not

    def is_value(self, cell: str) -> bool:
        """A number, a time or nothing: what a line of data is made of."""
        cell = cell.strip()
        return is_null(cell) or self.is_number(cell) or is_time(cell)

    def _header(self, rows: list[list[str]]) -> tuple[list[str] | None, list[list[str]]]:
        """The titles, or None, and the rows of data.

        A line that begins with # or % is a comment, or begins with a title such as %SpO2.
        """
        if self._is_header(self._comment, rows[0]):
            return [re.sub(r"^(#\s*|%\s+)(?=.)", "", self._comment[0]), *self._comment[1:]], rows
        if not all(map(self.is_value, rows[0])):
            if len(rows) > 2 and (titled := with_units(rows, self.is_value)):
                return titled, rows[2:]
            return rows[0], rows[1:]
        if not is_numbered_header(rows[0], rows[1:]):
            return None, rows
        if rows[0][0].strip():
            self.notes = (
                f"row {self._line_of[0] + 1} ({one_line(self.separator.join(rows[0]), 40)}) is read "
                f"as pandas' column numbers, not as a sample",
            )
        return rows[0], rows[1:]

    def _is_header(self, comment: Sequence[str], first: Sequence[str]) -> bool:
        """Whether the comment right above the first row is its header: it has as many cells, and the
        row is data. A lone one is a title if it is a word; numbers and times are none."""
        said = [cell.strip() for cell in comment]
        said[:1] = [cell.lstrip("#% ") for cell in said[:1]]
        if len(comment) != len(first) or all(map(self.is_value, said)):
            return False
        if len(first) == 1 and not re.fullmatch(r"[#%]\s?\w+", comment[0].strip()):
            return False
        # Na is sodium
        return "" in map(str.strip, first[1:]) or any(
            cell in NULL_CELLS or (self.is_value(cell) and not is_null(cell))
            for cell in map(str.strip, first)
            if cell
        )

    def _decoded(self, raw: bytes) -> str:
        """The sample as text; sets the encoding."""
        whole = len(raw) < _SAMPLE_BYTES
        self.encoding = "utf-16" if raw.startswith(_BOMS) else "utf8"
        if self.encoding == "utf-16":
            try:
                return raw.decode("utf-16", errors="strict" if whole else "ignore")
            except UnicodeDecodeError as error:
                reason = f"is damaged UTF-16: {one_line(error)}"
                raise RecordingError(f"{self._path}: {reason}") from error
        if b"\0" in raw:
            raise RecordingError(f"{self._path}: is not text; a CSV file is UTF-8 text")
        try:
            return raw.decode("utf-8-sig", errors="strict" if whole else "ignore")
        except UnicodeDecodeError:
            return raw.decode("latin-1")

    def _check_preamble(self, lines: list[str]) -> None:
        """Refuse lines above the table that are no part of it, as some devices write them."""
        for separator in (self.separator, "\t", ";", ","):
            widths = [len(row) for row in self._cells(lines, separator)]
            if separator == self.separator and len(set(widths)) == 1 < widths[0]:
                return
            if len(widths) == len(lines) and widths[-1] > max(1, widths[0]):
                above = next(i for i in range(len(widths), 0, -1) if widths[i - 1] != widths[-1])
                if above > 1 and len(widths) - above > 2 and widths[:above].count(widths[-1]) == 0:
                    raise RecordingError(
                        f"{self._path}: the table begins in row {self._line_of[above] + 1}, with "
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
                and not any(self.is_value(line) for line in body)
                and any(self.is_number(cell) for cell in parts[-1])
            ):
                raise RecordingError(
                    f"{self._path}: columns are separated by {name}; comma, semicolon or tab is right"
                )


def is_numbered_header(first: Sequence[str], body: Sequence[Sequence[str]]) -> bool:
    """Whether a first row of numbers is a header: pandas writes an array's columns as 0, 1, 2, ...

    With an index there is an empty cell before them, over a column that is full and rises: rows are
    counted, or timed. Without one (index=False) data may begin so too. Read as a header, they would
    lose a sample; read as data, a header would be one: no great harm either way, so that only what
    tells them apart counts. For two columns or more, no number below is written as a whole one: pandas
    writes 1.0, and what writes 1 will have done so again. For three or more, the numbers lie outside
    their columns, further away than those ever move in a step: raw counts about 2048, not a count that
    goes on with 3, 4, 5. A single 0 is data.

    Args:
        first: the cells of the first row, all of them numbers or empty.
        body: the rows of the sample below it.
    """
    cells = [cell.strip() for cell in first]
    indexed = cells[0] == ""
    numbers = cells[1:] if indexed else cells
    body = [row for row in body if len(row) == len(first)]
    if not numbers or numbers != [str(i) for i in range(len(numbers))] or len(body) < 2:
        return False
    if indexed:
        return _is_index([row[0].strip() for row in body])
    values = [[cell.strip() for cell in column] for column in zip(*body, strict=True)]
    if len(numbers) > 1 and not any(_INTEGER.fullmatch(c) for column in values for c in column):
        return True
    return len(numbers) > 2 and all(map(_stands_apart, range(len(numbers)), values))


def _is_index(cells: Sequence[str]) -> bool:
    """Full, and rising where it is numbers; times are what they are."""
    values = _numbers(cells)
    if np.isnan(values).all():
        return all(cells)
    forward = np.isfinite(values).all() and (np.diff(values) >= 0).all()
    return bool(forward and values[-1] > values[0])


def _stands_apart(number: int, cells: Sequence[str]) -> bool:
    values = _numbers(cells)
    values = values[np.isfinite(values)]
    if values.size < 3:
        return False
    away = max(values.min() - number, number - values.max())
    return bool(away > np.abs(np.diff(values)).max())


def _numbers(cells: Sequence[str]) -> np.ndarray:
    def number(cell: str) -> float:
        try:
            return float(cell.replace(",", "."))
        except ValueError:
            return np.nan

    return np.array([number(cell) for cell in cells])


def with_units(rows: Sequence[Sequence[str]], is_value: Callable[[str], bool]) -> list[str] | None:
    """The header with the units of a second row, or None if that row is none of units.

    It is one where no cell is a number, every cell is empty or a short word, half of them units that
    are known, and a number stands below one of these: a lone W over text is awake, not watt.
    A missing value is no unit, though it may stand among units: (mV, n/a).
    """
    header, second, third = rows[:3]
    units = [cell.strip() for cell in second]
    nothing = ("n/a", "na", "none")
    said = [unit for unit in units if unit and unit.casefold() not in nothing]
    known = [i for i, unit in enumerate(units) if unit in said and _UNIT.fullmatch(unit)]
    if (
        len(second) != len(header)
        or not said
        or any(map(is_value, said))
        or any(len(unit) > 16 or re.search(r"\d{2}", unit) for unit in said)
        or 2 * len(known) < len(said)
        or not any(
            is_value(third[i]) and re.search(r"\d", third[i]) for i in known if i < len(third)
        )
    ):
        return None
    plain = [re.sub(r"^[\[(](.*)[\])]$", r"\1", unit) for unit in units]
    return [
        title if not unit or title.rstrip().endswith(("]", ")")) else f"{title.strip()} [{unit}]"
        for title, unit in zip(header, plain, strict=True)
    ]
