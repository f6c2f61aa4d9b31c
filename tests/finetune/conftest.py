"""A cohort of labelled recordings, and a folder tuned on it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from pulse_windows import RATE, encoder, pulse, write_table

from normwear_fast.cli.main import main


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six recordings of 10 s, one with a gap; one that cannot be read; labels; weights."""
    folder = tmp_path_factory.mktemp("cohort")
    (folder / "recordings").mkdir()
    rng = np.random.default_rng(3)
    rows = []
    for subject in range(6):
        data = pulse(0.9 if subject % 2 == 0 else 2.5, 10.0, rng)
        if subject == 2:
            data[0, 150:230] = np.nan
        path = folder / "recordings" / f"r{subject}.npz"
        np.savez(path, data=data, sampling_rate=RATE, channels=np.array(["ECG", "PPG"]))
        rows.append([f"r{subject}", "slow" if subject % 2 == 0 else "fast", f"s{subject}"])
    (folder / "recordings" / "damaged.npz").write_bytes(b"PK\x03\x04 no more")
    rows.append(["damaged", "slow", "s9"])
    write_table(folder / "labels.csv", ["recording", "label", "subject"], rows)
    encoder().save_pretrained(folder / "weights")
    return folder


@pytest.fixture(scope="module")
def tuned(cohort: Path) -> Path:
    """The folder of a head that the command trained."""
    arguments = [str(cohort / "recordings"), "--labels", str(cohort / "labels.csv")]
    arguments += ["--weights", str(cohort / "weights"), "--output", str(cohort / "model")]
    arguments += ["--window", "2", "--hop", "1", "--precision", "float32", "--workers", "0"]
    assert main(["finetune", *arguments, "--validation", "0.34"]) == 1  # the damaged one
    return cohort / "model"
