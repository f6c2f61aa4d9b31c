"""Pretraining begun anew with --overwrite; its kills are in test_training_kills.py."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pretrain_runs import CPU, SETTINGS, TINY, Waves
from training_kills import result

from normwear_fast.checkpoint import CHECKPOINT_FILE
from normwear_fast.cli.main import main
from normwear_fast.errors import OutputError, UsageError
from normwear_fast.pretrain.trainer import pretrain

SHORT = replace(SETTINGS, steps=2, warmup=1)


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("short")
    pretrain(Waves(), TINY, SHORT, folder, run=CPU)
    return folder


@pytest.mark.parametrize(
    ("shards", "how", "said"),
    [
        (
            Waves(),
            {"run": replace(CPU, accelerator="nothing")},
            "device nothing, devices 1, strategy auto",
        ),
        (Waves(), {"run": replace(CPU, strategy="twofold")}, "devices 1, strategy twofold"),
        ([], {"run": CPU}, "no series to train on"),
    ],
)
def test_an_overwrite_that_is_refused_leaves_the_old_run_whole(
    shards: Any, how: Any, said: str, short: Path
) -> None:
    before = result(short)
    with pytest.raises((OutputError, UsageError), match=said):
        pretrain(shards, TINY, SHORT, short, overwrite=True, **how)
    assert result(short) == before


def test_a_damaged_curve_is_no_reason_not_to_begin_anew(short: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(short, folder)
    with (folder / "steps.csv").open("a") as file:
        file.write("3,much,\n")
    with pytest.raises(OutputError, match=r"steps\.csv: is damaged"):
        pretrain(Waves(), TINY, SHORT, folder, run=CPU)
    pretrain(Waves(), TINY, SHORT, folder, run=CPU, overwrite=True)
    assert result(folder)["steps.csv"] == result(short)["steps.csv"]


def test_settings_may_be_numpys_numbers(tmp_path: Path) -> None:
    """Their checkpoint could not be read: it holds no classes."""
    given = {"base_learning_rate": np.float64(0.1), "seed": np.int64(5), "steps": np.int32(2)}
    settings = replace(SHORT, **given)  # type: ignore[arg-type]
    said: list[str] = []
    for _ in range(2):
        pretrain(Waves(), TINY, settings, tmp_path, run=CPU, say=said.append)
    assert said[-1] == "going on after step 2 of 2"
    assert (tmp_path / CHECKPOINT_FILE).exists()


@pytest.mark.parametrize("name", ["checkpoint-every", "picture-every", "probe-every"])
def test_an_interval_below_zero_is_refused(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """It meant never: a long run without a checkpoint."""
    assert main(["pretrain", "nowhere", "--output", "run", f"--{name}", "-1"]) == 2
    assert f"--{name} is -1; it must be >= 0 (0: never)" in capsys.readouterr().err
