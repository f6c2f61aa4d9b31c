"""Headers of tables, as devices and pandas write them, and columns of text or of nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from recording_checks import opened, refused, write
from table_files import EVEN, ROWS, SIGNAL, both, names

from normwear_fast.cli.inspect import describe
from normwear_fast.recordings import find_recordings, open_recording
from normwear_fast.recordings.headers import is_numbered_header


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
    assert names(recording) == (columns or ["0", "1", "2"])
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
        assert recording.channels[0].sampling_rate == (rate or 100.0)
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
def test_utf16_is_read(tmp_path: Path, encoding: str) -> None:
    text = "\ufefftime_s,EDA (µS)\n" + "".join(f"{i / 4},{i * 0.5}\n" for i in range(20_000))
    (tmp_path / "r.csv").write_bytes(text.encode(encoding))
    recording, read = opened(tmp_path / "r.csv")
    assert [(c.name, c.unit) for c in recording.channels] == [("EDA", "µS")]
    np.testing.assert_array_equal(read, [np.arange(20_000) * 0.5])
    (tmp_path / "r.csv").write_bytes(text[:100].encode(encoding)[:-1])
    refused(tmp_path / "r.csv", "UTF-16")


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


@pytest.mark.parametrize("mark", ["# ", "#", "% "])
def test_a_comment_line_that_is_the_header(tmp_path: Path, mark: str) -> None:
    """NumPy's savetxt writes "# time,ecg"."""
    table = np.stack([EVEN, SIGNAL[:, 0]], axis=1)
    path = tmp_path / "r.csv"
    np.savetxt(path, table, delimiter=",", header="time,ecg", comments=mark)
    recording, read = opened(path)
    assert [(c.name, c.sampling_rate) for c in recording.channels] == [("ecg", 100.0)]
    np.testing.assert_allclose(read, [SIGNAL[:, 0]], atol=1e-12)
    np.savetxt(path, table, delimiter=",", header="made by a watch", comments=mark)
    assert names(opened(path, 100.0)[0]) == ["channel_1", "channel_2"]


def test_physionet_s_csv(tmp_path: Path) -> None:
    """Quoted by apostrophes; minutes, seconds and fractions, and hours from the first one on."""
    rows = []
    for i in range(2000):
        minutes, seconds = divmod(3590_000 + 10 * i, 60_000)
        clock = f"{minutes // 60}:{minutes % 60:02d}" if minutes >= 60 else f"{minutes}"
        rows.append(f"'{clock}:{seconds / 1000:06.3f}',{i},{-i}\n")
    text = "'Elapsed time','MLII','V5'\n'hh:mm:ss.mmm','mV','mV'\n" + "".join(rows)
    recording, read = opened(write(tmp_path / "r.csv", text))
    expected = [("MLII", "mV", 100.0), ("V5", "mV", 100.0)]
    assert [(c.name, c.unit, c.sampling_rate) for c in recording.channels] == expected
    np.testing.assert_array_equal(read, [np.arange(2000), -np.arange(2000)])
    text = "'sample #','MLII','V5'\n" + "".join(f"{i},{i % 7},{i % 5}\n" for i in range(500))
    recording, _ = opened(write(tmp_path / "r.csv", text), 360.0)
    assert names(recording) == ["MLII", "V5"]


@pytest.mark.parametrize(
    "name", ["Unnamed: 0", "sample #", "loggingSample(N)", "nSeq", "sample interval", "#"]
)
def test_names_of_counts_of_rows(tmp_path: Path, name: str) -> None:
    for path in both(tmp_path, {"ecg": SIGNAL[:, 0], name: np.arange(ROWS)}):
        recording, _ = opened(path, 100.0)
        assert names(recording) == ["ecg"]
        assert any("counts rows and is left out" in note for note in recording.notes)
    for path in both(tmp_path, {"ecg": SIGNAL[:, 0], name: SIGNAL[:, 1]}):
        assert len(names(opened(path, 100.0)[0])) == 2


@pytest.mark.parametrize("line", ["# 0.5,1.5", "#1,2", "% 2024-05-31, 13:58"])
def test_a_comment_of_values_is_no_header(tmp_path: Path, line: str) -> None:
    rows = "".join(f"{i},{-i}\n" for i in range(200))
    recording, data = opened(write(tmp_path / "r.csv", f"{line}\n{rows}"), 100.0)
    assert names(recording) == ["channel_1", "channel_2"]
    np.testing.assert_array_equal(data, [np.arange(200), -np.arange(200)])
