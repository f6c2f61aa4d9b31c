"""`normwear-fast finetune`: tables of labels, stretches, sample sets, and mistakes in one line."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import full_disk
from pulse_windows import RATE, pulse, write_table

from normwear_fast.cli.main import main
from normwear_fast.errors import UsageError
from normwear_fast.finetune import FineTuneSettings, read_labels


def test_rows_that_are_stretches_are_windows_or_are_cut_into_them(tmp_path: Path) -> None:
    names = ["recording", "start_s", "end_s", "value", "subject"]
    rows = [
        ["r0", 0, 4, 54, "a"],
        ["r0", 4, 8, 55, "a"],
        ["r1", 0, 4, 150, "b"],
        ["r1", 4, 5, 1, "b"],
    ]
    table = read_labels(write_table(tmp_path / "labels.csv", names, rows))
    assert table.task.targets == ("value",)
    windows, row_of, short = table.window_list(2.0, 1.0)
    assert windows.recordings["r0"].starts.tolist() == [0, 1, 2, 4, 5, 6]
    assert [row_of["r0", i] for i in windows.recordings["r0"].ids] == [0, 0, 0, 1, 1, 1]
    assert short == 1
    windows, row_of, short = table.window_list(None, None)
    assert windows.recordings["r1"].durations.tolist() == [4, 1]
    assert short == 0
    assert row_of["r1", "3"] == 3


@pytest.mark.parametrize(
    ("names", "rows", "said"),
    [
        ("recording", ["r0"], "no column label"),
        ("recording,label", ["r0,a", "r0,b"], "'r0' has several rows"),
        ("recording,label", ["r0,a", "r1,"], "line 3: no label"),
        ("recording,label", ["r0,a", ",b"], "line 3: no recording"),
        ("recording,label", ["r0,a", "nobody,b"], "nobody, which is not among the inputs"),
        ("recording,label,subject", ["r0,a,x", "r1,b,"], "line 3: no subject"),
        ("recording,label,split", ["r0,a,train", "r1,b,dev"], "line 3: split is 'dev'"),
        ("recording,start_s,label", ["r0,0,a"], "no column duration_s or end_s"),
        ("recording,start_s,end_s,label", ["r0,4,4,a", "r1,0,4,b"], "line 2: a stretch is 0.0 s"),
        ("recording,start_s,end_s,label", ["r0,x,4,a", "r1,0,4,b"], "start_s is 'x'"),
        ("recording,label", ["r0,a", "r1,a"], "class 'a' alone"),
        ("recording,label", ["r0,0.5", "r1,nan"], "line 3: no label"),
        ("recording,label", ["r0,0.5", "r1,inf"], "a finite number is right"),
        ("recording,label", [], "has no rows"),
        ("recording,value", ["r0,1", "r1,high"], "value is 'high'; a number is right"),
    ],
)
def test_a_table_that_is_wrong_is_one_line_before_anything_is_done(
    names: str,
    rows: list[str],
    said: str,
    cohort: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "labels.csv"
    path.write_text("\n".join([names, *rows]) + "\n")
    output = tmp_path / "out"
    arguments = [str(cohort / "recordings"), "--labels", str(path), "--output", str(output)]
    assert main(["finetune", *arguments, "--weights", "nowhere", "--workers", "0"]) == 2
    error = capsys.readouterr().err.strip()
    assert said in error
    assert "\n" not in error
    assert not output.exists()


def test_whole_numbers_are_classes_unless_regression_is_asked_for(tmp_path: Path) -> None:
    path = write_table(
        tmp_path / "a.csv", ["recording", "label", "age"], [["x", 1, 30], ["y", 0, 40]]
    )
    table = read_labels(path)
    assert table.task.classes == ("0", "1")
    assert table.labels.tolist() == [1, 0]
    assert table.subjects == ["x", "y"]  # a recording is a person where nothing says otherwise
    both = read_labels(path, columns=["label", "age"], task="regression")
    assert both.task.targets == ("label", "age")
    assert both.labels.tolist() == [[1, 30], [0, 40]]
    path = write_table(tmp_path / "b.csv", ["recording", "label"], [["x", "1.0"], ["y", "2.5"]])
    assert read_labels(path).task.kind == "reg"
    assert read_labels(path, task="classification").task.classes == ("1", "2.5")


def test_recordings_that_differ_in_channels_are_named(
    cohort: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(cohort / "recordings" / "r0.npz", tmp_path / "r0.npz")
    data = pulse(2.5, 10.0, np.random.default_rng(0))
    np.savez(tmp_path / "r1.npz", data=data, sampling_rate=RATE, channels=np.array(["PPG", "ECG"]))
    labels = write_table(
        tmp_path / "labels.csv", ["recording", "label"], [["r0", "a"], ["r1", "b"]]
    )
    arguments = ["finetune", str(tmp_path), "--labels", str(labels), "--workers", "0"]
    arguments += ["--weights", str(cohort / "weights"), "--output", str(tmp_path / "out")]
    assert main(arguments) == 2
    assert "r0 has ECG, PPG; r1 has PPG, ECG" in capsys.readouterr().err


def test_a_sample_set_trains_and_its_test_half_is_judged(
    data_dir: Path, cohort: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with np.load(data_dir / "imu" / "basic_motions.npz") as arrays:
        half = {name: arrays[name][::2] for name in arrays.files if name[1] == "_"}
        half = {name: value[:, :3, :60] if "x" in name else value for name, value in half.items()}
        np.savez(tmp_path / "motions.npz", sampling_rate=arrays["sampling_rate"], **half)
    arguments = [str(tmp_path / "motions.npz"), "--weights", str(cohort / "weights")]
    arguments += ["--output", str(tmp_path / "out"), "--precision", "float32", "--json"]
    assert main(["finetune", *arguments, "--normalize", "none", "--preprocess", "none"]) == 0
    about = json.loads(capsys.readouterr().out)
    assert about["data"]["windows"] == {"train": 16, "validation": 4, "test": 20}
    assert about["metrics"]["test"]["accuracy"] > 0.6  # 4 classes; random weights
    assert "no window names a subject" in about["data"]["notes"][0]
    assert main(["finetune", *arguments]) == 2
    assert "exists" in capsys.readouterr().err


def test_an_output_that_cannot_be_written_is_refused_before_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And predict's before it predicts: neither the recordings nor the model named are there."""
    with full_disk():
        assert (
            main(["finetune", "nowhere", "--weights", "none", "--output", str(tmp_path / "m")]) == 2
        )
    assert "m: cannot be written (File too large)" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"mode": "half"}, "mode is 'half'"),
        ({"epochs": 0}, "epochs is 0"),
        ({"learning_rate": math.nan}, "learning_rate is nan"),
        ({"validation": 0.0}, "validation is 0.0"),
        ({"layer_decay": 0.0}, "layer_decay is 0.0"),
    ],
)
def test_settings_out_of_range_are_named(arguments: Any, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        FineTuneSettings(**arguments)
