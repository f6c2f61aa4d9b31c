"""CSV as people write it: separators, units, quotes, odd shapes, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from recording_checks import opened, refused, write

from normwear_fast.recordings import open_recording


@pytest.mark.parametrize("separator", [",", ";", "\t"])
@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
def test_csv_separators_and_units_are_found_and_text_left_out(
    tmp_path: Path, separator: str, suffix: str
) -> None:
    lines = [
        ["", "time_ms", "ECG [mV]", "acc (x)", "acc (y)", "label"],
        ["0", "0", "1.5", "-3", "", "rest"],
        ["1", "10", "", "4e2", "2", "rest"],
        ["2", "20", "nan", "5", "3", "walk"],
    ]
    path = write(tmp_path / f"r{suffix}", "\n".join(map(separator.join, lines)))
    recording, data = opened(path)
    assert [(c.name, c.unit) for c in recording.channels] == [
        ("ECG", "mV"),
        ("acc (x)", ""),
        ("acc (y)", ""),
    ]
    np.testing.assert_array_equal(data, [[1.5, np.nan, np.nan], [-3, 400, 5], [np.nan, 2, 3]])
    notes = " ".join(recording.notes)
    assert "'label' holds text" in notes
    assert "first column counts rows" in notes


def test_csv_of_odd_shapes_is_read(tmp_path: Path) -> None:
    path = tmp_path / "r.csv"
    write(path, "# made by a watch\n\n1;2,5\n3;4,5\n")  # comment, no header, decimal comma
    np.testing.assert_array_equal(opened(path, 10.0)[1], [[1, 3], [2.5, 4.5]])
    path.write_bytes("\ufeffEDA (µS)\n1\n\n3".encode())  # byte-order mark; an empty line
    recording, data = opened(path, 4.0)
    assert (recording.channels[0].name, recording.channels[0].unit) == ("EDA", "µS")
    np.testing.assert_array_equal(data, [[1, np.nan, 3]])
    path.write_bytes("T °C,b\n1,2\n".encode("latin-1"))
    assert opened(path, 4.0)[0].channels[0].name == "T °C"
    write(path, '"a, quoted","b"\r\n"1","2"\r\n')  # quotes, Windows line ends
    assert [c.name for c in opened(path, 4.0)[0].channels] == ["a, quoted", "b"]
    write(path, "x,x,\n1,2,3\n")
    assert [c.name for c in opened(path, 4.0)[0].channels] == ["x", "x_2", "channel_3"]
    write(path, "x\n1\ninf\n")
    np.testing.assert_array_equal(opened(path, 4.0)[1], [[1, np.nan]])
    write(path, "2024-05-31 10:00:00,1\n2024-05-31 10:00:01,2\n")  # times known without a header
    recording, data = opened(path)
    assert recording.channels[0].sampling_rate == 1.0
    np.testing.assert_array_equal(data, [[1, 2]])
    write(path, "time_s\n0\n1\n")
    assert open_recording(path).channels == ()


def test_csv_trailing_separators_make_no_channel(tmp_path: Path) -> None:
    path = write(tmp_path / "r.csv", "time_s,ecg,\n0,1,\n0.1,2,\n0.2,3,\n")
    recording, data = opened(path)
    assert [c.name for c in recording.channels] == ["ecg"]
    assert "column 3 has no name and no value and is left out" in recording.notes
    rows = "".join(f"{i / 50},{i},\n" for i in range(9000))
    write(path, f"time_s,ecg,\n{rows}180,1,7\n")  # a value far down
    assert [c.name for c in opened(path)[0].channels] == ["ecg", "channel_2"]
    write(path, "1,,2\n3,,4\n")
    recording, data = opened(path, 10.0)
    np.testing.assert_array_equal(data, [[1, 3], [2, 4]])
    write(path, "ecg,ppg\n1,\n3,\n")  # nor is a named one a channel, with nothing in it
    recording, data = opened(path, 10.0)
    np.testing.assert_array_equal(data, [[1, 3]])
    assert "column 'ppg' has no value and is left out" in recording.notes


@pytest.mark.parametrize("text", ["time|ecg", "time ecg", "time (s)   ecg", "| time | ecg |"])
def test_csv_with_other_separators_is_refused(tmp_path: Path, text: str) -> None:
    separator = "|" if "|" in text else " "
    lines = [text, *(f"{i / 50}{separator}{i}" for i in range(100))]
    path = write(tmp_path / "r.csv", "\n".join(lines))
    name = "'|'" if separator == "|" else "spaces"
    for rate in (None, 50.0):
        refused(path, f"separated by {name}; comma, semicolon or tab is right", rate=rate)


def test_channels_of_one_name_get_numbers(tmp_path: Path) -> None:
    names = ["a", "a", "b", "a_2", "a"]
    np.savez(tmp_path / "r.npz", data=np.ones((5, 9)), sampling_rate=10.0, channels=names)
    write(tmp_path / "r.csv", ",".join(names) + "\n1,2,3,4,5\n")
    for name in ("r.npz", "r.csv"):
        recording, _ = opened(tmp_path / name, 10.0)
        assert [c.name for c in recording.channels] == ["a", "a_3", "b", "a_2", "a_4"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ["empty"]),
        ("\n\n", ["no rows"]),
        ("time_s,ecg\n", ["only a header"]),
        ("time_s,ecg\n0,1\n0.1,2\n0.2,oops\n", ["row 4", "'ecg'", "'oops'"]),
        (
            "time_s,ecg\n" + "".join(f"{i / 50},{i}\n" for i in range(90000)) + "1800,?\n",
            ["row 90002", "'ecg'", "'?'"],
        ),
        ("time_s,ecg\n0,1\n0.1,2,3\n", ["row 3", "3 columns", "2"]),
        ("time_s,ecg\n0,1\n0.1\n", ["row 3", "1 columns", "2"]),
        ("time_s,ecg\n0,1\n0.2,2\n0.1,3\n", ["row 4", "back by 0.1 s"]),
        ("time_s,ecg\n0,1\n,2\n0.2,3\n", ["row 3", "no time"]),
        ("time_s,ecg\n5,1\n5,2\n5,3\n", ["does not move in 3 rows"]),
        ("time_s,ecg\n5,1\n", ["does not move"]),
        ("time,ecg\n31/05/2024 10:00,1\n31/05/2024 10:01,2\n", ["ISO 8601", "31/05/2024"]),
        ("time,ecg\n2024-05-31 10:00:00,1\nsoon,2\n", ["row 3", "'soon'", "time"]),
        ("time_s,ecg\n0,1\n0.01,1\n0.02,1\n99999999,1\n", ["almost all of it is a gap"]),
        ("time_s,ecg\n0,1\n0.01,1\n1e30,1\n", ["years"]),
        ("a,b\n1," + "2" * 3_000_000 + "\n", ["over 1 MB"]),
        ("a\0b\n1\n", ["not text"]),
    ],
)
def test_bad_csv_is_refused_by_row_and_column(tmp_path: Path, text: str, words: list[str]) -> None:
    refused(write(tmp_path / "r.csv", text), *words)


def test_text_among_numbers_is_refused_with_a_rate_too(tmp_path: Path) -> None:
    path = write(tmp_path / "r.csv", "ppg\n1\n2\nlead off\n")
    refused(path, "row 4", "'ppg'", "'lead off'", "is not a number", rate=100.0)
