"""FIF, BrainVision, EEGLAB and GDF against mne, and refused in one line where they lie."""

from __future__ import annotations

import struct
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
from recording_checks import opened_in_any_blocks, refused_when_read, signal
from recording_writers import raw_of, write_brainvision, write_eeglab, write_fif, write_gdf

from normwear_fast.errors import UsageError
from normwear_fast.recordings import find_recordings, open_recording

mne = pytest.importorskip("mne")


def expected_of(path: Path) -> np.ndarray:
    """What mne itself reads, whole."""
    return mne.io.read_raw(path, preload=True, verbose="ERROR").get_data()


def test_fif_equals_mne(tmp_path: Path) -> None:
    kinds = ["eeg", "ecg", "stim", "gsr"]
    raw = raw_of(signal(4, 4000) * 1e-6, names=["Fz", "ECG", "STI 014", "EDA"], kinds=kinds)
    raw.info["bads"] = ["Fz"]
    raw.set_annotations(mne.Annotations([1.0], [2.0], ["BAD_move"]))
    raw.save(tmp_path / "a_raw.fif", fmt="double", verbose="ERROR")
    recording, whole = opened_in_any_blocks(tmp_path / "a_raw.fif")
    assert [(c.name, c.unit, c.sampling_rate) for c in recording.channels] == [
        ("Fz", "V", 200.0),
        ("ECG", "V", 200.0),
        ("EDA", "S", 200.0),
    ]
    np.testing.assert_array_equal(whole, expected_of(tmp_path / "a_raw.fif")[[0, 1, 3]])
    notes = " ".join(recording.notes)
    assert "STI 014" in notes
    assert "Fz" in notes
    assert "1 stretches marked bad" in notes


def test_split_fif_is_one_recording(tmp_path: Path) -> None:
    write_fif(tmp_path / "a_raw.fif", signal(20, 40_000), split_size="2MB", buffer_size_sec=5)
    write_fif(tmp_path / "a_raw-9.fif")  # a recording of its own, by its looks a part
    assert (tmp_path / "a_raw-1.fif").exists()
    assert [one.id for one in find_recordings([tmp_path])] == ["a_raw", "a_raw-9"]
    recording, whole = opened_in_any_blocks(tmp_path / "a_raw.fif")
    assert recording.start_time == datetime(2024, 5, 6, tzinfo=UTC)
    np.testing.assert_array_equal(whole, expected_of(tmp_path / "a_raw.fif"))
    (tmp_path / "a_raw-1.fif").unlink()
    refused_when_read(tmp_path / "a_raw.fif", "a_raw-1.fif", "does not exist")


def test_fif_acquisition_skips_are_missing(tmp_path: Path) -> None:
    first = raw_of(signal(2, 4000) * 1e-6)
    path = tmp_path / "a_raw.fif"
    first.set_annotations(mne.Annotations([5.0], [3.0], ["BAD_ACQ_SKIP"]))
    first.save(path, fmt="double", verbose="ERROR")
    recording, whole = opened_in_any_blocks(path)
    np.testing.assert_array_equal(np.isnan(whole[0]), np.isin(np.arange(4000), range(1000, 1600)))
    assert any("1 gaps, 3 s" in note for note in recording.notes)


def test_fif_that_holds_no_raw_data_is_refused(tmp_path: Path) -> None:
    epochs = mne.EpochsArray(
        signal(1, 400).reshape(4, 1, 100), mne.create_info(1, 100.0), verbose=False
    )
    epochs.save(tmp_path / "a-epo.fif", verbose="ERROR")
    refused_when_read(tmp_path / "a-epo.fif", "No raw data")


def test_fif_tags_that_lead_astray_are_refused(tmp_path: Path) -> None:
    good = write_fif(tmp_path / "good_raw.fif").read_bytes()

    def with_tag(place: int, value: int) -> Path:
        path = tmp_path / "a_raw.fif"
        path.write_bytes(good[:place] + struct.pack(">i", value) + good[place + 4 :])
        return path

    refused_when_read(with_tag(8, 2**31 - 1), "declares 2147483647 bytes")
    second = 16 + struct.unpack_from(">i", good, 8)[0]
    third = second + 16 + struct.unpack_from(">i", good, second + 8)[0]
    refused_when_read(with_tag(third + 12, 16), "points back")
    refused_when_read(with_tag(third + 12, -7), "points back")
    path = tmp_path / "a_raw.fif"
    path.write_bytes(good[: len(good) // 2])
    refused_when_read(path, "a_raw.fif")


@pytest.mark.parametrize("orientation", ["MULTIPLEXED", "VECTORIZED"])
def test_brainvision_equals_mne(tmp_path: Path, orientation: str) -> None:
    data = signal(3, 2000, np.int16)
    path = write_brainvision(tmp_path, data, orientation)
    recording, whole = opened_in_any_blocks(path)
    assert [(c.name, c.unit, c.sampling_rate) for c in recording.channels] == [
        (f"C{i}", "V", 250.0) for i in (1, 2, 3)
    ]
    np.testing.assert_allclose(whole, data * 0.5e-6, rtol=1e-12)
    np.testing.assert_array_equal(whole, expected_of(path))
    assert recording.start_time == datetime(2024, 5, 6, 7, 8, 9, tzinfo=UTC)
    assert [one.id for one in find_recordings([tmp_path])] == ["rec"]
    refused_when_read(tmp_path / "rec.eeg", "give its header", "rec.vhdr")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"DataFile": "../rec.eeg"}, ["same folder"]),
        ({"DataFile": "/etc/hostname"}, ["same folder"]),
        ({"MarkerFile": "../x.vmrk"}, ["same folder"]),
        ({"DataFile": "gone.eeg"}, ["does not exist"]),
        ({"NumberOfChannels": "1000000000"}, ["declares 1e+09 channels", "lists 3"]),
        ({"NumberOfChannels": "2"}, ["2 channels"]),
        ({"NumberOfChannels": "x"}, ["'x'"]),
        ({"SamplingInterval": "0"}, ["above 0"]),
        ({"DataPoints": "2001"}, ["declares 2001 samples", "12006", "12000"]),
        ({"BinaryFormat": "INT_8"}, ["INT_8"]),
    ],
)
def test_bad_brainvision_is_refused(
    tmp_path: Path, changes: dict[str, str], words: list[str]
) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    path = write_brainvision(folder, signal(3, 2000, np.int16), **changes)
    (tmp_path / "rec.eeg").write_bytes((folder / "rec.eeg").read_bytes())
    if changes == {"NumberOfChannels": "2"}:  # 12,000 bytes are no whole number of odd frames
        (folder / "rec.eeg").write_bytes(b"\0" * 11_998)
    refused_when_read(path, *words)


@pytest.mark.parametrize("where", ["fdt", "structure", "variables"])
def test_eeglab_equals_mne(tmp_path: Path, where: str) -> None:
    data = signal(2, 3000, np.float32)
    path = write_eeglab(tmp_path, data, where)
    recording, whole = opened_in_any_blocks(path)
    assert [(c.name, c.unit, c.sampling_rate) for c in recording.channels] == [
        ("E1", "V", 128.0),
        ("E2", "V", 128.0),
    ]
    np.testing.assert_allclose(whole, data.astype(np.float64) * 1e-6, rtol=1e-6)
    np.testing.assert_array_equal(whole, expected_of(path))
    assert [one.id for one in find_recordings([tmp_path])] == ["rec"]


def test_bad_eeglab_is_refused(tmp_path: Path) -> None:
    path = write_eeglab(tmp_path, signal(2, 3000, np.float32), "fdt")
    data = (tmp_path / "rec.fdt").read_bytes()
    (tmp_path / "rec.fdt").write_bytes(data[:-100])
    refused_when_read(path, "declares 3000 samples of 2 channels, 24000 bytes", "23900")
    (tmp_path / "rec.fdt").unlink()
    refused_when_read(path, "rec.set")
    whole = write_eeglab(tmp_path, signal(2, 3000, np.float32), "structure").read_bytes()
    path.write_bytes(whole[:-1000])
    refused_when_read(path, "declares", "more")
    path.write_bytes(whole[:126] + b"XX" + whole[128:])
    refused_when_read(path, "no MATLAB 5 file")


@pytest.mark.parametrize("version", ["1.25", "2.20"])
def test_gdf_equals_mne(tmp_path: Path, version: str) -> None:
    data = signal(2, 2000, np.int16)
    path = write_gdf(tmp_path / "a.gdf", list(data), [100, 100], version)
    recording, whole = opened_in_any_blocks(path)
    assert [(c.name, c.unit, c.sampling_rate) for c in recording.channels] == [
        ("G1", "V", 100.0),
        ("G2", "V", 100.0),
    ]
    np.testing.assert_allclose(whole, data * 0.1e-6, atol=1e-12)
    np.testing.assert_array_equal(whole, expected_of(path))


def test_gdf_of_several_rates_is_refused(tmp_path: Path) -> None:
    fast, slow = signal(1, 2000, np.int16)[0], signal(1, 500, np.int16)[0]
    path = write_gdf(tmp_path / "a.gdf", [fast, slow], [100, 25], "2.20")
    refused_when_read(path, "25, 100 Hz", "EDF")


def test_bad_gdf_is_refused(tmp_path: Path) -> None:
    path = write_gdf(tmp_path / "a.gdf", list(signal(2, 2000, np.int16)), [100, 100], "1.25")
    good = path.read_bytes()
    path.write_bytes(good[:-3000])
    refused_when_read(path, "declares 20 data records")
    path.write_bytes(good[:252] + struct.pack("<I", 2**32 - 1) + good[256:])
    refused_when_read(path, "4294967295 channels")
    path.write_bytes(good[:-4] + struct.pack("<I", 2**32 - 1))
    refused_when_read(path, "declares 4294967295 events")
    path.write_bytes(b"GDF ?.??" + good[8:])
    refused_when_read(path, "is no GDF file")


def test_what_only_read_raw_knows_says_so(tmp_path: Path) -> None:
    (tmp_path / "a.nxe").write_bytes(np.zeros((640, 64), "<i2").tobytes())
    (tmp_path / "b.cnt").write_bytes(b"no such thing" * 100)
    with pytest.raises(UsageError):  # in folders they are passed over
        find_recordings([tmp_path])
    with open_recording(tmp_path / "a.nxe") as recording:
        assert any("untested" in note for note in recording.notes)
    refused_when_read(tmp_path / "b.cnt", "is damaged")
