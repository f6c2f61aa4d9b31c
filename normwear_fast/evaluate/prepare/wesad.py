"""WESAD: baseline, stress or amusement from a chest and a wrist device.

Layout, from the set's readme (Schmidt et al., ICMI 2018): `WESAD/S2/S2.pkl` ... `S17/S17.pkl` (no S1,
S12), pickled by Python 2: `{"signal": {"chest": {ACC (n, 3), ECG, EMG, EDA, Temp, Resp} at 700 Hz,
"wrist": {ACC (n, 3) at 32 Hz, BVP at 64, EDA at 4, TEMP at 4}}, "label" at 700 Hz, "subject"}`. Labels
1 baseline, 2 stress, 3 amusement are used; 0, 4 to 7 are not.

Uncertain: which 10 channels the paper took (its count and modalities fit both accelerometers, wrist
PPG, chest ECG and both skin conductances), and its window length; here 6 s, the pretraining
window, kept where one label covers it whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from normwear_fast.errors import RecordingError, reading
from normwear_fast.evaluate.prepare.common import Piece, cut
from normwear_fast.evaluate.registry import Dataset
from normwear_fast.recordings.unpickle import load_pickle

_SOURCES = (
    *(("chest", "ACC", axis) for axis in range(3)),
    *(("wrist", "ACC", axis) for axis in range(3)),
    *(("wrist", "BVP", 0), ("chest", "ECG", 0), ("chest", "EDA", 0), ("wrist", "EDA", 0)),
)
_LABEL_RATE = 700.0


def _channel(record: Any, device: str, name: str, axis: int, path: Path) -> np.ndarray:
    try:
        values = np.asarray(record["signal"][device][name], dtype=np.float64)
        return values.reshape(len(values), -1)[:, axis]
    except (KeyError, TypeError, ValueError, IndexError, OverflowError):
        raise RecordingError(f"{path}: no signal {device} {name} as WESAD has it") from None


def read(raw: Path, dataset: Dataset) -> Iterator[Piece]:
    """Pieces of every `S*/S*.pkl` at or below `raw`."""
    assert dataset.duration is not None
    files = [path for path in sorted(raw.rglob("S*.pkl")) if path.stem == path.parent.name]
    for path in files:
        record = load_pickle(path, encoding="latin1")
        channels = [
            (_channel(record, *source, path), rate)
            for source, rate in zip(_SOURCES, dataset.sampling_rates, strict=True)
        ]
        if "label" not in record:
            raise RecordingError(f"{path}: no label in it")
        with reading(path, RecordingError, "its label is no array"):
            label = np.asarray(record["label"]).ravel()
        for start, window in cut(channels, dataset.duration):
            first = round(start * _LABEL_RATE)
            part = label[first : first + round(dataset.duration * _LABEL_RATE)]
            if len(part) and part[0] in (1, 2, 3) and (part == part[0]).all():
                yield Piece(path.stem, window, (int(part[0]) - 1,))
