"""Times in HDF5 and Zarr: units, moments they count from, a rate beside them, a broken clock."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from recording_checks import opened_in_any_blocks, refused_when_read, signal


def test_time_arrays_are_the_clocks_of_their_groups(store: Callable[..., Path]) -> None:
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

    recording, whole = opened_in_any_blocks(store(fill))
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
def test_units_of_time_that_xarray_writes_are_known(
    store: Callable[..., Path], units: str, unit: float
) -> None:
    ecg = signal(1, 500)[0]
    late = np.arange(500) / 100 + 7.0  # 100 Hz: 10 ms could be 10 s

    def fill(root: Any, put: Any) -> None:
        put(root, "ecg", ecg).attrs["units"] = "mV"
        times = late / unit
        times = np.round(times).astype(np.int64) if unit < 1 else times
        put(root, "time", times).attrs["units"] = units

    recording, whole = opened_in_any_blocks(store(fill))
    (channel,) = recording.channels
    assert (channel.name, channel.unit, channel.sampling_rate) == ("ecg", "mV", 100.0)
    np.testing.assert_array_equal(whole[0], ecg)
    assert recording.start_time is not None
    begun = recording.start_time - datetime(2024, 1, 1, 0, 0, 7, tzinfo=UTC)
    assert abs(begun.total_seconds()) < 1e-3
    assert not any("read as" in note for note in recording.notes)  # nothing is guessed


def test_time_arrays_may_count_from_moments_of_their_own(store: Callable[..., Path]) -> None:
    """xarray counts from the first time of each array."""

    def fill(root: Any, put: Any) -> None:
        for name, moment in (("a", "2024-01-01 00:00:00"), ("b", "2024-01-01 00:00:03")):
            group = root.create_group(name)
            put(group, "ecg", signal(1, 500)[0])
            put(group, "time", 10 * np.arange(500)).attrs["units"] = f"milliseconds since {moment}"

    recording, _ = opened_in_any_blocks(store(fill))
    assert [(c.name, c.start) for c in recording.channels] == [("a/ecg", 0.0), ("b/ecg", 3.0)]


def test_units_since_what_is_no_date_are_noted(store: Callable[..., Path]) -> None:
    def fill(root: Any, put: Any) -> None:
        put(root, "ecg", signal(1, 500)[0])
        put(root, "time", 10 * np.arange(500)).attrs["units"] = "ms since the start"

    recording, _ = opened_in_any_blocks(store(fill))
    assert (recording.channels[0].sampling_rate, recording.start_time) == (100.0, None)
    assert recording.notes == ("time counts 'ms since the start': no date that is known here",)


def test_units_that_contradict_the_name_are_refused(store: Callable[..., Path]) -> None:
    def fill(root: Any, put: Any) -> None:
        put(root, "ecg", signal(1, 500)[0])
        put(root, "time_ms", 10 * np.arange(500)).attrs["units"] = "seconds since 2024-01-01"

    refused_when_read(store(fill), "time_ms", "seconds since", "contradict its name")


def test_of_two_time_arrays_the_one_that_a_table_would_have_counts(
    store: Callable[..., Path],
) -> None:
    def fill(root: Any, put: Any) -> None:
        put(root, "ecg", signal(1, 400)[0])
        put(root, "time", np.random.default_rng(5).uniform(0, 10, 400))
        put(root, "timestamp", np.arange(400) / 50)

    recording, _ = opened_in_any_blocks(store(fill))
    assert recording.channels[0].sampling_rate == 50.0
    assert "time array time is not the clock of any array and left out" in recording.notes


def test_a_temperature_is_no_time_array(store: Callable[..., Path]) -> None:
    values = {"T": signal(1, 500)[0], "t": signal(1, 500)[0]}

    def fill(root: Any, put: Any) -> None:
        put(root, "time_s", np.arange(500) / 50)
        for name, data in values.items():
            put(root, name, data)

    recording, whole = opened_in_any_blocks(store(fill))
    assert sorted(c.name for c in recording.channels) == ["T", "t"]
    assert {c.sampling_rate for c in recording.channels} == {50.0}
    for channel, data in zip(recording.channels, whole, strict=True):
        np.testing.assert_array_equal(data, values[channel.name])


def test_a_time_array_that_contradicts_the_rate_is_refused(store: Callable[..., Path]) -> None:
    def fill(root: Any, put: Any) -> None:
        root.attrs["sampling_rate"] = 100.0
        put(root, "ecg", signal(1, 500)[0])
        put(root, "time_s", np.arange(500) / 50)

    refused_when_read(store(fill), "100", "50", "contradicts")


def timed(tmp_path: Path, store: Callable[..., Path], times: Any, rate: float, **more: Any) -> Any:
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
def test_a_rate_tells_the_unit_of_times_that_are_rough(
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
    for path in timed(tmp_path, store, times, hertz, ecg=true):
        recording, (data,) = opened_in_any_blocks(path, rate and hertz)
        assert recording.channels[0].sampling_rate == hertz, recording.notes
        late = data - np.arange(data.size) / hertz
        assert np.nanmax(np.abs(late)) < 2.5 / hertz
        assert np.isfinite(late).mean() > 0.99
        assert any("are read as ms" in note for note in recording.notes)
        assert not any("mean rate" in note for note in recording.notes)
        refused_when_read(path, "--rate 100 contradicts", rate=100)


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
    for path in timed(tmp_path, store, times, 64.0, ecg=ecg, acc=acc):
        recording, whole = opened_in_any_blocks(path)
        channels = {c.name: data for c, data in zip(recording.channels, whole, strict=True)}
        np.testing.assert_array_equal(channels["ecg"], ecg)
        np.testing.assert_array_equal([channels["acc_1"], channels["acc_2"]], acc)
        assert {c.sampling_rate for c in recording.channels} == {64.0}
        (note,) = recording.notes
        assert says in note
        assert note.endswith(": no clock, sampling_rate stands in for it")
        refused_when_read(path, "--rate 100 contradicts", rate=100)


def test_a_rate_is_the_clock_beside_a_count_of_rows(
    tmp_path: Path, store: Callable[..., Path]
) -> None:
    for path in timed(tmp_path, store, np.arange(500), 64.0, ecg=signal(1, 500)[0]):
        recording, _ = opened_in_any_blocks(path)
        assert recording.channels[0].sampling_rate == 64.0
        assert "column 'time' counts rows; sampling_rate is its clock" in recording.notes


@pytest.mark.parametrize("step", [10, 16, 0.005])
def test_a_rate_that_times_have_in_no_unit_is_refused(
    tmp_path: Path, store: Callable[..., Path], step: float
) -> None:
    for path in timed(tmp_path, store, step * np.arange(1000), 80.0, ecg=signal(1, 1000)[0]):
        refused_when_read(path, "sampling_rate 80 of ecg contradicts", "one of the two is right")


def test_of_dates_and_times_the_one_that_each_row_has(tmp_path: Path) -> None:
    times = np.arange(500) / 50
    whole = np.datetime64("2024-05-31", "s") + times.astype(np.int64)
    np.savez(tmp_path / "r.npz", datetime=whole, elapsed=times, ecg=signal(1, 500)[0])
    recording, (data,) = opened_in_any_blocks(tmp_path / "r.npz")
    assert recording.channels[0].sampling_rate == 50.0
    np.testing.assert_array_equal(data, signal(1, 500)[0])
    assert "time array datetime is not the clock of any array and left out" in recording.notes
    assert recording.start_time == datetime(2024, 5, 31, tzinfo=UTC)


def test_a_jittered_clock_takes_the_rate_that_the_user_gives(tmp_path: Path) -> None:
    times = np.sort(np.arange(500) / 50 + np.random.default_rng(3).uniform(0, 8e-3, 500))
    np.savez(tmp_path / "r.npz", time=times, ecg=times)
    recording, _ = opened_in_any_blocks(tmp_path / "r.npz", 50.0)
    assert recording.channels[0].sampling_rate == 50.0


def test_rows_that_are_there_twice_are_read_once(store: Callable[..., Path]) -> None:
    rows = np.sort(np.concatenate([np.arange(600), np.arange(200, 400)]))

    def fill(root: Any, put: Callable[..., Any]) -> None:
        put(root, "time_s", rows / 64)
        put(root, "ecg", signal(1, 600)[0][rows])

    recording, (data,) = opened_in_any_blocks(store(fill))
    assert recording.channels[0].sampling_rate == 64.0
    np.testing.assert_array_equal(data, signal(1, 600)[0])
