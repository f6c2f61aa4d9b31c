"""Opening and finding recordings: rubbish, names, folders, and the libraries left alone."""

from __future__ import annotations

import os
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from recording_checks import opened, refused, signal
from recording_writers import write_fif, write_h5, write_zarr

from normwear_fast.errors import InputError, RecordingError, UsageError
from normwear_fast.recordings import base, extensions, find_recordings, open_recording


def test_opening_refuses_what_cannot_be_read(tmp_path: Path, data_dir: Path) -> None:
    refused(tmp_path / "none.edf", "No such file")
    for name in ("r.csv", "r.edf", "r.hea", "r.npy", "r.npz", "r.parquet", "r.bdf"):
        (tmp_path / name).touch()
        refused(tmp_path / name, "empty (0 bytes)")
    (tmp_path / "folder.edf").mkdir()
    refused(tmp_path / "folder.edf", "is a folder")
    refused(tmp_path / "other.xyz", "no format", ".edf")
    refused(data_dir / "03700181.dat", "03700181.hea")
    if os.geteuid():  # root may read everything
        (tmp_path / "r.npy").write_bytes(b"x")
        (tmp_path / "r.npy").chmod(0)
        refused(tmp_path / "r.npy", "Permission denied")
    for rate in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(UsageError, match="--rate"):
            open_recording(data_dir / "a103l.hea", sampling_rate=rate)
    refused(data_dir / "a103l.hea", "--rate 100 contradicts", "250 Hz", rate=100.0)
    with open_recording(data_dir / "a103l.hea", sampling_rate=251.0) as recording:
        assert recording.channels[0].sampling_rate == 250.0
        with pytest.raises(InputError, match="channel 3 does not exist"):
            recording.blocks([3])
        with pytest.raises(InputError, match="above 0"):
            recording.blocks([0], 0.0)


def binary_formats() -> list[str]:
    """Every extension of the package's own readers but text: other tests register readers too."""
    ours = [s for s in extensions() if base._READERS[s].__module__.startswith("normwear_fast.")]
    return [suffix for suffix in ours if suffix not in (".csv", ".tsv")]


@pytest.mark.parametrize("suffix", binary_formats())
@given(raw=st.binary(min_size=1, max_size=600))
@example(raw=b"A 0")  # a whole WFDB header, of a record without signals
def test_rubbish_is_refused(
    tmp_path_factory: pytest.TempPathFactory, suffix: str, raw: bytes
) -> None:
    path = tmp_path_factory.getbasetemp() / f"rubbish{suffix}"
    path.write_bytes(raw)
    try:
        recording = open_recording(path, sampling_rate=64.0)
    except RecordingError:
        refused(path, rate=64.0)
    else:
        assert suffix == ".hea"
        assert recording.channels == ()


@settings(max_examples=50)
@given(raw=st.one_of(st.binary(min_size=1, max_size=300), st.text(min_size=1).map(str.encode)))
def test_rubbish_text_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, raw: bytes
) -> None:
    path = tmp_path_factory.getbasetemp() / "rubbish.csv"
    path.write_bytes(raw)
    text = ""
    try:
        opened(path, 64.0)
    except RecordingError as error:
        text = str(error)
    assert len(text.splitlines()) <= 1


def test_finding_gives_every_recording_an_id_of_its_own(tmp_path: Path, data_dir: Path) -> None:
    for name in (
        "p1/ecg.csv",
        "p1/ecg.npy",
        "p1/night 2.EDF",
        "p2/ecg.csv",
        "p2/deep/er.x.parquet",
        "p2/notes.txt",
        "p2/.hidden.csv",
        ".cache/x.csv",
    ):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    for suffix in (".hea", ".dat", ".xyz"):
        (tmp_path / "p2" / f"s{suffix}").touch()
    (tmp_path / "p2" / "loop").symlink_to(tmp_path)

    assert [found.id for found in find_recordings([tmp_path])] == [
        "p1/ecg.csv",
        "p1/ecg.npy",
        "p1/night 2",
        "p2/deep/er.x",
        "p2/ecg",
        "p2/s",
    ]
    (tmp_path / "p2" / "loop").unlink()
    # a file by itself; a file twice; unknown formats are kept when named, to be reported
    given = [tmp_path / "p2" / "ecg.csv", tmp_path / "p2", tmp_path / "p2" / "notes.txt"]
    assert [found.id for found in find_recordings(given)] == ["deep/er.x", "ecg", "notes", "s"]
    # one name in two inputs
    given = [tmp_path / "p1" / "ecg.csv", tmp_path / "p2"]
    ids = [found.id for found in find_recordings(given)]
    assert ids == ["deep/er.x", "p1/ecg.csv", "p2/ecg.csv", "s"]
    assert find_recordings([str(data_dir / "a103l.hea")])[0].path == data_dir / "a103l.hea"

    with pytest.raises(UsageError, match=r"nowhere: no such file or folder"):
        find_recordings([tmp_path / "p1", tmp_path / "nowhere"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match=r"empty: no recording found; known are .*\.edf"):
        find_recordings([tmp_path / "empty"])


def test_heavy_libraries_load_when_needed() -> None:
    code = (
        "import sys, normwear_fast.recordings, normwear_fast.cli.inspect;"
        "print([m for m in ('wfdb', 'edfio', 'pyarrow', 'pandas', 'scipy') if m in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"


def test_opening_reads_little(tmp_path: Path) -> None:
    """A large file of every lazy format is opened and its first block read in bounded memory."""
    data = signal(4, 1_000_000, np.float32)

    def fill(root: Any, put: Any) -> None:
        put(root, "data", data, chunks=(1, 50_000)).attrs["sampling_rate"] = 100.0

    paths = [
        write_h5(tmp_path / "a.h5", fill),
        write_zarr(tmp_path / "a.zarr", fill, 3),
        write_fif(tmp_path / "a_raw.fif", data.astype(np.float64)),  # at 200 Hz
    ]
    for path in paths:
        tracemalloc.start()
        with open_recording(path) as recording:
            for count, block in enumerate(recording.blocks(range(4), 30.0)):
                assert block[0].size == 30 * recording.channels[0].sampling_rate
                if count == 20:
                    break
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 12e6, path
