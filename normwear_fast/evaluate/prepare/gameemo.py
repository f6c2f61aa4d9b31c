"""GAMEEMO: four computer games, one a quadrant of arousal and valence.

Layout (Alakus, Gonen and Turkoglu, Biomed. Signal Process. Control 2020; Mendeley b3pn4kwpmn):
`(S01)` ... `(S28)`, each `Preprocessed EEG Data/.csv format/S01G1AllChannels.csv` to `G4`, a header of
14 Emotiv EPOC+ electrodes (AF3, AF4, F3, F4, F7, F8, FC5, FC6, O1, O2, P7, P8, T7, T8), about 38,252
rows at 128 Hz. Games: G1 boring (low arousal, negative), G2 calm (low, positive), G3 horror (high,
negative), G4 funny (high, positive).

Uncertain: which four electrodes the paper took; here AF3, AF4, T7, T8, where a headband sits.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from normwear_fast.errors import RecordingError
from normwear_fast.evaluate.prepare.common import Piece, column, cut, number, read_csv
from normwear_fast.evaluate.registry import Dataset


def read(raw: Path, dataset: Dataset) -> Iterator[Piece]:
    """Pieces of every preprocessed game at or below `raw`."""
    assert dataset.duration is not None
    for path in sorted(raw.rglob("*.csv")):
        name = re.fullmatch(r"S(\d{2})G([1-4])AllChannels\.csv", path.name, re.IGNORECASE)
        if name is None:
            continue
        header, rows = read_csv(path)
        indices = [column(header, rf"^{electrode}$", path) for electrode in dataset.channels]
        if any(len(row) <= max(indices) for row in rows):
            raise RecordingError(f"{path}: a row of fewer fields than the electrodes need")
        table = np.array([[number(row[index], str(path)) for index in indices] for row in rows])
        channels = list(zip(table.T, dataset.sampling_rates, strict=True))
        for _, window in cut(channels, dataset.duration):
            yield Piece(f"S{name.group(1)}", window, (int(name.group(2)) - 1,))
