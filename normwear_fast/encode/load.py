"""Embeddings of an output folder, in the library of the reader's choice."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from normwear_fast.encode.output import METADATA_KEY, check_columns
from normwear_fast.errors import OutputError, UsageError, reading
from normwear_fast.files import COUNT, fits

if TYPE_CHECKING:
    import pyarrow as pa

LIBRARIES = ("pandas", "polars", "numpy", "pyarrow")


def load_embeddings(
    folder: str | Path,
    library: Literal["pandas", "polars", "numpy", "pyarrow"] = "pandas",
    *,
    columns: Sequence[str] | None = None,
) -> Any:
    """All rows of an encode output, in the order of its inputs.

    Args:
        folder: as given to ``encode --output``.
        library: ``pandas`` or ``polars`` for a data frame, ``pyarrow`` for a table, ``numpy`` for a
            dictionary of arrays.
        columns: names of the ones wanted, at least one; all by default.

    Returns:
        One row a window: ``recording, window_id, start_s, duration_s, channels, status,
        missing_fraction, embedding``. In pandas an embedding is a float32 array, (C, E) where
        channels were kept and (n,) where they were pooled, or None for a skipped window. In NumPy
        ``embedding`` is one array (N, C, E) or (N, n) with NaN for skipped windows where all shapes
        agree, else an object array of the same as in pandas.

    Raises:
        OutputError: no output of encode there, or a damaged part.
        UsageError: an unknown library or column, no column, or a library that is not installed.
    """
    if library not in LIBRARIES:
        raise UsageError(f"library is {library!r}; it must be one of {', '.join(LIBRARIES)}")
    if isinstance(columns, str):
        raise UsageError(f"columns is {columns!r}; it must be a list of names: [{columns!r}]")
    if columns is not None and not len(columns):
        raise UsageError("columns is empty; name at least one, or leave it out for all")
    if library in ("pandas", "polars"):
        _check_installed(library)
    table = _read(Path(folder), columns)
    if library == "pyarrow":
        return table
    if library == "polars":
        import polars

        return polars.from_arrow(table)
    named: dict[str, Any] = {}
    for name in table.column_names:
        column = table.column(name)
        named[name] = (
            _arrays(column) if name == "embedding" else column.to_numpy(zero_copy_only=False)
        )
    if library == "pandas":
        import pandas

        return pandas.DataFrame(named)
    if "embedding" in named:
        named["embedding"] = _stack(named["embedding"])
    return named


def _check_installed(library: str) -> None:
    try:
        import_module(library)
    except ImportError:
        install = "'normwear-fast[eval]'" if library == "pandas" else library
        raise UsageError(
            f"library {library!r} needs {library}: pip install {install}; library='numpy' and 'pyarrow' "
            "need nothing more"
        ) from None


def _read(folder: Path, columns: Sequence[str] | None) -> pa.Table:
    import pyarrow as pa
    import pyarrow.parquet as pq

    paths = sorted(folder.glob("part-*.parquet"))
    if not paths:
        raise OutputError(f"{folder}: no part-*.parquet there; name the output folder of encode")
    slices: list[tuple[int, pa.Table]] = []
    form: pa.Schema | None = None
    for path in paths:
        what = "cannot be read as a part of encode's output; remove it and run encode again"
        with reading(path, OutputError, what):
            file = pq.ParquetFile(path)
            metadata = json.loads(file.metadata.metadata[METADATA_KEY])
            unknown = sorted(
                set(columns if columns is not None else ()) - set(file.schema_arrow.names)
            )
            if unknown:
                raise UsageError(
                    f"{folder} has no column {', '.join(unknown)}; it has "
                    f"{', '.join(file.schema_arrow.names)}"
                )
            table = file.read(columns=None if columns is None else list(columns))
            table.validate(full=True)
            table = table.replace_schema_metadata(None)
        check_columns(table.schema, path)
        units = metadata["units"] if fits(metadata, {"units": [[COUNT, COUNT]]}) else []
        if sum(rows for _, rows in units) != len(table):
            raise OutputError(
                f"{path}: its {len(table)} rows are not those of its work units; remove it and run "
                "encode again"
            )
        form = form or table.schema
        if table.schema != form:
            raise OutputError(f"{path}: its columns are not those of {paths[0].name}")
        first = 0
        for index, rows in units:
            slices.append((index, table.slice(first, rows)))
            first += rows
    # Parts hold units in the order they came to be ready; the inputs' order is that of their index.
    slices.sort(key=lambda item: item[0])
    return pa.concat_tables([table for _, table in slices]).combine_chunks()


def _arrays(column: pa.ChunkedArray) -> NDArray[np.object_]:
    """Each value as an array that views the column's memory; None where it is null."""
    import pyarrow as pa

    values: list[NDArray[np.float32] | None] = []
    for chunk in column.chunks:
        valid = chunk.is_valid().to_numpy(zero_copy_only=False).tolist()
        if pa.types.is_fixed_size_list(chunk.type):
            width = chunk.type.list_size
            flat = chunk.values.slice(chunk.offset * width, len(chunk) * width)
            rows = flat.to_numpy(zero_copy_only=False).reshape(len(chunk), width)
            values += [row if ok else None for row, ok in zip(rows, valid, strict=True)]
            continue
        offsets = chunk.offsets.to_numpy().tolist()
        items = chunk.values
        if pa.types.is_fixed_size_list(items.type):
            width = items.type.list_size
            flat = items.values.slice(items.offset * width, len(items) * width)
            rows = flat.to_numpy(zero_copy_only=False).reshape(len(items), width)
        else:
            rows = items.to_numpy(zero_copy_only=False)
        values += [
            rows[first:stop] if ok else None
            for first, stop, ok in zip(offsets, offsets[1:], valid, strict=False)
        ]
    cells = np.empty(len(values), dtype=object)
    for i, value in enumerate(values):
        cells[i] = value
    return cells


def _stack(cells: NDArray[np.object_]) -> NDArray[Any]:
    shapes = {cell.shape for cell in cells if cell is not None}
    if len(shapes) != 1:
        return cells
    stacked = np.full((len(cells), *shapes.pop()), np.nan, np.float32)
    for row, cell in zip(stacked, cells, strict=True):
        if cell is not None:
            row[...] = cell
    return stacked
