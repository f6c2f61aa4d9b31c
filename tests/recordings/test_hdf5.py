"""HDF5's own: links, sizes that are checked before memory, and a damaged heap."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from recording_checks import opened_in_any_blocks, refused_when_read, signal
from recording_writers import write_h5

from normwear_fast.errors import RecordingError
from normwear_fast.recordings import open_recording

h5py = pytest.importorskip("h5py")


def test_hdf5_links_do_not_leave_the_file(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["secret"] = np.arange(100.0)
        file["secret"].attrs["sampling_rate"] = 10.0
    with h5py.File(tmp_path / "link.h5", "w") as file:
        file["ecg"] = h5py.ExternalLink("other.h5", "/secret")
    refused_when_read(tmp_path / "link.h5", "link to another file")
    with h5py.File(tmp_path / "soft.h5", "w") as file:
        file["data"] = np.arange(100.0)
        file["data"].attrs["sampling_rate"] = 10.0
        file["again"] = h5py.SoftLink("/data")
        file["nowhere"] = h5py.SoftLink("/no/such")
        file["loop"] = file["/"]
    recording, whole = opened_in_any_blocks(tmp_path / "soft.h5")
    assert len(whole) == 1
    assert sum("soft link" in note for note in recording.notes) == 2
    with h5py.File(tmp_path / "raw.h5", "w") as file:
        (tmp_path / "outside.bin").write_bytes(b"\0" * 800)
        one = file.create_dataset(
            "ecg", (100,), "f8", external=[(str(tmp_path / "outside.bin"), 0, 800)]
        )
        one.attrs["sampling_rate"] = 10.0
    refused_when_read(tmp_path / "raw.h5", "stored in other files")
    layout = h5py.VirtualLayout((100,), "f8")
    layout[:] = h5py.VirtualSource(str(tmp_path / "other.h5"), "secret", (100,))
    with h5py.File(tmp_path / "virtual.h5", "w") as file:
        file.create_virtual_dataset("ecg", layout).attrs["sampling_rate"] = 10.0
    refused_when_read(tmp_path / "virtual.h5", "stored in other files")


@pytest.mark.parametrize("chunks", [None, (1, 4096)])
def test_hdf5_sizes_are_checked_before_memory(tmp_path: Path, chunks: Any) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        one = file.create_dataset("data", (8, 2**40), "f8", chunks=chunks)
        one.attrs["sampling_rate"] = 100.0
        if chunks:
            one[0, :10] = 1.0
    refused_when_read(tmp_path / "a.h5", "declares", "stored")


def test_hdf5_chunks_too_large_to_hold_are_refused(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        one = file.create_dataset("data", (1, 2**27), "f8", chunks=(1, 2**27))
        one.attrs["sampling_rate"] = 100.0
    refused_when_read(tmp_path / "a.h5", "chunks of 1024 MB")


def test_a_heap_cut_by_zeros_is_refused(tmp_path: Path) -> None:
    """Found by a random damage: the library walks such a heap for ever, and cannot be interrupted."""

    def fill(root: Any, put: Any) -> None:
        put(root, "data", signal(2, 600))
        root.attrs["sampling_rate"] = 50.0
        root.attrs["channels"] = ["first", "second"]

    path = write_h5(tmp_path / "a.h5", fill)
    with open_recording(path) as recording:
        assert [channel.name for channel in recording.channels] == ["first", "second"]
    content = bytearray(path.read_bytes())
    place = content.index(b"GCOL")
    content[place + 16 : place + 300] = bytes(284)
    path.write_bytes(bytes(content))
    with pytest.raises(RecordingError, match=f"a.h5: is damaged: the heap at byte {place} is cut"):
        open_recording(path)
