"""HDF5 and Zarr, one layout: which arrays are channels, their names, rates, packing and notes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from recording_checks import opened_in_any_blocks, refused_when_read, signal
from recording_writers import write_h5

from normwear_fast.errors import RecordingError
from normwear_fast.recordings import open_recording

h5py = pytest.importorskip("h5py")


@pytest.mark.parametrize("chunks", [(1, 700), (3, 1000)])
@pytest.mark.parametrize("dtype", ["<f4", ">i2", "f8"])
def test_data_is_read_with_its_attributes(
    store: Callable[..., Path], chunks: tuple[int, int], dtype: str
) -> None:
    data = signal(3, 80_000 if dtype == "f8" else 5000, dtype)

    def fill(root: Any, put: Any) -> None:
        wide = chunks if len(data[0]) < 10_000 else (chunks[0], 10 * chunks[1])
        one = put(root, "data", data, chunks=wide)
        one.attrs["sampling_rate"] = 100.0
        one.attrs["channels"] = ["ECG", "PPG", "EDA"]
        one.attrs["units"] = ["mV", "", "uS"]

    recording, whole = opened_in_any_blocks(store(fill))
    assert [(c.name, c.unit, c.sampling_rate) for c in recording.channels] == [
        ("ECG", "mV", 100.0),
        ("PPG", "", 100.0),
        ("EDA", "uS", 100.0),
    ]
    np.testing.assert_array_equal(whole, data.astype(np.float64))


def test_groups_have_rates_of_their_own(store: Callable[..., Path]) -> None:
    ppg, acc, temp = signal(1, 640)[0], signal(3, 320), signal(1, 40)[0]

    def fill(root: Any, put: Any) -> None:
        root.attrs["sampling_rate"] = 4
        watch = root.create_group("watch")
        watch.attrs["sampling_rate"] = 64.0
        put(watch, "ppg", ppg)
        put(watch, "acc", acc).attrs["sampling_rate"] = 32.0
        put(root, "temp", temp).attrs["units"] = "degC"
        put(root, "labels", np.zeros((2, 2, 2)))

    recording, whole = opened_in_any_blocks(store(fill))
    found = {c.name: (c.sampling_rate, c.unit) for c in recording.channels}
    assert found == {
        "watch/ppg": (64.0, ""),
        "watch/acc_1": (32.0, ""),
        "watch/acc_2": (32.0, ""),
        "watch/acc_3": (32.0, ""),
        "temp": (4.0, "degC"),
    }
    by_name = dict(zip((c.name for c in recording.channels), whole, strict=True))
    np.testing.assert_array_equal(by_name["watch/ppg"], ppg)
    np.testing.assert_array_equal(by_name["watch/acc_2"], acc[1])
    np.testing.assert_array_equal(by_name["temp"], temp)
    assert recording.duration == 10.0
    assert any("labels" in note for note in recording.notes)


@pytest.mark.parametrize("clocked", [True, False])
def test_numbers_that_xarray_packed_are_unpacked(store: Callable[..., Path], clocked: bool) -> None:
    counts = np.arange(-250, 250, dtype=np.int16)

    def fill(root: Any, put: Any) -> None:
        attributes = put(root, "ecg", counts).attrs
        attributes["scale_factor"], attributes["add_offset"] = 0.005, 1.5
        attributes["_FillValue"] = -7
        if clocked:
            put(root, "time_ms", 10 * np.arange(500))
        else:
            root.attrs["sampling_rate"] = 100.0

    _, whole = opened_in_any_blocks(store(fill))
    expected = np.where(counts == -7, np.nan, counts * 0.005 + 1.5)
    np.testing.assert_array_equal(whole[0], expected)


def test_packing_that_is_no_number_is_refused(store: Callable[..., Path]) -> None:
    def fill(root: Any, put: Any) -> None:
        put(root, "ecg", np.arange(500)).attrs["scale_factor"] = "tenths"
        root.attrs["sampling_rate"] = 100.0

    with pytest.raises(RecordingError, match="scale_factor of ecg is 'tenths'; a number is right"):
        opened_in_any_blocks(store(fill))


@pytest.mark.parametrize("clocked", [True, False])
def test_packing_may_have_one_number_a_channel(store: Callable[..., Path], clocked: bool) -> None:
    counts = signal(2, 500, np.int16)

    def fill(root: Any, put: Any) -> None:
        attributes = put(root, "data", counts).attrs
        attributes["scale_factor"], attributes["add_offset"] = [0.5, 4.0], [[1.0], [0.0]]
        attributes["_FillValue"] = int(counts[1, 3])
        if clocked:
            put(root, "time_ms", 10 * np.arange(500))
        else:
            root.attrs["sampling_rate"] = 100.0

    _, whole = opened_in_any_blocks(store(fill))
    expected = counts * np.array([[0.5], [4.0]]) + np.array([[1.0], [0.0]])
    np.testing.assert_array_equal(whole, np.where(counts == counts[1, 3], np.nan, expected))


@pytest.mark.parametrize("scale", [0, 0.0, float("nan"), float("inf"), [1.0, 0.0], [1.0, 2.0, 3.0]])
def test_packing_that_makes_no_samples_is_refused(tmp_path: Path, scale: Any) -> None:
    def fill(root: Any, put: Any) -> None:
        put(root, "data", signal(2, 500)).attrs["scale_factor"] = scale
        root.attrs["sampling_rate"] = 100.0

    refused_when_read(write_h5(tmp_path / "r.h5", fill), "scale_factor of data is", str(scale))


def test_what_is_no_signal_is_noted(store: Callable[..., Path]) -> None:
    def fill(root: Any, put: Any) -> None:
        root.attrs["sampling_rate"] = 64.0
        root.attrs["channels"] = ["x", "y"]
        put(root, "ppg", signal(1, 640)[0])
        put(root, "eda", signal(1, 320)[0])
        put(root, "labels", np.arange(10))
        put(root, "events", np.ones((30, 2)))
        put(root, "slow", signal(1, 10)[0]).attrs["sampling_rate"] = 1.0
        put(root, "time", np.arange(99) / 64)

    recording, _ = opened_in_any_blocks(store(fill))
    found = {c.name: c.samples for c in recording.channels}
    assert found == {"ppg": 640, "eda": 320, "slow": 10}
    for words in (
        "labels (10,) is far shorter than ppg (640,)",
        "events (30, 2) is far shorter",
        "time array time is not the clock of any array",
        "channels belongs to an array data",
        "eda ends 5 s before",
    ):
        assert any(words in note for note in recording.notes), words
    assert len(recording.notes) == 5


def test_upright_arrays_beside_others_are_left_out(store: Callable[..., Path]) -> None:
    def fill(root: Any, put: Any) -> None:
        root.attrs["sampling_rate"] = 64.0
        put(root, "acc", signal(500, 3))
        put(root, "ppg", signal(1, 500)[0])

    recording, whole = opened_in_any_blocks(store(fill))
    assert [c.name for c in recording.channels] == ["ppg"]
    np.testing.assert_array_equal(whole, signal(1, 500))
    assert "acc has shape (500, 3); (channels, samples) is right: left out" in recording.notes


def test_arrays_without_a_rate_need_one(store: Callable[..., Path]) -> None:
    path = store(lambda root, put: put(root, "ecg", signal(1, 500)[0]))
    refused_when_read(path, "ecg", "sampling_rate", "--rate")
    recording, _ = opened_in_any_blocks(path, rate=250)
    assert recording.channels[0].sampling_rate == 250


@pytest.mark.parametrize("rate", [0, -5.0, float("nan"), "fast", [1.0, 2.0]])
def test_a_rate_that_is_none_is_refused(store: Callable[..., Path], rate: Any) -> None:
    def fill(root: Any, put: Any) -> None:
        put(root, "data", signal(2, 500))
        root.attrs["sampling_rate"] = rate

    refused_when_read(store(fill), "sampling_rate", "Hz above 0")


def test_shapes_that_are_no_signals_are_refused(store: Callable[..., Path]) -> None:
    def upright(root: Any, put: Any) -> None:
        root.attrs["sampling_rate"] = 10.0
        put(root, "data", signal(500, 2))

    refused_when_read(store(upright), "(500, 2)", "(channels, samples)")


def test_names_that_do_not_fit_are_refused(store: Callable[..., Path]) -> None:
    def fill(root: Any, put: Any) -> None:
        put(root, "data", signal(3, 500)).attrs["channels"] = ["a", "b"]
        root.attrs["sampling_rate"] = 10.0

    refused_when_read(store(fill), "2 entries for 3 channels")


def test_names_that_are_there_twice_get_numbers(store: Callable[..., Path]) -> None:
    def fill(root: Any, put: Any) -> None:
        put(root, "data", signal(3, 500)).attrs["channels"] = ["a", "a", "b"]
        root.attrs["sampling_rate"] = 10.0

    recording, _ = opened_in_any_blocks(store(fill))
    assert [channel.name for channel in recording.channels] == ["a", "a_2", "b"]


def test_nothing_but_text_holds_no_signal(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["notes"] = "hello"
    with open_recording(tmp_path / "a.h5") as recording:
        assert recording.channels == ()


def test_nan_and_infinity_are_missing(store: Callable[..., Path]) -> None:
    data = signal(1, 500)
    data[0, 3:7] = np.nan
    data[0, 9] = np.inf

    def fill(root: Any, put: Any) -> None:
        put(root, "data", data).attrs["sampling_rate"] = 10.0

    _, whole = opened_in_any_blocks(store(fill))
    assert np.isnan(whole[0]).sum() == 5
