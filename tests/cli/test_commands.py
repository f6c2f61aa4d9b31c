"""Every command: help, imports, extras that are missing, mistakes in one line, real processes."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch
from cli_runs import TINY, one_error
from helpers import full_disk

from normwear_fast import FastNormWear, __version__
from normwear_fast.cli.main import COMMANDS, main


def test_convert_writes_the_same_weights(
    weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
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
    for name, (module, _) in COMMANDS.items():
        assert callable(import_module(module).run)
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


WORK = "encode RECORDINGS --random-weights 0 --output OUT"


@pytest.mark.parametrize(
    ("module", "words", "message", "extra"),
    [
        ("sklearn", "probe nowhere --baseline raw", "probing needs scikit-learn", "eval"),
        ("matplotlib", "probe nowhere --baseline raw --output OUT", "needs matplotlib", "plots"),
        ("lightning_fabric", "finetune x --weights w --output OUT", "needs lightning-f", "train"),
        ("sklearn", "finetune x --weights w --output OUT", "needs scikit-learn", "train"),
        (
            "matplotlib",
            "zeroshot x --question q --option a --option b --weights w --picture OUT.png",
            "--picture needs matplotlib",
            "plots",
        ),
        ("zarr", f"{WORK} --pool patch", "needs zarr", "io"),
        ("ray", f"{WORK} --engine ray", "needs Ray", "ray"),
    ],
)
def test_a_missing_extra_is_named_before_the_work(
    module: str, words: str, message: str, extra: str, recordings: Path, tmp_path: Path
) -> None:
    """In a process where the module cannot be imported, as in a plain install."""
    places = {"OUT": tmp_path / "out", "OUT.png": tmp_path / "out.png", "RECORDINGS": recordings}
    code = (
        "import sys\n"
        f"sys.modules[{module!r}] = None\n"
        "from normwear_fast.cli.main import main\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    given = [str(places.get(word, word)) for word in words.split()]
    done = subprocess.run(
        [sys.executable, "-c", code, *given], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert message in done.stderr
    assert f"pip install 'normwear-fast[{extra}]'" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_the_installed_command(recordings: Path) -> None:
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
