"""The scripts of examples/, run as a reader of examples/README.md runs them."""

from __future__ import annotations

import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
SCRIPTS: dict[str, tuple[str, ...]] = {
    "embed_arrays.py": (),
    "encode_cohort.py": ("pandas", "wfdb", "edfio"),
    "probe_activity.py": ("sklearn",),
    "fine_tune.py": (),
}
"""Each with the packages of its extras."""


def printed(name: str, folder: Path) -> str:
    """What a script prints; it must succeed and leave nothing behind."""
    for package in SCRIPTS[name]:
        pytest.importorskip(package)
    done = subprocess.run(
        [sys.executable, EXAMPLES / name],
        cwd=folder,
        env=os.environ | {"TMPDIR": str(folder)},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    left = {path.name for path in folder.iterdir()}
    assert {
        name for name in left if not name.startswith("torchinductor_")
    } == set()  # torch's cache
    return done.stdout


def test_the_table_names_every_script() -> None:
    scripts = {path.name for path in EXAMPLES.glob("*.py")}
    assert scripts == set(SCRIPTS)
    assert set(re.findall(r"\]\((\w+\.py)\)", (EXAMPLES / "README.md").read_text())) == scripts


def test_embed_arrays(tmp_path: Path) -> None:
    out = printed("embed_arrays.py", tmp_path)
    assert "channels='mean' (B, E): (2, 128)" in out
    assert "channels='keep' (C, E): (6, 128) (1, 128)" in out
    imu, ppg = (float(value) for value in re.findall(r"(?:IMU|PPG) (-?\d\.\d+)", out))
    assert imu > 0.8 > ppg  # raw counts are elsewhere, as the script says


def test_encode_cohort(tmp_path: Path) -> None:
    out = printed("encode_cohort.py", tmp_path)
    assert re.search(r"ecg/mitdb_100 +20 +\(2, 128\)", out)
    assert out.endswith("64 windows, 6.4 minutes encoded\n")


def test_probe_activity(tmp_path: Path) -> None:
    out = printed("probe_activity.py", tmp_path)
    score, _ = (float(value) for value in re.findall(r"accuracy (\d\.\d+) on 24 windows", out))
    assert score > 0.4  # chance is 0.25
    assert "no evidence" in out


def test_fine_tune(tmp_path: Path) -> None:
    out = printed("fine_tune.py", tmp_path)
    head, tuned = (float(value) for value in re.findall(r"RMSE (\d+\.\d) dB", out))
    assert 0 < head < 8  # ratios drawn from 30 dB deviate by 8.7
    assert 0 < tuned < 8


@pytest.mark.parametrize("name", SCRIPTS)
def test_missing_weights_are_one_line(
    name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A copy of a script beside the recordings, without the weights; in this process, for its imports."""
    for package in SCRIPTS[name]:
        pytest.importorskip(package)
    shutil.copytree(EXAMPLES / "cohort", tmp_path / "cohort")
    shutil.copy2(EXAMPLES / name, tmp_path)
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(tmp_path / name), run_name="__main__")
    # The command has said it itself, and left its exit code.
    said = capfd.readouterr().err if end.value.code == 2 else f"{end.value.code}\n"
    assert re.fullmatch(r"(normwear-fast: )?error: .*no such weights file or folder.*\n", said)


def test_a_missing_extra_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.linear_model", None)
    with pytest.raises(SystemExit, match=r"scikit-learn; pip install 'normwear-fast\[eval\]'"):
        runpy.run_path(str(EXAMPLES / "probe_activity.py"), run_name="__main__")
