"""Blocks equal the whole, and memory depends on neither the header's claims nor the length."""

from __future__ import annotations

import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet
from recording_checks import read, refused, write

from normwear_fast.recordings import open_recording

edfio = pytest.importorskip("edfio")


@pytest.mark.usefixtures("wfdb_reads_every_block")
@pytest.mark.parametrize("seconds", [0.001, 0.37, 7.0, 33.3, 1e6])
@pytest.mark.parametrize("name", ["03700181.hea", "a103l_two_rates.edf"])
def test_blocks_equal_whole(data_dir: Path, tmp_path: Path, name: str, seconds: float) -> None:
    path = data_dir / name
    if seconds < 1:  # a cut-out, or it takes minutes
        path = _short(path, tmp_path)
    with open_recording(path) as recording:
        order = [1, 0]
        for ours, whole in zip(
            read(recording, seconds, order), read(recording, 1e9, order), strict=True
        ):
            np.testing.assert_array_equal(ours, whole)


def _short(path: Path, folder: Path) -> Path:
    short = folder / path.name
    raw = path.read_bytes()
    if path.suffix == ".hea":
        short.write_bytes(raw.replace(b" 75000 ", b" 300 "))
        (folder / "03700181.dat").write_bytes((path.parent / "03700181.dat").read_bytes()[:2700])
    else:
        short.write_bytes(raw[:236] + b"3       " + raw[244 : 768 + 3 * 750])
    return short


def _huge_wfdb(folder: Path) -> Path:
    (folder / "r.dat").write_bytes(bytes(100))
    return write(folder / "r.hea", f"r 1 50 {10**12}\nr.dat 16 200/mV 16 0 0 0 0 a\n")


def _huge_edf(folder: Path) -> Path:
    signals = [edfio.EdfSignal(np.arange(100.0), 100)]
    edfio.Edf(signals).write(folder / "r.edf")
    raw = bytearray((folder / "r.edf").read_bytes())
    raw[236:244] = b"99999999"
    (folder / "r.edf").write_bytes(raw)
    return folder / "r.edf"


def _huge_npy(folder: Path) -> Path:
    with (folder / "r.npy").open("wb") as file:
        header = {"descr": "<f8", "fortran_order": False, "shape": (10**6, 10**9)}
        np.lib.format.write_array_header_1_0(file, header)
    return folder / "r.npy"


@pytest.mark.parametrize("make", [_huge_wfdb, _huge_edf, _huge_npy])
def test_a_lying_header_allocates_nothing(tmp_path: Path, make: Callable[[Path], Path]) -> None:
    path = make(tmp_path)
    refused(path, rate=50.0)  # imports what it needs
    tracemalloc.start()
    try:
        refused(path, rate=50.0)
        assert tracemalloc.get_traced_memory()[1] < 2_000_000
    finally:
        tracemalloc.stop()


STREAM = """
import sys
import numpy as np
from damaged_reader import peak_resident
from normwear_fast.recordings import open_recording
def peak():
    return peak_resident() / 1024
small, large = sys.argv[1:]
def run(path):
    with open_recording(path, sampling_rate=1000.0 if path.endswith("y") else None) as recording:
        total = sum(b[0].size for b in recording.blocks(range(len(recording.channels)), 20.0))
        assert total == recording.channels[0].samples
run(small)
before = peak()
run(large)
print(peak() - before)
"""


def _stream_csv(path: Path, samples: int) -> None:
    from pyarrow import csv

    t = np.arange(samples) / 1000 + np.random.default_rng(13).uniform(0, 3e-4, samples)
    csv.write_csv(pa.table({"time_s": t, "x": np.sin(t), "y": np.cos(t)}), str(path))


def _stream_parquet(path: Path, samples: int) -> None:
    x = np.random.default_rng(13).normal(size=(3, samples))
    t = np.arange(samples) / 1000
    parquet.write_table(
        pa.table({"time_s": t, "x": x[0], "y": x[1], "z": x[2]}), path, row_group_size=100_000
    )


def _stream_bdf(path: Path, samples: int) -> None:
    x = np.random.default_rng(13).normal(size=(8, samples))
    edfio.Bdf([edfio.BdfSignal(row, 1000) for row in x]).write(path)


def _stream_hea(path: Path, samples: int) -> None:
    x = np.random.default_rng(13).integers(-999, 999, (samples, 8)).astype("<i2")
    path.with_suffix(".dat").write_bytes(x.tobytes())
    signals = f"{path.stem}.dat 16 200/mV 16 0 0 0 0 a\n" * 8
    path.write_text(f"{path.stem} 8 1000 {samples}\n{signals}")


def _stream_npz(path: Path, samples: int) -> None:
    x = np.random.default_rng(13).integers(0, 9, (4, samples)).astype(np.float64)
    np.savez_compressed(path, data=x, sampling_rate=1000)


@pytest.mark.parametrize(
    ("suffix", "make", "samples"),
    [
        (".csv", _stream_csv, 1_000_000),  # 55 MB
        (".parquet", _stream_parquet, 2_000_000),  # 64 MB
        (".bdf", _stream_bdf, 1_600_000),  # 38 MB; edfio alone would take 150
        (".hea", _stream_hea, 4_000_000),  # 64 MB
        (".npz", _stream_npz, 2_000_000),  # 64 MB unpacked
    ],
)
def test_memory_does_not_grow_with_the_recording(
    tmp_path: Path, suffix: str, make: Callable[[Path, int], None], samples: int
) -> None:
    pytest.importorskip("resource")
    small, large = tmp_path / f"small{suffix}", tmp_path / f"large{suffix}"
    make(small, samples // 2)  # fills the libraries' pools
    make(large, samples)
    result = subprocess.run(
        [sys.executable, "-c", STREAM, str(small), str(large)],
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        check=True,
    )
    # The times of a CSV's rows and the pools' own steps, 5 to 30 MB; all of a file would be 50 and more.
    assert float(result.stdout) < 35, f"{result.stdout.strip()} MB more for the large file"
