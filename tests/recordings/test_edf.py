"""EDF and BDF against edfio: round trips, discontinuous files, and headers that lie."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

import numpy as np
import pytest
from recording_checks import opened, read, refused

from normwear_fast.recordings import open_recording

edfio = pytest.importorskip("edfio")


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


def test_edf_of_annotations_only_holds_no_signal(data_dir: Path) -> None:
    recording = open_recording(data_dir / "test_edfann.edf")
    assert recording.channels == ()
    assert recording.duration == 0.0
    assert recording.notes == ("holds annotations and no signal",)


@pytest.mark.parametrize("bdf", [False, True])
def test_edf_and_bdf_are_what_edfio_wrote(tmp_path: Path, bdf: bool) -> None:
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


def test_discontinuous_edf_has_gaps(tmp_path: Path) -> None:
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


def test_edf_header_that_lies_is_refused(data_dir: Path, tmp_path: Path) -> None:
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
