"""`normwear-fast encode`: what it prints and writes, plans, skips, and says when interrupted."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_runs import encode, one_error

from normwear_fast import load_embeddings
from normwear_fast.cli import encode as encode_command
from normwear_fast.cli.main import main
from normwear_fast.encode.settings import join_names, split_names
from normwear_fast.encode.windows import select_channels
from normwear_fast.errors import RecordingError
from normwear_fast.recordings import Channel


def test_encode_then_again_then_overwrite(
    recordings: Path, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [recordings, "--weights", weights, "--output", tmp_path / "out", "--device", "cpu"]
    assert encode(*words) == 0
    said = capsys.readouterr()
    assert "3 of 3 windows encoded" in said.out
    assert "random" not in said.out
    assert said.err.startswith("encoding 3 windows\n")
    table = load_embeddings(tmp_path / "out")
    assert table.recording.tolist() == ["one", "one", "two"]
    assert table.channels[0].tolist() == ["ECG", "PPG"]
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["state"] == "complete"
    assert len(manifest["model"]["weights"]["sha256"]) == 64

    assert encode(*words) == 0
    assert "This run was complete already" in capsys.readouterr().out

    assert encode(*words, "--pool", "cls") == 2
    assert "pool was mean, now cls" in one_error(capsys)
    assert encode(*words, "--pool", "cls", "--overwrite", "--json") == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["complete"]
    assert summary["ok"] == summary["encoded_now"] == 3
    assert set(summary["seconds"]) == {"read", "prepare", "encode", "write", "wall"}


def test_random_weights_are_said_to_mean_nothing(
    recordings: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--random-weights", "3", "--model-size", "small", "--channels", "PPG"]
    assert encode(recordings / "two.npz", "--output", tmp_path / "out", *options) == 0
    assert "random (seed 3): these embeddings mean nothing" in capsys.readouterr().out
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["model"]["weights"] == {"source": "random", "seed": 3}
    assert load_embeddings(tmp_path / "out").embedding[0].shape == (1, 128)


def test_dry_run_needs_no_weights_and_writes_nothing(
    recordings: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [recordings, "--dry-run", "--window", "3", "--output", tmp_path / "out"]
    assert encode(*words) == 0
    # 195 samples: N = 193 is odd, 193 rows, 21 rows of patches, 274 tokens a channel.
    assert "would encode 6 windows (12 channel-windows, 3,288 tokens) of 2" in (
        capsys.readouterr().out
    )
    assert encode(*words, "--json") == 0
    plan = json.loads(capsys.readouterr().out)
    assert (plan["windows"], plan["tokens"]) == (6, 3288)
    assert [entry["windows"] for entry in plan["inputs"]] == [4, 2]
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_plans_the_model_that_the_run_would_load(
    recordings: Path, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def planned(*words: object) -> dict[str, Any]:
        assert encode(recordings, "--dry-run", "--json", *words) == 0
        return json.loads(capsys.readouterr().out)

    base = planned()
    assert base["model"]["embed_dim"] == 768
    assert base["model"]["origin"] == "the released sizes, as nothing said others"
    given = planned("--weights", weights)
    assert (given["model"]["embed_dim"], given["model"]["depth"]) == (64, 2)
    assert given["model"]["origin"] == f"{weights}, from config.json"
    assert given["output_bytes"] < base["output_bytes"] / 4
    assert given["flops"] < base["flops"] / 100
    small = planned("--random-weights", 0, "--model-size", "small")
    assert small["model"]["embed_dim"] == 128
    assert planned("--random-weights", 0)["model"]["embed_dim"] == 768
    assert encode(recordings, "--dry-run") == 0
    assert "embed_dim 768, depth 12; the released sizes" in capsys.readouterr().out

    # Weights that the run would refuse are refused: nothing says that these are not the released size.
    shutil.copy(weights / "model.safetensors", tmp_path)
    refused = []
    for extra in (["--dry-run"], ["--output", tmp_path / "out"]):
        assert encode(recordings, "--weights", tmp_path, *extra) == 2
        refused.append(one_error(capsys))
    assert refused[0] == refused[1]
    assert "not weights of these sizes (embed_dim 768" in refused[0]


def test_channels_whose_names_have_commas_are_quoted(
    weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ["ECG, lead I", "PPG", 'the "red"']
    data = np.random.default_rng(0).standard_normal((3, 65 * 7))
    np.savez(tmp_path / "x.npz", data=data, sampling_rate=65.0, channels=names)
    words = [tmp_path / "x.npz", "--weights", weights, "--output", tmp_path / "out"]
    assert encode(*words, "--channels", 'PPG, "ECG, lead I"') == 0
    assert load_embeddings(tmp_path / "out").channels[0].tolist() == ["PPG", "ECG, lead I"]
    capsys.readouterr()
    assert encode(*words, "--channels", '"ECG, lead I') == 2
    assert 'argument --channels: "ECG, lead I is no list of channels' in one_error(capsys)
    assert split_names(join_names(names)) == tuple(names)
    assert join_names(names) == '"ECG, lead I", PPG, "the ""red"""'
    # The names that an error lists can be copied.
    with pytest.raises(RecordingError) as caught:
        select_channels([Channel(name, "", 65.0, 1) for name in names], ["EEG"])
    assert str(caught.value) == f"has no channel EEG; it has {join_names(names)}"
    for command in ("encode", "plan", "prepare", "finetune", "zeroshot"):
        main([command, "--help"])
        said = " ".join(capsys.readouterr().out.split())  # its lines are as wide as the terminal
        assert """'"ECG, lead I",PPG'""" in said, command


def test_a_name_that_can_be_no_id_is_one_failed_recording(
    recordings: Path, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in (b"a\nb.npz", b"\xff.npz", b"good.npz"):
        shutil.copy(recordings / "two.npz", os.fsdecode(os.fsencode(tmp_path) + b"/" + name))
    words = [tmp_path, "--weights", weights, "--output", tmp_path / "out"]
    assert encode(*words) == 1
    said = capsys.readouterr()
    assert "1 of 1 windows encoded\n2 of 3 recordings failed: \\xff, a\\nb\n" in said.out
    assert f"{tmp_path}/a\\nb.npz: its name has characters no id can have; rename it" in said.err
    assert load_embeddings(tmp_path / "out").recording.tolist() == ["good"]
    assert encode(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.npz"), *words[1:]) == 2
    assert "\\xff.npz: its name" in one_error(capsys)


def test_ctrl_c_says_how_to_go_on(
    recordings: Path,
    weights: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    words = [recordings, "--weights", weights, "--output", tmp_path / "out", "--hop", "0.02"]

    class Interrupting(encode_command._Lines):
        def advance(self, windows: int) -> None:
            if signal.getsignal(signal.SIGINT) is not signal.SIG_DFL:  # a second one would kill
                signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(encode_command, "make_progress", Interrupting)
    assert encode(*words) == 130
    assert "the same command goes on from there" in capsys.readouterr().out
    monkeypatch.undo()
    assert encode(*words) == 0
    table = load_embeddings(tmp_path / "out")
    assert len(table) == 301 + 51
    assert not table.duplicated(["recording", "window_id"]).any()


def test_ctrl_c_in_a_terminal_with_readers(recordings: Path, weights: Path, tmp_path: Path) -> None:
    """The whole group of processes gets the signal; only the run answers, and no reader complains."""
    words = ["encode", recordings, "--weights", weights, "--output", tmp_path / "out"]
    command = [sys.executable, "-m", "normwear_fast.cli", *map(str, words), "--workers", "2"]
    run = subprocess.Popen(
        [*command, "--hop", "0.005"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert run.stderr is not None
    assert run.stderr.readline() == "encoding 1,402 windows\n"
    time.sleep(0.3)
    os.killpg(run.pid, signal.SIGINT)
    out, err = run.communicate(timeout=60)
    assert run.returncode == 130
    assert "the same command goes on from there" in out
    assert "Traceback" not in err


def test_progress_lines_and_bar(
    recordings: Path,
    weights: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(encode_command, "LINE_SECONDS", 0.0)
    assert encode(recordings, "--weights", weights, "--output", tmp_path / "lines") == 0
    said = capsys.readouterr().err
    assert "looked at 2 of 2 recordings" in said
    assert "3 of 3 windows, " in said
    monkeypatch.setattr(encode_command, "make_progress", encode_command._Bar)
    assert encode(recordings, "--weights", weights, "--output", tmp_path / "bar") == 0
    assert "3/3" in capsys.readouterr().err


def test_a_channel_some_recordings_lack_fails_those_alone(
    recordings: Path, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(recordings / "one.npz", tmp_path)
    np.savez(tmp_path / "eeg.npz", EEG=np.ones(800), sampling_rate=65.0)
    words = [tmp_path, "--weights", weights, "--output", tmp_path / "out", "--channels", "ECG"]
    assert encode(*words) == 1
    assert "eeg.npz: has no channel ECG; it has EEG" in capsys.readouterr().err
    assert len(load_embeddings(tmp_path / "out")) == 2


def test_nan_is_a_skipped_row(
    weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = np.random.default_rng(0).random((2, 65 * 18))
    data[0, 400:900] = np.nan
    np.savez(tmp_path / "x.npz", data=data, sampling_rate=65.0)
    assert encode(tmp_path / "x.npz", "--weights", weights, "--output", tmp_path / "out") == 0
    assert "1 of 3 windows encoded; 2 skipped (2 for missing data)" in capsys.readouterr().out


def test_the_channels_that_lacked_data_are_named(
    weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = np.random.default_rng(0).random((5, 65 * 18))
    data[1] = np.nan
    data[0, :500] = np.nan
    data[3:, :1] = np.nan  # less than a tenth of a window
    names = ["ECG", "PPG", "EDA", "ACC x", "ACC y"]
    np.savez(tmp_path / "x.npz", data=data, sampling_rate=65.0, channels=names)
    words = [tmp_path / "x.npz", "--weights", weights, "--output", tmp_path / "out"]
    assert encode(*words) == 0
    wanted = "lacked data most: PPG in 3 of the windows skipped for it, ECG in 2\n"
    assert wanted in capsys.readouterr().out
    assert encode(*words, "--json") == 0  # complete already: the parts know
    assert json.loads(capsys.readouterr().out)["lacking"] == {"PPG": 3, "ECG": 2}
    assert encode(*words, "--overwrite", "--max-missing", "0", "--json") == 0
    assert json.loads(capsys.readouterr().out)["lacking"]["ACC y"] == 1
    assert encode(*words, "--overwrite", "--max-missing", "0") == 0
    assert "ECG in 2, ACC x in 1, and 1 more (--json has all)\n" in capsys.readouterr().out
    assert encode(*words, "--overwrite", "--max-missing", "1", "--json") == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["skipped"] == {"no data in a channel": 3}
    assert summary["lacking"] == {"PPG": 3, "ECG": 1}


def test_stderr_that_the_shell_has_closed_costs_nothing(recordings: Path, tmp_path: Path) -> None:
    """Nobody hears of the progress, and no file takes the number that libraries print to."""
    words = ["encode", recordings, "--random-weights", "0", "--model-size", "small", "--json"]
    command = shlex.join(map(str, [sys.executable, "-m", "normwear_fast.cli", *words]))
    for number, closed in enumerate(("2>&-", "0<&- 1>&- 2>&-")):
        output = tmp_path / f"out{number}"
        done = subprocess.run(
            ["sh", "-c", f"{command} --output {shlex.quote(str(output))} {closed}"],
            capture_output=True,
            check=False,
        )
        assert done.returncode == 0
        assert len(load_embeddings(output)) == 3
        assert number or json.loads(done.stdout)["ok"] == 3  # nothing but the summary
