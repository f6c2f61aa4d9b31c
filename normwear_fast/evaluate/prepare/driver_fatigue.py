"""DriverFatigue: EEG of twelve drivers, rested and fatigued.

Layout (Min, Wang and Hu, PLOS ONE 2017; figshare 5202739): `1` ... `12`, each with `Normal state.cnt`
and `Fatigue state.cnt`, NeuroScan CNT files of 32-bit samples at 1000 Hz, 32 electrodes, microvolts
after each electrode's calibration. The format as NeuroScan documents it: a header of 900 bytes
(electrodes at 370, rate at 376, samples at 864, position of the events at 886), 75 bytes an electrode
(name at 0, baseline at 47, sensitivity at 59, calibration at 71), then the samples, all electrodes
of an instant together; microvolt = (value - baseline) * sensitivity * calibration / 204.8.

Uncertain: which four electrodes the paper took; here FP1, FP2, TP7, TP8, where a headband sits.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from normwear_fast.errors import RecordingError
from normwear_fast.evaluate.prepare.common import Piece, cut
from normwear_fast.evaluate.registry import Dataset

_HEADER = 900
_ELECTRODE = 75


def read_cnt(path: Path, names: tuple[str, ...]) -> tuple[list[NDArray[np.float64]], float]:
    """Electrodes `names` of a NeuroScan CNT file in microvolts, and the rate in Hz."""
    size = path.stat().st_size
    with path.open("rb") as file:
        header = file.read(_HEADER)
        if len(header) < _HEADER or not header.startswith(b"Version"):
            raise RecordingError(f"{path}: not a NeuroScan CNT file")
        (electrodes,) = struct.unpack_from("<H", header, 370)
        (rate,) = struct.unpack_from("<H", header, 376)
        (events,) = struct.unpack_from("<i", header, 886)
        table = file.read(_ELECTRODE * electrodes)
    if not electrodes or not rate or len(table) < _ELECTRODE * electrodes:
        raise RecordingError(f"{path}: {electrodes} electrodes at {rate} Hz; the file is damaged")
    found: dict[str, tuple[int, float, float]] = {}
    for index in range(electrodes):
        at = index * _ELECTRODE
        name = table[at : at + 10].split(b"\0")[0].decode("latin1").strip().upper()
        baseline = struct.unpack_from("<h", table, at + 47)[0]
        sensitivity = struct.unpack_from("<f", table, at + 59)[0]
        calibration = struct.unpack_from("<f", table, at + 71)[0]
        found[name] = (index, baseline, sensitivity * calibration / 204.8)
    missing = [name for name in names if name not in found]
    if missing:
        raise RecordingError(
            f"{path}: no electrode {', '.join(missing)}; it has {', '.join(sorted(found))}"
        )
    if not all(math.isfinite(found[name][2]) for name in names):
        raise RecordingError(f"{path}: an electrode's calibration is no number; it is damaged")
    start = _HEADER + _ELECTRODE * electrodes
    # Where the header does not say where the samples end, they end with the file.
    end = events if start < events <= size else size
    samples = (end - start) // (4 * electrodes)
    if samples < 1:
        raise RecordingError(f"{path}: no samples in it; the file is cut short")
    values = np.memmap(path, "<i4", "r", start, (samples, electrodes))
    channels = [
        (values[:, found[name][0]].astype(np.float64) - found[name][1]) * found[name][2]
        for name in names
    ]
    return channels, float(rate)


def read(raw: Path, dataset: Dataset) -> Iterator[Piece]:
    """Pieces of every pair of states at or below `raw`."""
    assert dataset.duration is not None
    for label, state in enumerate(("Normal state", "Fatigue state")):
        for path in sorted(raw.rglob(f"{state}.cnt")):
            subject = re.sub(r"[^0-9A-Za-z]", "", path.parent.name)
            channels, rate = read_cnt(path, dataset.channels)
            for _, window in cut([(values, rate) for values in channels], dataset.duration):
                yield Piece(subject, window, (label,))
