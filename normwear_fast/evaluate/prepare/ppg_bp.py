"""PPG-BP: hypertension, diabetes and cerebral disease from a finger's pulse.

Layout (Liang et al., Scientific Data 2018; figshare 5459299): `Data File/PPG-BP dataset.xlsx`, a title
row and then columns such as subject_ID, Hypertension (Normal, Prehypertension, Stage 1 hypertension,
Stage 2 hypertension), Diabetes, cerebral infarction, cerebrovascular disease (the disease's name or
empty); `Data File/0_subject/{subject}_{1,2,3}.txt`, 2,100 tab-separated samples, 2.1 s at 1000 Hz.

Two diabetes entries (Diabetes, Type 2 Diabetes) are one class. The table saved as CSV under the same
name is taken too.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from normwear_fast.errors import RecordingError, reading
from normwear_fast.evaluate.prepare.common import Piece, column, find_root, number, read_xlsx
from normwear_fast.evaluate.prepare.common import read_csv as read_csv_table
from normwear_fast.evaluate.registry import Dataset

_TABLE = "PPG-BP dataset"


def _table(root: Path) -> tuple[Path, list[list[str]]]:
    path = root / f"{_TABLE}.xlsx"
    if path.is_file():
        return path, read_xlsx(path)
    path = root / f"{_TABLE}.csv"
    if path.is_file():
        header, rows = read_csv_table(path)
        return path, [header, *rows]
    raise RecordingError(f"{root}: no {_TABLE}.xlsx (or .csv) beside 0_subject")


def _labels(path: Path, rows: list[list[str]], dataset: Dataset) -> dict[str, tuple[int, ...]]:
    top = next((i for i, row in enumerate(rows) if "subject_ID" in row), None)
    if top is None:
        raise RecordingError(f"{path}: no row of column names with subject_ID")
    header = rows[top]
    who = header.index("subject_ID")
    columns = [
        column(header, pattern, path)
        for pattern in ("^hypertension$", "^diabetes$", "infarction", "^cerebrovascular")
    ]
    labels: dict[str, tuple[int, ...]] = {}
    for row in rows[top + 1 :]:
        row = row + [""] * (len(header) - len(row))
        if not row[who]:
            continue
        subject = str(int(number(row[who], f"{path}, subject_ID")))
        pressure, diabetes, infarction, vessels = (row[i].strip().lower() for i in columns)
        names = dataset.tasks[0].classes
        if pressure not in names:
            raise RecordingError(
                f"{path}: hypertension of subject {subject} is {pressure!r}; one of "
                f"{', '.join(names)} is right"
            )
        vessel_class = 0 if not vessels else 2 if vessels.startswith("insufficiency") else 1
        labels[subject] = (
            names.index(pressure),
            int(bool(diabetes)),
            int(bool(infarction)),
            vessel_class,
        )
    return labels


def read(raw: Path, dataset: Dataset) -> Iterator[Piece]:
    """Pieces of every `{subject}_{segment}.txt`."""
    root = find_root(raw, "0_subject", "Data File/0_subject and the table beside it")
    table, rows = _table(root)
    labels = _labels(table, rows, dataset)
    for path in sorted((root / "0_subject").rglob("*_[0-9].txt")):
        subject = path.stem.split("_")[0]
        if subject not in labels:
            raise RecordingError(f"{path}: subject {subject} is not in {table}")
        with reading(path, RecordingError, "not tab-separated numbers"):
            values = np.array(path.read_text(encoding="utf-8-sig").split(), dtype=np.float64)
        if not len(values):
            raise RecordingError(f"{path}: no numbers in it")
        yield Piece(subject, ((values, dataset.sampling_rates[0]),), labels[subject])
