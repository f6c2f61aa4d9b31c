"""Parquet tables, streamed by batches of rows: columns of numbers are channels."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from normwear_fast.errors import RecordingError, one_line
from normwear_fast.recordings.base import Array, register, split_units
from normwear_fast.recordings.clock import Midnight, TimeColumn, choose_clock, time_column
from normwear_fast.recordings.table import TableRecording

_BATCH = 65536  # rows
_SAMPLE = 4096  # rows of which a clock is told from a channel
_UNIT_SECONDS = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "ns": 1e-9}


@register(".parquet", ".pq")
class ParquetRecording(TableRecording):
    """A Parquet file; every row is a sample. The time column is found as in CSV, or by its type."""

    format = "Parquet"

    def __init__(self, path: Path, *, sampling_rate: float | None = None) -> None:
        import pyarrow as pa
        from pyarrow import parquet, types

        self.path = path
        try:
            with parquet.ParquetFile(pa.OSFile(os.fsencode(path))) as file:
                schema = file.schema_arrow
                rows = file.metadata.num_rows
        except (pa.ArrowInvalid, pa.ArrowException, ValueError) as error:
            raise RecordingError(f"{path}: is no Parquet file: {one_line(error)}") from error
        if len(set(schema.names)) < len(schema.names):
            raise RecordingError(f"{path}: has two columns of one name")
        if not rows:
            raise RecordingError(f"{path}: holds no rows")

        def temporal(kind: Any) -> bool:
            return types.is_timestamp(kind) or types.is_duration(kind) or types.is_time(kind)

        def number(kind: Any) -> bool:
            return (
                types.is_integer(kind)
                or types.is_floating(kind)
                or types.is_boolean(kind)
                or types.is_decimal(kind)
            )

        self._time: TimeColumn | None = None
        self._time_type: Any = None
        named = [f for f in schema if time_column(f.name) and (number(f.type) or temporal(f.type))]
        if not named and not any(temporal(field.type) for field in schema):
            # pandas' unnamed index, where it is no count of rows, may be the clock by its values
            named = [f for f in schema if _is_index(f.name) and types.is_floating(f.type)]
        taken = [time_column(f.name) or TimeColumn(f.name, None, sure=False) for f in named]
        chosen, channels = choose_clock(taken, self._sample(named, temporal), sampling_rate)
        signals = {named[place].name for place in channels}
        self.notes += tuple(
            f"column {name!r} is not taken for a clock: it is a channel"
            for name in signals
            if not _is_index(name)
        )
        clocks = [field for field in named if field.name not in signals]
        clock = None if chosen is None else named[chosen]
        if clock is None:
            clocks = [field for field in schema if temporal(field.type)]
            clock = clocks[0] if clocks else None
        if clock is not None:
            self._time_type = clock.type
            self._time = time_column(clock.name) or TimeColumn(clock.name, None)
            if temporal(clock.type):
                self._time = TimeColumn(clock.name, _UNIT_SECONDS[clock.type.unit])
        self._columns: list[str] = []
        self._file_units: list[str] = []
        for field in schema:
            if field in clocks:
                if clock is not None and field.name != clock.name:
                    self.notes += (f"column {field.name!r} is a second clock and left out",)
            elif _is_index(field.name):
                self.notes += (f"pandas index {field.name!r} is left out",)
            elif number(field.type):
                self._columns.append(field.name)
                unit = (field.metadata or {}).get(b"unit", b"")
                self._file_units.append(unit.decode("utf-8", "replace"))
            else:
                self.notes += (f"column {field.name!r} holds {field.type} and is left out",)
        self._titles = [
            (name, given or unit)
            for (name, unit), given in zip(
                split_units(self._columns), self._file_units, strict=True
            )
        ]
        self._survey(sampling_rate)

    def _sample(
        self, fields: list[Any], temporal: Callable[[Any], bool]
    ) -> list[NDArray[np.float64] | None]:
        """The first values of columns of numbers; None for wall-clock times."""
        import pyarrow as pa
        from pyarrow import parquet

        numbers = [field.name for field in fields if not temporal(field.type)]
        try:
            with parquet.ParquetFile(pa.OSFile(os.fsencode(self.path)), pre_buffer=False) as file:
                batches = file.iter_batches(_SAMPLE, columns=numbers, use_threads=False)
                batch = next(batches) if len(numbers) > 0 else None
        except (pa.ArrowInvalid, pa.ArrowException, OSError) as error:
            raise RecordingError(f"{self.path}: is damaged: {one_line(error)}") from error
        return [
            None if batch is None or temporal(f.type) else _floats(batch.column(f.name))
            for f in fields
        ]

    def _rows(
        self, channels: list[int], *, time: bool
    ) -> Iterator[tuple[NDArray[Any], list[Array]]]:
        import pyarrow as pa
        from pyarrow import parquet, types

        columns = [self._columns[c] for c in channels]
        clock = [self._time.title] if time and self._time is not None else []
        row = self._first_row
        midnight = None
        if clock and types.is_time(self._time_type):
            midnight = Midnight(round(86_400 / _UNIT_SECONDS[self._time_type.unit]))
        try:
            # Buffered ahead, all of a file stays in memory: 318 MB for one of 207 MB, 46 without.
            with parquet.ParquetFile(pa.OSFile(os.fsencode(self.path)), pre_buffer=False) as file:
                for batch in file.iter_batches(
                    batch_size=_BATCH, columns=[*clock, *columns], use_threads=False
                ):
                    times = np.zeros(batch.num_rows)
                    if clock:
                        column = batch.column(clock[0])
                        if column.null_count:
                            bad = row + int(np.argmax(column.is_null().to_numpy(False)))
                            raise RecordingError(
                                f"{self.path}: row {bad} has no time in column {clock[0]!r}"
                            )
                        if types.is_timestamp(column.type) and self.start_time is None:
                            self.start_time = _wall_clock(column[0])
                        if not (types.is_integer(column.type) or types.is_floating(column.type)):
                            if types.is_time32(column.type):
                                column = column.cast(pa.int32())
                            decimal = types.is_decimal(column.type)
                            column = column.cast(pa.float64() if decimal else pa.int64())
                        times = column.to_numpy(zero_copy_only=False)
                        if midnight is not None:
                            times = midnight(times)
                    row += batch.num_rows
                    yield times, [_floats(batch.column(name)) for name in columns]
        except (pa.ArrowInvalid, pa.ArrowException, OSError) as error:
            raise RecordingError(f"{self.path}: is damaged: {one_line(error)}") from error


def _is_index(name: str) -> bool:
    """What pandas calls an index without a name."""
    return name.startswith("__index_level_")


def _wall_clock(value: Any) -> datetime | None:
    try:
        stamp = value.as_py()
    except (ValueError, OverflowError):
        return None
    # a pandas Timestamp, for ns, where pandas is there
    return stamp.to_pydatetime(warn=False) if hasattr(stamp, "to_pydatetime") else stamp


def _floats(column: Any) -> Array:
    """A pyarrow column as float64 with NaN for nulls and infinities."""
    import pyarrow as pa

    values: Array = np.array(
        column.cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False), dtype=np.float64
    )
    values[~np.isfinite(values)] = np.nan
    return values
