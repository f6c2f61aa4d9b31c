"""Which column of a table is its clock: by name, by values, and the best of several."""

from __future__ import annotations

from datetime import UTC
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from recording_checks import opened, refused, write
from table_files import EVEN, ROWS, SIGNAL, WALL_MS, both, even, names

from normwear_fast.recordings.clock import time_column


@pytest.mark.parametrize(
    "title", ["ecg", "hr", "times_ecg", "ppg (ms)", "tempo", "s", "elapsed_beats", "ts_1"]
)
def test_channels_are_not_taken_for_clocks(title: str) -> None:
    assert time_column(title) is None


@pytest.mark.parametrize("kind", [".csv", ".parquet"])
@pytest.mark.parametrize(
    ("columns", "clock", "channels"),
    [
        ("T,timestamp (ms),eda", "timestamp (ms)", ["T", "eda"]),
        ("t,timestamp (ms),eda", "timestamp (ms)", ["t", "eda"]),
        ("Ts,eda,time_s", "time_s", ["Ts", "eda"]),
        ("t,eda,time_s", "time_s", ["t", "eda"]),
        ("epoch,eda,time_s", "time_s", ["epoch", "eda"]),
        ("elapsed,timestamp_ms,eda", "timestamp_ms", ["eda"]),  # goes back: no clock, no channel
    ],
)
def test_a_temperature_is_no_clock(
    tmp_path: Path, kind: str, columns: str, clock: str, channels: list[str]
) -> None:
    names = columns.split(",")
    rng = np.random.default_rng(3)
    values = {name: rng.normal(33, 1, 400).round(2) for name in names}
    values[clock] = np.arange(400) * (0.25 if clock == "time_s" else 250.0)
    path = tmp_path / f"r{kind}"
    table = pd.DataFrame(values)[names]
    table.to_csv(path, index=False) if kind == ".csv" else table.to_parquet(path)
    for rate in (None, 4.0):
        recording, data = opened(path, rate)
        assert [(c.name, c.sampling_rate) for c in recording.channels] == [
            (name, 4.0) for name in channels
        ]
        np.testing.assert_array_equal(data, [values[name] for name in channels])


def test_an_ambiguous_name_is_a_clock_by_its_values(tmp_path: Path) -> None:
    rng = np.random.default_rng(4)
    warming = np.cumsum(rng.uniform(0, 0.02, 400)).round(4) + 30
    path, values = even(tmp_path / "r.csv", warming, "t,eda")
    recording, data = opened(path, 4.0)  # the rate tells: a channel
    np.testing.assert_array_equal(data, [warming, values])
    assert "column 't' is not taken for a clock: it is a channel" in recording.notes
    path, values = even(tmp_path / "r.csv", [f"{i / 50:.2f}" for i in range(400)], "t,eda")
    for rate in (None, 50.0):
        recording, data = opened(path, rate)
        np.testing.assert_array_equal(data, [values])
        assert recording.channels[0].sampling_rate == 50.0
    refused(path, "--rate 4 contradicts", rate=4.0)
    path, _ = even(tmp_path / "r.csv", [f"{i / 50:.2f}" for i in range(400)], "T,eda")
    refused(path, "no time column")


def test_ambiguous_names_of_wall_clocks_are_clocks_and_of_counts_are_not(tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    stamps = 1_717_149_600_000 + np.cumsum(rng.integers(18, 23, 400))
    path, _ = even(tmp_path / "r.csv", stamps, "ts,ecg")
    for rate in (None, 50.0):
        recording, _ = opened(path, rate)
        assert [c.name for c in recording.channels] == ["ecg"]
        assert recording.start_time is not None
    count = np.arange(600) // 30  # of epochs of 30 s
    path, values = even(tmp_path / "r.csv", count, "epoch,eda")
    refused(path, "no time column", "--rate")
    np.testing.assert_array_equal(opened(path, 1.0)[1], [count, values])
    t = rng.normal(33, 1, 50)
    np.savez(tmp_path / "r.npz", t=t, eda=t, sampling_rate=4.0)
    assert [c.name for c in opened(tmp_path / "r.npz")[0].channels] == ["t", "eda"]
    np.savez(tmp_path / "r.npz", t=np.arange(50) / 4, eda=t, sampling_rate=4.0)
    assert [c.name for c in opened(tmp_path / "r.npz")[0].channels] == ["eda"]


def test_the_steadier_of_two_clocks_counts(tmp_path: Path) -> None:
    times = np.arange(400) / 50
    back = np.random.default_rng(5).uniform(0, 10, 400).round(3)
    table = pd.DataFrame({"time": back, "timestamp": times, "ecg": times})
    table.to_csv(tmp_path / "r.csv", index=False)
    table.to_parquet(tmp_path / "r.parquet")
    for name in ("r.csv", "r.parquet"):
        recording, _ = opened(tmp_path / name)
        assert recording.channels[0].sampling_rate == 50.0
        assert "column 'time' is a second clock and left out" in recording.notes
        assert not any("'timestamp' is a second clock" in note for note in recording.notes)


@pytest.mark.parametrize("title", ["T", " T", "T [°C]", "T (C)", "T_s"])
def test_an_upper_case_t_is_a_temperature(title: str) -> None:
    assert time_column(title) is None
    assert time_column("T (ms)") is not None


def test_parquet_of_pandas_has_one_clock(tmp_path: Path) -> None:
    table = pd.DataFrame({"time": np.arange(100) / 50, "ECG": 1.0, "PPG": 2.0})
    table.to_parquet(tmp_path / "r.parquet")
    recording, _ = opened(tmp_path / "r.parquet")
    assert [c.name for c in recording.channels] == ["ECG", "PPG"]
    assert recording.notes == ("times in column 'time' are read as s",)


def stamps(form: str) -> list[str]:
    return list(pd.date_range("2024-05-31 10:00", periods=ROWS, freq="10ms").strftime(form))


@pytest.mark.parametrize(
    "columns",
    [
        {"time": WALL_MS * 10**6, "seconds_elapsed": EVEN},  # Sensor Logger
        {
            "Phone timestamp": stamps("%Y-%m-%dT%H:%M:%S.%f"),  # Polar
            "sensor timestamp [ns]": 599_616_000 * 10**9 + (EVEN * 1e9).astype(np.int64),
        },
        {"epoc (ms)": WALL_MS, "elapsed (s)": EVEN},  # MetaWear
        {"timestamp_unix": WALL_MS * 1000, "timestamp_iso": stamps("%Y-%m-%dT%H:%M:%S.%fZ")},
        {"dataReceived": 1000 * (WALL_MS // 1000 + 1), "timestamp": WALL_MS},  # Galaxy, in bursts
        {"Sample Index": np.arange(ROWS) % 256, "Timestamp": WALL_MS},  # OpenBCI
        {"Time Stamp": WALL_MS},
        {"time_stamps": WALL_MS},
        {"unix_ts_ms": WALL_MS},
        {"time": EVEN, "device ticks": EVEN * 1e6},
    ],
)
def test_clocks_of_devices_are_found(tmp_path: Path, columns: dict[str, Any]) -> None:
    for path in both(tmp_path, {**columns, "ecg": SIGNAL[:, 0]}):
        recording, read = opened(path)
        assert names(recording) == ["ecg"]
        assert recording.channels[0].sampling_rate == pytest.approx(100.0, rel=1e-9)
        np.testing.assert_array_equal(read, [SIGNAL[:, 0]])
        assert len([n for n in recording.notes if "left out" in n]) == len(columns) - 1
        known = "time" not in columns or "seconds_elapsed" in columns
        if known and path.suffix == ".csv":
            assert recording.start_time is not None
            assert recording.start_time.replace(tzinfo=UTC).timestamp() == WALL_MS[0] / 1000


def test_second_clocks_beside_a_given_rate_are_no_channels(tmp_path: Path) -> None:
    for path in both(tmp_path, {"dataReceived": WALL_MS, "ecg": SIGNAL[:, 0]}):
        assert names(opened(path, 100.0)[0]) == ["ecg"]
        assert names(opened(path, 1.0)[0]) == ["dataReceived", "ecg"]  # keeps another pace


def test_signals_that_rise_are_no_clocks(tmp_path: Path) -> None:
    rng = np.random.default_rng(12)
    signals = {
        "ramp": EVEN,  # runs as the clock does
        "n": np.arange(ROWS),
        "steps": np.cumsum(rng.integers(0, 2, ROWS)),
        "count": np.cumsum(rng.integers(0, 2, ROWS)),
        "energy": np.cumsum(rng.uniform(0, 1, ROWS)),
        "seconds_asleep": np.cumsum(rng.integers(0, 2, ROWS)),
        "raw": 1_700_000_000 + np.cumsum(rng.integers(0, 100, ROWS)),
        "index": rng.normal(size=ROWS),
        "temperature": 30 + EVEN / 100,
        "constant": np.full(ROWS, 1_700_000_000.0),
    }
    for path in both(tmp_path, {"time_s": EVEN, **signals}):
        recording, read = opened(path)
        assert names(recording) == list(signals)
        np.testing.assert_array_equal(read, list(signals.values()))


@pytest.mark.parametrize(
    ("title", "seconds", "sure"),
    [
        ("seconds_elapsed", 1.0, True),
        ("time since start [ms]", 1e-3, True),
        ("TimeStamp", None, True),
        ("timestampMS", 1e-3, True),
        ("unix ts", None, True),
        ("sensor_ts", None, False),
        ("Date Time", None, True),
    ],
)
def test_names_of_clocks_tell_their_unit(title: str, seconds: float | None, sure: bool) -> None:
    found = time_column(title)
    assert found is not None
    assert (found.seconds, found.sure) == (seconds, sure)


@pytest.mark.parametrize(
    "title", ["mS", "reaction_time", "time_since_last_beat", "T_sec_raw", "seconds_asleep"]
)
def test_names_of_no_clocks_are_none(title: str) -> None:
    assert time_column(title) is None


def lossy(rate: float = 64.0, seconds: int = 40) -> np.ndarray:
    """Times (s) of a recording that lost some rows, not at the same rate everywhere."""
    times = np.arange(int(rate * seconds)) / rate
    keep = np.random.default_rng(13).random(times.size) > 0.02
    keep[1000:1030] = False
    keep[[0, -1]] = True
    return times[keep]


@pytest.mark.parametrize("second", ["unix_ts", "datetime", "gps_time"])
def test_a_full_and_fine_clock_comes_first(tmp_path: Path, second: str) -> None:
    times = lossy()
    wall = np.floor(1_700_000_000.4 + times).astype(int)
    stamp: Any = wall
    if second == "datetime":
        stamp = pd.to_datetime(wall, unit="s")
    elif second == "gps_time":
        stamp = np.where(np.arange(times.size) % 64 == 0, wall, np.nan)
    for columns in (
        {"time": times, second: stamp, "ecg": times},
        {second: stamp, "time": times, "ecg": times},
    ):
        for path in both(tmp_path, columns):
            recording, (read,) = opened(path)
            assert recording.channels[0].sampling_rate == 64.0
            there = np.isfinite(read)
            late = np.abs(read - np.arange(read.size) / 64)[there].max()
            assert late < 1e-3
            assert recording.start_time is not None
            assert recording.start_time.replace(tzinfo=UTC).timestamp() == wall[0]


@pytest.mark.parametrize("given", [64.0, None])
@pytest.mark.parametrize(
    ("name", "times"),
    [
        ("sensor_time", np.arange(ROWS) * 512),  # ticks
        ("sensor_time", (np.arange(ROWS) * 512) % 65536),
        ("device_time", np.tile(np.arange(ROWS // 2) / 64, 2)),
        ("rel_time", np.arange(ROWS) % 100 / 64),
        ("gps_time", np.where(np.arange(ROWS) % 64 == 0, 1.7e9, np.nan)),
        ("sensor_time", np.cumsum(np.arange(ROWS) % 7) * 1000),
    ],
)
def test_a_weak_clock_costs_no_recording(
    tmp_path: Path, given: float | None, name: str, times: np.ndarray
) -> None:
    signal = np.arange(ROWS, dtype=float)
    columns = {name: times, "ecg": signal}
    if given is None:  # another clock is there
        columns = {name: times, "time": EVEN, "ecg": signal}
    for path in both(tmp_path, columns):
        recording, read = opened(path, given)
        assert names(recording) == ["ecg"]
        assert recording.channels[0].sampling_rate == (given or 100.0)
        np.testing.assert_array_equal(read, [signal])
        assert any(name in note and "left out" in note for note in recording.notes)
        assert not any("pass --rate" in note for note in recording.notes if given)


def test_a_weak_clock_that_goes_back_later_is_no_clock(tmp_path: Path) -> None:
    rows = 20_000  # beyond the sample
    device = np.concatenate([np.arange(rows - 100), np.arange(100)]) / 100
    for path in both(
        tmp_path, {"device_time_s": device, "time": np.arange(rows) / 100, "ecg": np.arange(rows)}
    ):
        recording, read = opened(path)
        np.testing.assert_array_equal(read, [np.arange(rows)])
        assert any("'device_time_s' is no clock" in note for note in recording.notes)
    for path in both(tmp_path, {"device_time": device, "ecg": np.arange(rows)}):
        refused(path, "goes back")


def test_a_weak_clock_that_is_even_is_believed(tmp_path: Path) -> None:
    for path in both(tmp_path, {"unix_ts": WALL_MS, "ecg": EVEN}):
        refused(path, "contradicts", "100 Hz", rate=64.0)


def test_local_time_is_no_moment(tmp_path: Path) -> None:
    local = WALL_MS + 7_200_000
    for path in both(tmp_path, {"LocalTimestamp": local, "UnixTimestamp": WALL_MS, "ecg": EVEN}):
        recording, _ = opened(path)
        assert recording.start_time is not None
        assert recording.start_time.timestamp() == WALL_MS[0] / 1000
    for path in both(tmp_path, {"LocalTimestamp": local, "ecg": EVEN}):
        assert opened(path)[0].start_time is None


def test_a_count_of_rows_goes_up_by_one(tmp_path: Path) -> None:
    by_two = np.arange(ROWS) * 2
    for path in both(tmp_path, {"time_s": EVEN, "row": by_two // 2, "count": by_two}):
        recording, read = opened(path)
        assert names(recording) == ["count"]
        np.testing.assert_array_equal(read, [by_two])


def test_parts_of_a_date_are_no_clock() -> None:
    for title in ("timestamp_hour", "min_time", "hour", "minutes_asleep", "time_day"):
        assert time_column(title) is None


@pytest.mark.parametrize(
    ("name", "cells"),
    [
        ("pace", ["5:32", "5:30", "5:41"]),
        ("lap", ["0:45"]),
        ("ie", ["1:20", "", "1:30"]),
        ("ratio", ["20:10", "1:30"]),
    ],
)
def test_minutes_and_seconds_are_no_clock(tmp_path: Path, name: str, cells: list[str]) -> None:
    rows = [f"{cells[i % len(cells)]},{i}\n" for i in range(60)]
    path = write(tmp_path / "r.csv", f"{name},ecg\n" + "".join(rows))
    recording, read = opened(path, 10.0)
    assert names(recording) == ["ecg"]
    np.testing.assert_array_equal(read, [np.arange(60)])
    assert f"column {name!r} holds text and is left out" in recording.notes


@pytest.mark.parametrize(
    ("title", "seconds"), [("min", 60.0), ("minutes", 60.0), ("hours", 3600.0), ("milliSec", 1e-3)]
)
def test_a_unit_alone_is_a_clock_by_its_values(tmp_path: Path, title: str, seconds: float) -> None:
    """As BIOPAC names it. A minimum is none."""
    for path in both(tmp_path, {title: EVEN / seconds, "ecg": SIGNAL[:, 0]}):
        recording, _ = opened(path)
        assert names(recording) == ["ecg"]
        assert recording.channels[0].sampling_rate == pytest.approx(100.0, rel=1e-6)
    if title == "milliSec":
        return
    for path in both(tmp_path, {"time_s": EVEN, title: SIGNAL[:, 1], "ecg": SIGNAL[:, 0]}):
        assert names(opened(path)[0]) == [title, "ecg"]


def test_a_time_column_of_text_beside_a_given_rate(tmp_path: Path) -> None:
    stamp = ["5/31/2024 1:58:58 PM"] * ROWS
    for path in both(tmp_path, {"Timestamp": stamp, "ecg": SIGNAL[:, 0]}):
        refused(path, "time column 'Timestamp' holds", "ISO 8601")
        recording, read = opened(path, 100.0)
        np.testing.assert_array_equal(read, [SIGNAL[:, 0]])
        assert any("'Timestamp' holds" in note for note in recording.notes)


def test_an_integer_index_of_parquet(tmp_path: Path) -> None:
    table = pd.DataFrame({"ecg": SIGNAL[:, 0]})
    table.set_index(WALL_MS).to_parquet(tmp_path / "r.parquet")
    recording, _ = opened(tmp_path / "r.parquet")
    assert recording.channels[0].sampling_rate == 100.0
    table.set_index(5 + np.arange(ROWS) ** 2).to_parquet(tmp_path / "r.parquet")
    recording, _ = opened(tmp_path / "r.parquet", 50.0)
    assert names(recording) == ["ecg"]
    assert any("pandas' index and is left out" in note for note in recording.notes)


def test_a_date_that_stands_still_is_no_clock_of_parquet(tmp_path: Path) -> None:
    table = pd.DataFrame({"born": pd.Timestamp("1980-01-01"), "ecg": SIGNAL[:, 0]})
    table.to_parquet(tmp_path / "r.parquet")
    refused(tmp_path / "r.parquet", "no time column")
    assert names(opened(tmp_path / "r.parquet", 50.0)[0]) == ["ecg"]


@pytest.mark.parametrize(
    ("title", "owners"),
    [
        ("device", ["left", "right"]),
        ("name", ["x", "y", "z"]),
        ("Subject ID", [3, 5]),
        ("channel", [0, 1, 2]),
    ],
)
def test_a_long_table_is_refused(tmp_path: Path, title: str, owners: list[Any]) -> None:
    """Its rows, read as samples, would be of several channels by turns."""
    count = len(owners)
    columns = {
        "time_s": np.repeat(EVEN, count),
        title: np.tile(owners, ROWS),
        "value": SIGNAL[:, :count].ravel(),
    }
    for path in both(tmp_path, columns):
        for rate in (None, 100.0):
            refused(path, "share a time in column 'time_s'", title, str(owners[0]), rate=rate)
    for path in both(tmp_path, columns | {title: np.repeat(owners, ROWS)}):  # a label
        assert opened(path)[0].channels[-1].sampling_rate == 100.0 * count
