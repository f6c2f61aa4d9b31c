"""ECG-Abnormal: single heart beats of the PTB Diagnostic ECG Database, normal or not.

Layout (Kachuee, Fazeli and Sarrafzadeh, ICHI 2018, "ECG Heartbeat Categorization Dataset"):
`ptbdb_normal.csv` and `ptbdb_abnormal.csv` without a header, 187 samples at 125 Hz, scaled to 0..1 and
zero-padded behind the beat, then the label (0 or 1). The paper's archive calls the set "heart cat".

The files name no people: the split is stratified over beats, and no fold by subject exists.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from normwear_fast.errors import RecordingError
from normwear_fast.evaluate.prepare.common import Piece, find_root, read_columns
from normwear_fast.evaluate.registry import Dataset


def read(raw: Path, dataset: Dataset) -> Iterator[Piece]:
    """Pieces of both files, one a beat."""
    root = find_root(raw, "ptbdb_normal.csv", "ptbdb_normal.csv and ptbdb_abnormal.csv")
    for label, name in enumerate(("normal", "abnormal")):
        path = root / f"ptbdb_{name}.csv"
        rows = read_columns(path, ",")
        if rows.shape[1] != 188:
            raise RecordingError(
                f"{path}: {rows.shape[1]} columns; 187 samples and a label are right"
            )
        for index, row in enumerate(rows):
            yield Piece(f"{name}{index:05d}", ((row[:-1], dataset.sampling_rates[0]),), (label,))
