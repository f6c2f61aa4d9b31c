"""NPY and NPZ: which arrays are channels, which a clock, and what is refused or never unpickled."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from payload import Payload
from recording_checks import opened, read, refused

from normwear_fast.recordings import Recording, open_recording


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("kind", ["f4", "f8", ">i2", "u1", "?", "f2"])
def test_arrays_are_read_whole_and_in_blocks(tmp_path: Path, order: str, kind: str) -> None:
    data = np.asarray(np.random.default_rng(11).integers(0, 99, (3, 1000)), dtype=kind, order=order)
    np.save(tmp_path / "r.npy", data)
    np.savez(tmp_path / "stored.npz", data=data, sampling_rate=64, channels=["a", "b", "c"])
    np.savez_compressed(tmp_path / "packed.npz", data=data, sampling_rate=64.0, units=["g"] * 3)
    for name, rate in (("r.npy", 64.0), ("stored.npz", None), ("packed.npz", None)):
        with open_recording(tmp_path / name, sampling_rate=rate) as recording:
            assert [c.sampling_rate for c in recording.channels] == [64.0] * 3
            for seconds in (0.2, 3.33, 60.0):
                np.testing.assert_array_equal(read(recording, seconds), data.astype(float))
            np.testing.assert_array_equal(read(recording, 1.0, [2, 0]), data[[2, 0]].astype(float))
    with open_recording(tmp_path / "stored.npz") as recording:
        assert [c.name for c in recording.channels] == ["a", "b", "c"]
    with open_recording(tmp_path / "packed.npz") as recording:
        assert recording.channels[1].unit == "g"


@pytest.mark.parametrize("order", ["C", "F"])
def test_npz_longer_than_a_piece(tmp_path: Path, order: str) -> None:
    data = np.asarray(np.random.default_rng(12).normal(size=(3, 150_001)), order=order)
    np.savez_compressed(tmp_path / "r.npz", data=data, sampling_rate=1000)
    with open_recording(tmp_path / "r.npz") as recording:
        np.testing.assert_array_equal(read(recording, 7.77), data)


def test_npz_one_array_a_channel(tmp_path: Path) -> None:
    path = tmp_path / "r.npz"
    ecg, ppg = np.arange(1000.0), np.arange(250)
    np.savez(path, ecg=ecg, ppg=ppg, sampling_rate=[100, 25], label="rest", time=np.arange(9))
    recording, data = opened(path)
    assert [(c.name, c.sampling_rate) for c in recording.channels] == [("ecg", 100), ("ppg", 25)]
    assert recording.duration == 10.0
    np.testing.assert_array_equal(data[0], ecg)
    np.testing.assert_array_equal(data[1], ppg)
    np.savez(path, ecg=ecg, ppg=ppg)
    refused(path, "sampling_rate", "--rate")
    recording, data = opened(path, 50.0)  # of two lengths: the shorter one ends earlier
    assert [c.samples for c in recording.channels] == [1000, 250]
    with open_recording(path, sampling_rate=50.0) as recording:
        assert [data.size for data in read(recording, 2.0)] == [1000, 250]
        assert "ppg ends 15 s before the recording does" in recording.notes


def _has_note(recording: Recording, words: str) -> bool:
    return any(words in note for note in recording.notes)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("order", ["C", "F"])
def test_npz_takes_every_array_of_signals(tmp_path: Path, save: Any, order: str) -> None:
    path = tmp_path / "r.npz"
    acc = np.asarray(np.random.default_rng(1).normal(size=(3, 70_000)), order=order)
    save(path, ppg=acc[0], acc=acc, sampling_rate=64.0, units="g")
    with open_recording(path) as recording:
        assert [c.name for c in recording.channels] == ["ppg", "acc_1", "acc_2", "acc_3"]
        assert {c.unit for c in recording.channels} == {"g"}
        np.testing.assert_array_equal(read(recording, 7.0), [acc[0], *acc])
        np.testing.assert_array_equal(read(recording, 7.0, [3, 0]), [acc[2], acc[0]])
    # a rate and a unit of its own for each array, in the file's order
    save(path, ppg=acc[0], acc=acc[:, :35_000], sampling_rate=[64.0, 32.0], units=["", "g"])
    with open_recording(path) as recording:
        assert [(c.sampling_rate, c.unit) for c in recording.channels] == [
            (64.0, ""),
            *[(32.0, "g")] * 3,
        ]
    save(path, ppg=acc[0], acc=acc, sampling_rate=[64.0, 32.0, 4.0])
    refused(path, "sampling_rate has 3 entries for the arrays ppg, acc")
    save(path, **{"watch/ppg": acc[0], "watch/sampling_rate": 64.0, "ecg": acc[1]})
    recording = open_recording(path)
    assert [c.name for c in recording.channels] == ["watch/ppg"]
    assert _has_note(recording, "ecg has no sampling_rate and is left out")


def test_npz_notes_what_it_leaves_out(tmp_path: Path) -> None:
    path = tmp_path / "r.npz"
    x = np.random.default_rng(1).normal(size=(3, 640))
    np.savez(path, data=x[:2], ppg=x[2], sampling_rate=64.0)
    recording, data = opened(path)
    np.testing.assert_array_equal(data, x[:2])
    assert recording.notes == ("ppg stands beside data and is left out",)
    extra = {"labels": np.arange(10), "fs": [64], "subject": 7, "cube": np.ones((2, 2, 9))}
    np.savez(path, ppg=x[0], eda=x[1], sampling_rate=64.0, channels=["a", "b"], **extra)
    recording, data = opened(path)
    assert [c.name for c in recording.channels] == ["ppg", "eda"]
    for words in (
        "labels (10,)",
        "fs (1,)",
        "subject has shape ()",
        "cube has",
        "channels belongs",
    ):
        assert _has_note(recording, words), words
    np.savez(path, ppg=x[0], acc=x.T, sampling_rate=64.0)  # as most Python code holds one
    recording, data = opened(path)
    np.testing.assert_array_equal(data, x[:1])
    assert _has_note(recording, "acc has shape (640, 3); (channels, samples) is right: left out")
    with zipfile.ZipFile(path, "a") as file, pytest.warns(UserWarning, match="Duplicate"):
        file.writestr("ppg.npy", file.read("ppg.npy"))
    refused(path, "several arrays named ppg")


def test_npz_of_nothing_but_upright_arrays(tmp_path: Path) -> None:
    np.savez(tmp_path / "r.npz", acc=np.ones((640, 3)), labels=np.arange(10), sampling_rate=64.0)
    refused(tmp_path / "r.npz", "acc has shape (640, 3); (channels, samples) is right")


def test_npz_with_a_damaged_name(tmp_path: Path) -> None:
    path = tmp_path / "r.npz"
    np.savez(path, **{"pu\u00eds": np.ones(640), "sampling_rate": 64.0})
    path.write_bytes(path.read_bytes().replace("\u00ed".encode(), b"\xc3\xff"))
    refused(path, "is no NPZ file", "utf-8")


def test_npz_clock_equals_the_same_table_s(tmp_path: Path) -> None:
    """A gap of 92 s: the clock counts, not --rate."""
    x = np.random.default_rng(1).normal(size=1000)
    t = np.arange(1000) / 128
    t[600:] += 92
    pd.DataFrame({"time": t, "ecg": x}).to_csv(tmp_path / "r.csv", index=False)
    recording, expected = opened(tmp_path / "r.csv")
    stamps = np.datetime64("2024-01-01", "ns") + (t * 1e9).astype(np.int64)
    for name, times in (("r.npz", t), ("dates.npz", stamps), ("spans.npz", stamps - stamps[0])):
        np.savez_compressed(tmp_path / name, ecg=x, time=times)
        own, data = opened(tmp_path / name)
        assert own.channels[0].sampling_rate == pytest.approx(128.0)
        assert own.duration == pytest.approx(recording.duration)
        np.testing.assert_allclose(data, expected, atol=1e-4)
        assert _has_note(own, "1 gaps longer")
        refused(tmp_path / name, "--rate 64 contradicts the file's own 128 Hz", rate=64.0)
        assert (own.start_time is None) == (name != "dates.npz")
    np.savez(tmp_path / "r.npz", ecg=x, time=t, sampling_rate=64.0)
    refused(tmp_path / "r.npz", "sampling_rate 64 of ecg contradicts the 128 Hz", "time")
    stamps[50] = np.datetime64("NaT")
    np.savez(tmp_path / "r.npz", ecg=x, time=stamps)
    refused(tmp_path / "r.npz", "row 50 has no time")
    np.savez(tmp_path / "r.npz", data=np.stack([x, x]), time_ms=1000 * t, ppg=x)
    recording, _ = opened(tmp_path / "r.npz")
    assert [c.name for c in recording.channels] == ["channel_1", "channel_2"]


def test_example_windows_name_their_channels_and_rate(cohort_dir: Path) -> None:
    recording, data = opened(cohort_dir / "imu" / "walking_1.npz")
    assert [c.name for c in recording.channels] == [
        *("acc_x", "acc_y", "acc_z"),
        *("gyro_x", "gyro_y", "gyro_z"),
    ]
    assert {c.sampling_rate for c in recording.channels} == {10.0}
    assert np.std(data) > 0.1


def test_objects_are_never_unpickled(tmp_path: Path) -> None:
    trace = tmp_path / "ran"
    objects = np.array([Payload(trace)], dtype=object)
    np.save(tmp_path / "r.npy", objects, allow_pickle=True)
    refused(tmp_path / "r.npy", "objects", rate=64.0)
    for key in ("data", "sampling_rate", "x"):
        np.savez(tmp_path / "r.npz", **{"data": np.ones((1, 9)), key: objects})
        refused(tmp_path / "r.npz", "objects")
    (tmp_path / "r.npy").write_bytes(objects.dumps())  # a bare pickle
    refused(tmp_path / "r.npy", "no NumPy array", rate=64.0)
    assert not trace.exists()


def test_bad_arrays_are_refused(tmp_path: Path) -> None:
    npy, npz = tmp_path / "r.npy", tmp_path / "r.npz"
    np.save(npy, np.ones((2, 50)))
    refused(npy, "--rate")
    raw = npy.read_bytes()
    npy.write_bytes(raw[:-8])
    refused(npy, "(2, 50), 800 bytes; has 792", rate=64.0)
    lying = raw.replace(b"(2, 50), }      ", b"(2, 5000000000)}")
    assert lying != raw
    npy.write_bytes(lying)
    refused(npy, "80000000000 bytes", rate=64.0)
    for shape in ((50, 2), (2, 3, 4), (0,), (2, 0), ()):
        np.save(npy, np.ones(shape))
        refused(npy, f"shape {shape}", "(channels, samples)", rate=64.0)
        np.savez(npz, data=np.ones(shape), sampling_rate=64)
        refused(npz, f"shape {shape}")
    np.save(npy, np.ones(9, dtype=complex))
    refused(npy, "complex128", rate=64.0)
    for rate in (0, -4, np.nan, [1, 2], "fast"):
        np.savez(npz, data=np.ones((3, 9)), sampling_rate=rate)
        refused(npz, "sampling_rate of data is")
    np.savez(npz, data=np.ones((3, 9)), sampling_rate=64, channels=["a"])
    refused(npz, "channels of data has 1 entries for 3 channels")
    refused(npz.rename(tmp_path / "rr.npz"), "channels of data has 1")
    np.savez(npz, windows=np.ones((4, 3, 9)), sampling_rate=64)
    refused(npz, "has neither data", "windows")
    np.savez_compressed(npz, data=np.random.rand(2, 5000), sampling_rate=64)  # noqa: NPY002
    whole = npz.read_bytes()
    npz.write_bytes(whole[: len(whole) // 2])
    refused(npz, "is no NPZ file")
    damaged = bytearray(whole)
    damaged[20000:20100] = bytes(100)
    npz.write_bytes(damaged)
    refused(npz, to_the_end=True)
    with zipfile.ZipFile(npz, "w") as file:
        file.writestr("data.npy", raw.replace(b"(2, 50)", b"(2, 99)"))
    refused(npz, "declares float64 (2, 99), 1584 bytes; has 800")
