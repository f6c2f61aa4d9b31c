"""Fetal-fPCG: fetal heart rate from heart sound through the mother's abdomen.

Layout (Bhaskaran et al., Indian Institute of Science Fetal Heart Sound Database, PhysioNet
fetalheartsounddata 1.0): `subject_01.wav` ... `subject_60.wav`, mono, 16 bit, 2000 Hz, about 8 min, and
`Records.csv` with a column Subject and one whose name holds FHR (beats a minute); about 44 subjects
have a rate, the others are left out. SHA256SUMS.txt, where present, is checked.

Uncertain: the exact header of Records.csv, so columns are found by those words; and the paper's
windows: 6 s here, every window of a recording with the subject's one rate.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from normwear_fast.errors import RecordingError, reading
from normwear_fast.evaluate.prepare.common import (
    Piece,
    check_sums,
    column,
    cut,
    find_root,
    read_csv,
)
from normwear_fast.evaluate.registry import Dataset


def _rates(path: Path) -> dict[int, float]:
    """Heart rate of each subject that has one."""
    header, rows = read_csv(path)
    who, rate = column(header, r"^subject", path), column(header, r"fhr", path)
    found = {}
    for row in rows:
        cells = row + [""] * (len(header) - len(row))
        subject = re.search(r"\d+", cells[who])
        try:
            value = float(cells[rate])
        except ValueError:
            continue  # NA, a dash or empty: not measured
        if subject and np.isfinite(value) and value > 0:
            found[int(subject.group())] = value
    return found


def read(raw: Path, dataset: Dataset) -> Iterator[Piece]:
    """Pieces of every recording whose subject has a heart rate."""
    from scipy.io import wavfile

    assert dataset.duration is not None
    root = find_root(raw, "Records.csv", "Records.csv and the recordings beside it")
    rates = _rates(root / "Records.csv")
    check_sums(root, [root / "Records.csv"])
    for path in sorted(root.rglob("subject_*.wav")):
        subject = int(path.stem.split("_")[1]) if path.stem.split("_")[1].isdigit() else -1
        if subject not in rates:
            continue
        check_sums(root, [path])
        with reading(path, RecordingError, "not a WAV file"):
            rate, values = wavfile.read(path)
        if values.ndim != 1 or rate != dataset.sampling_rates[0]:
            raise RecordingError(
                f"{path}: shape {values.shape} at {rate} Hz; one channel at "
                f"{dataset.sampling_rates[0]:g} Hz is right"
            )
        channels = [(values.astype(np.float64), float(rate))]
        for _, window in cut(channels, dataset.duration):
            yield Piece(f"{subject:02d}", window, (rates[subject],))
