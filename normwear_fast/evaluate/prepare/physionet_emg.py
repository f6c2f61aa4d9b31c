"""PhysioNet EMG: a healthy, a myopathic and a neuropathic muscle.

Layout (PhysioNet emgdb 1.0.0): WFDB records `emg_healthy`, `emg_myopathy`, `emg_neuropathy` (.hea, .dat),
one channel in mV at 4000 Hz, and SHA256SUMS.txt, against which the files are checked.

Three people, one a class: nobody can be held out, so windows are split at random, as the TF-C
benchmark does, whose copy of the set the paper's archive names. Its windows are 1,500 samples
(0.375 s), which is 25 samples at 65 Hz. Uncertain: whether the paper resampled them.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from normwear_fast.errors import RecordingError
from normwear_fast.evaluate.prepare.common import Piece, check_sums, cut, find_root
from normwear_fast.evaluate.registry import Dataset


def read(raw: Path, dataset: Dataset) -> Iterator[Piece]:
    """Pieces of the three records."""
    from normwear_fast.recordings import open_recording

    assert dataset.duration is not None
    root = find_root(raw, "emg_healthy.hea", "the records of emgdb")
    for label, name in enumerate(dataset.tasks[0].classes):
        path = root / f"emg_{name}.hea"
        if not path.is_file():
            raise RecordingError(f"{path}: is missing; emgdb has three records")
        check_sums(root, [path, path.with_suffix(".dat")])
        with open_recording(path) as recording:
            rate = recording.channels[0].sampling_rate
            values = np.concatenate([block[0] for block in recording.blocks([0])])
        for _, window in cut([(values, rate)], dataset.duration):
            yield Piece(name, window, (label,))
