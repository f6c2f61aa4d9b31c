"""PPG-Hgb: haemoglobin from red and infrared pulse.

Layout (Abuzairi et al., Data in Brief 2024; Mendeley Data xdrwrh9zbk): `Raw dataset per
subject/1.csv` ... `68.csv`, columns `Red (a.u)`, `Infra Red (a.u)`, `Gender`, `Age (year)`,
`Hemoglobin (g/dL)`, one row a sample, the last three constant within a file; 249 or 250 rows, 10 s.
`Final Dataset Hb PPG.csv`, beside them, holds averages, no signal, and is not read.

Every recording is cut to 249 samples, so that all are equally long. Uncertain: the rate; 25 Hz fits
250 rows in 10 s, and is what users of the set report.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from normwear_fast.errors import RecordingError
from normwear_fast.evaluate.prepare.common import Piece, column, number, read_csv
from normwear_fast.evaluate.registry import Dataset

_SAMPLES = 249


def read(raw: Path, dataset: Dataset) -> Iterator[Piece]:
    """Pieces of every `{subject}.csv` of raw samples at or below `raw`, one a subject."""
    files = [
        path
        for path in sorted(raw.rglob("*.csv"))
        if path.stem.isdigit() and "preprocessing" not in path.parent.name.lower()
    ]
    for path in files:
        header, rows = read_csv(path)
        indices = [
            column(header, r"^red\b", path),
            column(header, r"^infra", path),
            column(header, r"^h(a)?emoglobin", path),
        ]
        if any(len(row) <= max(indices) for row in rows):
            raise RecordingError(f"{path}: a row of fewer fields than the header")
        table = np.array([[number(row[index], str(path)) for index in indices] for row in rows])
        if len(np.unique(table[:, 2])) != 1:
            raise RecordingError(f"{path}: more than one haemoglobin value; one a file is right")
        signals = table[:_SAMPLES, :2].T
        channels = tuple(zip(signals, dataset.sampling_rates, strict=True))
        yield Piece(f"{int(path.stem):02d}", channels, (float(table[0, 2]),))
