"""What a user reads of a failure: one line, never longer than it can be read, its end kept."""

from __future__ import annotations

import errno
import os
import zlib
from pathlib import Path

import numpy as np
import pytest

from normwear_fast.errors import (
    InputError,
    NormWearError,
    RecordingError,
    WeightNamesError,
    WeightsError,
    one_line,
    reading,
    within,
)
from normwear_fast.recordings import open_recording


def test_a_librarys_words_become_one_short_line() -> None:
    assert one_line(ValueError("bad\n  thing\tat\x1b[31m 3\0")) == "bad thing at [31m 3"
    assert one_line(ValueError()) == "ValueError"
    assert one_line("") == ""
    path = "/data/two  spaces.edf"
    assert one_line(OSError(errno.ENOENT, os.strerror(errno.ENOENT), path)) == (
        "No such file or directory"
    )
    quoted = one_line(ValueError("header " + "x" * 40_000 + " ends"))
    assert quoted.startswith("header xxx")
    assert quoted.endswith("xxx ends")
    assert len(quoted) == 300


@pytest.mark.parametrize("kind", [NormWearError, RecordingError, InputError])
def test_an_error_keeps_its_place_and_its_advice(kind: type[NormWearError]) -> None:
    message = f"/data/two  spaces.edf: channel {'A' * 70_000}\nis at 0 Hz; 1 to 100 kHz is right"
    text = str(kind(message))
    assert text.startswith("/data/two  spaces.edf: channel AAA")
    assert text.endswith("is at 0 Hz; 1 to 100 kHz is right")
    assert text.isprintable()
    assert len(text) == kind.longest == 1000
    assert str(kind("/data/two  spaces.edf: is empty")) == "/data/two  spaces.edf: is empty"
    assert str(kind()) == ""


def test_weights_that_differ_are_all_named() -> None:
    names = ", ".join(f"encoder_blocks.{i}.norm.weight" for i in range(600))
    assert names in str(WeightNamesError(f"w.pth: 600 missing: {names}"))
    assert len(str(WeightsError(f"w.pth: holds a {names}"))) == 1000


def test_a_member_name_as_long_as_the_file(tmp_path: Path) -> None:
    """Found in CI by a random damage: zipfile quotes the name that a damaged length makes."""
    path = tmp_path / "rec.npz"
    np.savez(path, data=np.random.default_rng(3).normal(size=(2, 6000)), sampling_rate=50.0)
    content = bytearray(path.read_bytes())
    content[26:28] = b"\xff\xff"
    path.write_bytes(bytes(content))
    with pytest.raises(RecordingError) as refusal:
        open_recording(path)
    assert str(refusal.value).startswith(f"{path}: is no NPZ file: File name in directory")
    assert len(str(refusal.value)) < 400 + len(str(path))


@pytest.mark.parametrize(
    "error", [zlib.error("bad"), MemoryError(), RecursionError(), KeyError("a")]
)
def test_whatever_a_library_raises_is_a_line_of_ours(error: Exception) -> None:
    with (
        pytest.raises(RecordingError, match=r"^x\.npz: no NPZ \(") as caught,
        reading("x.npz", RecordingError, "no NPZ"),
    ):
        raise error
    assert caught.value.__cause__ is error


@pytest.mark.parametrize("error", [InputError("y: its own words"), ImportError("h5py")])
def test_our_own_words_and_a_missing_library_pass(error: Exception) -> None:
    with pytest.raises(type(error), match=f"^{error}$"), reading("x", RecordingError, "is damaged"):
        raise error


def test_a_place_is_named_once() -> None:
    with pytest.raises(InputError, match=r"^l\.csv, line 3: no label$"), within("l.csv, line 3"):
        raise InputError("no label")
    with pytest.raises(InputError, match=r"^l\.csv, line 3: no label$"), within("l.csv"):
        raise InputError("l.csv, line 3: no label")
