"""Parquet: the samples of the same CSV, its timestamps, and what is refused."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from pyarrow import parquet
from recording_checks import opened, read, refused

from normwear_fast.recordings import open_recording


def test_parquet_equals_csv(tmp_path: Path) -> None:
    rng = np.random.default_rng(10)
    t = np.cumsum(rng.uniform(0.005, 0.03, 5000)).round(4)
    table = pd.DataFrame({"time_s": t, "ecg": rng.normal(size=5000).round(6), "n": range(5000)})
    table.loc[17, "ecg"] = np.nan
    table.to_csv(tmp_path / "r.csv", index=False)
    table.to_parquet(tmp_path / "r.parquet", row_group_size=700)
    theirs, expected = opened(tmp_path / "r.csv")
    with open_recording(tmp_path / "r.parquet") as recording:
        assert recording.format == "Parquet"
        assert recording.channels == theirs.channels
        for seconds in (0.3, 11.0, 60.0):
            for ours, other in zip(read(recording, seconds), expected, strict=True):
                np.testing.assert_array_equal(ours, other)


@pytest.mark.parametrize("unit", ["s", "ms", "us", "ns"])
@pytest.mark.parametrize("zone", [None, "UTC"])
def test_parquet_timestamps_are_clocks(tmp_path: Path, unit: str, zone: str | None) -> None:
    step = {"s": 1, "ms": 20, "us": 20_000, "ns": 20_000_000}[unit]
    start = 1_717_149_600 * {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}[unit]
    times = pa.array(np.arange(100) * step + start, pa.timestamp(unit, zone))
    values = np.arange(100, dtype=np.float32)
    table = pa.table({"ecg": values, "moment": times, "who": ["x"] * 100})
    parquet.write_table(table, tmp_path / "r.parquet")
    recording, data = opened(tmp_path / "r.parquet")
    assert [c.name for c in recording.channels] == ["ecg"]
    assert recording.channels[0].sampling_rate == (1.0 if unit == "s" else 50.0)
    np.testing.assert_array_equal(data, [values])
    expected = datetime(2024, 5, 31, 10, tzinfo=UTC)
    assert recording.start_time == (expected if zone else expected.replace(tzinfo=None))
    assert any("'who' holds string" in note for note in recording.notes)


def test_parquet_without_time_needs_a_rate(tmp_path: Path) -> None:
    schema = pa.schema(
        [
            pa.field("ecg", pa.int16(), metadata={"unit": "mV"}),
            pa.field("on", pa.bool_()),
            pa.field("eda [uS]", pa.float32()),
        ]
    )
    table = pa.table([[1, 2, None], [True, False, True], [0.5, None, np.inf]], schema=schema)
    path = tmp_path / "r.parquet"
    parquet.write_table(table, path)
    refused(path, "--rate")
    recording, data = opened(path, 4.0)
    assert [(c.name, c.unit) for c in recording.channels] == [
        ("ecg", "mV"),
        ("on", ""),
        ("eda", "uS"),
    ]
    np.testing.assert_array_equal(data, [[1, 2, np.nan], [1, 0, 1], [0.5, np.nan, np.nan]])


def test_bad_parquet_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "r.parquet"
    table = pd.DataFrame({"time_s": np.arange(20000) / 50, "x": np.random.rand(20000)})  # noqa: NPY002
    table.to_parquet(path)
    raw = path.read_bytes()
    for cut in (raw[:-100], b"PAR1" + b"\0" * 100, raw[:10]):
        path.write_bytes(cut)
        refused(path, "is no Parquet file")
    damaged = bytearray(raw)
    damaged[50:5000] = b"\xff" * 4950
    path.write_bytes(damaged)
    refused(path, to_the_end=True)
    table.iloc[:0].to_parquet(path)
    refused(path, "no rows")
    table["time_s"] = table["time_s"].to_numpy()[::-1]
    table.to_parquet(path)
    refused(path, "row 2", "back by 0.02 s")
    table["time_s"] = [None, *range(19999)]
    table.to_parquet(path)
    refused(path, "row 1", "no time")
