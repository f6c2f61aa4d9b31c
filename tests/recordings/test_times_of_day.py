"""Times of day go on past midnight, with or without a gap, a name or a date."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from pyarrow import parquet
from recording_checks import opened, refused, write

from normwear_fast.recordings.wallclock import Midnight


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


def test_times_of_day_without_a_name_pass_midnight(tmp_path: Path) -> None:
    rows = [f"{day(86_390 + i / 10)},{i}\n" for i in range(300)]
    recording, read = opened(write(tmp_path / "r.csv", "when,ecg\n" + "".join(rows)))
    assert recording.channels[0].sampling_rate == 10.0
    np.testing.assert_array_equal(read, [np.arange(300)])


@pytest.mark.parametrize("date", ["Date", "date", "day"])
@pytest.mark.parametrize("time", ["Time", "Time of day", "clock"])
@pytest.mark.parametrize("kind", [".csv", ".parquet"])
def test_a_column_of_days_beside_times_of_day(
    tmp_path: Path, kind: str, date: str, time: str
) -> None:
    """Without the days, three of them that are missing would be lost, and the start unknown."""
    times = pd.date_range("2024-05-31 23:59:00", periods=1200, freq="100ms")
    times = times.append(times[600:] + pd.Timedelta(days=3))
    table = pd.DataFrame({date: times.date, time: times.time, "ecg": np.arange(1800)})
    if kind == ".csv":
        table[time] = times.strftime("%H:%M:%S.%f")
    path = tmp_path / f"r{kind}"
    table.to_csv(path, index=False) if kind == ".csv" else table.to_parquet(path)
    recording, (data,) = opened(path)
    assert [c.name for c in recording.channels] == ["ecg"]
    assert recording.start_time == datetime(2024, 5, 31, 23, 59)
    assert recording.duration == pytest.approx(3 * 86_400 + 120.0)
    np.testing.assert_array_equal(data[:1200], np.arange(1200))
    np.testing.assert_array_equal(data[-600:], np.arange(1200, 1800))


def test_the_day_on_which_a_recording_began(tmp_path: Path) -> None:
    times = pd.date_range("2024-05-31 23:59:30", periods=600, freq="100ms")
    table = pd.DataFrame({"time": times.strftime("%H:%M:%S.%f"), "ecg": np.arange(600)})
    table.insert(0, "date", "2024-05-31")
    table.insert(0, "date of birth", "1980-01-01")
    table.to_csv(tmp_path / "r.csv", index=False)
    recording, (data,) = opened(tmp_path / "r.csv")
    assert recording.start_time == datetime(2024, 5, 31, 23, 59, 30)
    assert recording.channels[0].sampling_rate == 10.0
    np.testing.assert_array_equal(data, np.arange(600))
    table["Elapsed time"] = table.pop("time")  # of no day
    table.to_csv(tmp_path / "r.csv", index=False)
    assert opened(tmp_path / "r.csv")[0].start_time is None
    table["elapsed"] = pd.to_timedelta(np.arange(600) / 10, unit="s")
    table = table[["date", "elapsed", "ecg"]].assign(date=times.date)
    table.to_parquet(tmp_path / "r.parquet")
    assert opened(tmp_path / "r.parquet")[0].start_time is None


@pytest.mark.parametrize("unit", ["s", "ms", "us", "ns"])
def test_days_and_times_of_day_of_parquet(tmp_path: Path, unit: str) -> None:
    seconds = 86_390 + np.arange(100)
    scale = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}[unit]
    kind = pa.time32(unit) if unit in ("s", "ms") else pa.time64(unit)
    days = pa.array((19_800 + seconds // 86_400).astype(np.int32)).cast(pa.date32())
    clock = pa.array((seconds % 86_400 * scale).astype(f"i{kind.bit_width // 8}")).cast(kind)
    table = pa.table({"date": days, "time": clock, "ecg": np.arange(100.0)})
    parquet.write_table(table, tmp_path / "r.parquet")
    recording, (data,) = opened(tmp_path / "r.parquet")
    assert recording.start_time == datetime(2024, 3, 18, 23, 59, 50)
    assert recording.channels[0].sampling_rate == 1.0
    np.testing.assert_array_equal(data, np.arange(100))


def _dated(path: Path, days: Any, times: Any) -> Path:
    """Of 400 rows, as CSV or as Parquet."""
    table = pd.DataFrame({"date": days, "time": times, "ecg": np.arange(400)})
    if path.suffix == ".parquet":
        table.to_parquet(path)
    else:
        table["time"] = [time.isoformat("microseconds") for time in times]
        table.to_csv(path, index=False)
    return path


@pytest.mark.parametrize("kind", [".csv", ".parquet"])
def test_a_day_that_changes_a_row_too_late_or_too_early(tmp_path: Path, kind: str) -> None:
    times = pd.date_range("2024-05-31 23:59:50", periods=400, freq="100ms")
    path = tmp_path / f"r{kind}"
    for late in (1, 7, 400):  # or never
        days = np.concatenate([times.date[:1].repeat(late), times.date])[:400]
        recording, (data,) = opened(_dated(path, days, times.time))
        assert recording.start_time == datetime(2024, 5, 31, 23, 59, 50)
        assert recording.channels[0].sampling_rate == 10.0
        np.testing.assert_array_equal(data, np.arange(400))
    refused(_dated(path, np.append(times.date[1:], times.date[-1]), times.time), "goes back")


@pytest.mark.parametrize("kind", [".csv", ".parquet"])
def test_times_that_begin_at_0_00_say_no_start(tmp_path: Path, kind: str) -> None:
    times = pd.date_range("2024-05-31", periods=400, freq="100ms")
    recording, _ = opened(_dated(tmp_path / f"r{kind}", times.date, times.time))
    assert recording.start_time is None
    assert recording.channels[0].sampling_rate == 10.0
    assert any("no start time" in note for note in recording.notes)


@pytest.mark.parametrize("first", ["25:10:{:06.3f}", "10:{:06.3f}"])
def test_times_since_the_start_are_of_no_day(tmp_path: Path, first: str) -> None:
    rows = [f"2024-05-31,{first.format(i / 10)},{i}\n" for i in range(400)]
    recording, _ = opened(write(tmp_path / "r.csv", "date,time,ecg\n" + "".join(rows)))
    assert recording.start_time is None
    assert recording.channels[0].sampling_rate == 10.0


def test_of_two_days_neither(tmp_path: Path) -> None:
    rows = [f"2024-05-30,2024-05-31,20240531,{day(i / 10 + 60)},{i}\n" for i in range(400)]
    text = "recording_date,date,Day,time,ecg\n" + "".join(rows)
    recording, _ = opened(write(tmp_path / "r.csv", text))
    assert recording.start_time is None
    assert [c.name for c in recording.channels] == ["ecg"]
    assert "column 'Day' holds dates as numbers and is left out" in recording.notes
