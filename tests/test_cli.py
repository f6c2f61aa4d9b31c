"""The command line: what it prints, its exit codes, and one line for every mistake."""

from __future__ import annotations

import argparse
import json
import os
import pickle
import shlex
import shutil
import signal
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import full_disk

from normwear_fast import FastNormWear, NormWearConfig, __version__, load_embeddings
from normwear_fast.cli import encode as encode_command
from normwear_fast.cli.main import COMMANDS, build_parser, main
from normwear_fast.encode.settings import join_names, split_names
from normwear_fast.encode.windows import select_channels
from normwear_fast.errors import RecordingError
from normwear_fast.recordings import Channel

TINY = NormWearConfig(
    embed_dim=64, depth=2, num_heads=1, decoder_embed_dim=64, decoder_num_heads=1, decoder_depth=1
)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weights")
    FastNormWear(True, config=TINY).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def recordings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recordings")
    rng = np.random.default_rng(0)
    for name, seconds in (("one", 12.0), ("two", 7.0)):
        data = rng.standard_normal((2, round(65 * seconds)))
        np.savez(folder / f"{name}.npz", data=data, sampling_rate=65.0, channels=["ECG", "PPG"])
    return folder


def encode(*words: object) -> int:
    """In this process alone, unless the words say otherwise: readers take a moment to start."""
    return main(["encode", "--workers", "0", *map(str, words)])


def one_error(capsys: pytest.CaptureFixture[str]) -> str:
    """The single line that stderr must hold."""
    lines = [line for line in capsys.readouterr().err.splitlines() if "warning:" not in line]
    assert len(lines) == 1, lines
    assert lines[0].startswith("normwear-fast: error: ")
    return lines[0]


# --- what works --------------------------------------------------------------------------------------


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


def test_channels_whose_names_have_commas(
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


def test_convert(weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = tmp_path / "checkpoint.pth"
    state = FastNormWear(True, config=TINY).state_dict()
    torch.save({"model": {f"module.{k}": v for k, v in state.items()}}, checkpoint)
    shutil.copy(weights / "config.json", tmp_path)
    assert main(["convert", str(checkpoint), "--output", str(tmp_path / "new"), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["names"] == len(state)
    again = FastNormWear.from_pretrained(tmp_path / "new").state_dict()
    assert all(torch.equal(again[name], value) for name, value in state.items())
    again = ["convert", str(checkpoint), "--output", str(tmp_path / "new")]
    assert main([*again, "--overwrite"]) == 0
    assert report["sha256"] in capsys.readouterr().out
    assert main(again) == 2
    assert "new/model.safetensors: exists; choose another folder" in capsys.readouterr().err
    with full_disk():
        assert main(["convert", str(checkpoint), "--output", str(tmp_path / "full")]) == 2
    assert "full: cannot be written (File too large)" in capsys.readouterr().err
    assert not (tmp_path / "full").exists()


def test_every_command_has_help_with_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    for name in COMMANDS:
        assert main([name, "--help"]) == 0
        said = capsys.readouterr().out
        assert f"normwear-fast {name}" in said.split("example:")[1]
    assert main(["--help"]) == 0
    said = capsys.readouterr().out
    assert set(COMMANDS) <= set(said.split("commands:")[1].split())
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"normwear-fast {__version__}\n"


def test_only_the_chosen_command_is_imported() -> None:
    code = (
        "import sys; from normwear_fast.cli.main import build_parser; build_parser('encode'); "
        "print(sorted(m for m in sys.modules if m.startswith('normwear_fast.cli.') or "
        "m in ('torch', 'pyarrow', 'scipy', 'wfdb', 'pandas', 'matplotlib')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['normwear_fast.cli.encode', 'normwear_fast.cli.main']"


def test_commands_are_as_the_table_says() -> None:
    for name, (module, _) in COMMANDS.items():
        assert isinstance(build_parser(name), argparse.ArgumentParser)
        assert callable(import_module(module).run)


# --- what does not -----------------------------------------------------------------------------------


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


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["encod"], "invalid choice: 'encod'"),
        (["encode"], "the following arguments are required: INPUT"),
        (["encode", "{in}", "--output", "o"], "--weights W is needed (or --random-weights"),
        (["encode", "{in}", "--random-weights", "0"], "--output DIR is needed"),
        (["convert", "nowhere.pth", "--output", "o"], "nowhere.pth: no such weights file"),
    ],
)
def test_wrong_commands_are_one_line(
    words: list[str], message: str, recordings: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([word.replace("{in}", str(recordings)) for word in words]) == 2
    assert message in one_error(capsys)


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
def test_recordings_that_cannot_be_encoded(
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


def test_a_channel_some_recordings_lack(
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


def test_stderr_that_the_shell_has_closed(recordings: Path, tmp_path: Path) -> None:
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


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("extra", [[], ["--json"]])
def test_printing_to_a_full_disk(extra: list[str], recordings: Path) -> None:
    words = [sys.executable, "-m", "normwear_fast.cli", "inspect", str(recordings), *extra]
    with open("/dev/full", "w") as full:
        done = subprocess.run(words, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        "normwear-fast: error: standard output: cannot be written (No space left on device)"
    ]


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


MISSING = [
    ("sklearn", ["probe", "nowhere", "--baseline", "raw"], "probing needs scikit-learn", "eval"),
    (
        "matplotlib",
        ["probe", "nowhere", "--baseline", "raw", "--output", "OUT"],
        "needs matplotlib",
        "plots",
    ),
    (
        "lightning_fabric",
        ["finetune", "x", "--weights", "w", "--output", "OUT"],
        "needs lightning-f",
        "train",
    ),
    (
        "sklearn",
        ["finetune", "x", "--weights", "w", "--output", "OUT"],
        "needs scikit-learn",
        "train",
    ),
    (
        "matplotlib",
        [
            "zeroshot",
            "x",
            "--question",
            "q",
            "--option",
            "a",
            "--option",
            "b",
            "--weights",
            "w",
            "--picture",
            "OUT.png",
        ],
        "--picture needs matplotlib",
        "plots",
    ),
    (
        "zarr",
        ["encode", "RECORDINGS", "--random-weights", "0", "--output", "OUT", "--pool", "patch"],
        "needs zarr",
        "io",
    ),
    (
        "ray",
        ["encode", "RECORDINGS", "--random-weights", "0", "--output", "OUT", "--engine", "ray"],
        "needs Ray",
        "ray",
    ),
]


@pytest.mark.parametrize(("module", "words", "message", "extra"), MISSING)
def test_a_missing_extra_is_named_before_the_work(
    module: str, words: list[str], message: str, extra: str, recordings: Path, tmp_path: Path
) -> None:
    """In a process where the module cannot be imported, as in a plain install."""
    places = {"OUT": tmp_path / "out", "OUT.png": tmp_path / "out.png", "RECORDINGS": recordings}
    code = (
        "import sys\n"
        f"sys.modules[{module!r}] = None\n"
        "from normwear_fast.cli.main import main\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    given = [str(places.get(word, word)) for word in words]
    done = subprocess.run(
        [sys.executable, "-c", code, *given], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert message in done.stderr
    assert f"pip install 'normwear-fast[{extra}]'" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not places["OUT"].exists()


class Malicious:
    def __reduce__(self) -> Any:
        return os.mkdir, ("pwned",)


def code_in_weights(folder: Path) -> str:
    (folder / "w.pth").write_bytes(pickle.dumps({"model": Malicious()}))
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


def test_no_permission(
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


def test_output_that_is_a_file(
    recordings: Path, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").write_text("mine")
    for output in ("out", "out/deeper"):
        assert encode(recordings, "--weights", weights, "--output", tmp_path / output) == 2
        assert "a file is in the way" in one_error(capsys)
    assert (tmp_path / "out").read_text() == "mine"


def test_disk_full_in_the_middle(
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


def test_the_installed_command(recordings: Path, tmp_path: Path) -> None:
    """As users call it: exit codes and streams of a real process, also into a closed pipe."""
    script = Path(sys.executable).with_name("normwear-fast")
    command = [str(script)] if script.exists() else [sys.executable, "-m", "normwear_fast.cli"]
    wrong = subprocess.run(
        [*command, "encode", "nowhere"], capture_output=True, text=True, check=False
    )
    assert wrong.returncode == 2
    assert wrong.stdout == ""
    assert len(wrong.stderr.splitlines()) == 1
    dry = [*command, "encode", str(recordings), "--dry-run"]
    head = subprocess.run(f"{' '.join(dry)} | true", shell=True, capture_output=True, check=False)
    assert b"Traceback" not in head.stderr
