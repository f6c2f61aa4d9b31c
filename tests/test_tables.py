"""CSV and Parquet as devices and pandas write them: headers, second clocks, resolutions, midnight."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from test_recordings import opened, refused, write

from normwear_fast.cli.inspect import describe
from normwear_fast.recordings import Recording, find_recordings, open_recording
from normwear_fast.recordings.clock import Midnight, time_column
from normwear_fast.recordings.headers import is_numbered_header

ROWS = 600
SIGNAL = np.random.default_rng(11).normal(size=(ROWS, 3))
EVEN = np.arange(ROWS) / 100  # s


def names(recording: Recording) -> list[str]:
    return [channel.name for channel in recording.channels]


def both(tmp_path: Path, columns: dict[str, Any]) -> list[Path]:
    """The same table as CSV and as Parquet."""
    table = pd.DataFrame(columns)
    table.to_csv(tmp_path / "r.csv", index=False)
    table.to_parquet(tmp_path / "r.parquet")
    return [tmp_path / "r.csv", tmp_path / "r.parquet"]


# ---------------------------------------------------------------- headers


@pytest.mark.parametrize("index", [True, False])
@pytest.mark.parametrize("counts", [False, True])
def test_pandas_column_numbers_are_a_header(tmp_path: Path, index: bool, counts: bool) -> None:
    data = (SIGNAL * 50 + 2048).round() if counts else SIGNAL
    kind = int if counts else float
    pd.DataFrame(data.astype(kind)).to_csv(tmp_path / "r.csv", index=index)
    recording, read = opened(tmp_path / "r.csv", 100.0)
    assert names(recording) == ["0", "1", "2"]
    np.testing.assert_array_equal(read, data.T)
    assert ("the first column counts rows and is left out" in recording.notes) is index


@pytest.mark.parametrize(
    ("rows", "header"),
    [
        (["0,1,2", "3,4,5", "6,7,8", "9,10,11"], False),  # data that count
        (["0,1,2", "5,-3,9", "-4,8,1", "3,2,-7"], False),  # raw counts about 0
        (["0", "0.1", "0.25", "0.5"], False),  # one column may begin with 0
        (["0,1", "0.02,1.5", "0.04,1.25", "1,2"], False),  # %g writes 0 and 1
        (["0,1", "0.02,1.5", "0.04,1.0", "1.0,2.0"], True),
        (["0,2,1", "0.1,0.2,0.3", "0.5,0.2,0.3"], False),
        ([",0,1", ",0.1,0.2", ",0.5,0.2"], False),  # nothing below the empty cell
        ([",0,1", "5.5,0.1,0.2", "4.1,0.5,0.2"], False),  # falls: a signal with a missing sample
        ([",0,1", "0,3,4", "1,5,6"], True),
        ([",0", "2024-05-31,3", "2024-06-01,5"], True),
        (["0,1,2"], False),
    ],
)
def test_what_is_a_header_of_numbers(rows: list[str], header: bool) -> None:
    cells = [row.split(",") for row in rows]
    assert is_numbered_header(cells[0], cells[1:]) is header


@pytest.mark.parametrize("columns", [None, ["a", "b", "c"]])
@pytest.mark.parametrize(
    "index",
    [
        pd.date_range("2024-05-31", periods=ROWS, freq="10ms"),
        EVEN,
        1_717_113_600_000 + np.arange(ROWS) * 10,
    ],
)
def test_a_time_index_without_a_name_is_the_clock(
    tmp_path: Path, index: Any, columns: list[str] | None
) -> None:
    table = pd.DataFrame(SIGNAL, index=index, columns=columns)
    table.to_csv(tmp_path / "r.csv")
    recording, read = opened(tmp_path / "r.csv")
    assert names(recording) == columns or ["0", "1", "2"]
    assert recording.channels[0].sampling_rate == 100.0
    np.testing.assert_array_equal(read, SIGNAL.T)
    assert (recording.start_time is None) is (index is EVEN)


def test_a_first_column_without_a_name(tmp_path: Path) -> None:
    path = tmp_path / "r.csv"
    table = pd.DataFrame(SIGNAL, columns=["a", "b", "c"])
    for some in (table[::4], table[100:], table[SIGNAL[:, 0] > 0]):
        some.to_csv(path)
        assert names(opened(path, 25.0)[0]) == ["a", "b", "c"]
    table.set_index(table.a.to_numpy()).to_csv(path)  # a signal
    recording, read = opened(path, 100.0)
    assert names(recording) == ["channel_1", "a", "b", "c"]
    np.testing.assert_array_equal(read[0], SIGNAL[:, 0])


def test_parquet_index_of_times(tmp_path: Path) -> None:
    path = tmp_path / "r.pq"  # as good an ending
    for index, rate in ((EVEN, None), (np.arange(ROWS)[::-1], 50.0)):
        pd.DataFrame({"a": SIGNAL[:, 0]}, index=index).to_parquet(path)
        recording, read = opened(path, rate)
        assert names(recording) == ["a"]
        assert recording.channels[0].sampling_rate == rate or 100.0
        np.testing.assert_array_equal(read, [SIGNAL[:, 0]])


def test_comments_units_and_separator_lines(tmp_path: Path) -> None:
    path = tmp_path / "r.csv"
    rows = "".join(f"{i % 256}, {i * 1.5}, {1_700_000_000 + i / 250:.6f}\n" for i in range(1000))
    head = "%OpenBCI Raw EXG Data\n%Sample Rate = 250 Hz\nSample Index, EXG Channel 0, Timestamp\n"
    recording, read = opened(write(path, head + rows))
    assert names(recording) == ["EXG Channel 0"]
    assert recording.channels[0].sampling_rate == 250.0
    np.testing.assert_array_equal(read, [np.arange(1000) * 1.5])

    rows = "".join(f"{1_700_000_000_000 + i * 20}\t{i * 0.5}\t2.5\t\n" for i in range(200))
    head = "Shimmer_D5B8_Timestamp_Unix_CAL\tAccel_X\tGSR\t\nms\tm/(s^2)\tuS\t\n"
    for first in ('"sep=\t"\n', "sep=\\t\n", ""):
        recording, read = opened(write(path, first + head + rows))
        assert [(c.name, c.unit) for c in recording.channels] == [
            ("Accel_X", "m/(s^2)"),
            ("GSR", "uS"),
        ]
        assert recording.channels[0].sampling_rate == 50.0
        np.testing.assert_array_equal(read[0], np.arange(200) * 0.5)

    recording, read = opened(write(path, "%SpO2,HR\n97,60\n98,61\n"), 1.0)
    assert names(recording) == ["%SpO2", "HR"]
    # no units: a row of data that cannot be read
    refused(write(path, "time_s,ecg\n0,-\n1,2\n2,3\n"), "row 2", "'ecg'", "'-' is not a number")
    text = "time_s,ecg\nwarming,up\n1,2\n2,3\n"
    refused(write(path, text), "row 2", "'warming'", "one row of titles is right")
    text = "ecg,ppg\nTrial 12,Sensor 7\n1,2\n2,3\n"
    refused(write(path, text), "row 2", "one row of titles", rate=1.0)


def test_a_preamble_is_refused_with_where_the_table_begins(tmp_path: Path) -> None:
    head = "---- Data File Created By ActiGraph at 30 Hz ----\n" + "Epoch Period 00:00:00\n" * 9
    text = head + "X,Y,Z\n" + "0.1,0.2,0.3\n" * 50
    path = write(tmp_path / "r.csv", text)
    refused(path, "begins in row 11", "3 columns", "with #", rate=30.0)
    commented = "".join(f"#{line}\n" for line in head.splitlines()) + "X,Y,Z\n" + "1,2,3\n" * 9
    assert names(opened(write(path, commented), 30.0)[0]) == ["X", "Y", "Z"]
    # a table that is one, whatever else its cells hold
    note = "time_s,ecg,note\n" + "0.{},1,\n" * 3 + "0.{},1,a;b\n" * 5
    assert names(opened(write(path, note.format(*range(1, 9))))[0]) == ["ecg"]


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
def test_utf16(tmp_path: Path, encoding: str) -> None:
    text = "\ufefftime_s,EDA (µS)\n" + "".join(f"{i / 4},{i * 0.5}\n" for i in range(20_000))
    (tmp_path / "r.csv").write_bytes(text.encode(encoding))
    recording, read = opened(tmp_path / "r.csv")
    assert [(c.name, c.unit) for c in recording.channels] == [("EDA", "µS")]
    np.testing.assert_array_equal(read, [np.arange(20_000) * 0.5])
    (tmp_path / "r.csv").write_bytes(text[:100].encode(encoding)[:-1])
    refused(tmp_path / "r.csv", "UTF-16")


# ---------------------------------------------------------------- resolutions


@pytest.mark.parametrize("rate", [256, 300, 360, 512, 1000])
def test_epoch_seconds_with_three_decimals_are_even(tmp_path: Path, rate: int) -> None:
    times = (1_700_000_000.3 + np.arange(4000) / rate).round(3)
    for path in both(tmp_path, {"timestamp": times, "ecg": np.tile(SIGNAL[:, 0], 7)[:4000]}):
        for given in (None, float(rate)):
            recording, read = opened(path, given)
            assert recording.channels[0].sampling_rate == rate
            np.testing.assert_array_equal(read, [np.tile(SIGNAL[:, 0], 7)[:4000]])


def test_lost_samples_show_at_any_resolution(tmp_path: Path) -> None:
    keep = np.delete(np.arange(4000), [700, *range(1500, 1510), 3000])
    times = (1_700_000_000 + keep / 100).round(2)
    for path in both(tmp_path, {"timestamp": times, "ecg": keep}):
        recording, (read,) = opened(path)
        assert recording.channels[0].sampling_rate == 100.0
        assert recording.channels[0].samples == 4000
        np.testing.assert_allclose(read[keep], keep, atol=1e-3)
        assert np.isnan(read[1500:1510]).all()


@pytest.mark.parametrize(
    ("rate", "first", "rows"),
    [(500, 0, 5_000_000), (1000, 0, 3_600_000), (1000, 10_000, 50_000), (360, 36_000, 200_000)],
)
def test_float32_times_are_even(tmp_path: Path, rate: int, first: int, rows: int) -> None:
    times = (first + np.arange(rows) / rate).astype(np.float32)
    pd.DataFrame({"time": times, "ecg": np.zeros(times.size, np.int8)}).to_parquet(
        tmp_path / "r.pq"
    )
    with open_recording(tmp_path / "r.pq", sampling_rate=rate) as recording:
        assert recording.channels[0].sampling_rate == rate
        assert recording.channels[0].samples == times.size


def test_a_count_of_rows_neither_repeats_nor_skips(tmp_path: Path) -> None:
    for rate in (1024, 900):
        times = np.rint(np.arange(3000) * 1000 / rate).astype(int)
        for path in both(tmp_path, {"time": times, "ecg": np.arange(3000)}):
            recording, read = opened(path, float(rate))
            assert recording.channels[0].sampling_rate == rate
            np.testing.assert_array_equal(read, [np.arange(3000)])
            assert "times in column 'time' are read as ms" in recording.notes
    times = np.rint(np.arange(3000) * 1000 / 1024).astype(int)
    for path in both(tmp_path, {"time": times, "ecg": 1.0}):
        refused(path, "step by 1 and repeat", "1024 Hz in ms", rate=100.0)
    # packets that were lost: a number each
    numbers = np.delete(np.arange(3000), [50, 51, 900])
    for path in both(tmp_path, {"time": numbers, "ecg": numbers}):
        recording, (read,) = opened(path, 64.0)
        np.testing.assert_allclose(read, np.arange(3000))


# ---------------------------------------------------------------- second clocks


def stamps(form: str) -> list[str]:
    return list(pd.date_range("2024-05-31 10:00", periods=ROWS, freq="10ms").strftime(form))


WALL_MS = 1_717_149_600_000 + (EVEN * 1e3).astype(np.int64)


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
def test_clocks_of_devices(tmp_path: Path, columns: dict[str, Any]) -> None:
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


def test_second_clocks_beside_a_given_rate(tmp_path: Path) -> None:
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
def test_names_of_clocks(title: str, seconds: float | None, sure: bool) -> None:
    found = time_column(title)
    assert found is not None
    assert (found.seconds, found.sure) == (seconds, sure)


@pytest.mark.parametrize(
    "title", ["mS", "reaction_time", "time_since_last_beat", "T_sec_raw", "seconds_asleep"]
)
def test_names_of_no_clocks(title: str) -> None:
    assert time_column(title) is None


# ---------------------------------------------------------------- text and empty columns


def test_text_far_down_costs_its_column_alone(tmp_path: Path) -> None:
    rows = 20_000  # far beyond the sample
    table = pd.DataFrame({"time_s": np.arange(rows) / 100, "ECG": np.arange(rows) * 0.5})
    table["event"] = ""
    table.loc[15_000, "event"] = "start"
    path = tmp_path / "r.csv"
    table.to_csv(path, index=False)
    recording, read = opened(path)
    assert names(recording) == ["ECG"]
    assert "column 'event' holds text and is left out" in recording.notes
    np.testing.assert_array_equal(read, [table.ECG])

    table["PPG"] = table.ECG + 1
    table["mark"] = ["7", *[""] * 18_000, "oops", *[""] * (rows - 18_002)]  # has a number too
    table.loc[16_000, "event"] = "8.5"  # and so has this one now
    table.to_csv(path, index=False)
    with open_recording(path) as recording:
        assert names(recording) == ["ECG", "event", "PPG", "mark"]
        assert "row 18003, column 'mark': 'oops' is not a number" in recording.notes
        blocks = list(recording.blocks([0, 2]))
        for place in (0, 1):
            whole = np.concatenate([block[place] for block in blocks])
            np.testing.assert_array_equal(whole, table.ECG + place)
    words = ["--channels 'ECG,PPG'", "is not a number"]
    refused(path, "row 15002", "'start'", *words, to_the_end=True)
    content = describe(find_recordings([path])[0])  # `inspect` says what of the others is missing
    assert [channel["missing"] for channel in content["channels"]] == [0, None, 0, None]


def test_columns_without_a_value(tmp_path: Path) -> None:
    last = np.full(ROWS, np.nan)
    last[-1] = 3.0
    empty = np.full(ROWS, np.nan)
    for path in both(tmp_path, {"time_s": EVEN, "ecg": EVEN, "ppg": empty, "late": last}):
        recording, read = opened(path)
        assert names(recording) == ["ecg", "late"]
        assert "column 'ppg' has no value and is left out" in recording.notes
        np.testing.assert_array_equal(read, [EVEN, last])
    for path in both(tmp_path, {"time_s": EVEN, "ppg": empty}):
        assert open_recording(path).channels == ()
    write(tmp_path / "r.csv", "ecg\n\n1\n2\n")  # a missing sample before the first
    np.testing.assert_array_equal(opened(tmp_path / "r.csv", 1.0)[1], [[np.nan, 1, 2]])


# ---------------------------------------------------------------- times of day


def day(seconds: float, *, hours: int = 2, wrap: bool = True) -> str:
    minutes, second = divmod(round(seconds, 1), 60)
    hour, minute = divmod(int(minutes), 60)
    return f"{hour % 24 if wrap else hour:0{hours}d}:{minute:02d}:{second:04.1f}"


@pytest.mark.parametrize("start", [86_390.0, 9 * 3600 + 3590.0, 25 * 3600 + 600.0])
@pytest.mark.parametrize(("hours", "wrap"), [(2, True), (1, True), (1, False)])
def test_csv_times_of_day_go_on(tmp_path: Path, start: float, hours: int, wrap: bool) -> None:
    rows = 20_000 if start == 86_390 else 300
    times = [day(start + i / 10, hours=hours, wrap=wrap) for i in range(rows)]
    path = tmp_path / "r.csv"
    pd.DataFrame({"time": times, "ecg": np.arange(rows)}).to_csv(path, index=False)
    recording, read = opened(path)
    assert recording.channels[0].sampling_rate == 10.0
    np.testing.assert_array_equal(read, [np.arange(rows)])


def test_times_of_day_with_a_gap_at_midnight_and_bad_ones(tmp_path: Path) -> None:
    text = "time,ecg\n" + "".join(f"{day(86_340 + i)},1\n" for i in range(50))
    text += "".join(f"{day(30 + i)},1\n" for i in range(50))
    recording, (read,) = opened(write(tmp_path / "r.csv", text))
    assert read.size == 140
    assert np.isnan(read).sum() == 40
    path = write(tmp_path / "r.csv", "time,ecg\n10:00:00,1\n09:00:00,2\n10:00:01,3\n")
    refused(path, "row 3", "back by 3600 s")
    path = write(tmp_path / "r.csv", "time,ecg\n10:00:00,1\n10:61:00,2\n10:00:01,3\n")
    refused(path, "row 3", "'10:61:00' is not a time")
    times = [datetime(2024, 5, 31, 23, 59, 59 - i % 2).time() for i in (1, 0)]
    times += [datetime(2024, 6, 1, 0, 0, i).time() for i in range(5)]
    for unit in ("time64[us]", "time32[ms]"):
        import pyarrow as pa
        from pyarrow import parquet

        kind = pa.time64("us") if unit == "time64[us]" else pa.time32("ms")
        table = pa.table({"time": pa.array(times, kind), "ecg": np.arange(7.0)})
        parquet.write_table(table, tmp_path / "r.parquet")
        recording, read_all = opened(tmp_path / "r.parquet")
        assert recording.channels[0].sampling_rate == 1.0
        np.testing.assert_array_equal(read_all, [np.arange(7)])


def test_midnight_falls_between_pieces() -> None:
    times = np.arange(0, 300, 7)
    midnight = Midnight(100)
    pieces = [midnight(piece) for piece in np.array_split(times % 100, 9)]
    np.testing.assert_array_equal(np.concatenate(pieces), times)


# ---------------------------------------------------------------- which clock, and which header


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


def test_a_weak_clock_that_goes_back_later(tmp_path: Path) -> None:
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


def test_no_advice_to_pass_what_was_passed(tmp_path: Path) -> None:
    times = np.cumsum(np.tile([9, 10, 11], 200))
    for path in both(tmp_path, {"time": times, "ecg": 1.0}):
        assert "pass --rate" in refused(path)
        text = refused(path, "--rate 64", rate=64.0)
        assert "pass --rate" not in text


def test_a_row_that_is_there_twice_in_a_count(tmp_path: Path) -> None:
    rows = np.sort(np.append(np.arange(300), 100))
    for path in both(tmp_path, {"time": rows, "ecg": rows}):
        _, (read,) = opened(path, 64.0)
        np.testing.assert_array_equal(read, np.arange(300))


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


@pytest.mark.parametrize(
    ("title", "seconds"),
    [
        *(("Time [min]", 60.0), ("time (h)", 3600.0), ("time (days)", 86400.0)),
        *(
            ("elapsed_minutes", 60.0),
            ("time_h", 3600.0),
            ("T [min]", 60.0),
            ("Time (Hours)", 3600.0),
        ),
    ],
)
def test_long_units(tmp_path: Path, title: str, seconds: float) -> None:
    for path in both(tmp_path, {title: EVEN / seconds, "ecg": EVEN}):
        recording, read = opened(path)
        assert recording.channels[0].sampling_rate == pytest.approx(100.0, rel=1e-9)
        np.testing.assert_array_equal(read, [EVEN])


@pytest.mark.parametrize("title", ["time [m]", "Time (weeks)", "elapsed [cs]"])
def test_units_of_time_that_are_not_known(tmp_path: Path, title: str) -> None:
    for path in both(tmp_path, {title: EVEN, "ecg": EVEN}):
        for rate in (None, 100.0):
            refused(path, title, "not known", rate=rate)


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


def test_times_of_day_without_a_name_pass_midnight(tmp_path: Path) -> None:
    rows = [f"{day(86_390 + i / 10)},{i}\n" for i in range(300)]
    recording, read = opened(write(tmp_path / "r.csv", "when,ecg\n" + "".join(rows)))
    assert recording.channels[0].sampling_rate == 10.0
    np.testing.assert_array_equal(read, [np.arange(300)])


@pytest.mark.parametrize("blank", ["\u00a0", "\x0b", "\x0c"])
def test_blanks_that_arrow_does_not_trim(tmp_path: Path, blank: str) -> None:
    text = f"time_s,ecg,ppg\n0, 1,1\n0.5,{blank}2,2\n1,3\t,3\n"
    with open_recording(write(tmp_path / "r.csv", text)) as recording:
        assert [recording.channels[i].name for i in recording.unreadable] == ["ecg"]
        assert any("row 3, column 'ecg'" in note for note in recording.notes)
        (block,) = recording.blocks([1])
        np.testing.assert_array_equal(block, [[1, 2, 3]])


@pytest.mark.parametrize(
    ("text", "titles"),
    [
        ("%SpO2,HR,stage\n95,60,W\n96,61,W\n", ["%SpO2", "HR"]),
        ("%SpO2,HR,stage\nNone,None,W\n96,61,W\n", ["%SpO2", "HR"]),
        ("%SpO2,HR,stage\n,,W\n96,61,W\n", ["%SpO2", "HR"]),
        ("%SpO2\n95\n96\n", ["%SpO2"]),
        ("% of a watch\n95\n96\n", ["channel_1"]),
        ("% by me, today\nNa,K\n95,60\n96,61\n", ["Na", "K"]),
    ],
)
def test_a_header_that_begins_with_percent(tmp_path: Path, text: str, titles: list[str]) -> None:
    recording, read = opened(write(tmp_path / "r.csv", text), 1.0)
    assert names(recording) == titles
    assert read[0].size == 2
    assert read[0][1] == 96


@pytest.mark.parametrize(
    ("text", "titles", "rows"),
    [
        ("ecg,ppg\nn/a,n/a\n1,2\n3,4\n", [("ecg", ""), ("ppg", "")], 3),
        ("ecg,stage\n,W\n1,W\n3,W\n", [("ecg", "")], 3),
        ("ecg,stage\nNA,S\n1,S\n3,W\n", [("ecg", "")], 3),
        ("ecg,ppg\nmV,n/a\n1,2\n3,4\n", [("ecg", "mV"), ("ppg", "n/a")], 2),
    ],
)
def test_missing_values_are_no_units(
    tmp_path: Path, text: str, titles: list[tuple[str, str]], rows: int
) -> None:
    recording, read = opened(write(tmp_path / "r.csv", text), 1.0)
    assert [(c.name, c.unit) for c in recording.channels] == titles
    assert {one.size for one in read} == {rows}


def test_column_numbers_without_an_index_are_noted(tmp_path: Path) -> None:
    recording, _ = opened(write(tmp_path / "r.csv", "0,1\n0.5,1.5\n0.25,1.0\n"), 1.0)
    assert any("row 1 (0,1) is read as pandas' column numbers" in n for n in recording.notes)
