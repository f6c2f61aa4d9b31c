"""Noninvasive-BP: systolic and diastolic pressure from heart sound, pulse and ECG.

Layout (Esmaili, Kachuee and Shabany, IEEE Trans. Instrum. Meas. 2017; Kaggle mkachuee/noninvasivebp):
`1.json` ... `26.json`, each `{"age", "weight", "height", "data_PPG", "data_ECG", "data_PCG", "data_FSR",
"data_BP": [{"SBP", "DBP"}, ...]}`, series at 1000 Hz. The times of the cuff readings are not given: the
force sensor under the cuff (FSR) shows them. Its fall is steepest as the cuff deflates; the readings
are the N strongest one-second falls at least 15 s apart, as the set's public notebooks find them.

Each reading labels the whole 6 s windows of the 30 s before its fall. Uncertain: the paper's windows.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from normwear_fast.errors import RecordingError
from normwear_fast.evaluate.prepare.common import Piece, cut
from normwear_fast.evaluate.registry import Dataset
from normwear_fast.files import read_json

_SERIES = ("data_PCG", "data_PPG", "data_ECG")
_BEFORE = 30.0
_APART = 15.0


def _numbers(record: Any, name: str, path: Path) -> NDArray[np.float64]:
    try:
        values = np.asarray(record[name], dtype=np.float64)
    except (KeyError, TypeError, ValueError, OverflowError):
        values = np.empty(0)
    if values.ndim != 1 or not len(values):
        raise RecordingError(f"{path}: no series {name} of numbers in it")
    return values


def reading_times(force: NDArray[np.float64], rate: float, count: int) -> list[int]:
    """Samples at which the cuff deflates most steeply, `count` of them, ascending."""
    second, apart = round(rate), round(_APART * rate)
    # Medians of 51 samples shrug off the sensor's single-sample jumps.
    from scipy.ndimage import median_filter

    # The set's sensor falls in value as the cuff presses: a deflation is its steepest rise.
    smooth = -median_filter(force, size=51, mode="nearest")
    fall = smooth[second:] - smooth[:-second]
    found = []
    for _ in range(count):
        at = int(np.argmin(fall))
        if not np.isfinite(fall[at]):
            break
        found.append(at + second // 2)
        fall[max(0, at - apart // 2) : at + apart // 2 + 1] = np.inf
    return sorted(found)


def read(raw: Path, dataset: Dataset) -> Iterator[Piece]:
    """Pieces of every `{subject}.json` at or below `raw`."""
    assert dataset.duration is not None
    rate = dataset.sampling_rates[0]
    for path in sorted(raw.rglob("*.json")):
        if not path.stem.isdigit():
            continue
        record = read_json(path, RecordingError)
        series = [_numbers(record, name, path) for name in _SERIES]
        force = _numbers(record, "data_FSR", path)
        try:
            readings = [(float(item["SBP"]), float(item["DBP"])) for item in record["data_BP"]]
        except (KeyError, TypeError, ValueError, OverflowError):
            readings = [(np.nan, np.nan)]
        if not np.isfinite(readings).all():
            raise RecordingError(f"{path}: data_BP is no list of SBP and DBP in numbers")
        if len(force) <= round(rate):
            raise RecordingError(f"{path}: {len(force)} samples of force; no reading fits in them")
        times = reading_times(force, rate, len(readings))
        if len(times) < len(readings):
            raise RecordingError(
                f"{path}: {len(readings)} pressure readings, and {len(times)} falls of the cuff"
            )
        for at, reading in zip(times, readings, strict=True):
            first = max(0, at - round(_BEFORE * rate))
            window = [(values[first:at], rate) for values in series]
            for _, piece in cut(window, dataset.duration):
                yield Piece(f"{int(path.stem):02d}", piece, (reading,))
