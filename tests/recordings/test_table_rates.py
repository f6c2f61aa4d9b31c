"""The sampling rate of a table's times: units, rounding, coarse clocks, gaps, and repeats."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from recording_checks import opened, read, refused
from table_files import EVEN, SIGNAL, both, even

from normwear_fast.recordings import open_recording
from normwear_fast.recordings.rates import Intervals


def test_csv_without_time_needs_a_rate(data_dir: Path) -> None:
    path = data_dir / "ppg_100hz.csv"
    recording, (data,) = opened(path, 100.0)
    np.testing.assert_array_equal(data, np.loadtxt(path))
    assert recording.channels[0].sampling_rate == 100.0
    assert recording.channels[0].name == "channel_1"
    refused(path, "no time column", "--rate")


def test_csv_with_a_millisecond_timer_has_its_rate(cohort_dir: Path) -> None:
    path = cohort_dir / "ppg" / "ppg_timer_ms.csv"
    table = pd.read_csv(path)
    recording, (data,) = opened(path)
    np.testing.assert_array_equal(data, table.hr)
    channel = recording.channels[0]
    assert channel.name == "hr"
    assert channel.sampling_rate == pytest.approx(1000 / table.timer.diff().median(), rel=1e-6)
    assert any("read as ms" in note for note in recording.notes)
    # the file's own clock may be confirmed, not contradicted
    assert opened(path, 117.5)[0].channels == recording.channels
    refused(path, "--rate 100 contradicts", "116.98", rate=100.0)


def test_rows_that_share_a_tick_of_a_computer_s_clock_are_samples(data_dir: Path) -> None:
    """100 Hz on a clock of 15.6 ms: one or two rows a tick, none of which repeats the one before it."""
    path = data_dir / "ppg_datetime.csv"
    table = pd.read_csv(path)
    times = pd.to_datetime(table.datetime, format="ISO8601")
    recording, (data,) = opened(path)
    assert recording.start_time == times[0].to_pydatetime()
    rate = recording.channels[0].sampling_rate
    assert rate == pytest.approx(100.0, rel=0.02)
    seconds = (times - times[0]).dt.total_seconds()
    later = table.groupby(seconds).cumcount().to_numpy() / rate
    grid = np.arange(data.size) / rate
    expected = np.interp(grid, seconds + np.minimum(later, 0.0155), table.hr)
    assert np.corrcoef(data, expected)[0, 1] > 0.999
    assert not any("dropped" in note for note in recording.notes)


@pytest.mark.parametrize(
    ("title", "scale"),
    [
        ("time", 1.0),
        ("time [s]", 1.0),
        ("Time (ms)", 1e3),
        ("timestamp_us", 1e6),
        ("elapsed_ms", 1e3),
        ("seconds", 1.0),
        ("timestamp", 1e3),
        ("t", 1e6),
        ("ms", 1e3),
        ("Unix Time", 1e9),
    ],
)
def test_csv_times_in_any_unit_give_the_rate(tmp_path: Path, title: str, scale: float) -> None:
    start = 1_700_000_000 if scale == 1e9 else 0  # wall-clock ns, else from zero
    times = [f"{start * scale + i / 64 * scale:.15g}" for i in range(500)]
    path, values = even(tmp_path / "r.csv", times, f"{title},ecg")
    recording, (data,) = opened(path)
    assert recording.channels[0].sampling_rate == pytest.approx(64.0, rel=1e-6)
    if scale != 1e9:  # 15 digits of ns since 1970 are microseconds
        np.testing.assert_array_equal(data, values)
    else:
        assert recording.start_time == datetime.fromtimestamp(start, UTC)


@pytest.mark.parametrize("rate", [65, 100, 128, 512, 700, 1000])
def test_csv_clock_written_to_the_millisecond_is_even(tmp_path: Path, rate: int) -> None:
    times = [f"{i / rate:.3f}" for i in range(4000)]
    path, values = even(tmp_path / "r.csv", times)
    recording, (data,) = opened(path)
    assert recording.channels[0].sampling_rate == rate
    np.testing.assert_array_equal(data, values)


def test_csv_clock_in_whole_seconds_is_even(tmp_path: Path) -> None:
    times = [f"2024-05-31 10:{i // 64 // 60:02d}:{i // 64 % 60:02d}" for i in range(64 * 90)]
    path, values = even(tmp_path / "r.csv", times, "datetime,ecg")
    recording, (data,) = opened(path)
    assert recording.channels[0].sampling_rate == 64
    np.testing.assert_array_equal(data, values)


@pytest.mark.parametrize("phase", [0.0, 0.37])
@pytest.mark.parametrize("rounds", [np.floor, np.rint])
@pytest.mark.parametrize(("rate", "tick"), [(100, 1.0), (100, 0.1), (1000, 0.1), (64, 5.0)])
def test_csv_rate_of_a_coarse_clock_is_exact(
    tmp_path: Path, rate: int, tick: float, rounds: Any, phase: float
) -> None:
    times = rounds((np.arange(rate * 15) / rate + phase) / tick) * tick
    path, values = even(tmp_path / "r.csv", [f"{t:.1f}" for t in times])
    recording, (data,) = opened(path)
    assert recording.channels[0].sampling_rate == rate
    np.testing.assert_array_equal(data, values)
    assert any(f"written to {tick:g} s" in note for note in recording.notes)
    assert opened(path, rate * 1.005)[0].channels[0].sampling_rate == rate * 1.005
    refused(path, "contradicts", rate=rate * 1.2)


def test_csv_gap_of_a_coarse_clock_is_missing(tmp_path: Path) -> None:
    times = np.arange(3000) // 100
    times[1500:] += 7
    path, values = even(tmp_path / "r.csv", times)
    with open_recording(path) as recording:
        assert recording.channels[0].sampling_rate == 100.0
        assert any("1 gaps" in note for note in recording.notes)
        expected = np.concatenate([values[:1500], np.full(700, np.nan), values[1500:]])
        for seconds in (0.1, 7.0, 1e6):
            np.testing.assert_allclose(read(recording, seconds)[0], expected)
    path, _ = even(tmp_path / "r.csv", np.arange(150) // 100)
    refused(path, "change once in 150 rows", "--rate")
    assert opened(path, 100.0)[0].channels[0].samples == 150


@pytest.mark.parametrize(
    ("step", "rate"),
    [(0.5, 2.0), (1 / 3, 3.0), (0.25, 4.0), (15.625, 64.0), (1.953125, 512.0), (15625, 64.0)],
)
def test_csv_unit_of_a_time_is_told_by_its_steps(tmp_path: Path, step: float, rate: float) -> None:
    path, values = even(tmp_path / "r.csv", [f"{i * step:.9g}" for i in range(300)], "time,ecg")
    recording, (data,) = opened(path)
    assert recording.channels[0].sampling_rate == pytest.approx(rate, rel=1e-6)
    np.testing.assert_array_equal(data, values)


@pytest.mark.parametrize(
    ("step", "words", "rates"),
    [
        (2, ["s (0.5 Hz) or ms (500 Hz)", "time_s or time_ms"], [0.5, 500.0]),
        (10, ["s (0.1 Hz) or ms (100 Hz)"], [0.1, 100.0]),
        (2.5, ["s (0.4 Hz) or ms (400 Hz)"], [0.4, 400.0]),
        (1000, ["ms (1 Hz) or us (1000 Hz)", "time_ms or time_us"], [1.0, 1000.0]),
    ],
)
def test_csv_time_of_which_nothing_tells_the_unit_is_refused(
    tmp_path: Path, step: float, words: list[str], rates: list[float]
) -> None:
    times = [f"{i * step:g}" for i in range(300)]
    path, _ = even(tmp_path / "r.csv", times, "time,ecg")
    refused(path, f"step by {step:g}", *words, "--rate")
    for rate in rates:
        assert opened(path, rate)[0].channels[0].sampling_rate == rate
    path, _ = even(tmp_path / "r.csv", times, "time_s,ecg")
    assert opened(path)[0].channels[0].sampling_rate == pytest.approx(1 / step)


def test_csv_clock_rounded_to_the_millisecond_without_a_unit_is_even(tmp_path: Path) -> None:
    for rate in (64, 128, 400):
        times = np.rint(np.arange(400) * 1000 / rate).astype(int)
        path, _ = even(tmp_path / "r.csv", times, "time,ecg")
        assert opened(path)[0].channels[0].sampling_rate == rate


@pytest.mark.parametrize(
    "times",
    [
        ["2024-05-31T10:00:00.00Z", "2024-05-31T10:00:00.02Z", "2024-05-31T10:00:00.04Z"],
        ["2024-05-31 12:00:00.00+02:00", "2024-05-31 10:00:00.02Z", "2024-05-31 10:00:00.04Z"],
        ["10:00:00.00", "10:00:00.02", "10:00:00.04"],
    ],
)
def test_csv_wall_clocks_of_every_kind_are_read(tmp_path: Path, times: list[str]) -> None:
    path, values = even(tmp_path / "r.csv", times, "timestamp,ecg")
    recording, (data,) = opened(path)
    assert recording.channels[0].sampling_rate == 50.0
    np.testing.assert_array_equal(data, values)
    expected = datetime(2024, 5, 31, 10, tzinfo=UTC) if len(times[0]) > 12 else None
    assert recording.start_time == expected


def test_csv_uneven_clock_is_put_on_a_grid_and_its_gaps_are_missing(tmp_path: Path) -> None:
    rng = np.random.default_rng(7)
    t = np.sort((np.arange(2000) + rng.uniform(-0.3, 0.3, 2000)) / 50)
    t[0] = 0
    t[1200:] += 30.0  # a gap
    t[500] = t[499]  # a repeat
    t = t.round(6)
    path, values = even(tmp_path / "r.csv", t)
    with open_recording(path) as recording:
        rate = recording.channels[0].sampling_rate
        assert rate == pytest.approx(50, rel=0.05)
        notes = " ".join(recording.notes)
        assert "uneven clock" in notes
        assert "1 of 2000 rows repeat" in notes
        assert "1 gaps longer than" in notes
        keep = np.arange(2000) != 500
        grid = np.arange(recording.channels[0].samples) / rate
        expected = np.interp(grid, t[keep], values[keep])
        inside = (grid > t[1199]) & (grid < t[1200])
        expected[inside] = np.nan
        for seconds in (0.1, 7.0, 1e6):
            (data,) = read(recording, seconds)
            np.testing.assert_allclose(data, expected, atol=1e-9)
        assert inside.sum() > 0.9 * 30 * rate


def test_csv_lost_samples_of_an_even_clock_leave_the_others_alone(tmp_path: Path) -> None:
    keep = np.delete(np.arange(3000), [700, *range(1500, 1600)])
    path, values = even(tmp_path / "r.csv", [f"{i * 0.01:.2f}" for i in keep])
    recording, (data,) = opened(path)
    assert recording.channels[0].sampling_rate == 100.0
    np.testing.assert_allclose(data[keep], values)
    assert np.isnan(data[1500:1600]).all()  # a gap
    assert data[700] == pytest.approx((values[699] + values[700]) / 2)  # one sample: interpolated


def test_csv_resampling_does_not_depend_on_the_reader_s_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from normwear_fast.recordings import text

    t = np.cumsum(np.random.default_rng(8).uniform(0.005, 0.03, 3000)).round(4)
    path, _ = even(tmp_path / "r.csv", t)
    _, (whole,) = opened(path)
    for size in (128, 1000):
        monkeypatch.setattr(text, "_BLOCK_BYTES", size)
        np.testing.assert_array_equal(opened(path)[1][0], whole)


def test_csv_times_that_count_rows_need_a_rate(tmp_path: Path) -> None:
    path, values = even(tmp_path / "r.csv", [str(i) for i in range(200)], "time,ecg")
    refused(path, "step by 1", "--rate", "time_s or time_ms")
    for rate in (1.0, 64.0, 1000.0):
        recording, (data,) = opened(path, rate)
        assert recording.channels[0].sampling_rate == rate
        np.testing.assert_array_equal(data, values)
    path, _ = even(tmp_path / "r.csv", [str(i) for i in range(200)], "time_s,ecg")
    assert opened(path)[0].channels[0].sampling_rate == 1.0


def test_intervals_beyond_the_limit_keep_their_median(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Intervals, "LIMIT", 1000)
    intervals = Intervals()
    values = np.random.default_rng(9).integers(90, 110, 50_000)
    for part in np.array_split(values, 77):
        intervals.add(part)
    assert intervals.percentiles(50)[0] == pytest.approx(np.median(values), abs=1)
    assert sum(part.size for part in intervals._kept) <= 1000


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


def test_no_advice_to_pass_what_was_passed(tmp_path: Path) -> None:
    times = np.cumsum(np.tile([9, 10, 11], 200))
    for path in both(tmp_path, {"time": times, "ecg": 1.0}):
        assert "pass --rate" in refused(path)
        text = refused(path, "--rate 64", rate=64.0)
        assert "pass --rate" not in text


def test_a_row_that_is_there_twice_in_a_count_is_read_once(tmp_path: Path) -> None:
    rows = np.sort(np.append(np.arange(300), 100))
    for path in both(tmp_path, {"time": rows, "ecg": rows}):
        _, (read,) = opened(path, 64.0)
        np.testing.assert_array_equal(read, np.arange(300))


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
def test_minutes_hours_and_days_are_units(tmp_path: Path, title: str, seconds: float) -> None:
    for path in both(tmp_path, {title: EVEN / seconds, "ecg": EVEN}):
        recording, read = opened(path)
        assert recording.channels[0].sampling_rate == pytest.approx(100.0, rel=1e-9)
        np.testing.assert_array_equal(read, [EVEN])


@pytest.mark.parametrize("title", ["time [m]", "Time (weeks)", "elapsed [cs]"])
def test_units_of_time_that_are_not_known_are_refused(tmp_path: Path, title: str) -> None:
    for path in both(tmp_path, {title: EVEN, "ecg": EVEN}):
        for rate in (None, 100.0):
            refused(path, title, "not known", rate=rate)


@pytest.mark.parametrize("rate", [52.0, 64.0, 128.0, 130.0, 256.0, 360.0])
@pytest.mark.parametrize("lost", [[700], list(range(700, 760)), [100, 500, 501, 900]])
def test_an_uneven_clock_s_rate_is_not_that_of_its_rounding(
    tmp_path: Path, rate: float, lost: list[int]
) -> None:
    """Of 64 Hz in whole ms most intervals are 16: their median, 62.5 Hz, is nobody's rate."""
    true = np.delete(np.arange(1500), lost) / rate
    columns = {"timestamp": np.floor(1_717_149_600_000 + 1e3 * true).astype(np.int64), "ecg": true}
    for path in both(tmp_path, columns):
        for given in (None, rate):
            recording, (data,) = opened(path, given)
            assert recording.channels[0].sampling_rate == pytest.approx(rate, rel=2e-4)
            assert abs(data.size - 1500) <= 1
            late = data - np.arange(data.size) / recording.channels[0].sampling_rate
            assert np.nanmax(np.abs(late)) < 3e-3


@pytest.mark.parametrize("rate", [51.2, 31.25, 62.5, 4.5])
def test_a_short_table_s_rate_is_not_rounded(tmp_path: Path, rate: float) -> None:
    for path in both(tmp_path, {"time_s": np.arange(50) / rate, "ecg": np.arange(50)}):
        assert opened(path)[0].channels[0].sampling_rate == pytest.approx(rate, rel=1e-9)


def test_rows_of_a_coarse_clock_that_come_unevenly_are_kept(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    true = np.flatnonzero(rng.random(3000) > 0.05) / 25
    for path in both(tmp_path, {"time_s": np.floor(true * 10) / 10, "ecg": true}):
        recording, (data,) = opened(path)
        rate = recording.channels[0].sampling_rate
        assert rate == pytest.approx(25 * 0.95, rel=0.03)
        assert np.nanmax(np.abs(data - np.arange(data.size) / rate)) < 0.2
        assert not any("dropped" in note for note in recording.notes)


def test_a_jittered_clock_takes_the_rate_that_it_is_given(tmp_path: Path) -> None:
    times = np.arange(800) / 50 + np.random.default_rng(4).normal(0, 2e-3, 800)
    for path in both(tmp_path, {"time_s": times - times[0], "ecg": times}):
        assert opened(path, 50.0)[0].channels[0].sampling_rate == 50.0
        refused(path, "--rate 100 contradicts", "column 'time_s'", rate=100.0)


def test_times_since_a_phone_was_switched_on_are_not_since_1970(tmp_path: Path) -> None:
    """20 minutes in ns are as large as 2009 in ms."""
    times = 1_234_567_000_000 + np.round(np.arange(500) * 1e9 / 1024).astype(np.int64)
    for path in both(tmp_path, {"time": times, "ecg": EVEN[:500]}):
        recording, _ = opened(path)
        assert recording.channels[0].sampling_rate == pytest.approx(1024.0, rel=1e-6)
        assert recording.start_time is None
    phone = {"time_s": EVEN, "sensor_time": 1_234_567_000_000 + (EVEN * 1e9).astype(np.int64)}
    for path in both(tmp_path, {**phone, "ecg": EVEN}):
        assert opened(path)[0].start_time is None


def _copies(kind: str) -> np.ndarray:
    """Places of 1200 rows, of which some are there twice."""
    some = np.random.default_rng(5).choice(1200, 300, replace=False)
    more = {"some": some, "all": np.arange(1200), "a part": np.arange(400, 800)}[kind]
    return np.sort(np.concatenate([np.arange(1200), more]))


@pytest.mark.parametrize("kind", ["some", "all", "a part"])
def test_rows_that_are_there_twice_are_read_once(tmp_path: Path, kind: str) -> None:
    """As merged exports and packets that were sent again have them: no clock coarser than its rows."""
    rows = _copies(kind)
    columns = {"time_s": rows / 64, "ecg": rows % 97, "row": np.arange(rows.size), "on": 1}
    for path in both(tmp_path, columns):
        recording, data = opened(path)
        assert [(c.name, c.sampling_rate) for c in recording.channels] == [
            ("ecg", 64.0),
            ("on", 64.0),
        ]
        np.testing.assert_array_equal(data, [np.arange(1200) % 97, np.ones(1200)])
        assert any(f"{rows.size - 1200} of {rows.size} rows" in note for note in recording.notes)
        rate = rows.size / 1200 * 64  # unless it is the user's
        assert opened(path, rate)[0].channels[0].samples == pytest.approx(rows.size, abs=1)
    for path in both(tmp_path, {**columns, "ecg": np.arange(rows.size) % 97}):
        assert opened(path)[0].channels[0].sampling_rate == pytest.approx(rate, rel=2e-3)


def test_packets_that_were_lost_leave_the_rate_of_the_others(tmp_path: Path) -> None:
    packets = np.flatnonzero(np.random.default_rng(2).random(300) > 0.1)
    times = np.repeat(np.round(packets * 10 / 64, 3), 10)
    path, _ = even(tmp_path / "r.csv", times)
    recording, (data,) = opened(path)
    assert recording.channels[0].sampling_rate == 64.0
    assert np.isnan(data).mean() == pytest.approx(0.1, abs=0.05)


def test_a_coarse_time_that_a_gap_cuts_off_is_no_measure(tmp_path: Path) -> None:
    times = np.arange(4000) / 1000
    times[2000:] += 37.3
    path, _ = even(tmp_path / "r.csv", np.floor(times))
    assert opened(path)[0].channels[0].sampling_rate == 1000.0


@pytest.mark.parametrize("written", ["%H%M%S", "%H%M%S.%f", "%Y%m%d%H%M%S", "%Y%m%d%H%M%S%f"])
def test_digits_of_times_of_day_are_no_seconds(tmp_path: Path, written: str) -> None:
    """A minute would have a hundred of them."""
    times = pd.date_range("2024-05-31 12:58:30", periods=1200, freq="100ms").strftime(written)
    cells = [time[:-3] if "%f" in written else time for time in times]
    for rate in (None, 10.0):
        path, _ = even(tmp_path / "r.csv", cells, "time,ecg")
        refused(path, "digits of times of day", "13:58:58.081", rate=rate)
