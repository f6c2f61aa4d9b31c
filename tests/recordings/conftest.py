"""What tests of readers share as fixtures."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from recording_writers import write_h5, write_zarr

Writer = Callable[[Path, Callable[[Any, Callable[..., Any]], None]], Path]
STORES: dict[str, Writer] = {
    "hdf5": lambda folder, fill: write_h5(folder / "a.h5", fill),
    "zarr2": lambda folder, fill: write_zarr(folder / "a.zarr", fill, 2),
    "zarr3": lambda folder, fill: write_zarr(folder / "a.zarr", fill, 3),
    "zarr2_zip": lambda folder, fill: write_zarr(folder / "a.zip", fill, 2),
    "zarr3_zip": lambda folder, fill: write_zarr(folder / "a.zip", fill, 3),
}


@pytest.fixture(params=list(STORES))
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[..., Path]:
    """Writes what a function fills in as HDF5 or Zarr, in each of the forms that hold arrays."""
    return lambda fill: STORES[request.param](tmp_path, fill)


@pytest.fixture
def record(data_dir: Path, tmp_path: Path) -> Path:
    """A copy of a103l to damage."""
    for suffix in (".hea", ".mat"):
        shutil.copy(data_dir / f"a103l{suffix}", tmp_path)
    return tmp_path / "a103l.hea"


@pytest.fixture
def wfdb_reads_every_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """Most records of the tests are short: as it is, one read would serve all their blocks."""
    monkeypatch.setattr("normwear_fast.recordings.wfdb.READ_VALUES", 1)
