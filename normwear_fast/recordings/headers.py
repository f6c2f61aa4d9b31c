"""What the first rows of a CSV file are: titles, column numbers, units, or data."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import numpy as np

from normwear_fast.recordings.clock import wall_unit

_INTEGER = re.compile(r"[+-]?\d+")
_UNIT = re.compile(
    r"[\[(]?(?:(?:[pnuµμmckMG]?(?:V|A|S|s|sec|Hz|g|m|T|Pa|Ohms?|Ω|siemens|gauss|W|K)|volts?|Gauss|"
    r"seconds?|deg|°|rad|rpm|degC|°C|C|°F|degF|%|bpm|BPM|mmHg|counts?|cnts?|lsb|LSB|raw|adc|a\.?u\.?|"
    r"local_flux|no_?units?|no units|unitless|none|n/?a)"
    r"(?:\s?(?:/|\*|per)\s?\(?(?:s|sec|min|h|Hz|m|V|K)(?:\^?2|²|\*\*2)?\)?)*(?:\^?2|²)?)?[\])]?"
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


def counts_rows(cells: Sequence[str]) -> bool:
    """Row numbers, as pandas writes them: from 0 or 1 on, or some rows of a longer table. Those that
    count from 1970 are times."""
    cells = [cell.strip() for cell in cells]
    if len(cells) < 2 or not all(map(_INTEGER.fullmatch, cells)):
        return False
    if wall_unit(float(cells[0])) is not None:
        return False
    steps = np.diff(np.array(cells, dtype=np.float64))
    # of rows that were filtered, some are left; a clock steps by more
    regular = (steps == steps[0]).all() or np.median(steps) <= 3
    return bool((len(cells) > 3 or cells[0] in ("0", "1")) and regular and steps.min() > 0)


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
