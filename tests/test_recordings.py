"""Readers against the libraries that wrote the formats, streaming against whole, and bad input."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tracemalloc
import zipfile
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from payload import Payload
from pyarrow import parquet

from normwear_fast.cli import inspect
from normwear_fast.cli.main import main
from normwear_fast.errors import InputError, RecordingError, UsageError
from normwear_fast.recordings import Recording, base, extensions, find_recordings, open_recording
from normwear_fast.recordings.clock import Intervals, time_column

edfio = pytest.importorskip("edfio")
wfdb = pytest.importorskip("wfdb")


def read(recording: Recording, seconds: float = 60.0, channels: Any = None) -> list[np.ndarray]:
    """Channels whole, from blocks; checked against the declared lengths."""
    wanted = range(len(recording.channels)) if channels is None else channels
    blocks = list(recording.blocks(wanted, seconds))
    whole = [np.concatenate([block[i] for block in blocks]) for i in range(len(wanted))]
    assert all(data.dtype == np.float64 for data in whole)
    assert [data.size for data in whole] == [recording.channels[c].samples for c in wanted]
    return whole


def opened(path: Path, rate: float | None = None) -> tuple[Recording, list[np.ndarray]]:
    with open_recording(path, sampling_rate=rate) as recording:
        return recording, read(recording)


def refused(path: Path, *words: str, rate: float | None = None, to_the_end: bool = False) -> str:
    """The one line that a bad file gets; it names the file and has all the words."""
    with pytest.raises(RecordingError) as info:  # noqa: PT012
        recording = open_recording(path, sampling_rate=rate)
        if to_the_end:
            read(recording)
    text = str(info.value)
    assert "\n" not in text
    assert path.stem in text
    for word in words:
        assert word in text, text
    return text


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


# ---------------------------------------------------------------- WFDB


@pytest.fixture(autouse=True)
def _wfdb_reads_every_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """These files are short: as it is, one read would serve all their blocks."""
    monkeypatch.setattr("normwear_fast.recordings.wfdb.READ_VALUES", 1)


@pytest.mark.parametrize("values", [1, 50_000, 1 << 20])
def test_wfdb_reads_as_much_as_it_should(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch, values: int
) -> None:
    """However much is read at a time, blocks and samples are the same; reads are fewer."""
    with open_recording(data_dir / "03700181.hea") as recording:
        expected = list(recording.blocks([0, 1, 2], 20.3))
    monkeypatch.setattr("normwear_fast.recordings.wfdb.READ_VALUES", values)
    reads = 0
    rdrecord = wfdb.rdrecord

    def counted(*args: Any, **options: Any) -> Any:
        nonlocal reads
        reads += 1
        return rdrecord(*args, **options)

    monkeypatch.setattr(wfdb, "rdrecord", counted)
    with open_recording(data_dir / "03700181.hea") as recording:
        blocks = list(recording.blocks([0, 1, 2], 20.3))
    assert len(blocks) == len(expected)
    for ours, theirs in zip(blocks, expected, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            np.testing.assert_array_equal(a, b)
    per_block = sum(len(channel) for channel in blocks[0])
    at_once = max(1, values // per_block)
    # Two skews: a block takes two reads, but for the last, which is beyond the skewed one's end.
    assert -(-len(blocks) // at_once) <= reads <= 2 * -(-len(blocks) // at_once)


@pytest.mark.parametrize("name", ["03700181", "a103l", "s0010_re"])
def test_wfdb_equals_wfdb(data_dir: Path, name: str) -> None:
    expected = wfdb.rdrecord(str(data_dir / name), smooth_frames=False)
    recording, data = opened(data_dir / f"{name}.hea")
    assert recording.format == "WFDB"
    assert recording.start_time == expected.base_datetime
    assert [c.name for c in recording.channels] == expected.sig_name
    assert [c.unit for c in recording.channels] == expected.units
    assert [c.sampling_rate for c in recording.channels] == [
        expected.fs * n for n in expected.samps_per_frame
    ]
    for ours, theirs in zip(data, expected.e_p_signal, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_wfdb_facts(data_dir: Path) -> None:
    with open_recording(data_dir / "03700181.hea") as recording:
        assert [(c.name, c.unit, c.sampling_rate) for c in recording.channels] == [
            ("MCL1", "mV", 500.0),
            ("ABP", "mmHg", 125.0),
            ("RESP", "mV", 125.0),
        ]
        assert recording.duration == 600.0
        assert recording.start_time == datetime(1994, 8, 15, 17, 27, 45)
        # RESP is skewed by 4 frames: the last four samples do not exist
        assert np.isnan(read(recording, channels=[2])[0]).nonzero()[0].tolist() == [
            74996,
            74997,
            74998,
            74999,
        ]
    with open_recording(data_dir / "s0010_re.hea") as recording:
        assert [c.name for c in recording.channels][-4:] == ["v6", "vx", "vy", "vz"]


@pytest.mark.parametrize("seconds", [0.001, 0.37, 7.0, 33.3, 1e6])
@pytest.mark.parametrize("name", ["03700181.hea", "a103l_two_rates.edf"])
def test_blocks_equal_whole(data_dir: Path, tmp_path: Path, name: str, seconds: float) -> None:
    path = data_dir / name
    if seconds < 1:  # a cut-out, or it takes minutes
        path = _short(path, tmp_path)
    with open_recording(path) as recording:
        order = [1, 0]
        for ours, whole in zip(
            read(recording, seconds, order), read(recording, 1e9, order), strict=True
        ):
            np.testing.assert_array_equal(ours, whole)


def _short(path: Path, folder: Path) -> Path:
    short = folder / path.name
    raw = path.read_bytes()
    if path.suffix == ".hea":
        short.write_bytes(raw.replace(b" 75000 ", b" 300 "))
        (folder / "03700181.dat").write_bytes((path.parent / "03700181.dat").read_bytes()[:2700])
    else:
        short.write_bytes(raw[:236] + b"3       " + raw[244 : 768 + 3 * 750])
    return short


def _wrsamp(folder: Path, name: str, digital: np.ndarray, storage: str, **more: Any) -> Path:
    """A record of (samples, channels) digital values with gain 100 and baseline 10."""
    count = digital.shape[1]
    wfdb.wrsamp(
        name,
        fs=50,
        units=["mV"] * count,
        sig_name=more.pop("names", [f"c{i}" for i in range(count)]),
        d_signal=digital,
        fmt=[storage] * count,
        adc_gain=[100.0] * count,
        baseline=[10] * count,
        write_dir=str(folder),
        **more,
    )
    return folder / f"{name}.hea"


def _pack(digital: np.ndarray, storage: str) -> bytes:
    """Formats that wfdb reads and does not write, by their definition."""
    flat = digital.ravel()
    if storage == "160":
        return (flat + 32768).astype("<u2").tobytes()
    a, b, c = np.pad(flat, (0, -flat.size % 3)).reshape(-1, 3).T & 1023
    if storage == "310":
        low, high = (a & 127) << 1 | a >> 7 << 8, (b & 127) << 1 | b >> 7 << 8
        words = low | (c & 31) << 11 | (high | c >> 5 << 11) << 16
    else:
        words = a | b << 10 | c << 20
    return words.astype("<u4").tobytes()


@pytest.mark.parametrize("storage", ["16", "24", "32", "80", "160", "212", "310", "311"])
@pytest.mark.parametrize("length", [251, 252, 253])
def test_wfdb_storage_formats(tmp_path: Path, storage: str, length: int) -> None:
    digital = np.random.default_rng(0).integers(-100, 100, (length, 2))
    bits = {"80": 8, "160": 16, "212": 12, "310": 10, "311": 10}.get(storage) or int(storage)
    digital[5, 1] = -(2 ** (bits - 1))  # the lowest value of each format means "invalid"
    if storage in ("160", "310", "311"):
        path = _wrsamp(tmp_path, "r", digital, "16")
        path.write_text(path.read_text().replace("r.dat 16", f"r.dat {storage}"))
        path.with_suffix(".dat").write_bytes(_pack(digital, storage))
    else:
        path = _wrsamp(tmp_path, "r", digital, storage)
    expected = (digital - 10) / 100.0
    expected[5, 1] = np.nan
    declared = path.read_text()
    for text in (f" 50 {length}", " 50", " 50 0"):
        path.write_text(declared.replace(f" 50 {length}", text))
        with open_recording(path) as recording:
            # without a length in the header, the padding of packed formats looks like one more
            assert 0 <= recording.channels[0].samples - length <= (text != f" 50 {length}")
            for seconds in (0.3, 60.0):
                data = np.stack(read(recording, seconds), axis=1)[:length]
                np.testing.assert_allclose(data, expected, rtol=0, atol=1e-12)


def test_wfdb_format_8_goes_on_across_blocks(tmp_path: Path) -> None:
    digital = np.cumsum(np.random.default_rng(1).integers(-60, 60, (400, 2)), axis=0)
    steps = np.diff(digital, axis=0, prepend=digital[:1]).astype(np.int8)
    (tmp_path / "r.dat").write_bytes(steps.tobytes())
    lines = [f"r.dat 8 100(10)/mV 16 0 {digital[0, i]} 0 0 c{i}" for i in range(2)]
    path = write(tmp_path / "r.hea", "\n".join(["r 2 50 400", *lines, ""]))
    with open_recording(path) as recording:
        for seconds in (0.1, 3.0, 60.0):
            np.testing.assert_allclose(
                np.stack(read(recording, seconds), axis=1), (digital - 10) / 100, atol=1e-9
            )


def test_wfdb_skews_differ(tmp_path: Path) -> None:
    digital = np.arange(600).reshape(200, 3)
    path = _wrsamp(tmp_path, "r", digital, "16")
    text = path.read_text().splitlines()
    text[2] = text[2].replace(" 16 ", " 16:7 ", 1)
    text[3] = text[3].replace(" 16 ", " 16:2 ", 1)
    path.write_text("\n".join(text) + "\n")
    with open_recording(path) as recording:
        for seconds in (0.1, 60.0):
            data = read(recording, seconds)
            for channel, skew in enumerate((0, 7, 2)):
                expected = np.full(200, np.nan)
                expected[: 200 - skew] = (digital[skew:, channel] - 10) / 100
                np.testing.assert_allclose(data[channel], expected)


@pytest.mark.parametrize(("first", "second"), [("0", "16"), ("16", "0"), ("16", "212")])
def test_wfdb_file_of_two_storage_formats(tmp_path: Path, first: str, second: str) -> None:
    (tmp_path / "r.dat").write_bytes(bytes(800))
    lines = [f"r.dat {one} 100/mV 16 0 0 0 0 c{one}" for one in (first, second)]
    path = write(tmp_path / "r.hea", "\n".join(["r 2 50 200", *lines, ""]))
    refused(path, f"r.dat have storage formats {first} and {second}; one for all is right")


def test_wfdb_flac(tmp_path: Path) -> None:
    soundfile = pytest.importorskip("soundfile")
    digital = np.random.default_rng(2).integers(-999, 999, (500, 2)).astype(np.int16)
    soundfile.write(tmp_path / "r.flac", digital, 96000, format="FLAC", subtype="PCM_16")
    lines = [f"r.flac 516 100(10)/mV 16 0 0 0 0 c{i}" for i in range(2)]
    path = write(tmp_path / "r.hea", "\n".join(["r 2 50 500", *lines, ""]))
    with open_recording(path) as recording:
        data = np.stack(read(recording, 1.7), axis=1)
    np.testing.assert_allclose(data, (digital - 10) / 100)
    path.write_text(path.read_text().replace(" 500\n", " 501\n"))
    with pytest.raises(RecordingError, match="500 frames; its header declares 501"):
        open_recording(path)


def test_wfdb_several_segments(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    a, b = rng.integers(-500, 500, (100, 2)), rng.integers(-500, 500, (80, 2))
    _wrsamp(tmp_path, "a", a, "16", names=["ECG", "PPG"])
    _wrsamp(tmp_path, "b", b, "16", names=["ECG", "PPG"])
    write(tmp_path / "fixed.hea", "fixed/3 2 50 230\na 100\n~ 50\nb 80\n")
    gap = np.full((50, 2), np.nan)
    expected = np.concatenate([(a - 10) / 100, gap, (b - 10) / 100])
    with open_recording(tmp_path / "fixed.hea") as recording:
        assert [c.name for c in recording.channels] == ["ECG", "PPG"]
        for seconds in (0.7, 60.0):
            np.testing.assert_allclose(np.stack(read(recording, seconds), axis=1), expected)

    # variable layout: c has the channels in another order and lacks one
    _wrsamp(tmp_path, "c", b[:, :1], "212", names=["PPG"])
    write(
        tmp_path / "layout.hea",
        "layout 2 50 0\n~ 0 100/mV 16 0 0 0 0 ECG\n~ 0 1/mV 16 0 0 0 0 PPG\n",
    )
    write(tmp_path / "variable.hea", "variable/3 2 50 180\nlayout 0\na 100\nc 80\n")
    expected = np.concatenate([(a - 10) / 100, (b[:, [0, 0]] - 10) / 100])
    expected[100:, 0] = np.nan
    with open_recording(tmp_path / "variable.hea") as recording:
        for seconds in (0.7, 60.0):
            np.testing.assert_allclose(np.stack(read(recording, seconds), axis=1), expected)

    # segments are parts, not recordings of their own
    assert [found.id for found in find_recordings([tmp_path])] == ["fixed", "variable"]
    write(tmp_path / "fixed.hea", "fixed/3 2 50 230\na 90\n~ 60\nb 80\n")
    refused(tmp_path / "fixed.hea", "declares 90 frames for segment a", "100")
    write(tmp_path / "fixed.hea", "fixed/2 2 50 180\na 100\nzz 80\n")
    with pytest.raises(RecordingError, match=r"zz\.hea: no such file"):
        open_recording(tmp_path / "fixed.hea")


def _layout(folder: Path, layout: list[str], *segments: list[str]) -> tuple[Path, list[np.ndarray]]:
    """A record of variable layout, and the values of its segments' signals; wfdb 4.3.1 writes none
    with two signals of one name, and cannot read one."""
    line = "{} 16 100/mV 16 0 0 0 0 {}\n"
    lines = "".join(line.format("~", name) for name in layout)
    write(folder / "layout.hea", f"layout {len(layout)} 50 0\n{lines}")
    values = []
    for number, names in enumerate(segments):
        digital = np.random.default_rng(number).integers(-500, 500, (60, len(names)))
        (folder / f"s{number}.sig").write_bytes(digital.astype("<i2").tobytes())
        lines = "".join(line.format(f"s{number}.sig", name) for name in names)
        write(folder / f"s{number}.hea", f"s{number} {len(names)} 50 60\n{lines}")
        values.append(digital.T / 100)
    listed = "".join(f"s{number} 60\n" for number in range(len(segments)))
    head = f"r/{len(segments) + 1} {len(layout)} 50 {60 * len(segments)}\nlayout 0\n"
    return write(folder / "r.hea", head + listed), values


def test_wfdb_signals_of_one_name_are_matched_in_their_order(tmp_path: Path) -> None:
    path, values = _layout(
        tmp_path, ["ECG", "PPG", "ECG"], ["ECG", "ECG", "PPG"], ["PPG"], ["PPG", "ECG", "ECG"]
    )
    recording, data = opened(path)
    assert [c.name for c in recording.channels] == ["ECG", "PPG", "ECG_2"]
    none = np.full(60, np.nan)
    for channel, (place, there) in enumerate(zip([0, 2, 1], [1, 0, 2], strict=True)):
        middle = values[1][0] if channel == 1 else none
        expected = np.concatenate([values[0][place], middle, values[2][there]])
        np.testing.assert_allclose(data[channel], expected, rtol=0, atol=1e-12)


def test_wfdb_signals_of_one_name_that_nothing_tells_apart(tmp_path: Path) -> None:
    for layout, segment in ((["ECG", "ECG"], ["ECG"]), (["ECG"], ["ECG", "ECG"])):
        path, _ = _layout(tmp_path, layout, layout, segment)
        with pytest.raises(RecordingError, match=r"s1\.hea: has \d signals named 'ECG'"):
            open_recording(path)


def test_wfdb_signals_that_the_layout_lacks_are_noted(tmp_path: Path) -> None:
    path, values = _layout(tmp_path, ["ECG"], ["ABP", "ECG"], ["ABP", "ECG"])
    recording, data = opened(path)
    assert recording.notes == ("signal ABP is not in the layout and left out",)
    np.testing.assert_allclose(data[0], np.concatenate([values[0][1], values[1][1]]), atol=1e-12)


@pytest.fixture
def record(data_dir: Path, tmp_path: Path) -> Path:
    """A copy of a103l to damage."""
    for suffix in (".hea", ".mat"):
        shutil.copy(data_dir / f"a103l{suffix}", tmp_path)
    return tmp_path / "a103l.hea"


def test_wfdb_truncated(record: Path) -> None:
    signals = record.with_suffix(".mat")
    signals.write_bytes(signals.read_bytes()[:-1])
    refused(record, "a103l.mat", "495023 bytes", "82500 frames", "495024 bytes")


def test_wfdb_header_that_lies(record: Path) -> None:
    text = record.read_text()
    for frames in (82501, 10**15):
        record.write_text(text.replace(" 82500", f" {frames}"))
        refused(record, f"declares {frames} frames", "495024")
    record.write_text(text.replace("a103l 3 ", "a103l 4 "))
    refused(record, "declares 4 signals and lists 3")
    record.write_text(text.replace(" 250 ", " 0 "))
    refused(record, "0")
    record.write_text(text.replace("16+24", "99"))
    refused(record, "99")


def test_wfdb_other_bad_headers(record: Path) -> None:
    record.with_suffix(".mat").unlink()
    refused(record, "a103l.mat", "does not exist")
    for rubbish in (b"\x00\xff" * 50, b"\n", b"# comment only\n", b"hello"):
        record.write_bytes(rubbish)
        refused(record)


def test_wfdb_without_signals(tmp_path: Path) -> None:
    recording = open_recording(write(tmp_path / "r.hea", "r 0 50 0\n"))
    assert (recording.channels, recording.duration) == ((), 0.0)
    assert list(recording.blocks([])) == []


# ---------------------------------------------------------------- EDF and BDF


def test_edf_equals_edfio(data_dir: Path) -> None:
    expected = edfio.read_edf(data_dir / "a103l_two_rates.edf")
    recording, data = opened(data_dir / "a103l_two_rates.edf")
    assert recording.format == "EDF"
    assert recording.duration == 330.0
    assert [(c.name, c.unit, c.sampling_rate) for c in recording.channels] == [
        ("ECG II", "mV", 250.0),
        ("PLETH", "NU", 125.0),
    ]
    for ours, signal in zip(data, expected.signals, strict=True):
        np.testing.assert_array_equal(ours, signal.data)


def test_edf_of_annotations_only(data_dir: Path) -> None:
    recording = open_recording(data_dir / "test_edfann.edf")
    assert recording.channels == ()
    assert recording.duration == 0.0
    assert recording.notes == ("holds annotations and no signal",)


@pytest.mark.parametrize("bdf", [False, True])
def test_edf_round_trip(tmp_path: Path, bdf: bool) -> None:
    signal = edfio.BdfSignal if bdf else edfio.EdfSignal
    rng = np.random.default_rng(4)
    values = [rng.normal(0, 50, 40 * 100), rng.normal(0, 1, 40 * 25)]
    file = (edfio.Bdf if bdf else edfio.Edf)(
        [
            signal(values[0], 100, label="EEG Cz", physical_dimension="uV"),
            signal(values[1], 25, label="EDA", physical_dimension="uS"),
        ],
        recording=edfio.Recording(startdate=datetime(2024, 5, 31).date()),
        starttime=datetime(2024, 5, 31, 13, 58, 58).time(),
        annotations=[edfio.EdfAnnotation(3, None, "blink")],
    )
    path = tmp_path / ("r.bdf" if bdf else "r.edf")
    file.write(path)
    with open_recording(path) as recording:
        assert recording.format == ("BDF+C" if bdf else "EDF+C")
        assert recording.start_time == datetime(2024, 5, 31, 13, 58, 58)
        assert [(c.name, c.unit, c.sampling_rate) for c in recording.channels] == [
            ("EEG Cz", "uV", 100.0),
            ("EDA", "uS", 25.0),
        ]
        for seconds in (1.0, 7.0, 1e6):
            data = read(recording, seconds)
            for ours, theirs, original in zip(data, file.signals, values, strict=True):
                np.testing.assert_array_equal(ours, theirs.data)
                assert abs(ours - original).max() < np.ptp(original) / (2**24 if bdf else 2**16)


def _discontinuous(path: Path, onsets: list[str]) -> list[np.ndarray]:
    """An EDF+D file with data records of 1 s at these onsets, at 50 and 10 Hz."""
    n = len(onsets)
    rng = np.random.default_rng(5)
    file = edfio.Edf(
        [
            edfio.EdfSignal(rng.normal(size=50 * n), 50, label="a"),
            edfio.EdfSignal(rng.normal(size=10 * n), 10, label="b"),
        ],
        data_record_duration=1,
        annotations=[edfio.EdfAnnotation(0, None, "a text that makes room in the record")],
    )
    file.write(path)
    raw = bytearray(path.read_bytes())
    raw[192:236] = f"{'EDF+D':<44}".encode()
    header = 256 * 4
    record = (len(raw) - header) // n
    for i, onset in enumerate(onsets):
        start = header + i * record + 120
        raw[start : header + (i + 1) * record] = f"+{onset}\x14\x14\0".encode().ljust(
            record - 120, b"\0"
        )
    path.write_bytes(raw)
    return [signal.data.reshape(n, -1) for signal in file.signals]


def test_edf_discontinuous(tmp_path: Path) -> None:
    onsets = ["5", "6", "9.5", "10.5", "1000.26"]
    records = _discontinuous(tmp_path / "r.edf", onsets)
    with open_recording(tmp_path / "r.edf") as recording:
        assert recording.format == "EDF+D"
        assert "2 gaps" in recording.notes[0]
        assert recording.duration == pytest.approx(1000.26 - 5 + 1, abs=0.1)
        for seconds in (0.5, 2.0, 60.0):
            for data, parts, rate in zip(read(recording, seconds), records, (50, 10), strict=True):
                expected = np.full(data.size, np.nan)
                for onset, part in zip(onsets, parts, strict=True):
                    start = int((float(onset) - 5) * rate + 0.5)
                    expected[start : start + rate] = part
                np.testing.assert_array_equal(data, expected)
    _discontinuous(tmp_path / "r.edf", ["0", "1", "1.5"])
    refused(tmp_path / "r.edf", "data record 2 begins at 1.5 s")


def test_edf_header_that_lies(data_dir: Path, tmp_path: Path) -> None:
    raw = (data_dir / "a103l_two_rates.edf").read_bytes()
    path = tmp_path / "r.edf"

    def lie(start: int, text: str, width: int = 8) -> None:
        field = text.encode().ljust(width)
        path.write_bytes(raw[:start] + field + raw[start + width :])

    for records in ("331", "329", "99999999"):
        lie(236, records)
        refused(path, f"declares {records} data records", "248268")
    lie(236, "many")
    refused(path, "'many'", "number of data records")
    lie(184, "1024")
    refused(path, "declares 1024 bytes of header for 2 signals", "768")
    lie(252, "9999", 4)
    refused(path, "9999 signals")
    lie(256 + 2 * 216, "99999999")
    refused(path, "declares 330 data records", "248268")
    lie(256 + 2 * 216, "-5")
    refused(path, "'-5'", "samples a record of signal 0")
    lie(244, "0")
    refused(path, "lasts 0.0 s")
    lie(256 + 2 * 120, "min")
    refused(path, "calibration")
    lie(0, "PNG")
    refused(path, "does not begin like one")
    path.write_bytes(raw[:100])
    refused(path, "has 100 bytes")
    path.write_bytes(raw[:700])
    refused(path, "700")
    path.write_bytes(raw[:-1000])
    refused(path, "declares 330 data records, 248268 bytes; the file has 247268")
    lie(236, "-1")  # "still recording": the size says how many there are
    assert open_recording(path).duration == 330.0


# ---------------------------------------------------------------- CSV and TSV


def test_csv_without_time(data_dir: Path) -> None:
    path = data_dir / "ppg_100hz.csv"
    recording, (data,) = opened(path, 100.0)
    np.testing.assert_array_equal(data, np.loadtxt(path))
    assert recording.channels[0].sampling_rate == 100.0
    assert recording.channels[0].name == "channel_1"
    refused(path, "no time column", "--rate")


def test_csv_with_a_millisecond_timer(cohort_dir: Path) -> None:
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


def test_csv_with_wall_clock_times(data_dir: Path) -> None:
    path = data_dir / "ppg_datetime.csv"
    table = pd.read_csv(path)
    times = pd.to_datetime(table.datetime, format="ISO8601")
    recording, (data,) = opened(path)
    assert recording.start_time == times[0].to_pydatetime()
    first = ~times.duplicated()
    seconds = (times[first] - times[0]).dt.total_seconds().to_numpy()
    rate = 1 / np.median(np.diff(seconds))
    channel = recording.channels[0]
    assert channel.sampling_rate == pytest.approx(rate)
    grid = np.arange(channel.samples) / channel.sampling_rate
    np.testing.assert_allclose(data, np.interp(grid, seconds, table.hr[first]), atol=1e-6)
    assert any(f"{int((~first).sum())} of 10000 rows repeat" in note for note in recording.notes)
    assert any("median rate 62.5 Hz" in note for note in recording.notes)


def _even(
    path: Path,
    times: list[str] | np.ndarray,
    header: str = "time_s,ecg",
    separator: str = ",",
) -> tuple[Path, np.ndarray]:
    values = np.random.default_rng(6).normal(size=len(times)).round(4)
    rows = [f"{t}{separator}{v}" for t, v in zip(times, values, strict=True)]
    return write(path, "\n".join([header.replace(",", separator), *rows]) + "\n"), values


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
def test_csv_time_units(tmp_path: Path, title: str, scale: float) -> None:
    start = 1_700_000_000 if scale == 1e9 else 0  # wall-clock ns, else from zero
    times = [f"{start * scale + i / 64 * scale:.15g}" for i in range(500)]
    path, values = _even(tmp_path / "r.csv", times, f"{title},ecg")
    recording, (data,) = opened(path)
    assert recording.channels[0].sampling_rate == pytest.approx(64.0, rel=1e-6)
    if scale != 1e9:  # 15 digits of ns since 1970 are microseconds
        np.testing.assert_array_equal(data, values)
    else:
        assert recording.start_time == datetime.fromtimestamp(start, UTC)


@pytest.mark.parametrize("rate", [65, 100, 128, 512, 700, 1000])
def test_csv_clock_written_to_the_millisecond_is_even(tmp_path: Path, rate: int) -> None:
    times = [f"{i / rate:.3f}" for i in range(4000)]
    path, values = _even(tmp_path / "r.csv", times)
    recording, (data,) = opened(path)
    assert recording.channels[0].sampling_rate == rate
    np.testing.assert_array_equal(data, values)


def test_csv_clock_in_whole_seconds_is_even(tmp_path: Path) -> None:
    times = [f"2024-05-31 10:{i // 64 // 60:02d}:{i // 64 % 60:02d}" for i in range(64 * 90)]
    path, values = _even(tmp_path / "r.csv", times, "datetime,ecg")
    recording, (data,) = opened(path)
    assert recording.channels[0].sampling_rate == 64
    np.testing.assert_array_equal(data, values)


@pytest.mark.parametrize("phase", [0.0, 0.37])
@pytest.mark.parametrize("rounds", [np.floor, np.rint])
@pytest.mark.parametrize(("rate", "tick"), [(100, 1.0), (100, 0.1), (1000, 0.1), (64, 5.0)])
def test_csv_rate_of_a_coarse_clock(
    tmp_path: Path, rate: int, tick: float, rounds: Any, phase: float
) -> None:
    times = rounds((np.arange(rate * 15) / rate + phase) / tick) * tick
    path, values = _even(tmp_path / "r.csv", [f"{t:.1f}" for t in times])
    recording, (data,) = opened(path)
    assert recording.channels[0].sampling_rate == rate
    np.testing.assert_array_equal(data, values)
    assert any(f"written to {tick:g} s" in note for note in recording.notes)
    assert opened(path, rate * 1.005)[0].channels[0].sampling_rate == rate * 1.005
    refused(path, "contradicts", rate=rate * 1.2)


def test_csv_gap_of_a_coarse_clock(tmp_path: Path) -> None:
    times = np.arange(3000) // 100
    times[1500:] += 7
    path, values = _even(tmp_path / "r.csv", times)
    with open_recording(path) as recording:
        assert recording.channels[0].sampling_rate == 100.0
        assert any("1 gaps" in note for note in recording.notes)
        expected = np.concatenate([values[:1500], np.full(700, np.nan), values[1500:]])
        for seconds in (0.1, 7.0, 1e6):
            np.testing.assert_allclose(read(recording, seconds)[0], expected)
    path, _ = _even(tmp_path / "r.csv", np.arange(150) // 100)
    refused(path, "change once in 150 rows", "--rate")
    assert opened(path, 100.0)[0].channels[0].samples == 150


@pytest.mark.parametrize(
    ("step", "rate"),
    [(0.5, 2.0), (1 / 3, 3.0), (0.25, 4.0), (15.625, 64.0), (1.953125, 512.0), (15625, 64.0)],
)
def test_csv_unit_of_a_time(tmp_path: Path, step: float, rate: float) -> None:
    path, values = _even(tmp_path / "r.csv", [f"{i * step:.9g}" for i in range(300)], "time,ecg")
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
def test_csv_time_of_which_nothing_tells_the_unit(
    tmp_path: Path, step: float, words: list[str], rates: list[float]
) -> None:
    times = [f"{i * step:g}" for i in range(300)]
    path, _ = _even(tmp_path / "r.csv", times, "time,ecg")
    refused(path, f"step by {step:g}", *words, "--rate")
    for rate in rates:
        assert opened(path, rate)[0].channels[0].sampling_rate == rate
    path, _ = _even(tmp_path / "r.csv", times, "time_s,ecg")
    assert opened(path)[0].channels[0].sampling_rate == pytest.approx(1 / step)


def test_csv_even_clock_rounded_to_the_millisecond_without_a_unit(tmp_path: Path) -> None:
    for rate in (64, 128, 400):
        times = np.rint(np.arange(400) * 1000 / rate).astype(int)
        path, _ = _even(tmp_path / "r.csv", times, "time,ecg")
        assert opened(path)[0].channels[0].sampling_rate == rate


@pytest.mark.parametrize(
    "times",
    [
        ["2024-05-31T10:00:00.00Z", "2024-05-31T10:00:00.02Z", "2024-05-31T10:00:00.04Z"],
        ["2024-05-31 12:00:00.00+02:00", "2024-05-31 10:00:00.02Z", "2024-05-31 10:00:00.04Z"],
        ["10:00:00.00", "10:00:00.02", "10:00:00.04"],
    ],
)
def test_csv_kinds_of_wall_clock(tmp_path: Path, times: list[str]) -> None:
    path, values = _even(tmp_path / "r.csv", times, "timestamp,ecg")
    recording, (data,) = opened(path)
    assert recording.channels[0].sampling_rate == 50.0
    np.testing.assert_array_equal(data, values)
    expected = datetime(2024, 5, 31, 10, tzinfo=UTC) if len(times[0]) > 12 else None
    assert recording.start_time == expected


def test_csv_uneven_clock_gaps_and_repeats(tmp_path: Path) -> None:
    rng = np.random.default_rng(7)
    t = np.sort((np.arange(2000) + rng.uniform(-0.3, 0.3, 2000)) / 50)
    t[0] = 0
    t[1200:] += 30.0  # a gap
    t[500] = t[499]  # a repeat
    t = t.round(6)
    path, values = _even(tmp_path / "r.csv", t)
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
    path, values = _even(tmp_path / "r.csv", [f"{i * 0.01:.2f}" for i in keep])
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
    path, _ = _even(tmp_path / "r.csv", t)
    _, (whole,) = opened(path)
    for size in (128, 1000):
        monkeypatch.setattr(text, "_BLOCK_BYTES", size)
        np.testing.assert_array_equal(opened(path)[1][0], whole)


@pytest.mark.parametrize("separator", [",", ";", "\t"])
@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
def test_csv_separators_units_and_columns_left_out(
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


def test_csv_shapes(tmp_path: Path) -> None:
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


def test_csv_trailing_separator(tmp_path: Path) -> None:
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
def test_csv_other_separators(tmp_path: Path, text: str) -> None:
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


def test_csv_times_that_count_rows(tmp_path: Path) -> None:
    path, values = _even(tmp_path / "r.csv", [str(i) for i in range(200)], "time,ecg")
    refused(path, "step by 1", "--rate", "time_s or time_ms")
    for rate in (1.0, 64.0, 1000.0):
        recording, (data,) = opened(path, rate)
        assert recording.channels[0].sampling_rate == rate
        np.testing.assert_array_equal(data, values)
    path, _ = _even(tmp_path / "r.csv", [str(i) for i in range(200)], "time_s,ecg")
    assert opened(path)[0].channels[0].sampling_rate == 1.0


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
def test_csv_refused(tmp_path: Path, text: str, words: list[str]) -> None:
    refused(write(tmp_path / "r.csv", text), *words)


def test_csv_text_refused_with_rate(tmp_path: Path) -> None:
    path = write(tmp_path / "r.csv", "ppg\n1\n2\nlead off\n")
    refused(path, "row 4", "'ppg'", "'lead off'", "is not a number", rate=100.0)


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
    path, values = _even(tmp_path / "r.csv", warming, "t,eda")
    recording, data = opened(path, 4.0)  # the rate tells: a channel
    np.testing.assert_array_equal(data, [warming, values])
    assert "column 't' is not taken for a clock: it is a channel" in recording.notes
    path, values = _even(tmp_path / "r.csv", [f"{i / 50:.2f}" for i in range(400)], "t,eda")
    for rate in (None, 50.0):
        recording, data = opened(path, rate)
        np.testing.assert_array_equal(data, [values])
        assert recording.channels[0].sampling_rate == 50.0
    refused(path, "--rate 4 contradicts", rate=4.0)
    path, _ = _even(tmp_path / "r.csv", [f"{i / 50:.2f}" for i in range(400)], "T,eda")
    refused(path, "no time column")


def test_ambiguous_names_of_wall_clocks_and_counts(tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    stamps = 1_717_149_600_000 + np.cumsum(rng.integers(18, 23, 400))
    path, _ = _even(tmp_path / "r.csv", stamps, "ts,ecg")
    for rate in (None, 50.0):
        recording, _ = opened(path, rate)
        assert [c.name for c in recording.channels] == ["ecg"]
        assert recording.start_time is not None
    count = np.arange(600) // 30  # of epochs of 30 s
    path, values = _even(tmp_path / "r.csv", count, "epoch,eda")
    refused(path, "no time column", "--rate")
    np.testing.assert_array_equal(opened(path, 1.0)[1], [count, values])
    t = rng.normal(33, 1, 50)
    np.savez(tmp_path / "r.npz", t=t, eda=t, sampling_rate=4.0)
    assert [c.name for c in opened(tmp_path / "r.npz")[0].channels] == ["t", "eda"]
    np.savez(tmp_path / "r.npz", t=np.arange(50) / 4, eda=t, sampling_rate=4.0)
    assert [c.name for c in opened(tmp_path / "r.npz")[0].channels] == ["eda"]


def test_the_steadier_of_two_clocks(tmp_path: Path) -> None:
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


def test_intervals_beyond_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Intervals, "LIMIT", 1000)
    intervals = Intervals()
    values = np.random.default_rng(9).integers(90, 110, 50_000)
    for part in np.array_split(values, 77):
        intervals.add(part)
    assert intervals.percentiles(50)[0] == pytest.approx(np.median(values), abs=1)
    assert sum(part.size for part in intervals._kept) <= 1000


# ---------------------------------------------------------------- Parquet


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
def test_parquet_timestamps(tmp_path: Path, unit: str, zone: str | None) -> None:
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


def test_parquet_without_time(tmp_path: Path) -> None:
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


def test_parquet_refused(tmp_path: Path) -> None:
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


# ---------------------------------------------------------------- NPY and NPZ


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("kind", ["f4", "f8", ">i2", "u1", "?", "f2"])
def test_arrays(tmp_path: Path, order: str, kind: str) -> None:
    data = np.asarray(np.random.default_rng(11).integers(0, 99, (3, 1000)), dtype=kind, order=order)
    np.save(tmp_path / "r.npy", data)
    np.savez(tmp_path / "stored.npz", data=data, sampling_rate=64, channels=["a", "b", "c"])
    np.savez_compressed(tmp_path / "packed.npz", data=data, sampling_rate=64.0, units=["g"] * 3)
    for name, rate in (("r.npy", 64.0), ("stored.npz", None), ("packed.npz", None)):
        with open_recording(tmp_path / name, sampling_rate=rate) as recording:
            assert [c.sampling_rate for c in recording.channels] == [64.0] * 3
            for seconds in (0.2, 3.33, 60.0):
                np.testing.assert_array_equal(read(recording, seconds), data.astype(float))
            np.testing.assert_array_equal(read(recording, 1.0, [2, 0]), data[[2, 0]].astype(float))
    with open_recording(tmp_path / "stored.npz") as recording:
        assert [c.name for c in recording.channels] == ["a", "b", "c"]
    with open_recording(tmp_path / "packed.npz") as recording:
        assert recording.channels[1].unit == "g"


@pytest.mark.parametrize("order", ["C", "F"])
def test_npz_longer_than_a_piece(tmp_path: Path, order: str) -> None:
    data = np.asarray(np.random.default_rng(12).normal(size=(3, 150_001)), order=order)
    np.savez_compressed(tmp_path / "r.npz", data=data, sampling_rate=1000)
    with open_recording(tmp_path / "r.npz") as recording:
        np.testing.assert_array_equal(read(recording, 7.77), data)


def test_npz_one_array_a_channel(tmp_path: Path) -> None:
    path = tmp_path / "r.npz"
    ecg, ppg = np.arange(1000.0), np.arange(250)
    np.savez(path, ecg=ecg, ppg=ppg, sampling_rate=[100, 25], label="rest", time=np.arange(9))
    recording, data = opened(path)
    assert [(c.name, c.sampling_rate) for c in recording.channels] == [("ecg", 100), ("ppg", 25)]
    assert recording.duration == 10.0
    np.testing.assert_array_equal(data[0], ecg)
    np.testing.assert_array_equal(data[1], ppg)
    np.savez(path, ecg=ecg, ppg=ppg)
    refused(path, "sampling_rate", "--rate")
    recording, data = opened(path, 50.0)  # of two lengths: the shorter one ends earlier
    assert [c.samples for c in recording.channels] == [1000, 250]
    with open_recording(path, sampling_rate=50.0) as recording:
        assert [data.size for data in read(recording, 2.0)] == [1000, 250]
        assert "ppg ends 15 s before the recording does" in recording.notes


def _has_note(recording: Recording, words: str) -> bool:
    return any(words in note for note in recording.notes)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("order", ["C", "F"])
def test_npz_takes_every_array_of_signals(tmp_path: Path, save: Any, order: str) -> None:
    path = tmp_path / "r.npz"
    acc = np.asarray(np.random.default_rng(1).normal(size=(3, 70_000)), order=order)
    save(path, ppg=acc[0], acc=acc, sampling_rate=64.0, units="g")
    with open_recording(path) as recording:
        assert [c.name for c in recording.channels] == ["ppg", "acc_1", "acc_2", "acc_3"]
        assert {c.unit for c in recording.channels} == {"g"}
        np.testing.assert_array_equal(read(recording, 7.0), [acc[0], *acc])
        np.testing.assert_array_equal(read(recording, 7.0, [3, 0]), [acc[2], acc[0]])
    # a rate and a unit of its own for each array, in the file's order
    save(path, ppg=acc[0], acc=acc[:, :35_000], sampling_rate=[64.0, 32.0], units=["", "g"])
    with open_recording(path) as recording:
        assert [(c.sampling_rate, c.unit) for c in recording.channels] == [
            (64.0, ""),
            *[(32.0, "g")] * 3,
        ]
    save(path, ppg=acc[0], acc=acc, sampling_rate=[64.0, 32.0, 4.0])
    refused(path, "sampling_rate has 3 entries for the arrays ppg, acc")
    save(path, **{"watch/ppg": acc[0], "watch/sampling_rate": 64.0, "ecg": acc[1]})
    recording = open_recording(path)
    assert [c.name for c in recording.channels] == ["watch/ppg"]
    assert _has_note(recording, "ecg has no sampling_rate and is left out")


def test_npz_notes_what_it_leaves_out(tmp_path: Path) -> None:
    path = tmp_path / "r.npz"
    x = np.random.default_rng(1).normal(size=(3, 640))
    np.savez(path, data=x[:2], ppg=x[2], sampling_rate=64.0)
    recording, data = opened(path)
    np.testing.assert_array_equal(data, x[:2])
    assert recording.notes == ("ppg stands beside data and is left out",)
    extra = {"labels": np.arange(10), "fs": [64], "subject": 7, "cube": np.ones((2, 2, 9))}
    np.savez(path, ppg=x[0], eda=x[1], sampling_rate=64.0, channels=["a", "b"], **extra)
    recording, data = opened(path)
    assert [c.name for c in recording.channels] == ["ppg", "eda"]
    for words in (
        "labels (10,)",
        "fs (1,)",
        "subject has shape ()",
        "cube has",
        "channels belongs",
    ):
        assert _has_note(recording, words), words
    np.savez(path, ppg=x[0], acc=x.T, sampling_rate=64.0)  # as most Python code holds one
    recording, data = opened(path)
    np.testing.assert_array_equal(data, x[:1])
    assert _has_note(recording, "acc has shape (640, 3); (channels, samples) is right: left out")
    with zipfile.ZipFile(path, "a") as file, pytest.warns(UserWarning, match="Duplicate"):
        file.writestr("ppg.npy", file.read("ppg.npy"))
    refused(path, "several arrays named ppg")


def test_npz_of_nothing_but_upright_arrays(tmp_path: Path) -> None:
    np.savez(tmp_path / "r.npz", acc=np.ones((640, 3)), labels=np.arange(10), sampling_rate=64.0)
    refused(tmp_path / "r.npz", "acc has shape (640, 3); (channels, samples) is right")


def test_npz_with_a_damaged_name(tmp_path: Path) -> None:
    path = tmp_path / "r.npz"
    np.savez(path, **{"pu\u00eds": np.ones(640), "sampling_rate": 64.0})
    path.write_bytes(path.read_bytes().replace("\u00ed".encode(), b"\xc3\xff"))
    refused(path, "is no NPZ file", "utf-8")


def test_npz_clock_equals_the_same_table_s(tmp_path: Path) -> None:
    """A gap of 92 s: the clock counts, not --rate."""
    x = np.random.default_rng(1).normal(size=1000)
    t = np.arange(1000) / 128
    t[600:] += 92
    pd.DataFrame({"time": t, "ecg": x}).to_csv(tmp_path / "r.csv", index=False)
    recording, expected = opened(tmp_path / "r.csv")
    stamps = np.datetime64("2024-01-01", "ns") + (t * 1e9).astype(np.int64)
    for name, times in (("r.npz", t), ("dates.npz", stamps), ("spans.npz", stamps - stamps[0])):
        np.savez_compressed(tmp_path / name, ecg=x, time=times)
        own, data = opened(tmp_path / name)
        assert own.channels[0].sampling_rate == pytest.approx(128.0)
        assert own.duration == pytest.approx(recording.duration)
        np.testing.assert_allclose(data, expected, atol=1e-4)
        assert _has_note(own, "1 gaps longer")
        refused(tmp_path / name, "--rate 64 contradicts the file's own 128 Hz", rate=64.0)
        assert (own.start_time is None) == (name != "dates.npz")
    np.savez(tmp_path / "r.npz", ecg=x, time=t, sampling_rate=64.0)
    refused(tmp_path / "r.npz", "sampling_rate 64 of ecg contradicts the 128 Hz", "time")
    stamps[50] = np.datetime64("NaT")
    np.savez(tmp_path / "r.npz", ecg=x, time=stamps)
    refused(tmp_path / "r.npz", "time has no time in row 50")
    np.savez(tmp_path / "r.npz", data=np.stack([x, x]), time_ms=1000 * t, ppg=x)
    recording, _ = opened(tmp_path / "r.npz")
    assert [c.name for c in recording.channels] == ["channel_1", "channel_2"]


def test_example_windows(cohort_dir: Path) -> None:
    recording, data = opened(cohort_dir / "imu" / "walking_1.npz")
    assert [c.name for c in recording.channels] == [
        *("acc_x", "acc_y", "acc_z"),
        *("gyro_x", "gyro_y", "gyro_z"),
    ]
    assert {c.sampling_rate for c in recording.channels} == {10.0}
    assert np.std(data) > 0.1


def test_objects_are_never_unpickled(tmp_path: Path) -> None:
    trace = tmp_path / "ran"
    objects = np.array([Payload(trace)], dtype=object)
    np.save(tmp_path / "r.npy", objects, allow_pickle=True)
    refused(tmp_path / "r.npy", "objects", rate=64.0)
    for key in ("data", "sampling_rate", "x"):
        np.savez(tmp_path / "r.npz", **{"data": np.ones((1, 9)), key: objects})
        refused(tmp_path / "r.npz", "objects")
    (tmp_path / "r.npy").write_bytes(objects.dumps())  # a bare pickle
    refused(tmp_path / "r.npy", "no NumPy array", rate=64.0)
    assert not trace.exists()


def test_arrays_refused(tmp_path: Path) -> None:
    npy, npz = tmp_path / "r.npy", tmp_path / "r.npz"
    np.save(npy, np.ones((2, 50)))
    refused(npy, "--rate")
    raw = npy.read_bytes()
    npy.write_bytes(raw[:-8])
    refused(npy, "(2, 50), 800 bytes; has 792", rate=64.0)
    lying = raw.replace(b"(2, 50), }      ", b"(2, 5000000000)}")
    assert lying != raw
    npy.write_bytes(lying)
    refused(npy, "80000000000 bytes", rate=64.0)
    for shape in ((50, 2), (2, 3, 4), (0,), (2, 0), ()):
        np.save(npy, np.ones(shape))
        refused(npy, f"shape {shape}", "(channels, samples)", rate=64.0)
        np.savez(npz, data=np.ones(shape), sampling_rate=64)
        refused(npz, f"shape {shape}")
    np.save(npy, np.ones(9, dtype=complex))
    refused(npy, "complex128", rate=64.0)
    for rate in (0, -4, np.nan, [1, 2], "fast"):
        np.savez(npz, data=np.ones((3, 9)), sampling_rate=rate)
        refused(npz, "sampling_rate of data is")
    np.savez(npz, data=np.ones((3, 9)), sampling_rate=64, channels=["a"])
    refused(npz, "channels of data has 1 entries for 3 channels")
    refused(npz.rename(tmp_path / "rr.npz"), "channels of data has 1")
    np.savez(npz, windows=np.ones((4, 3, 9)), sampling_rate=64)
    refused(npz, "has neither data", "windows")
    np.savez_compressed(npz, data=np.random.rand(2, 5000), sampling_rate=64)  # noqa: NPY002
    whole = npz.read_bytes()
    npz.write_bytes(whole[: len(whole) // 2])
    refused(npz, "is no NPZ file")
    damaged = bytearray(whole)
    damaged[20000:20100] = bytes(100)
    npz.write_bytes(damaged)
    refused(npz, to_the_end=True)
    with zipfile.ZipFile(npz, "w") as file:
        file.writestr("data.npy", raw.replace(b"(2, 50)", b"(2, 99)"))
    refused(npz, "declares float64 (2, 99), 1584 bytes; has 800")


# ---------------------------------------------------------------- memory


def _huge_wfdb(folder: Path) -> Path:
    (folder / "r.dat").write_bytes(bytes(100))
    return write(folder / "r.hea", f"r 1 50 {10**12}\nr.dat 16 200/mV 16 0 0 0 0 a\n")


def _huge_edf(folder: Path) -> Path:
    signals = [edfio.EdfSignal(np.arange(100.0), 100)]
    edfio.Edf(signals).write(folder / "r.edf")
    raw = bytearray((folder / "r.edf").read_bytes())
    raw[236:244] = b"99999999"
    (folder / "r.edf").write_bytes(raw)
    return folder / "r.edf"


def _huge_npy(folder: Path) -> Path:
    with (folder / "r.npy").open("wb") as file:
        header = {"descr": "<f8", "fortran_order": False, "shape": (10**6, 10**9)}
        np.lib.format.write_array_header_1_0(file, header)
    return folder / "r.npy"


@pytest.mark.parametrize("make", [_huge_wfdb, _huge_edf, _huge_npy])
def test_a_lying_header_allocates_nothing(tmp_path: Path, make: Callable[[Path], Path]) -> None:
    path = make(tmp_path)
    refused(path, rate=50.0)  # imports what it needs
    tracemalloc.start()
    try:
        refused(path, rate=50.0)
        assert tracemalloc.get_traced_memory()[1] < 2_000_000
    finally:
        tracemalloc.stop()


STREAM = """
import sys
import numpy as np
from damaged_reader import peak_resident
from normwear_fast.recordings import open_recording
def peak():
    return peak_resident() / 1024
small, large = sys.argv[1:]
def run(path):
    with open_recording(path, sampling_rate=1000.0 if path.endswith("y") else None) as recording:
        total = sum(b[0].size for b in recording.blocks(range(len(recording.channels)), 20.0))
        assert total == recording.channels[0].samples
run(small)
before = peak()
run(large)
print(peak() - before)
"""


def _stream_csv(path: Path, samples: int) -> None:
    from pyarrow import csv

    t = np.arange(samples) / 1000 + np.random.default_rng(13).uniform(0, 3e-4, samples)
    csv.write_csv(pa.table({"time_s": t, "x": np.sin(t), "y": np.cos(t)}), str(path))


def _stream_parquet(path: Path, samples: int) -> None:
    x = np.random.default_rng(13).normal(size=(3, samples))
    t = np.arange(samples) / 1000
    parquet.write_table(
        pa.table({"time_s": t, "x": x[0], "y": x[1], "z": x[2]}), path, row_group_size=100_000
    )


def _stream_bdf(path: Path, samples: int) -> None:
    x = np.random.default_rng(13).normal(size=(8, samples))
    edfio.Bdf([edfio.BdfSignal(row, 1000) for row in x]).write(path)


def _stream_hea(path: Path, samples: int) -> None:
    x = np.random.default_rng(13).integers(-999, 999, (samples, 8)).astype("<i2")
    path.with_suffix(".dat").write_bytes(x.tobytes())
    signals = f"{path.stem}.dat 16 200/mV 16 0 0 0 0 a\n" * 8
    path.write_text(f"{path.stem} 8 1000 {samples}\n{signals}")


def _stream_npz(path: Path, samples: int) -> None:
    x = np.random.default_rng(13).integers(0, 9, (4, samples)).astype(np.float64)
    np.savez_compressed(path, data=x, sampling_rate=1000)


@pytest.mark.parametrize(
    ("suffix", "make", "samples"),
    [
        (".csv", _stream_csv, 1_000_000),  # 55 MB
        (".parquet", _stream_parquet, 2_000_000),  # 64 MB
        (".bdf", _stream_bdf, 1_600_000),  # 38 MB; edfio alone would take 150
        (".hea", _stream_hea, 4_000_000),  # 64 MB
        (".npz", _stream_npz, 3_000_000),  # 96 MB unpacked
    ],
)
def test_memory_does_not_grow_with_the_recording(
    tmp_path: Path, suffix: str, make: Callable[[Path, int], None], samples: int
) -> None:
    pytest.importorskip("resource")
    small, large = tmp_path / f"small{suffix}", tmp_path / f"large{suffix}"
    make(small, samples // 2)  # fills the libraries' pools
    make(large, samples)
    result = subprocess.run(
        [sys.executable, "-c", STREAM, str(small), str(large)],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=True,
    )
    # The times of a CSV's rows and the pools' own steps, 5 to 30 MB; all of a file would be 50 and more.
    assert float(result.stdout) < 35, f"{result.stdout.strip()} MB more for the large file"


# ---------------------------------------------------------------- opening and finding


def test_opening(tmp_path: Path, data_dir: Path) -> None:
    refused(tmp_path / "none.edf", "No such file")
    for name in ("r.csv", "r.edf", "r.hea", "r.npy", "r.npz", "r.parquet", "r.bdf"):
        (tmp_path / name).touch()
        refused(tmp_path / name, "empty (0 bytes)")
    (tmp_path / "folder.edf").mkdir()
    refused(tmp_path / "folder.edf", "is a folder")
    refused(tmp_path / "other.xyz", "no format", ".edf")
    refused(data_dir / "03700181.dat", "03700181.hea")
    if os.geteuid():  # root may read everything
        (tmp_path / "r.npy").write_bytes(b"x")
        (tmp_path / "r.npy").chmod(0)
        refused(tmp_path / "r.npy", "Permission denied")
    for rate in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(UsageError, match="--rate"):
            open_recording(data_dir / "a103l.hea", sampling_rate=rate)
    refused(data_dir / "a103l.hea", "--rate 100 contradicts", "250 Hz", rate=100.0)
    with open_recording(data_dir / "a103l.hea", sampling_rate=251.0) as recording:
        assert recording.channels[0].sampling_rate == 250.0
        with pytest.raises(InputError, match="channel 3 does not exist"):
            recording.blocks([3])
        with pytest.raises(InputError, match="above 0"):
            recording.blocks([0], 0.0)


def binary_formats() -> list[str]:
    """Every extension of the package's own readers but text: other tests register readers too."""
    ours = [s for s in extensions() if base._READERS[s].__module__.startswith("normwear_fast.")]
    return [suffix for suffix in ours if suffix not in (".csv", ".tsv")]


@pytest.mark.parametrize("suffix", binary_formats())
@given(raw=st.binary(min_size=1, max_size=600))
@example(raw=b"A 0")  # a whole WFDB header, of a record without signals
def test_rubbish_is_refused(
    tmp_path_factory: pytest.TempPathFactory, suffix: str, raw: bytes
) -> None:
    path = tmp_path_factory.getbasetemp() / f"rubbish{suffix}"
    path.write_bytes(raw)
    try:
        recording = open_recording(path, sampling_rate=64.0)
    except RecordingError:
        refused(path, rate=64.0)
    else:
        assert suffix == ".hea"
        assert recording.channels == ()


@settings(max_examples=50)
@given(raw=st.one_of(st.binary(min_size=1, max_size=300), st.text(min_size=1).map(str.encode)))
def test_rubbish_text_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, raw: bytes
) -> None:
    path = tmp_path_factory.getbasetemp() / "rubbish.csv"
    path.write_bytes(raw)
    text = ""
    try:
        opened(path, 64.0)
    except RecordingError as error:
        text = str(error)
    assert len(text.splitlines()) <= 1


def test_finding(tmp_path: Path, data_dir: Path) -> None:
    for name in (
        "p1/ecg.csv",
        "p1/ecg.npy",
        "p1/night 2.EDF",
        "p2/ecg.csv",
        "p2/deep/er.x.parquet",
        "p2/notes.txt",
        "p2/.hidden.csv",
        ".cache/x.csv",
    ):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    for suffix in (".hea", ".dat", ".xyz"):
        (tmp_path / "p2" / f"s{suffix}").touch()
    (tmp_path / "p2" / "loop").symlink_to(tmp_path)

    assert [found.id for found in find_recordings([tmp_path])] == [
        "p1/ecg.csv",
        "p1/ecg.npy",
        "p1/night 2",
        "p2/deep/er.x",
        "p2/ecg",
        "p2/s",
    ]
    (tmp_path / "p2" / "loop").unlink()
    # a file by itself; a file twice; unknown formats are kept when named, to be reported
    given = [tmp_path / "p2" / "ecg.csv", tmp_path / "p2", tmp_path / "p2" / "notes.txt"]
    assert [found.id for found in find_recordings(given)] == ["deep/er.x", "ecg", "notes", "s"]
    # one name in two inputs
    given = [tmp_path / "p1" / "ecg.csv", tmp_path / "p2"]
    ids = [found.id for found in find_recordings(given)]
    assert ids == ["deep/er.x", "p1/ecg.csv", "p2/ecg.csv", "s"]
    assert find_recordings([str(data_dir / "a103l.hea")])[0].path == data_dir / "a103l.hea"

    with pytest.raises(UsageError, match=r"nowhere: no such file or folder"):
        find_recordings([tmp_path / "p1", tmp_path / "nowhere"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match=r"empty: no recording found; known are .*\.edf"):
        find_recordings([tmp_path / "empty"])


def test_heavy_libraries_load_when_needed() -> None:
    code = (
        "import sys, normwear_fast.recordings, normwear_fast.cli.inspect;"
        "print([m for m in ('wfdb', 'edfio', 'pyarrow', 'pandas', 'scipy') if m in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"


# ---------------------------------------------------------------- the example cohort and inspect


def test_example_cohort(cohort_dir: Path) -> None:
    found = find_recordings([cohort_dir])
    assert len(found) == 11
    assert sum(p.stat().st_size for p in cohort_dir.rglob("*") if p.is_file()) < 3_000_000
    described = {one.id: inspect.describe(one) for one in found}
    assert sum(one["duration_s"] for one in described.values()) == pytest.approx(418.2, abs=0.1)
    assert {one["format"] for one in described.values()} == {"WFDB", "EDF", "CSV", "NPZ"}
    readme = (cohort_dir / "README.md").read_text()
    for one in found:
        assert f"`{one.id}`" in readme or f"`{one.id.split('/')[0]}/*`" in readme


def _inspect(*words: str) -> int:
    return main(["inspect", *words])


def test_inspect_table(cohort_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _inspect(str(cohort_dir)) == 0
    out = capsys.readouterr().out
    for text in ("ecg/mitdb_100: WFDB, 0:02:00", "MLII", "mV", "360", "43200", "11 recordings"):
        assert text in out


def test_inspect_json_and_failures(
    tmp_path: Path, data_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    x = np.ones((2, 100))
    x[1, [3, 4, 5, 19, 20, 98, 99]] = np.nan
    x[0, -1] = np.inf
    np.savez(tmp_path / "gaps.npz", data=x, sampling_rate=1 / 3)  # blocks of 20 samples
    (tmp_path / "bad.edf").write_bytes(b"rubbish")
    shutil.copy(data_dir / "test_edfann.edf", tmp_path)
    assert _inspect(str(tmp_path), "--json") == 1
    captured = capsys.readouterr()
    result = json.loads(captured.out)
    first, second = result["recordings"][0]["channels"]
    assert (first["missing"], first["gaps"]) == (1, 1)
    assert (second["missing"], second["gaps"]) == (7, 3)
    assert second["longest_gap_s"] == pytest.approx(9.0)
    assert result["recordings"][1]["channels"] == []
    assert result["recordings"][1]["duration_s"] == 0.0
    assert [failure["id"] for failure in result["failed"]] == ["bad"]
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("normwear-fast: error: ")
    assert "bad.edf" in captured.err
    assert _inspect(str(tmp_path / "test_edfann.edf")) == 0
    assert "holds no signal" in capsys.readouterr().out


def test_a_rate_is_for_the_recordings_without_a_clock(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from normwear_fast.encode.settings import EncodeSettings
    from normwear_fast.encode.survey import survey

    np.save(tmp_path / "bare.npy", np.ones((1, 320)))
    np.savez(tmp_path / "timed.npz", data=np.ones((1, 640)), sampling_rate=64.0)
    assert _inspect(str(tmp_path), "--rate", "32") == 0
    out = capsys.readouterr().out
    assert "bare: NPY, 0:00:10\n" in out
    assert "timed: NPZ, 0:00:10\n" in out
    assert out.count("has a clock of its own: --rate 32 is not for it and left out") == 1
    settings = EncodeSettings(window=2.0, hop=2.0, rate=32.0)
    entries = survey(find_recordings([tmp_path]), settings)
    assert [(entry.windows, entry.error) for entry in entries] == [(5, None), (5, None)]
    assert "--rate 32 is not for it" in entries[1].notes[0]
    # one by itself must not contradict
    alone = tmp_path / "timed.npz"
    assert _inspect(str(alone), "--rate", "32") == 1
    assert "--rate 32 contradicts the file's own 64 Hz" in capsys.readouterr().err
    assert "--rate 32 contradicts" in str(survey(find_recordings([alone]), settings)[0].error)


def test_why_a_recording_lacks_a_channel(tmp_path: Path) -> None:
    from normwear_fast.encode.settings import EncodeSettings
    from normwear_fast.encode.survey import survey

    x = np.random.default_rng(1).normal(size=640)
    np.savez(tmp_path / "a.npz", ppg=x, acc=np.stack([x, x]), sampling_rate=64.0)
    np.savez(tmp_path / "b.npz", ppg=x, acc=np.stack([x, x], axis=1), sampling_rate=64.0)
    table = pd.DataFrame({"time_s": np.arange(640) / 64, "ppg": x, "acc_1": np.nan})
    table.to_csv(tmp_path / "c.csv", index=False)
    settings = EncodeSettings(window=2.0, hop=2.0, channels=("ppg", "acc_1"))
    errors = [str(entry.error) for entry in survey(find_recordings([tmp_path]), settings)]
    assert errors[0] == "None"
    for error, reason in zip(errors[1:], ("acc has shape (640, 2); (ch", "acc_1"), strict=True):
        said = error.partition("has no channel acc_1; it has ppg; ")[2]
        assert reason in said
        assert said.endswith("left out")


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")
def test_inspect_of_a_name_that_is_not_utf8(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = os.fsencode(tmp_path)
    table = pd.DataFrame({"time_s": np.arange(50) / 50, "ecg": 1.0})
    table.to_csv(os.fsdecode(folder + b"/caf\xe9.csv"), index=False)
    table.to_parquet(tmp_path / "r.parquet")
    os.replace(tmp_path / "r.parquet", folder + b"/th\xe9.parquet")
    assert _inspect(str(tmp_path)) == 0
    out = capsys.readouterr().out
    for text in ("caf\\udce9: CSV", "th\\udce9: Parquet", "2 recordings, 0 failed"):
        assert text in out
    assert _inspect(str(tmp_path), "--json") == 0
    assert json.loads(capsys.readouterr().out)["recordings"][0]["id"] == "caf\udce9"


def test_inspect_usage(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert _inspect("--help") == 0
    assert "normwear-fast inspect examples/cohort" in capsys.readouterr().out
    for words in ([str(tmp_path / "nowhere")], [str(tmp_path)], []):
        assert _inspect(*words) == 2
        error = capsys.readouterr().err
        assert error.startswith("normwear-fast: error: ")
        assert error.count("\n") == 1
