"""HDF5, Zarr, mne's formats, Empatica E4 and sample pickles: written in place with each format's own
library, read back in blocks and whole, and refused in one line where they lie or lead astray."""

from __future__ import annotations

import json
import pickle
import re
import shutil
import stat
import struct
import zipfile
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from payload import Payload

from normwear_fast.cli.main import main
from normwear_fast.errors import RecordingError, UsageError
from normwear_fast.recordings import Recording, find_recordings, open_recording
from normwear_fast.recordings.unpickle import load_pickle

h5py = pytest.importorskip("h5py")
mne = pytest.importorskip("mne")
zarr = pytest.importorskip("zarr")


def read(recording: Recording, seconds: float = 60.0, channels: Any = None) -> list[np.ndarray]:
    """Channels whole, from blocks; checked against the declared lengths."""
    wanted = range(len(recording.channels)) if channels is None else channels
    blocks = list(recording.blocks(wanted, seconds))
    whole = [np.concatenate([block[i] for block in blocks]) for i in range(len(wanted))]
    assert all(data.dtype == np.float64 for data in whole)
    assert [data.size for data in whole] == [recording.channels[c].samples for c in wanted]
    return whole


def opened(path: Path, rate: float | None = None) -> tuple[Recording, list[np.ndarray]]:
    """A recording whole, after its blocks of two other lengths and orders were found equal to it."""
    with open_recording(path, sampling_rate=rate) as recording:
        whole = read(recording)
        for seconds in (0.37, 1e9):
            for data, expected in zip(read(recording, seconds), whole, strict=True):
                np.testing.assert_array_equal(data, expected)
        backwards = list(range(len(whole)))[::-1]
        for data, expected in zip(read(recording, 2.0, backwards), whole[::-1], strict=True):
            np.testing.assert_array_equal(data, expected)
        return recording, whole


def refused(path: Path, *words: str, rate: float | None = None) -> str:
    """The one line that a bad file gets; it names the file and has all the words."""
    with pytest.raises(RecordingError) as info, open_recording(path, sampling_rate=rate) as one:
        read(one)
    text = str(info.value)
    assert "\n" not in text
    assert path.name in text
    for word in words:
        assert word in text, text
    return text


def signal(channels: int, samples: int, dtype: Any = np.float64) -> np.ndarray:
    values = np.random.default_rng(7).normal(0, 100, (channels, samples))
    return values.astype(dtype)


# ---------------------------------------------------------------- HDF5 and Zarr: one layout


def write_h5(path: Path, fill: Callable[[Any, Callable[..., Any]], None]) -> Path:
    with h5py.File(path, "w") as file:

        def put(group: Any, name: str, data: Any, **options: Any) -> Any:
            return group.create_dataset(name, data=data, **options)

        fill(file, put)
    return path


def write_zarr(path: Path, fill: Callable[[Any, Callable[..., Any]], None], version: int) -> Path:
    archive = path.suffix == ".zip"
    store = zarr.storage.ZipStore(path, mode="w") if archive else zarr.storage.LocalStore(path)
    root = zarr.create_group(store, zarr_format=version)

    def put(group: Any, name: str, data: Any, **options: Any) -> Any:
        return group.create_array(name, data=np.asarray(data), **options)

    fill(root, put)
    store.close()
    return path


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
    return lambda fill: STORES[request.param](tmp_path, fill)


@pytest.mark.parametrize("chunks", [(1, 700), (3, 1000)])
@pytest.mark.parametrize("dtype", ["<f4", ">i2", "f8"])
def test_data_with_attributes(
    store: Callable[..., Path], chunks: tuple[int, int], dtype: str
) -> None:
    data = signal(3, 80_000 if dtype == "f8" else 5000, dtype)

    def fill(root: Any, put: Any) -> None:
        wide = chunks if len(data[0]) < 10_000 else (chunks[0], 10 * chunks[1])
        one = put(root, "data", data, chunks=wide)
        one.attrs["sampling_rate"] = 100.0
        one.attrs["channels"] = ["ECG", "PPG", "EDA"]
        one.attrs["units"] = ["mV", "", "uS"]

    recording, whole = opened(store(fill))
    assert [(c.name, c.unit, c.sampling_rate) for c in recording.channels] == [
        ("ECG", "mV", 100.0),
        ("PPG", "", 100.0),
        ("EDA", "uS", 100.0),
    ]
    np.testing.assert_array_equal(whole, data.astype(np.float64))


def test_groups_with_rates_of_their_own(store: Callable[..., Path]) -> None:
    ppg, acc, temp = signal(1, 640)[0], signal(3, 320), signal(1, 40)[0]

    def fill(root: Any, put: Any) -> None:
        root.attrs["sampling_rate"] = 4
        watch = root.create_group("watch")
        watch.attrs["sampling_rate"] = 64.0
        put(watch, "ppg", ppg)
        put(watch, "acc", acc).attrs["sampling_rate"] = 32.0
        put(root, "temp", temp).attrs["units"] = "degC"
        put(root, "labels", np.zeros((2, 2, 2)))

    recording, whole = opened(store(fill))
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


def test_time_arrays(store: Callable[..., Path]) -> None:
    even, slow = signal(2, 500), signal(1, 100)[0]
    uneven = signal(1, 400)[0]
    random = np.random.default_rng(3)
    jittered = 1.7e9 + np.cumsum(random.uniform(0.018, 0.022, 400))

    def fill(root: Any, put: Any) -> None:
        one = root.create_group("one")
        put(one, "data", even).attrs["channels"] = ["x", "y"]
        put(one, "time_ms", 1_700_000_000_000 + 20 * np.arange(500))
        two = root.create_group("two")
        put(two, "slow", slow)
        put(two, "timestamp", 1_700_000_002.0 + np.arange(100) / 10)
        three = root.create_group("three")
        put(three, "uneven", uneven)
        put(three, "t", jittered)

    recording, whole = opened(store(fill))
    by_name = {c.name: (c, data) for c, data in zip(recording.channels, whole, strict=True)}
    assert by_name["one/x"][0].sampling_rate == 50.0
    np.testing.assert_array_equal(by_name["one/y"][1], even[1])
    assert by_name["two/slow"][0].start == pytest.approx(2.0)
    np.testing.assert_array_equal(by_name["two/slow"][1], slow)
    channel, data = by_name["three/uneven"]
    assert channel.sampling_rate == pytest.approx(50.0, rel=0.02)
    grid = jittered[0] + np.arange(data.size) / channel.sampling_rate
    inside = grid <= jittered[-1]
    np.testing.assert_allclose(data[inside], np.interp(grid[inside], jittered, uneven), atol=0.2)


@pytest.mark.parametrize(
    ("units", "unit"),
    [
        ("milliseconds since 2024-01-01", 1e-3),
        ("microseconds since 2024-1-1 0:0:0", 1e-6),
        ("Seconds Since 2024-01-01T00:00:00Z", 1.0),
        ("minutes since 2024-01-01 00:00:00 UTC", 60.0),
        ("days since 2024-01-01 01:00:00+01:00", 86400.0),
    ],
)
def test_units_of_time_as_xarray_writes_them(
    store: Callable[..., Path], units: str, unit: float
) -> None:
    ecg = signal(1, 500)[0]
    late = np.arange(500) / 100 + 7.0  # 100 Hz: 10 ms could be 10 s

    def fill(root: Any, put: Any) -> None:
        put(root, "ecg", ecg).attrs["units"] = "mV"
        times = late / unit
        times = np.round(times).astype(np.int64) if unit < 1 else times
        put(root, "time", times).attrs["units"] = units

    recording, whole = opened(store(fill))
    (channel,) = recording.channels
    assert (channel.name, channel.unit, channel.sampling_rate) == ("ecg", "mV", 100.0)
    np.testing.assert_array_equal(whole[0], ecg)
    assert recording.start_time is not None
    begun = recording.start_time - datetime(2024, 1, 1, 0, 0, 7, tzinfo=UTC)
    assert abs(begun.total_seconds()) < 1e-3
    assert not any("read as" in note for note in recording.notes)  # nothing is guessed


@pytest.mark.parametrize("clocked", [True, False])
def test_numbers_as_xarray_packs_them(store: Callable[..., Path], clocked: bool) -> None:
    counts = np.arange(-250, 250, dtype=np.int16)

    def fill(root: Any, put: Any) -> None:
        attributes = put(root, "ecg", counts).attrs
        attributes["scale_factor"], attributes["add_offset"] = 0.005, 1.5
        attributes["_FillValue"] = -7
        if clocked:
            put(root, "time_ms", 10 * np.arange(500))
        else:
            root.attrs["sampling_rate"] = 100.0

    _, whole = opened(store(fill))
    expected = np.where(counts == -7, np.nan, counts * 0.005 + 1.5)
    np.testing.assert_array_equal(whole[0], expected)


def test_packing_that_is_no_number(store: Callable[..., Path]) -> None:
    def fill(root: Any, put: Any) -> None:
        put(root, "ecg", np.arange(500)).attrs["scale_factor"] = "tenths"
        root.attrs["sampling_rate"] = 100.0

    with pytest.raises(RecordingError, match="scale_factor of ecg is 'tenths'; a number is right"):
        opened(store(fill))


@pytest.mark.parametrize("clocked", [True, False])
def test_packing_with_one_number_a_channel(store: Callable[..., Path], clocked: bool) -> None:
    counts = signal(2, 500, np.int16)

    def fill(root: Any, put: Any) -> None:
        attributes = put(root, "data", counts).attrs
        attributes["scale_factor"], attributes["add_offset"] = [0.5, 4.0], [[1.0], [0.0]]
        attributes["_FillValue"] = int(counts[1, 3])
        if clocked:
            put(root, "time_ms", 10 * np.arange(500))
        else:
            root.attrs["sampling_rate"] = 100.0

    _, whole = opened(store(fill))
    expected = counts * np.array([[0.5], [4.0]]) + np.array([[1.0], [0.0]])
    np.testing.assert_array_equal(whole, np.where(counts == counts[1, 3], np.nan, expected))


@pytest.mark.parametrize("scale", [0, 0.0, float("nan"), float("inf"), [1.0, 0.0], [1.0, 2.0, 3.0]])
def test_packing_that_makes_no_samples(tmp_path: Path, scale: Any) -> None:
    def fill(root: Any, put: Any) -> None:
        put(root, "data", signal(2, 500)).attrs["scale_factor"] = scale
        root.attrs["sampling_rate"] = 100.0

    refused(write_h5(tmp_path / "r.h5", fill), "scale_factor of data is", str(scale))


def test_time_arrays_that_count_from_moments_of_their_own(store: Callable[..., Path]) -> None:
    """xarray counts from the first time of each array."""

    def fill(root: Any, put: Any) -> None:
        for name, moment in (("a", "2024-01-01 00:00:00"), ("b", "2024-01-01 00:00:03")):
            group = root.create_group(name)
            put(group, "ecg", signal(1, 500)[0])
            put(group, "time", 10 * np.arange(500)).attrs["units"] = f"milliseconds since {moment}"

    recording, _ = opened(store(fill))
    assert [(c.name, c.start) for c in recording.channels] == [("a/ecg", 0.0), ("b/ecg", 3.0)]


def test_units_since_what_is_no_date(store: Callable[..., Path]) -> None:
    def fill(root: Any, put: Any) -> None:
        put(root, "ecg", signal(1, 500)[0])
        put(root, "time", 10 * np.arange(500)).attrs["units"] = "ms since the start"

    recording, _ = opened(store(fill))
    assert (recording.channels[0].sampling_rate, recording.start_time) == (100.0, None)
    assert recording.notes == ("time counts 'ms since the start': no date that is known here",)


def test_units_that_contradict_the_name(store: Callable[..., Path]) -> None:
    def fill(root: Any, put: Any) -> None:
        put(root, "ecg", signal(1, 500)[0])
        put(root, "time_ms", 10 * np.arange(500)).attrs["units"] = "seconds since 2024-01-01"

    refused(store(fill), "time_ms", "seconds since", "contradict its name")


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

    recording, _ = opened(store(fill))
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


def test_of_two_time_arrays_the_one_that_a_table_would_have(store: Callable[..., Path]) -> None:
    def fill(root: Any, put: Any) -> None:
        put(root, "ecg", signal(1, 400)[0])
        put(root, "time", np.random.default_rng(5).uniform(0, 10, 400))
        put(root, "timestamp", np.arange(400) / 50)

    recording, _ = opened(store(fill))
    assert recording.channels[0].sampling_rate == 50.0
    assert "time array time is not the clock of any array and left out" in recording.notes


def test_a_temperature_is_no_time_array(store: Callable[..., Path]) -> None:
    values = {"T": signal(1, 500)[0], "t": signal(1, 500)[0]}

    def fill(root: Any, put: Any) -> None:
        put(root, "time_s", np.arange(500) / 50)
        for name, data in values.items():
            put(root, name, data)

    recording, whole = opened(store(fill))
    assert sorted(c.name for c in recording.channels) == ["T", "t"]
    assert {c.sampling_rate for c in recording.channels} == {50.0}
    for channel, data in zip(recording.channels, whole, strict=True):
        np.testing.assert_array_equal(data, values[channel.name])


def test_a_time_array_that_contradicts_the_rate(store: Callable[..., Path]) -> None:
    def fill(root: Any, put: Any) -> None:
        root.attrs["sampling_rate"] = 100.0
        put(root, "ecg", signal(1, 500)[0])
        put(root, "time_s", np.arange(500) / 50)

    refused(store(fill), "100", "50", "contradicts")


def _timed(tmp_path: Path, store: Callable[..., Path], times: Any, rate: float, **more: Any) -> Any:
    """A file of HDF5 or Zarr, and the same as NPZ: a ramp on its clock, and a sampling_rate."""

    def fill(root: Any, put: Any) -> None:
        root.attrs["sampling_rate"] = rate
        put(root, "time", times)
        for name, values in more.items():
            put(root, name, values)

    np.savez(tmp_path / "same.npz", time=times, sampling_rate=rate, **more)
    return store(fill), tmp_path / "same.npz"


@pytest.mark.parametrize("rate", [None, 64.0])
@pytest.mark.parametrize("kind", ["whole", "lost", "jitter", "bursts", "1024"])
def test_a_rate_beside_times_that_are_rough(
    tmp_path: Path, store: Callable[..., Path], kind: str, rate: float | None
) -> None:
    """64 Hz in whole ms steps by 16, which is 62.5 Hz or a slow signal in s."""
    rng = np.random.default_rng(3)
    hertz = 1024.0 if kind == "1024" else 64.0
    keep = np.ones(3000, dtype=bool)
    keep[[] if kind == "whole" else [700, 1500, 1501]] = False
    true = (np.arange(3000) / hertz)[keep]
    shift = rng.exponential(0.2, true.size) / hertz if kind == "jitter" else 0.0
    times = np.round(1000 * np.maximum.accumulate(true + shift)).astype(np.int64)
    if kind == "bursts":
        times = times.astype(np.float64) + rng.uniform(0, 0.9, times.size)
    for path in _timed(tmp_path, store, times, hertz, ecg=true):
        recording, (data,) = opened(path, rate and hertz)
        assert recording.channels[0].sampling_rate == hertz, recording.notes
        late = data - np.arange(data.size) / hertz
        assert np.nanmax(np.abs(late)) < 2.5 / hertz
        assert np.isfinite(late).mean() > 0.99
        assert any("read as ms, by sampling_rate" in note for note in recording.notes)
        assert not any("median rate" in note for note in recording.notes)
        refused(path, "--rate 100 contradicts", rate=100)


@pytest.mark.parametrize(
    ("bad", "says"), [(np.nan, "has no time"), (0.5, "goes back"), (0, "move")]
)
def test_a_rate_stands_in_for_a_broken_clock(
    tmp_path: Path, store: Callable[..., Path], bad: float, says: str
) -> None:
    times = np.arange(70_000) / 64
    times[69_000] = bad
    if says == "move":
        times[:] = 5.0
    ecg, acc = signal(1, 70_000)[0], signal(2, 70_000)
    for path in _timed(tmp_path, store, times, 64.0, ecg=ecg, acc=acc):
        recording, whole = opened(path)
        channels = {c.name: data for c, data in zip(recording.channels, whole, strict=True)}
        np.testing.assert_array_equal(channels["ecg"], ecg)
        np.testing.assert_array_equal([channels["acc_1"], channels["acc_2"]], acc)
        assert {c.sampling_rate for c in recording.channels} == {64.0}
        (note,) = recording.notes
        assert says in note
        assert note.endswith(": no clock, sampling_rate stands in for it")
        refused(path, "--rate 100 contradicts", rate=100)


def test_a_rate_beside_a_count_of_rows(tmp_path: Path, store: Callable[..., Path]) -> None:
    for path in _timed(tmp_path, store, np.arange(500), 64.0, ecg=signal(1, 500)[0]):
        recording, _ = opened(path)
        assert recording.channels[0].sampling_rate == 64.0
        assert "column 'time' counts rows; sampling_rate is its clock" in recording.notes


@pytest.mark.parametrize("step", [10, 16, 0.005])
def test_a_rate_that_times_have_in_no_unit(
    tmp_path: Path, store: Callable[..., Path], step: float
) -> None:
    for path in _timed(tmp_path, store, step * np.arange(1000), 80.0, ecg=signal(1, 1000)[0]):
        refused(path, "sampling_rate 80 of ecg contradicts", "one of the two is right")


def test_upright_arrays_beside_others(store: Callable[..., Path]) -> None:
    def fill(root: Any, put: Any) -> None:
        root.attrs["sampling_rate"] = 64.0
        put(root, "acc", signal(500, 3))
        put(root, "ppg", signal(1, 500)[0])

    recording, whole = opened(store(fill))
    assert [c.name for c in recording.channels] == ["ppg"]
    np.testing.assert_array_equal(whole, signal(1, 500))
    assert "acc has shape (500, 3); (channels, samples) is right: left out" in recording.notes


def test_without_a_rate(store: Callable[..., Path]) -> None:
    path = store(lambda root, put: put(root, "ecg", signal(1, 500)[0]))
    refused(path, "ecg", "sampling_rate", "--rate")
    recording, _ = opened(path, rate=250)
    assert recording.channels[0].sampling_rate == 250


@pytest.mark.parametrize("rate", [0, -5.0, float("nan"), "fast", [1.0, 2.0]])
def test_a_rate_that_is_none(store: Callable[..., Path], rate: Any) -> None:
    def fill(root: Any, put: Any) -> None:
        put(root, "data", signal(2, 500))
        root.attrs["sampling_rate"] = rate

    refused(store(fill), "sampling_rate", "Hz above 0")


def test_shapes_that_are_no_signals(store: Callable[..., Path]) -> None:
    def upright(root: Any, put: Any) -> None:
        root.attrs["sampling_rate"] = 10.0
        put(root, "data", signal(500, 2))

    refused(store(upright), "(500, 2)", "(channels, samples)")


def test_names_that_do_not_fit(store: Callable[..., Path]) -> None:
    def fill(root: Any, put: Any) -> None:
        put(root, "data", signal(3, 500)).attrs["channels"] = ["a", "b"]
        root.attrs["sampling_rate"] = 10.0

    refused(store(fill), "2 entries for 3 channels")


def test_names_that_are_there_twice(store: Callable[..., Path]) -> None:
    def fill(root: Any, put: Any) -> None:
        put(root, "data", signal(3, 500)).attrs["channels"] = ["a", "a", "b"]
        root.attrs["sampling_rate"] = 10.0

    recording, _ = opened(store(fill))
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

    _, whole = opened(store(fill))
    assert np.isnan(whole[0]).sum() == 5


# ---------------------------------------------------------------- HDF5's own ways out


def test_hdf5_links_do_not_leave_the_file(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["secret"] = np.arange(100.0)
        file["secret"].attrs["sampling_rate"] = 10.0
    with h5py.File(tmp_path / "link.h5", "w") as file:
        file["ecg"] = h5py.ExternalLink("other.h5", "/secret")
    refused(tmp_path / "link.h5", "link to another file")
    with h5py.File(tmp_path / "soft.h5", "w") as file:
        file["data"] = np.arange(100.0)
        file["data"].attrs["sampling_rate"] = 10.0
        file["again"] = h5py.SoftLink("/data")
        file["nowhere"] = h5py.SoftLink("/no/such")
        file["loop"] = file["/"]
    recording, whole = opened(tmp_path / "soft.h5")
    assert len(whole) == 1
    assert sum("soft link" in note for note in recording.notes) == 2
    with h5py.File(tmp_path / "raw.h5", "w") as file:
        (tmp_path / "outside.bin").write_bytes(b"\0" * 800)
        one = file.create_dataset(
            "ecg", (100,), "f8", external=[(str(tmp_path / "outside.bin"), 0, 800)]
        )
        one.attrs["sampling_rate"] = 10.0
    refused(tmp_path / "raw.h5", "stored in other files")
    layout = h5py.VirtualLayout((100,), "f8")
    layout[:] = h5py.VirtualSource(str(tmp_path / "other.h5"), "secret", (100,))
    with h5py.File(tmp_path / "virtual.h5", "w") as file:
        file.create_virtual_dataset("ecg", layout).attrs["sampling_rate"] = 10.0
    refused(tmp_path / "virtual.h5", "stored in other files")


@pytest.mark.parametrize("chunks", [None, (1, 4096)])
def test_hdf5_sizes_are_checked_before_memory(tmp_path: Path, chunks: Any) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        one = file.create_dataset("data", (8, 2**40), "f8", chunks=chunks)
        one.attrs["sampling_rate"] = 100.0
        if chunks:
            one[0, :10] = 1.0
    refused(tmp_path / "a.h5", "declares", "stored")


def test_hdf5_chunks_too_large_to_hold(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        one = file.create_dataset("data", (1, 2**27), "f8", chunks=(1, 2**27))
        one.attrs["sampling_rate"] = 100.0
    refused(tmp_path / "a.h5", "chunks of 1024 MB")


# ---------------------------------------------------------------- Zarr's own


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
        opened(one.path)


def test_zarr_sharded_and_an_array_at_the_root(tmp_path: Path) -> None:
    data = signal(4, 10_000, np.float32)
    root = zarr.create_array(
        zarr.storage.LocalStore(tmp_path / "a.zarr"), data=data, chunks=(1, 500), shards=(4, 2000)
    )
    root.attrs["sampling_rate"] = 50.0
    _, whole = opened(tmp_path / "a.zarr")
    np.testing.assert_array_equal(whole, data)


@pytest.mark.parametrize("version", [2, 3])
def test_zarr_missing_chunks(tmp_path: Path, version: int) -> None:
    data = signal(1, 1000)
    data[0, 200:300] = 0  # zarr does not write it

    def fill(root: Any, put: Any) -> None:
        put(root, "data", data, chunks=(1, 100)).attrs["sampling_rate"] = 10.0

    path = write_zarr(tmp_path / "a.zarr", fill, version)
    recording, whole = opened(path)
    np.testing.assert_array_equal(whole, data)
    assert any("1 of 10 chunks" in note for note in recording.notes)
    name = "data/zarr.json" if version == 3 else "data/.zarray"
    metadata = json.loads((path / name).read_text())
    metadata["shape"] = [1, 10**15]
    (path / name).write_text(json.dumps(metadata))
    refused(path, "declares 10000000000000 chunks", "9 are stored")


def test_zarr_codecs_that_run_code(tmp_path: Path) -> None:
    def fill(root: Any, put: Any) -> None:
        put(root, "data", signal(1, 500)).attrs["sampling_rate"] = 10.0

    path = write_zarr(tmp_path / "a.zarr", fill, 2)
    metadata = json.loads((path / "data/.zarray").read_text())
    metadata["filters"] = [{"id": "pickle", "protocol": 2}]
    (path / "data/.zarray").write_text(json.dumps(metadata))
    victim = tmp_path / "ran"
    for file in (path / "data").glob("0*"):
        file.write_bytes(pickle.dumps(Payload(victim)))
    refused(path, "codec 'pickle'")
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
    refused(path, "codec 'pickle'")


@pytest.mark.parametrize("form", ["blosc", "zstd", "shards"])
def test_zarr_chunks_cut_short(tmp_path: Path, form: str) -> None:
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
        refused(tmp_path / "a.zarr", "data is damaged at sample")
    file.write_bytes(good)
    _, whole = opened(tmp_path / "a.zarr")
    np.testing.assert_array_equal(whole, data)


def test_zarr_links_out_of_the_store(tmp_path: Path) -> None:
    def fill(root: Any, put: Any) -> None:
        put(root, "data", signal(1, 500)).attrs["sampling_rate"] = 10.0

    inside = write_zarr(tmp_path / "a.zarr", fill, 3)
    shutil.move(inside / "data", tmp_path / "elsewhere")
    (inside / "data").symlink_to(tmp_path / "elsewhere")
    refused(inside, "link out of the store")


# ---------------------------------------------------------------- mne: FIF, BrainVision, EEGLAB, GDF


def raw_of(data: np.ndarray, rate: float = 200.0, names: Any = None, kinds: Any = "eeg") -> Any:
    names = names or [f"EEG{i}" for i in range(len(data))]
    return mne.io.RawArray(data, mne.create_info(names, rate, kinds), verbose="ERROR")


def write_fif(path: Path, data: np.ndarray | None = None, **options: Any) -> Path:
    raw = raw_of(signal(3, 4000) * 1e-6 if data is None else data)
    raw.set_meas_date(datetime(2024, 5, 6, tzinfo=UTC))
    raw.save(path, fmt="double", verbose="ERROR", **options)
    return path


def expected_of(path: Path) -> np.ndarray:
    """What mne itself reads, whole."""
    return mne.io.read_raw(path, preload=True, verbose="ERROR").get_data()


def test_fif(tmp_path: Path) -> None:
    kinds = ["eeg", "ecg", "stim", "gsr"]
    raw = raw_of(signal(4, 4000) * 1e-6, names=["Fz", "ECG", "STI 014", "EDA"], kinds=kinds)
    raw.info["bads"] = ["Fz"]
    raw.set_annotations(mne.Annotations([1.0], [2.0], ["BAD_move"]))
    raw.save(tmp_path / "a_raw.fif", fmt="double", verbose="ERROR")
    recording, whole = opened(tmp_path / "a_raw.fif")
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


def test_fif_split_and_its_parts(tmp_path: Path) -> None:
    write_fif(tmp_path / "a_raw.fif", signal(20, 40_000), split_size="2MB", buffer_size_sec=5)
    write_fif(tmp_path / "a_raw-9.fif")  # a recording of its own, by its looks a part
    assert (tmp_path / "a_raw-1.fif").exists()
    assert [one.id for one in find_recordings([tmp_path])] == ["a_raw", "a_raw-9"]
    recording, whole = opened(tmp_path / "a_raw.fif")
    assert recording.start_time == datetime(2024, 5, 6, tzinfo=UTC)
    np.testing.assert_array_equal(whole, expected_of(tmp_path / "a_raw.fif"))
    (tmp_path / "a_raw-1.fif").unlink()
    refused(tmp_path / "a_raw.fif", "a_raw-1.fif", "does not exist")


def test_fif_acquisition_skips_are_missing(tmp_path: Path) -> None:
    first = raw_of(signal(2, 4000) * 1e-6)
    path = tmp_path / "a_raw.fif"
    first.set_annotations(mne.Annotations([5.0], [3.0], ["BAD_ACQ_SKIP"]))
    first.save(path, fmt="double", verbose="ERROR")
    recording, whole = opened(path)
    np.testing.assert_array_equal(np.isnan(whole[0]), np.isin(np.arange(4000), range(1000, 1600)))
    assert any("1 gaps, 3 s" in note for note in recording.notes)


def test_fif_that_holds_no_raw_data(tmp_path: Path) -> None:
    epochs = mne.EpochsArray(
        signal(1, 400).reshape(4, 1, 100), mne.create_info(1, 100.0), verbose=False
    )
    epochs.save(tmp_path / "a-epo.fif", verbose="ERROR")
    refused(tmp_path / "a-epo.fif", "No raw data")


def test_fif_tags_that_lead_astray(tmp_path: Path) -> None:
    good = write_fif(tmp_path / "good_raw.fif").read_bytes()

    def with_tag(place: int, value: int) -> Path:
        path = tmp_path / "a_raw.fif"
        path.write_bytes(good[:place] + struct.pack(">i", value) + good[place + 4 :])
        return path

    refused(with_tag(8, 2**31 - 1), "declares 2147483647 bytes")
    second = 16 + struct.unpack_from(">i", good, 8)[0]
    third = second + 16 + struct.unpack_from(">i", good, second + 8)[0]
    refused(with_tag(third + 12, 16), "points back")
    refused(with_tag(third + 12, -7), "points back")
    path = tmp_path / "a_raw.fif"
    path.write_bytes(good[: len(good) // 2])
    refused(path, "a_raw.fif")


def write_brainvision(
    folder: Path, data: np.ndarray, orientation: str = "MULTIPLEXED", **changes: str
) -> Path:
    """A header, data and markers as the format's description has them."""
    entries = {
        "DataFile": "rec.eeg",
        "MarkerFile": "rec.vmrk",
        "DataFormat": "BINARY",
        "DataOrientation": orientation,
        "NumberOfChannels": str(len(data)),
        "SamplingInterval": "4000",
        "BinaryFormat": "INT_16",
        **changes,
    }
    common = "".join(
        f"{key}={value}\n" for key, value in entries.items() if key != "BinaryFormat" and value
    )
    channels = "".join(f"Ch{i + 1}=C{i + 1},,0.5,uV\n" for i in range(len(data)))
    (folder / "rec.vhdr").write_text(
        "Brain Vision Data Exchange Header File Version 1.0\n\n[Common Infos]\n"
        f"{common}\n[Binary Infos]\nBinaryFormat={entries['BinaryFormat']}\n\n"
        f"[Channel Infos]\n{channels}\n[Comment]\nNumberOfChannels=99\n",
        encoding="utf-8",
    )
    (folder / "rec.vmrk").write_text(
        "Brain Vision Data Exchange Marker File, Version 1.0\n\n[Common Infos]\nDataFile=rec.eeg\n\n"
        "[Marker Infos]\nMk1=New Segment,,1,1,0,20240506070809000000\n",
        encoding="utf-8",
    )
    stored = data.T if orientation == "MULTIPLEXED" else data
    (folder / "rec.eeg").write_bytes(np.ascontiguousarray(stored, "<i2").tobytes())
    return folder / "rec.vhdr"


@pytest.mark.parametrize("orientation", ["MULTIPLEXED", "VECTORIZED"])
def test_brainvision(tmp_path: Path, orientation: str) -> None:
    data = signal(3, 2000, np.int16)
    path = write_brainvision(tmp_path, data, orientation)
    recording, whole = opened(path)
    assert [(c.name, c.unit, c.sampling_rate) for c in recording.channels] == [
        (f"C{i}", "V", 250.0) for i in (1, 2, 3)
    ]
    np.testing.assert_allclose(whole, data * 0.5e-6, rtol=1e-12)
    np.testing.assert_array_equal(whole, expected_of(path))
    assert recording.start_time == datetime(2024, 5, 6, 7, 8, 9, tzinfo=UTC)
    assert [one.id for one in find_recordings([tmp_path])] == ["rec"]
    refused(tmp_path / "rec.eeg", "give its header", "rec.vhdr")


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
def test_brainvision_refused(tmp_path: Path, changes: dict[str, str], words: list[str]) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    path = write_brainvision(folder, signal(3, 2000, np.int16), **changes)
    (tmp_path / "rec.eeg").write_bytes((folder / "rec.eeg").read_bytes())
    if changes == {"NumberOfChannels": "2"}:  # 12,000 bytes are no whole number of odd frames
        (folder / "rec.eeg").write_bytes(b"\0" * 11_998)
    refused(path, *words)


def write_eeglab(folder: Path, data: np.ndarray, where: str) -> Path:
    """A set with its data in an .fdt, in the EEG structure, or among the file's variables."""
    from scipy.io import savemat

    locations = np.zeros(len(data), dtype=[("labels", object)])
    locations["labels"] = [f"E{i + 1}" for i in range(len(data))]
    fields: dict[str, Any] = {
        "setname": "test",
        "nbchan": len(data),
        "trials": 1,
        "pnts": data.shape[1],
        "srate": 128.0,
        "xmin": 0.0,
        "xmax": (data.shape[1] - 1) / 128,
        "chanlocs": locations,
        "chaninfo": {"nodatchans": []},
        "event": [],
        "data": data.astype(np.float32),
    }
    if where == "fdt":
        fields["data"] = "rec.fdt"
        (folder / "rec.fdt").write_bytes(data.T.astype("<f4").tobytes())
    content = fields if where == "variables" else {"EEG": fields}
    savemat(folder / "rec.set", content, appendmat=False, do_compression=where != "structure")
    return folder / "rec.set"


@pytest.mark.parametrize("where", ["fdt", "structure", "variables"])
def test_eeglab(tmp_path: Path, where: str) -> None:
    data = signal(2, 3000, np.float32)
    path = write_eeglab(tmp_path, data, where)
    recording, whole = opened(path)
    assert [(c.name, c.unit, c.sampling_rate) for c in recording.channels] == [
        ("E1", "V", 128.0),
        ("E2", "V", 128.0),
    ]
    np.testing.assert_allclose(whole, data.astype(np.float64) * 1e-6, rtol=1e-6)
    np.testing.assert_array_equal(whole, expected_of(path))
    assert [one.id for one in find_recordings([tmp_path])] == ["rec"]


def test_eeglab_refused(tmp_path: Path) -> None:
    path = write_eeglab(tmp_path, signal(2, 3000, np.float32), "fdt")
    data = (tmp_path / "rec.fdt").read_bytes()
    (tmp_path / "rec.fdt").write_bytes(data[:-100])
    refused(path, "declares 3000 samples of 2 channels, 24000 bytes", "23900")
    (tmp_path / "rec.fdt").unlink()
    refused(path, "rec.set")
    whole = write_eeglab(tmp_path, signal(2, 3000, np.float32), "structure").read_bytes()
    path.write_bytes(whole[:-1000])
    refused(path, "declares", "more")
    path.write_bytes(whole[:126] + b"XX" + whole[128:])
    refused(path, "no MATLAB 5 file")


def write_gdf(path: Path, signals: list[np.ndarray], per_record: list[int], version: str) -> Path:
    """A GDF file of 16-bit channels in records of one second, as the format's description has it."""
    count = len(signals)
    records = len(signals[0]) // per_record[0]
    header = 256 * (count + 1)
    modern = float(version) >= 1.9
    fixed = bytearray(256)
    fixed[:8] = f"GDF {version}".encode()
    fixed[8:168] = b" " * 160
    if modern:
        struct.pack_into("<H", fixed, 184, header // 256)
    else:
        fixed[168:184] = b"2024050607080900"
        struct.pack_into("<q", fixed, 184, header)
    struct.pack_into("<qII", fixed, 236, records, 1, 1)
    struct.pack_into("<H" if modern else "<I", fixed, 252, count)

    def column(values: list[Any], form: str) -> bytes:
        return b"".join(struct.pack(form, value) for value in values)

    body = column([f"G{i + 1}".encode() for i in range(count)], "16s")
    body += b" " * 80 * count
    if modern:
        body += b" " * 6 * count + column([4275] * count, "<H")
    else:
        body += column([b"uV"] * count, "8s")
    body += column([-100.0] * count, "<d") + column([100.0] * count, "<d")
    digital = "<d" if modern else "<q"
    body += column([-1000] * count, digital) + column([1000] * count, digital)
    body += (b"\0" if modern else b" ") * 80 * count  # filters
    body += column(per_record, "<i") + column([3] * count, "<i")
    body += b"\0" * (256 * count - len(body))
    data = b"".join(
        values[r * n : (r + 1) * n].astype("<i2").tobytes()
        for r in range(records)
        for values, n in zip(signals, per_record, strict=True)
    )
    events = struct.pack("<BBBBI", 1, 0, 1, 0, 0) if not modern else b""
    path.write_bytes(bytes(fixed) + body + data + events)
    return path


@pytest.mark.parametrize("version", ["1.25", "2.20"])
def test_gdf(tmp_path: Path, version: str) -> None:
    data = signal(2, 2000, np.int16)
    path = write_gdf(tmp_path / "a.gdf", list(data), [100, 100], version)
    recording, whole = opened(path)
    assert [(c.name, c.unit, c.sampling_rate) for c in recording.channels] == [
        ("G1", "V", 100.0),
        ("G2", "V", 100.0),
    ]
    np.testing.assert_allclose(whole, data * 0.1e-6, atol=1e-12)
    np.testing.assert_array_equal(whole, expected_of(path))


def test_gdf_of_several_rates(tmp_path: Path) -> None:
    fast, slow = signal(1, 2000, np.int16)[0], signal(1, 500, np.int16)[0]
    path = write_gdf(tmp_path / "a.gdf", [fast, slow], [100, 25], "2.20")
    refused(path, "25, 100 Hz", "EDF")


def test_gdf_refused(tmp_path: Path) -> None:
    path = write_gdf(tmp_path / "a.gdf", list(signal(2, 2000, np.int16)), [100, 100], "1.25")
    good = path.read_bytes()
    path.write_bytes(good[:-3000])
    refused(path, "declares 20 data records")
    path.write_bytes(good[:252] + struct.pack("<I", 2**32 - 1) + good[256:])
    refused(path, "4294967295 channels")
    path.write_bytes(good[:-4] + struct.pack("<I", 2**32 - 1))
    refused(path, "declares 4294967295 events")
    path.write_bytes(b"GDF ?.??" + good[8:])
    refused(path, "is no GDF file")


def test_what_only_read_raw_knows_says_so(tmp_path: Path) -> None:
    (tmp_path / "a.nxe").write_bytes(np.zeros((640, 64), "<i2").tobytes())
    (tmp_path / "b.cnt").write_bytes(b"no such thing" * 100)
    with pytest.raises(UsageError):  # in folders they are passed over
        find_recordings([tmp_path])
    with open_recording(tmp_path / "a.nxe") as recording:
        assert any("untested" in note for note in recording.notes)
    refused(tmp_path / "b.cnt", "is damaged")


# ---------------------------------------------------------------- Empatica E4

START = 1_544_027_337.0


def write_e4(folder: Path, seconds: int = 30, names: Any = None) -> dict[str, np.ndarray]:
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(11)
    rates = {"BVP": 64, "EDA": 4, "ACC": 32, "TEMP": 4, "HR": 1}
    result = {}
    for name in names or rates:
        rate, late = rates[name], 10 if name == "HR" else 0
        width = 3 if name == "ACC" else 1
        rows = random.normal(20, 5, (rate * (seconds - late), width)).round(2)
        rows = np.round(rows) if name == "ACC" else rows
        lines = [", ".join([f"{START + late:.6f}"] * width), ", ".join([f"{rate:.6f}"] * width)]
        lines += [",".join(f"{v:g}" for v in row) for row in rows]
        (folder / f"{name}.csv").write_text("\r\n".join(lines) + "\r\n")
        result[name] = rows.T
    (folder / "IBI.csv").write_text(f"{START:.6f}, IBI\n5.2,0.8\n6.0,0.8\n")
    (folder / "tags.csv").write_text(f"{START + 5:.2f}\n")
    (folder / "info.txt").write_text("about the session\n")
    return result


def zipped(folder: Path, archive: Path, prefix: str = "") -> Path:
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
        for one in sorted(folder.iterdir()):
            file.write(one, prefix + one.name)
    return archive


@pytest.mark.parametrize("form", ["folder", "zip", "zip_with_folder"])
def test_e4(tmp_path: Path, form: str) -> None:
    data = write_e4(tmp_path / "1.5_night")
    path = tmp_path / "1.5_night"
    if form != "folder":
        prefix = "A00123/" if form == "zip_with_folder" else ""
        path = zipped(path, tmp_path / "session.zip", prefix)
        shutil.rmtree(tmp_path / "1.5_night")
    (found,) = find_recordings([tmp_path])
    assert found.id == ("1.5_night" if form == "folder" else "session")
    recording, whole = opened(found.path)
    assert recording.format == "Empatica E4"
    assert recording.start_time == datetime.fromtimestamp(START, UTC)
    by_name = {c.name: (c, values) for c, values in zip(recording.channels, whole, strict=True)}
    assert {name: (c.sampling_rate, c.start) for name, (c, _) in by_name.items()} == {
        "BVP": (64.0, 0.0),
        "EDA": (4.0, 0.0),
        "ACC_x": (32.0, 0.0),
        "ACC_y": (32.0, 0.0),
        "ACC_z": (32.0, 0.0),
        "TEMP": (4.0, 0.0),
        "HR": (1.0, 10.0),
    }
    assert recording.duration == 30.0
    for name in ("BVP", "EDA", "TEMP", "HR"):
        np.testing.assert_array_equal(by_name[name][1], data[name][0])
    for axis, values in zip("xyz", data["ACC"], strict=True):
        np.testing.assert_array_equal(by_name[f"ACC_{axis}"][1], values / 64)
    assert by_name["ACC_x"][0].unit == "g"
    assert any("IBI.csv" in note for note in recording.notes)


def test_e4_with_less(tmp_path: Path) -> None:
    write_e4(tmp_path / "s", names=["EDA"])
    recording, _ = opened(tmp_path / "s")
    assert [c.name for c in recording.channels] == ["EDA"]
    assert any("BVP.csv is not there" in note for note in recording.notes)
    refused(tmp_path / "s" / "EDA.csv", "give the folder")


@pytest.mark.parametrize(
    ("file", "old", "new", "words"),
    [
        ("BVP.csv", "1544027337.000000", "1944027337.000000", ["s after", "one session"]),
        ("BVP.csv", "1544027337.000000", "154402x337.000000", ["no time", "rate"]),
        ("BVP.csv", "64.000000", "0.000000", ["no time", "rate"]),
        ("ACC.csv", "32.000000, 32.000000", "32.000000, 31.000000", ["3 columns"]),
        ("EDA.csv", "4.000000\r\n", "4.000000\r\nx,1\r\n", ["EDA.csv"]),
    ],
)
def test_e4_refused(tmp_path: Path, file: str, old: str, new: str, words: list[str]) -> None:
    write_e4(tmp_path / "s")
    path = tmp_path / "s" / file
    text = path.read_bytes().decode()
    assert old in text
    path.write_bytes(text.replace(old, new, 1).encode())
    refused(tmp_path / "s", *words)
    zipped(tmp_path / "s", tmp_path / "s.zip")
    refused(tmp_path / "s.zip", *words)


@pytest.mark.parametrize("lines", [0, 1, 2])
@pytest.mark.parametrize("name", ["BVP", "ACC", "HR"])
def test_e4_sensors_without_samples_are_left_out(tmp_path: Path, name: str, lines: int) -> None:
    write_e4(tmp_path / "s")
    file = tmp_path / "s" / f"{name}.csv"
    file.write_text("".join(file.read_text().splitlines(True)[:lines]))
    zipped(tmp_path / "s", tmp_path / "s.zip")
    for path in (tmp_path / "s", tmp_path / "s.zip"):
        recording, whole = opened(path)
        names = [channel.name for channel in recording.channels]
        assert len(names) == len(whole) == (4 if name == "ACC" else 6)
        assert not any(channel.startswith(name) for channel in names)
        assert f"{name}.csv holds no samples and is left out" in recording.notes


def test_e4_without_any_samples(tmp_path: Path) -> None:
    write_e4(tmp_path / "s")
    for file in (tmp_path / "s").glob("*.csv"):
        file.write_text("".join(file.read_text().splitlines(True)[:2]))
    refused(tmp_path / "s", "none of its sensors' files holds samples")
    # what is cut short within its header, or damaged, is not empty
    write_e4(tmp_path / "s")
    (tmp_path / "s" / "HR.csv").write_bytes(b"\0" * 40)
    refused(tmp_path / "s", "HR.csv begins with no time")


def hostile_zip(tmp_path: Path, kind: str) -> Path:
    write_e4(tmp_path / "s")
    path = zipped(tmp_path / "s", tmp_path / "a.zip")
    with zipfile.ZipFile(path, "a") as file:
        if kind in ("../up.csv", "/abs.csv", "C:/x.csv", "a\\..\\..\\x.csv"):
            file.writestr(kind, "x")
        elif kind == "link":
            info = zipfile.ZipInfo("tags2.csv")
            info.external_attr = (stat.S_IFLNK | 0o777) << 16
            file.writestr(info, "/etc/passwd")
        elif kind == "twice":
            with pytest.warns(UserWarning, match="Duplicate"):
                file.writestr("BVP.csv", "x")
        elif kind == "bomb":
            file.writestr("notes.txt", b"\0" * 1000, zipfile.ZIP_DEFLATED)
    if kind == "bomb":  # the directory says what it unpacks to
        content = bytearray(path.read_bytes())
        struct.pack_into("<I", content, content.rindex(b"PK\x01\x02") + 24, 0x7FFFFFFF)
        path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    ("kind", "word"),
    [
        ("../up.csv", "leads out"),
        ("/abs.csv", "leads out"),
        ("C:/x.csv", "leads out"),
        ("a\\..\\..\\x.csv", "leads out"),
        ("link", "is a link"),
        ("twice", "two members"),
        ("bomb", "GB"),
    ],
)
def test_zips_that_lead_out(tmp_path: Path, kind: str, word: str) -> None:
    before = set(tmp_path.parent.iterdir())
    refused(hostile_zip(tmp_path, kind), word)
    assert set(tmp_path.parent.iterdir()) == before


def test_zips_that_are_no_recording(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as file:
        file.writestr("readme.txt", "hello")
    refused(tmp_path / "a.zip", "neither")
    (tmp_path / "b.zip").write_bytes(b"PK no zip at all")
    refused(tmp_path / "b.zip", "damaged zip")
    write_e4(tmp_path / "s")
    with zipfile.ZipFile(tmp_path / "c.zip", "w") as file:
        for session in ("one", "two"):
            file.write(tmp_path / "s" / "BVP.csv", f"{session}/BVP.csv")
    refused(tmp_path / "c.zip", "2 Empatica E4 sessions")


# ---------------------------------------------------------------- sample pickles


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("order", ["C", "F"])
def test_sample_pickles(tmp_path: Path, protocol: int, order: Any) -> None:
    data = np.array(signal(3, 390, np.float16), order=order)
    sample = {
        "uid": "wesad_1",
        "data": data,
        "sampling_rate": np.int64(65) if protocol % 2 else 65,
        "label": [{"class": 2}, {"reg": np.float32(0.5)}],
    }
    path = tmp_path / "a.pkl"
    path.write_bytes(pickle.dumps(sample, protocol))
    recording, whole = opened(path)
    assert [c.sampling_rate for c in recording.channels] == [65.0] * 3
    np.testing.assert_array_equal(whole, data.astype(np.float64))
    refused(path, "contradicts", rate=100)


@pytest.mark.parametrize(
    ("sample", "word"),
    [
        ([1, 2], "no sample"),
        ({"data": [[1.0, 2.0]], "sampling_rate": 65}, "no sample"),
        ({"data": np.zeros((3, 10))}, "--rate"),
        ({"data": np.zeros((3, 10)), "sampling_rate": "x"}, "Hz above 0"),
        ({"data": np.zeros((10, 3)), "sampling_rate": 65}, "(channels, samples)"),
        ({"data": np.array(["a", "b"]), "sampling_rate": 65}, "real numbers"),
        ({"data": np.zeros((1, 2, 3)), "sampling_rate": 65}, "(1, 2, 3)"),
    ],
)
def test_pickles_that_are_no_samples(tmp_path: Path, sample: Any, word: str) -> None:
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(sample))
    refused(tmp_path / "a.pkl", word)


def _state(shape: bytes, raw: bytes = b"C\x08" + b"\0" * 8) -> bytes:
    """An array built NumPy's way with this shape and these bytes, as instructions."""
    return (
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\0\x85C\x01btR"
        b"(K\x01" + shape + b"cnumpy\ndtype\n(X\x02\0\0\0f8I00\nI01\ntR"
        b"(K\x03X\x01\0\0\0<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\0tb" + b"\x89" + raw + b"tb."
    )


def hostile_pickles(victim: Path) -> dict[str, bytes]:
    """Pickles that would run a command, change the reader, or take all memory."""
    command = f"touch {victim}"
    text = command.encode()
    array = np.zeros(4)
    inner = pickle.dumps(Payload(victim), 2)
    pollution = b"cnumpy.core.multiarray\n_reconstruct\n"
    return {
        "system": pickle.dumps(Payload(victim)),
        "system_0": pickle.dumps(Payload(victim), 0),
        "in_a_sample": pickle.dumps({"data": array, "sampling_rate": 65, "label": Payload(victim)}),
        "object_array": pickle.dumps(np.array([Payload(victim)], dtype=object)),
        "eval": b"c__builtin__\neval\n(X\x03\0\0\x001+1tR.",
        "getattr_stack_global": b"\x80\x04\x8c\x08builtins\x8c\x07getattr\x93.",
        "dotted": b"\x80\x04\x8c\x05numpy\x8c\x0fndarray.__class__\x93.",
        "numpy_f2py": b"cnumpy.f2py\ncompile\n(X\x01\0\0\0xtR.",
        "numpy_runstring": b"cnumpy.testing._private.utils\nrunstring\n(X\x01\0\0\0x}tR.",
        "numpy_load": b"cnumpy\nload\n(X\x05\0\0\0a.npytR.",
        "inst": b"(S'" + text + b"'\nios\nsystem\n.",
        "obj": b"(cos\nsystem\nX" + struct.pack("<I", len(text)) + text + b"o.",
        "newobj": b"\x80\x02cnumpy\ndtype\n)\x81.",
        "newobj_ex": b"\x80\x04\x8c\x05numpy\x8c\x05dtype\x93)}\x92.",
        "ext": b"\x80\x02\x82\x01.",
        "persistent": b"Pfile\n.",
        "nested": b"cnumpy.core.multiarray\n_reconstruct\n(C"
        + bytes([len(inner)])
        + inner
        + b"K\0\x85C\x01btR.",
        "reconstruct_memory": b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n"
        b"\x8a\x08\0\0\0\0\0\x01\0\0\x85C\x01btR.",
        "reconstruct_type": b"cnumpy.core.multiarray\n_reconstruct\n(c__builtin__\ndict\n"
        b"K\0\x85C\x01btR.",
        "state_shape": _state(b"\x8a\x08\0\0\0\0\0\x01\0\0\x85"),
        "state_negative": _state(b"J\xff\xff\xff\xff\x85"),
        "state_short": _state(b"K\x02\x85"),
        "dtype_object": b"cnumpy\ndtype\n(X\x01\0\0\0OI00\nI01\ntR.",
        "dtype_void": b"cnumpy\ndtype\n(X\x0b\0\0\0V1000000000I00\nI01\ntR.",
        "dtype_fields": b"cnumpy\ndtype\n(X\x02\0\0\0f8I00\nI01\ntR(K\x03X\x01\0\0\0<N"
        b"(X\x01\0\0\0at}J\xff\xff\xff\xffJ\xff\xff\xff\xffK\0tb.",
        "pollute_function": pollution + b"N}X\x0c\0\0\0__defaults__K\x01s\x86b.",
        "pollute_slots": pollution + b"N}X\x04\0\0\0callNs\x86b.",
        "pollute_type": b"cnumpy\nndarray\nN}X\x04\0\0\0callNs\x86b.",
        "memo_2_31": b"Nr\xff\xff\xff\x7f." + b"\0" * 8,
        "memo_2_31_list": b"]r\xff\xff\xff\x7fN\x61j\xff\xff\xff\x7f0.",
        "long_2_31": b"\x8b\xff\xff\xff\x7f.",
        "text_2_60": b"\x8d\0\0\0\0\0\0\0\x10.",
        "bytes_2_60": b"\x8e\0\0\0\0\0\0\0\x10.",
        "bytearray_2_60": b"\x80\x05\x96\0\0\0\0\0\0\0\x10.",
        "frame_2_60": b"\x80\x04\x95\0\0\0\0\0\0\0\x10N.",
        "copies": b"]X\0\0\x10\0"
        + b"a" * (1 << 20)
        + b"q\x01a"
        + b"c_codecs\nencode\nh\x01X\x05\0\0\0ascii\x86Ra" * 4000
        + b".",
        "deep_key": b"}(" + b")" + b"\x85" * 200_000 + b"K\0u.",
        "deep_list": b"]" * 100_000 + b"a" * 99_999 + b".",
        "laughs": b"]q\0"
        + b"".join(
            b"](h" + bytes([i]) + b"h" + bytes([i]) + b"eq" + bytes([i + 1]) for i in range(60)
        )
        + b".",
        "set_of_itself": b"\x80\x04\x8f\x94(K\x01\x90.",
        "append_to_array": _state(b"K\x01\x85")[:-1] + b"K\0a.",
        "no_stack": b"R.",
        "cut": pickle.dumps({"data": array, "sampling_rate": 65})[:-20],
        "text": b"uid,data\n1,2\n",
    }


@pytest.mark.parametrize(
    ("written", "damaged", "word"),
    [
        (b"K\x03", b"K\x43", "a NumPy dtype of an unknown version"),
        (b"K\x00t", b"K\x02t", "a NumPy dtype of another size or with flags"),
        (b"C\x01b", b"C\x01`", "an array that is not built NumPy's way"),
    ],
)
def test_what_numpy_refuses_is_not_read_by_guess(
    tmp_path: Path, written: bytes, damaged: bytes, word: str
) -> None:
    """Found by random damage."""
    data = signal(2, 390, np.float16)
    sample = {"uid": "u1", "data": data, "sampling_rate": 65, "label": [{"class": 1}]}
    good = pickle.dumps(sample, 4)
    assert good.count(written) == 1
    (tmp_path / "a.pkl").write_bytes(good.replace(written, damaged))
    with pytest.raises(RecordingError, match=word):
        open_recording(tmp_path / "a.pkl")


@pytest.mark.parametrize("kind", list(hostile_pickles(Path("x"))))
def test_hostile_pickles(tmp_path: Path, kind: str) -> None:
    victim = tmp_path / "ran"
    path = tmp_path / "a.pkl"
    path.write_bytes(hostile_pickles(victim)[kind])
    refused(path)
    assert not victim.exists()
    # and the reader is what it was
    good = {"data": np.arange(6.0).reshape(1, 6), "sampling_rate": 65}
    path.write_bytes(pickle.dumps(good, 2))
    np.testing.assert_array_equal(load_pickle(path)["data"], good["data"])


def test_the_hostile_pickles_do_harm_elsewhere(tmp_path: Path) -> None:
    """The gadget is a real one: Python's own unpickler runs it."""
    victim = tmp_path / "ran"
    pickle.loads(hostile_pickles(victim)["system"])
    assert victim.exists()


# ---------------------------------------------------------------- the command line


def test_inspect_reads_them_all(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def fill(root: Any, put: Any) -> None:
        put(root, "data", signal(1, 500)).attrs["sampling_rate"] = 10.0

    write_h5(tmp_path / "h.h5", fill)
    write_zarr(tmp_path / "z.zarr", fill, 3)
    write_fif(tmp_path / "f_raw.fif")
    write_e4(tmp_path / "e4")
    (tmp_path / "bv").mkdir()
    write_brainvision(tmp_path / "bv", signal(3, 2000, np.int16))
    (tmp_path / "bad.h5").write_bytes(b"\x89HDF\r\n\x1a\n" + b"\0" * 100)
    assert main(["inspect", str(tmp_path), "--json"]) == 1
    out = capsys.readouterr()
    content = json.loads(out.out)
    assert [one["id"] for one in content["recordings"]] == ["bv/rec", "e4", "f_raw", "h", "z"]
    assert len(content["failed"]) == 1
    assert re.fullmatch(r"normwear-fast: error: [^\n]*bad\.h5[^\n]*\n", out.err)


def test_opening_reads_little(tmp_path: Path) -> None:
    """A large file of every lazy format is opened and its first block read in bounded memory."""
    import tracemalloc

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


def test_a_heap_cut_by_zeros(tmp_path: Path) -> None:
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
