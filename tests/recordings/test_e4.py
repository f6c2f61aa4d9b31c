"""Empatica E4 folders and zips: clocks, sensors left out, and archives that lead out."""

from __future__ import annotations

import shutil
import stat
import struct
import zipfile
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
from recording_checks import opened_in_any_blocks, refused_when_read
from recording_writers import START, write_e4, zipped

from normwear_fast.recordings import find_recordings


@pytest.mark.parametrize("form", ["folder", "zip", "zip_with_folder"])
def test_e4_is_read_sensor_by_sensor(tmp_path: Path, form: str) -> None:
    data = write_e4(tmp_path / "1.5_night")
    path = tmp_path / "1.5_night"
    if form != "folder":
        prefix = "A00123/" if form == "zip_with_folder" else ""
        path = zipped(path, tmp_path / "session.zip", prefix)
        shutil.rmtree(tmp_path / "1.5_night")
    (found,) = find_recordings([tmp_path])
    assert found.id == ("1.5_night" if form == "folder" else "session")
    recording, whole = opened_in_any_blocks(found.path)
    assert recording.format == "Empatica E4"
    assert recording.start_time == datetime.fromtimestamp(START, UTC)
    by_name = {c.name: (c, values) for c, values in zip(recording.channels, whole, strict=True)}
    assert {name: (c.sampling_rate, c.start) for name, (c, _) in by_name.items()} == {
        "BVP": (64.0, 0.0),
        "EDA": (4.0, 0.0),
        "ACC_x": (32.0, 0.0),
        "ACC_y": (32.0, 0.0),
        "ACC_z": (32.0, 0.0),
        "TEMP": (4.0, 0.0),
        "HR": (1.0, 10.0),
    }
    assert recording.duration == 30.0
    for name in ("BVP", "EDA", "TEMP", "HR"):
        np.testing.assert_array_equal(by_name[name][1], data[name][0])
    for axis, values in zip("xyz", data["ACC"], strict=True):
        np.testing.assert_array_equal(by_name[f"ACC_{axis}"][1], values / 64)
    assert by_name["ACC_x"][0].unit == "g"
    assert any("IBI.csv" in note for note in recording.notes)


def test_e4_may_lack_sensors(tmp_path: Path) -> None:
    write_e4(tmp_path / "s", names=["EDA"])
    recording, _ = opened_in_any_blocks(tmp_path / "s")
    assert [c.name for c in recording.channels] == ["EDA"]
    assert any("BVP.csv is not there" in note for note in recording.notes)
    refused_when_read(tmp_path / "s" / "EDA.csv", "give the folder")


@pytest.mark.parametrize(
    ("file", "old", "new", "words"),
    [
        ("BVP.csv", "1544027337.000000", "1944027337.000000", ["s after", "one session"]),
        ("BVP.csv", "1544027337.000000", "154402x337.000000", ["no time", "rate"]),
        ("BVP.csv", "64.000000", "0.000000", ["no time", "rate"]),
        ("ACC.csv", "32.000000, 32.000000", "32.000000, 31.000000", ["3 columns"]),
        ("EDA.csv", "4.000000\r\n", "4.000000\r\nx,1\r\n", ["EDA.csv"]),
    ],
)
def test_bad_e4_is_refused(tmp_path: Path, file: str, old: str, new: str, words: list[str]) -> None:
    write_e4(tmp_path / "s")
    path = tmp_path / "s" / file
    text = path.read_bytes().decode()
    assert old in text
    path.write_bytes(text.replace(old, new, 1).encode())
    refused_when_read(tmp_path / "s", *words)
    zipped(tmp_path / "s", tmp_path / "s.zip")
    refused_when_read(tmp_path / "s.zip", *words)


@pytest.mark.parametrize("lines", [0, 1, 2])
@pytest.mark.parametrize("name", ["BVP", "ACC", "HR"])
def test_e4_sensors_without_samples_are_left_out(tmp_path: Path, name: str, lines: int) -> None:
    write_e4(tmp_path / "s")
    file = tmp_path / "s" / f"{name}.csv"
    file.write_text("".join(file.read_text().splitlines(True)[:lines]))
    zipped(tmp_path / "s", tmp_path / "s.zip")
    for path in (tmp_path / "s", tmp_path / "s.zip"):
        recording, whole = opened_in_any_blocks(path)
        names = [channel.name for channel in recording.channels]
        assert len(names) == len(whole) == (4 if name == "ACC" else 6)
        assert not any(channel.startswith(name) for channel in names)
        assert f"{name}.csv holds no samples and is left out" in recording.notes


def test_e4_without_any_samples_is_refused(tmp_path: Path) -> None:
    write_e4(tmp_path / "s")
    for file in (tmp_path / "s").glob("*.csv"):
        file.write_text("".join(file.read_text().splitlines(True)[:2]))
    refused_when_read(tmp_path / "s", "none of its sensors' files holds samples")
    # what is cut short within its header, or damaged, is not empty
    write_e4(tmp_path / "s")
    (tmp_path / "s" / "HR.csv").write_bytes(b"\0" * 40)
    refused_when_read(tmp_path / "s", "HR.csv begins with no time")


def hostile_zip(tmp_path: Path, kind: str) -> Path:
    write_e4(tmp_path / "s")
    path = zipped(tmp_path / "s", tmp_path / "a.zip")
    with zipfile.ZipFile(path, "a") as file:
        if kind in ("../up.csv", "/abs.csv", "C:/x.csv", "a\\..\\..\\x.csv"):
            file.writestr(kind, "x")
        elif kind == "link":
            info = zipfile.ZipInfo("tags2.csv")
            info.external_attr = (stat.S_IFLNK | 0o777) << 16
            file.writestr(info, "/etc/passwd")
        elif kind == "twice":
            with pytest.warns(UserWarning, match="Duplicate"):
                file.writestr("BVP.csv", "x")
        elif kind == "bomb":
            file.writestr("notes.txt", b"\0" * 1000, zipfile.ZIP_DEFLATED)
    if kind == "bomb":  # the directory says what it unpacks to
        content = bytearray(path.read_bytes())
        struct.pack_into("<I", content, content.rindex(b"PK\x01\x02") + 24, 0x7FFFFFFF)
        path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    ("kind", "word"),
    [
        ("../up.csv", "leads out"),
        ("/abs.csv", "leads out"),
        ("C:/x.csv", "leads out"),
        ("a\\..\\..\\x.csv", "leads out"),
        ("link", "is a link"),
        ("twice", "two members"),
        ("bomb", "GB"),
    ],
)
def test_zips_that_lead_out_are_refused(tmp_path: Path, kind: str, word: str) -> None:
    before = set(tmp_path.parent.iterdir())
    refused_when_read(hostile_zip(tmp_path, kind), word)
    assert set(tmp_path.parent.iterdir()) == before


def test_zips_that_are_no_recording_are_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as file:
        file.writestr("readme.txt", "hello")
    refused_when_read(tmp_path / "a.zip", "neither")
    (tmp_path / "b.zip").write_bytes(b"PK no zip at all")
    refused_when_read(tmp_path / "b.zip", "damaged zip")
    write_e4(tmp_path / "s")
    with zipfile.ZipFile(tmp_path / "c.zip", "w") as file:
        for session in ("one", "two"):
            file.write(tmp_path / "s" / "BVP.csv", f"{session}/BVP.csv")
    refused_when_read(tmp_path / "c.zip", "2 Empatica E4 sessions")
