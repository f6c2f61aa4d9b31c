"""Zarr's own: folders and zips, shards, missing chunks, codecs that run code, and links."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from payload import Payload
from recording_checks import opened_in_any_blocks, refused_when_read, signal
from recording_writers import write_zarr

from normwear_fast.recordings import find_recordings

zarr = pytest.importorskip("zarr")


@pytest.mark.parametrize("version", [2, 3])
def test_zarr_folders_and_zips_are_one_recording(tmp_path: Path, version: int) -> None:
    def fill(root: Any, put: Any) -> None:
        put(root, "data", signal(1, 500), chunks=(1, 100)).attrs["sampling_rate"] = 10.0

    write_zarr(tmp_path / "sub" / "a.zarr", fill, version)
    write_zarr(tmp_path / "plain_store", fill, version)
    write_zarr(tmp_path / "b.zip", fill, version)
    found = find_recordings([tmp_path])
    assert [one.id for one in found] == ["b", "plain_store", "sub/a"]
    assert [one.id for one in find_recordings([tmp_path / "sub" / "a.zarr"])] == ["a"]
    for one in found:
        opened_in_any_blocks(one.path)


def test_zarr_may_be_sharded_and_an_array_at_the_root(tmp_path: Path) -> None:
    data = signal(4, 10_000, np.float32)
    root = zarr.create_array(
        zarr.storage.LocalStore(tmp_path / "a.zarr"), data=data, chunks=(1, 500), shards=(4, 2000)
    )
    root.attrs["sampling_rate"] = 50.0
    _, whole = opened_in_any_blocks(tmp_path / "a.zarr")
    np.testing.assert_array_equal(whole, data)


@pytest.mark.parametrize("version", [2, 3])
def test_zarr_missing_chunks_are_zeros_and_noted(tmp_path: Path, version: int) -> None:
    data = signal(1, 1000)
    data[0, 200:300] = 0  # zarr does not write it

    def fill(root: Any, put: Any) -> None:
        put(root, "data", data, chunks=(1, 100)).attrs["sampling_rate"] = 10.0

    path = write_zarr(tmp_path / "a.zarr", fill, version)
    recording, whole = opened_in_any_blocks(path)
    np.testing.assert_array_equal(whole, data)
    assert any("1 of 10 chunks" in note for note in recording.notes)
    name = "data/zarr.json" if version == 3 else "data/.zarray"
    metadata = json.loads((path / name).read_text())
    metadata["shape"] = [1, 10**15]
    (path / name).write_text(json.dumps(metadata))
    refused_when_read(path, "declares 10000000000000 chunks", "9 are stored")


def test_zarr_codecs_that_run_code_are_refused(tmp_path: Path) -> None:
    def fill(root: Any, put: Any) -> None:
        put(root, "data", signal(1, 500)).attrs["sampling_rate"] = 10.0

    path = write_zarr(tmp_path / "a.zarr", fill, 2)
    metadata = json.loads((path / "data/.zarray").read_text())
    metadata["filters"] = [{"id": "pickle", "protocol": 2}]
    (path / "data/.zarray").write_text(json.dumps(metadata))
    victim = tmp_path / "ran"
    for file in (path / "data").glob("0*"):
        file.write_bytes(pickle.dumps(Payload(victim)))
    refused_when_read(path, "codec 'pickle'")
    assert not victim.exists()
    path = write_zarr(tmp_path / "b.zarr", fill, 3)
    metadata = json.loads((path / "data/zarr.json").read_text())
    inner = metadata["codecs"]
    metadata["codecs"] = [
        {
            "name": "sharding_indexed",
            "configuration": {
                "chunk_shape": [1, 10],
                "codecs": [*inner, {"name": "numcodecs.pickle"}],
                "index_codecs": [{"name": "bytes"}],
            },
        }
    ]
    (path / "data/zarr.json").write_text(json.dumps(metadata))
    refused_when_read(path, "codec 'pickle'")


@pytest.mark.parametrize("form", ["blosc", "zstd", "shards"])
def test_zarr_chunks_cut_short_are_refused(tmp_path: Path, form: str) -> None:
    """numcodecs takes some of these, and gives back memory that nobody wrote."""
    data = signal(2, 600, np.float32)
    shards = (2, 300) if form == "shards" else None
    root = zarr.create_array(
        zarr.storage.LocalStore(tmp_path / "a.zarr"),
        data=data,
        chunks=(1, 100),
        shards=shards,
        zarr_format=2 if form == "blosc" else 3,
    )
    root.attrs["sampling_rate"] = 50.0
    file = tmp_path / "a.zarr" / ("0.1" if form == "blosc" else "c/0/1")
    good = file.read_bytes()
    for size in (0, 1, 7, len(good) // 2, len(good) - 60, len(good) - 1):
        file.write_bytes(good[:size])
        refused_when_read(tmp_path / "a.zarr", "data is damaged at sample")
    file.write_bytes(good)
    _, whole = opened_in_any_blocks(tmp_path / "a.zarr")
    np.testing.assert_array_equal(whole, data)


def test_zarr_links_out_of_the_store_are_refused(tmp_path: Path) -> None:
    def fill(root: Any, put: Any) -> None:
        put(root, "data", signal(1, 500)).attrs["sampling_rate"] = 10.0

    inside = write_zarr(tmp_path / "a.zarr", fill, 3)
    shutil.move(inside / "data", tmp_path / "elsewhere")
    (inside / "data").symlink_to(tmp_path / "elsewhere")
    refused_when_read(inside, "link out of the store")
