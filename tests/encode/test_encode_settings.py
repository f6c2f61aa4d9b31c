"""Settings and window lists that cannot be are one line; importing them is light."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from normwear_fast.encode import EncodeSettings, read_window_list
from normwear_fast.errors import UsageError


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"window": 0.16}, r"window of 0.16 s is 10 samples at 65 Hz; 11 \(0.17 s\) are needed"),
        ({"window": -1.0}, "window is -1.0 s; it must be above 0"),
        ({"window": math.nan}, "window is nan s"),
        ({"hop": 0.0}, "hop is 0.0 s"),
        ({"max_missing": 1.5}, "between 0 and 1"),
        ({"channels": ("A", "A")}, "name each wanted one once"),
        ({"normalize": "recording"}, "choose preprocess 'none'"),
        ({"pool": "max"}, "one of mean, cls"),
        ({"rate": 0.0}, "rate is 0.0 Hz"),
    ],
)
def test_settings_out_of_range_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        EncodeSettings(**values)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("recording,start_s\na,1\n", "no column duration_s or end_s; it has recording, start_s"),
        ("recording,start_s,end_s\n", "lists no windows"),
        ("recording,start_s,end_s\na,x,3\n", "line 2: start_s is 'x'"),
        ("recording,start_s,end_s\na,3\n", "line 2: end_s is None"),
        ("recording,start_s,end_s\na,0,2\na,3,3\n", "line 3: a window is 0.0 s"),
        ("recording,start_s,end_s\n,0,2\n", "line 2: no recording"),
        (
            "recording,start_s,duration_s,end_s\na,0,6,6\na,0,6,9\n",
            "line 3: start_s 0 and duration_s 6 end at 6, but end_s is 9",
        ),
        ("recording,start_s,duration_s\na,0,0.1\n", "line 2: a window of 0.1 s is 6 samples"),
        ("recording,start_s,end_s,window_id\na,0,2,w\na,1,3,w\n", "'w' is there twice"),
        (
            "recording,start_s,duration_s\na,0,6\na,0,5,6\n",
            "line 3: has 4 cells for the 3 columns recording, start_s, duration_s; as many are right",
        ),
    ],
)
def test_lists_that_cannot_be_are_refused_by_line(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "windows.csv"
    path.write_text(text)
    with pytest.raises(UsageError, match=message):
        read_window_list(path)


def test_a_list_may_have_rows_that_end_in_empty_cells(tmp_path: Path) -> None:
    path = tmp_path / "windows.csv"
    path.write_text("recording,start_s,duration_s\na,0,6,\na,6,6, ,\n")
    assert read_window_list(path).recordings["a"].durations.tolist() == [6, 6]


def test_importing_encode_is_light() -> None:
    """A reader process must not load torch: a second, and 300 MB, for each."""
    code = (
        "import sys, normwear_fast.encode.readers as r; "
        "print([m for m in ('torch', 'pandas', 'scipy.signal', 'pyarrow') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
