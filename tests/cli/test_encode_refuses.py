"""`normwear-fast encode`: one line for every mistake, bad recording, bad weights or full disk."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cli_runs import encode, one_error
from payload import Payload

from normwear_fast import FastNormWear, NormWearConfig, load_embeddings


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere.edf"], "nowhere.edf: no such file or folder"),
        (["{in}", "--window", "0.1"], "window of 0.1 s is 6 samples at 65 Hz; 11"),
        (["{in}", "--window", "six"], "argument --window: invalid float value: 'six'"),
        (["{in}", "--channels", "ECG,EEG"], "no recording has a channel EEG; there are ECG, PPG"),
        (["{in}", "--windows", "no.csv"], "no.csv: no such list of windows"),
        (["{in}", "--windows", "w.csv", "--hop", "3"], "leave out --window and --hop"),
        (["{in}", "--precision", "float8"], "precision 'float8' does not exist"),
        (["{in}", "--device", "tpu"], "--device tpu: it must be auto, cpu"),
        (["{in}", "--workers", "-1"], "--workers -1: it must be 0 or more"),
        (["{in}", "--normalize", "recording"], "choose preprocess 'none'"),
        (["{in}", "--model-size", "small"], "--model-size is for --random-weights"),
        (["{in}", "--max-missing", "2"], "max_missing is 2.0; it must be between 0 and 1"),
        (["{in}", "--pool", "max"], "argument --pool: invalid choice: 'max'"),
    ],
)
def test_wrong_usage_is_one_line(
    words: list[str],
    message: str,
    recordings: Path,
    weights: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = [word.replace("{in}", str(recordings)) for word in words]
    assert encode(*words, "--weights", weights, "--output", tmp_path / "out") == 2
    assert message in one_error(capsys)
    assert not (tmp_path / "out").exists()


def empty_file(folder: Path, data: Path) -> str:
    (folder / "x.csv").touch()
    return "is empty (0 bytes)"


def truncated_dat(folder: Path, data: Path) -> str:
    shutil.copy(data / "03700181.hea", folder)
    whole = (data / "03700181.dat").read_bytes()
    (folder / "03700181.dat").write_bytes(whole[: len(whole) // 2])
    return "03700181"


def lying_edf(folder: Path, data: Path) -> str:
    header = bytearray((data / "a103l_two_rates.edf").read_bytes())
    header[236:244] = b"99999999"  # number of data records
    (folder / "x.edf").write_bytes(header)
    return "x.edf"


def text_in_csv(folder: Path, data: Path) -> str:
    (folder / "x.csv").write_text("time_s,ppg\n" + "".join(f"{i / 65},{i}\n" for i in range(700)))
    with (folder / "x.csv").open("a") as file:
        file.write("10.8,high\n")
    return "high"


def no_signal(folder: Path, data: Path) -> str:
    shutil.copy(data / "test_edfann.edf", folder)
    return "holds no signal"


def too_short(folder: Path, data: Path) -> str:
    np.savez(folder / "x.npz", data=np.zeros((1, 100)), sampling_rate=65.0)
    return "x.npz: lasts 1.538 s, less than a window of 6 s"


def no_rate(folder: Path, data: Path) -> str:
    np.save(folder / "x.npy", np.zeros((1, 1000)))
    return "--rate"


def a_pickle(folder: Path, data: Path) -> str:
    np.save(folder / "x.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    return "x.npy"


@pytest.mark.parametrize(
    "make",
    [
        empty_file,
        truncated_dat,
        lying_edf,
        text_in_csv,
        no_signal,
        too_short,
        no_rate,
        a_pickle,
    ],
)
def test_recordings_that_cannot_be_encoded_are_listed(
    make: Any, weights: Path, data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Alone: one line and no output. Beside a good one: listed, and the good one is done."""
    folder = tmp_path / "in"
    folder.mkdir()
    message = make(folder, data_dir)
    words = [folder, "--weights", weights, "--output", tmp_path / "out"]
    assert encode(*words) == 1
    assert message in one_error(capsys)
    assert not (tmp_path / "out").exists()

    np.savez(
        folder / "good.npz", data=np.random.default_rng(0).random((1, 800)), sampling_rate=65.0
    )
    assert encode(*words, "--json") == 1
    said = capsys.readouterr()
    summary = json.loads(said.out)
    assert len(summary["failed"]) == 1
    assert [line for line in said.err.splitlines() if message in line]
    assert load_embeddings(tmp_path / "out").recording.tolist() == ["good", "good"]
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["failed"] == summary["failed"]


@pytest.mark.parametrize("seed", ["99999999999999999999999", str(2**63), "-1", "x"])
def test_a_seed_is_a_whole_number(
    seed: str, recordings: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = encode(recordings, f"--random-weights={seed}", "--output", tmp_path / "out")
    assert code == 2
    assert f"--random-weights: {seed} is no seed" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU may have fp8")
def test_a_dry_run_refuses_what_the_run_does(
    recordings: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = []
    for extra in (["--dry-run"], ["--random-weights", "0", "--output", tmp_path / "out"]):
        assert encode(recordings, "--precision", "fp8", *extra) == 2
        said.append(capsys.readouterr().err)
    assert said[0] == said[1]
    assert "precision 'fp8' needs backend 'triton' on a GPU" in said[0]


def code_in_weights(folder: Path) -> str:
    (folder / "w.pth").write_bytes(pickle.dumps({"model": Payload(folder / "ran")}))
    return "w.pth"


def another_size(folder: Path) -> str:
    torch.save(FastNormWear(True, config=NormWearConfig.small()).state_dict(), folder / "w.pth")
    return "w.pth"


def not_weights(folder: Path) -> str:
    (folder / "w.pth").write_bytes(b"not weights at all")
    return "w.pth"


@pytest.mark.parametrize("make", [code_in_weights, another_size, not_weights])
def test_bad_weights_are_refused(
    make: Any,
    recordings: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    message = make(tmp_path)
    assert encode(recordings, "--weights", tmp_path / "w.pth", "--output", "out") == 2
    assert message in one_error(capsys)
    assert os.listdir(tmp_path) == ["w.pth"]


def test_an_output_without_permission_is_one_line(
    recordings: Path,
    weights: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o555)
    if os.geteuid() == 0:  # whom no mode stops

        def refuse(*args: object, **options: object) -> None:
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(Path, "mkdir", refuse)
    assert encode(recordings, "--weights", weights, "--output", locked / "out") == 2
    assert "no permission to write there" in one_error(capsys)


def test_an_output_that_is_a_file_is_one_line(
    recordings: Path, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").write_text("mine")
    for output in ("out", "out/deeper"):
        assert encode(recordings, "--weights", weights, "--output", tmp_path / output) == 2
        assert "a file is in the way" in one_error(capsys)
    assert (tmp_path / "out").read_text() == "mine"


def test_a_disk_full_in_the_middle_is_said_and_the_run_goes_on(
    recordings: Path,
    weights: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Exit code 1: something was encoded, and the same command goes on."""
    synced, calls = os.fsync, []

    def full(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) > 3:  # file, folder and its parent, of the manifest
            raise OSError(28, "No space left on device")
        synced(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    words = [recordings, "--weights", weights, "--output", tmp_path / "out"]
    assert encode(*words) == 1
    assert "no space left on its device; free some and run the same" in capsys.readouterr().err
    assert os.listdir(tmp_path / "out") == ["manifest.json"]
    monkeypatch.undo()
    assert encode(*words) == 0
