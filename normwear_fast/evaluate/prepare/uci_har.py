"""UCI-HAR: six activities from a phone's accelerometer and gyroscope.

Layout, from the set's README.txt: `UCI HAR Dataset/{train,test}/Inertial Signals/
{total_acc,body_gyro}_{x,y,z}_{train,test}.txt`, one window of 128 samples (2.56 s at 50 Hz, half
overlapping) a line; `y_*.txt` activity 1 to 6; `subject_*.txt` subject 1 to 30. Units: g and rad/s.
The set's own split is kept.

Uncertain: whether the paper's six channels hold total or body acceleration; here total, what an
accelerometer gives.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from normwear_fast.errors import RecordingError
from normwear_fast.evaluate.prepare.common import Piece, find_root, read_columns
from normwear_fast.evaluate.registry import Dataset

_FILES = tuple(f"{kind}_{axis}" for kind in ("total_acc", "body_gyro") for axis in "xyz")


def read(raw: Path, dataset: Dataset) -> Iterator[Piece]:
    """Pieces of both halves."""
    root = find_root(raw, "train/Inertial Signals", "UCI HAR Dataset")
    for half in ("train", "test"):
        folder = root / half
        activity = read_columns(folder / f"y_{half}.txt")[:, 0]
        subject = read_columns(folder / f"subject_{half}.txt")[:, 0]
        signals = [
            read_columns(folder / "Inertial Signals" / f"{name}_{half}.txt") for name in _FILES
        ]
        if {len(signal) for signal in signals} != {len(activity)} or len(subject) != len(activity):
            raise RecordingError(f"{folder}: its files do not hold the same number of windows")
        if not np.isin(activity, range(1, 7)).all():
            raise RecordingError(f"{folder / f'y_{half}.txt'}: activities beyond 1 to 6")
        for index in range(len(activity)):
            yield Piece(
                f"{subject[index]:02.0f}",
                tuple(
                    (signal[index], rate)
                    for signal, rate in zip(signals, dataset.sampling_rates, strict=True)
                ),
                (int(activity[index]) - 1,),
                half == "test",
            )
