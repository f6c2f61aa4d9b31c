"""Tables for the tests of readers: the same one as CSV and as Parquet, and its columns' names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from recording_checks import write

from normwear_fast.recordings import Recording

ROWS = 600
SIGNAL = np.random.default_rng(11).normal(size=(ROWS, 3))
EVEN = np.arange(ROWS) / 100  # s


def names(recording: Recording) -> list[str]:
    return [channel.name for channel in recording.channels]


def both(tmp_path: Path, columns: dict[str, Any]) -> list[Path]:
    """The same table as CSV and as Parquet."""
    table = pd.DataFrame(columns)
    table.to_csv(tmp_path / "r.csv", index=False)
    table.to_parquet(tmp_path / "r.parquet")
    return [tmp_path / "r.csv", tmp_path / "r.parquet"]


WALL_MS = 1_717_149_600_000 + (EVEN * 1e3).astype(np.int64)


def even(
    path: Path,
    times: list[str] | np.ndarray,
    header: str = "time_s,ecg",
    separator: str = ",",
) -> tuple[Path, np.ndarray]:
    """A CSV of these times, even or not, and a signal; and the signal."""
    values = np.random.default_rng(6).normal(size=len(times)).round(4)
    rows = [f"{t}{separator}{v}" for t, v in zip(times, values, strict=True)]
    return write(path, "\n".join([header.replace(",", separator), *rows]) + "\n"), values
