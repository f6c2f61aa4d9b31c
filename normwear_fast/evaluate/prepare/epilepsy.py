"""Epilepsy: five conditions of single-channel EEG, each against the other four.

Two public layouts. University of Bonn (Andrzejak et al., Phys. Rev. E 2001): folders or files by letter,
Z (set A, eyes open), O (B, eyes closed), N (C, healthy zone), F (D, tumour zone), S (E, seizure), each
`Z001.txt` ... `Z100.txt` (the N set ends in `.TXT`), 4,097 samples at 173.61 Hz, one a line. UCI
Epileptic Seizure Recognition: `data.csv` (or `Epileptic Seizure Recognition.csv`), a name such as
`X21.V1.791`, X1 ... X178 (a second each), and y: 1 seizure, 2 tumour area, 3 healthy area, 4 eyes
closed, 5 eyes open.

The sets name no people; the recording stands for the subject, so that pieces of one recording stay
in one half. Uncertain: the paper's window; Bonn recordings are cut into 6 s here, UCI rows are kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from normwear_fast.errors import RecordingError
from normwear_fast.evaluate.prepare.common import Piece, cut, number, read_columns, read_csv
from normwear_fast.evaluate.registry import Dataset

_LETTERS = "ZONFS"
# UCI's y to the position of the set in _LETTERS.
_UCI = {1: 4, 2: 3, 3: 2, 4: 1, 5: 0}


def _labels(condition: int) -> tuple[int, ...]:
    return tuple(int(index == condition) for index in range(len(_LETTERS)))


def read(raw: Path, dataset: Dataset) -> Iterator[Piece]:
    """Pieces of whichever of the two layouts is at or below `raw`."""
    assert dataset.duration is not None
    rate = dataset.sampling_rates[0]
    texts = sorted(
        path
        for path in raw.rglob("*")
        if path.suffix.lower() == ".txt"
        and len(path.stem) == 4
        and path.stem[0].upper() in _LETTERS
        and path.stem[1:].isdigit()
    )
    if texts:
        for path in texts:
            values = read_columns(path)[:, 0]
            condition = _LETTERS.index(path.stem[0].upper())
            for _, window in cut([(values, rate)], dataset.duration):
                yield Piece(path.stem.upper(), window, _labels(condition))
        return
    for name in ("data.csv", "Epileptic Seizure Recognition.csv"):
        for path in sorted(raw.rglob(name)):
            yield from _read_uci(path)
            return


def _read_uci(path: Path) -> Iterator[Piece]:
    header, rows = read_csv(path)
    if len(header) != 180 or header[1].upper() != "X1" or header[-1].lower() != "y":
        raise RecordingError(f"{path}: not a name, X1 to X178 and y")
    for line, row in enumerate(rows, start=2):
        where = f"{path}, line {line}"
        if len(row) != len(header):
            raise RecordingError(f"{where}: {len(row)} fields; {len(header)} are right")
        condition = _UCI.get(int(number(row[-1], where)))
        if condition is None:
            raise RecordingError(f"{where}: y is {row[-1]!r}; 1 to 5 is right")
        values = np.array([number(field, where) for field in row[1:-1]])
        # X21.V1.791: the 21st second of recording V1.791.
        recording = row[0].split(".", 1)[-1].replace(".", "-") or f"row{line}"
        # The 23.6 s recordings were cut into 23 parts of 178 samples.
        yield Piece(recording, ((values, 173.61),), _labels(condition))
