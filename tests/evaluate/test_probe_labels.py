"""A label that a data set does not have is never replaced by the one it has."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from normwear_fast.cli.main import main


@pytest.mark.parametrize("form", ["folder", "npz"])
def test_a_label_of_a_form_with_one_is_refused(
    form: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It was ignored, and scores of another label printed."""
    windows = np.random.default_rng(0).standard_normal((8, 1, 130))
    labels = np.array([0, 1] * 4)
    path = tmp_path / "set.npz"
    np.savez(
        path,
        sampling_rate=65.0,
        x_train=windows,
        y_train=labels,
        x_test=windows,
        y_test=labels,
    )
    if form == "folder":
        path = tmp_path / "set"
        path.mkdir()
        rows = ["file,label,subject,sampling_rate"]
        for i, window in enumerate(windows):
            np.save(path / f"{i}.npy", window)
            rows.append(f"{i}.npy,{'ab'[i % 2]},{i // 2},65")
        (path / "labels.csv").write_text("\n".join(rows) + "\n")
    command = ["probe", str(path), "--baseline", "statistics", "--no-cache", "--resamples", "0"]
    assert main([*command, "--label", "stress"]) == 2
    error = capsys.readouterr().err
    assert f"{path}: --label stress: its label is label" in error
    assert main([*command, "--label", "label"]) == 0
