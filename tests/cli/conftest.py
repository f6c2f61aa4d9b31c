"""Weights of a small model, and two short recordings."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from cli_runs import TINY

from normwear_fast import FastNormWear


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weights")
    FastNormWear(True, config=TINY).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def recordings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recordings")
    rng = np.random.default_rng(0)
    for name, seconds in (("one", 12.0), ("two", 7.0)):
        data = rng.standard_normal((2, round(65 * seconds)))
        np.savez(folder / f"{name}.npz", data=data, sampling_rate=65.0, channels=["ECG", "PPG"])
    return folder
