"""Labels that leave too little: one line that says what would be right, never a traceback."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from pulse_windows import RATE, encoder, pulse, pulses, write_table

from normwear_fast.cli.main import main
from normwear_fast.errors import InputError
from normwear_fast.finetune import LabelledWindows
from normwear_fast.finetune.split import split_windows


@pytest.mark.parametrize(
    ("labels", "people", "said"),
    [
        ("aabbccdd", "11223344", r"class '\w' is in validation only"),  # a class is a person
        ("abcdefgh", "12345678", r"class '\w' is in validation only"),  # one window each
        ("ab", "12", r"class '\w' is in validation only"),
    ],
)
def test_classes_of_fewer_windows_than_folds(labels: str, people: str, said: str) -> None:
    """scikit-learn's folds ended in a ValueError of its own."""
    windows = pulses(4, 2)[0][: len(labels)]
    data = LabelledWindows.from_arrays(windows, list(labels), RATE, subjects=list(people))
    with pytest.raises(InputError, match=said):
        split_windows(data, 0.2, 0)


def test_two_windows_of_each_class_are_enough() -> None:
    data = LabelledWindows.from_arrays(pulses(2, 2)[0], list("abab"), RATE, subjects=list("1122"))
    split = split_windows(data, 0.2, 0)
    assert (len(split.train), len(split.validation)) == (2, 2)


def test_why_no_window_is_left_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        data = pulse(1.0, 10.0, rng)
        np.savez(tmp_path / f"{name}.npz", data=data, sampling_rate=RATE)
    (tmp_path / "c.npz").write_bytes(b"PK\x03\x04 no more")
    (tmp_path / "d.npz").write_bytes(b"PK\x03\x04 no more")
    encoder().save_pretrained(tmp_path / "weights")
    arguments = ["finetune", str(tmp_path), "--weights", str(tmp_path / "weights")]
    arguments += ["--output", str(tmp_path / "out"), "--workers", "0", "--labels"]
    for first, second, said in (
        ("a", "b", "a.npz: lasts 10 s, less than a window of 30 s (of 2 recordings the first)"),
        ("c", "d", f"no recording gives a labelled window: {tmp_path / 'c.npz'}: "),
    ):
        rows = [[first, "x"], [second, "y"]]
        labels = write_table(tmp_path / "labels.csv", ["recording", "label"], rows)
        assert main([*arguments, str(labels), "--window", "30"]) == 2
        error = capsys.readouterr().err.strip()
        assert said in error
        assert "\n" not in error
