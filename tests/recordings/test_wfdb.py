"""WFDB records against wfdb: storage formats, skews, segments, and headers that lie."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from recording_checks import opened, read, refused, write

from normwear_fast.errors import RecordingError
from normwear_fast.recordings import find_recordings, open_recording

wfdb = pytest.importorskip("wfdb")
pytestmark = pytest.mark.usefixtures("wfdb_reads_every_block")


@pytest.mark.parametrize("values", [1, 50_000, 1 << 20])
def test_wfdb_reads_several_blocks_at_a_time(
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


def test_wfdb_channels_have_names_units_rates_and_skews(data_dir: Path) -> None:
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
def test_wfdb_storage_formats_are_read(tmp_path: Path, storage: str, length: int) -> None:
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


def test_wfdb_skews_shift_each_channel(tmp_path: Path) -> None:
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
def test_wfdb_file_of_two_storage_formats_is_refused(
    tmp_path: Path, first: str, second: str
) -> None:
    (tmp_path / "r.dat").write_bytes(bytes(800))
    lines = [f"r.dat {one} 100/mV 16 0 0 0 0 c{one}" for one in (first, second)]
    path = write(tmp_path / "r.hea", "\n".join(["r 2 50 200", *lines, ""]))
    refused(path, f"r.dat have storage formats {first} and {second}; one for all is right")


def test_wfdb_flac_is_read(tmp_path: Path) -> None:
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


def test_wfdb_segments_are_one_recording(tmp_path: Path) -> None:
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


def test_wfdb_signals_of_one_name_that_nothing_tells_apart_are_refused(tmp_path: Path) -> None:
    for layout, segment in ((["ECG", "ECG"], ["ECG"]), (["ECG"], ["ECG", "ECG"])):
        path, _ = _layout(tmp_path, layout, layout, segment)
        with pytest.raises(RecordingError, match=r"s1\.hea: has \d signals named 'ECG'"):
            open_recording(path)


def test_wfdb_signals_that_the_layout_lacks_are_noted(tmp_path: Path) -> None:
    path, values = _layout(tmp_path, ["ECG"], ["ABP", "ECG"], ["ABP", "ECG"])
    recording, data = opened(path)
    assert recording.notes == ("signal ABP is not in the layout and left out",)
    np.testing.assert_allclose(data[0], np.concatenate([values[0][1], values[1][1]]), atol=1e-12)


def test_truncated_wfdb_is_refused(record: Path) -> None:
    signals = record.with_suffix(".mat")
    signals.write_bytes(signals.read_bytes()[:-1])
    refused(record, "a103l.mat", "495023 bytes", "82500 frames", "495024 bytes")


def test_wfdb_header_that_lies_is_refused(record: Path) -> None:
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


def test_other_bad_wfdb_headers_are_refused(record: Path) -> None:
    record.with_suffix(".mat").unlink()
    refused(record, "a103l.mat", "does not exist")
    for rubbish in (b"\x00\xff" * 50, b"\n", b"# comment only\n", b"hello"):
        record.write_bytes(rubbish)
        refused(record)


def test_wfdb_without_signals_has_no_channels(tmp_path: Path) -> None:
    recording = open_recording(write(tmp_path / "r.hea", "r 0 50 0\n"))
    assert (recording.channels, recording.duration) == ((), 0.0)
    assert list(recording.blocks([])) == []
