"""`normwear-fast inspect`: the example cohort, its table and JSON, failures, and wrong usage."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from recording_checks import signal
from recording_writers import write_brainvision, write_e4, write_fif, write_h5, write_zarr

from normwear_fast.cli import inspect
from normwear_fast.cli.main import main
from normwear_fast.recordings import find_recordings


def test_the_example_cohort_is_what_its_readme_says(cohort_dir: Path) -> None:
    found = find_recordings([cohort_dir])
    assert len(found) == 11
    assert sum(p.stat().st_size for p in cohort_dir.rglob("*") if p.is_file()) < 3_000_000
    described = {one.id: inspect.describe(one) for one in found}
    assert sum(one["duration_s"] for one in described.values()) == pytest.approx(418.2, abs=0.1)
    assert {one["format"] for one in described.values()} == {"WFDB", "EDF", "CSV", "NPZ"}
    readme = (cohort_dir / "README.md").read_text()
    for one in found:
        assert f"`{one.id}`" in readme or f"`{one.id.split('/')[0]}/*`" in readme


def _inspect(*words: str) -> int:
    return main(["inspect", *words])


def test_inspect_prints_a_table(cohort_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _inspect(str(cohort_dir)) == 0
    out = capsys.readouterr().out
    for text in ("ecg/mitdb_100: WFDB, 0:02:00", "MLII", "mV", "360", "43200", "11 recordings"):
        assert text in out


def test_inspect_counts_gaps_and_lists_failures(
    tmp_path: Path, data_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    x = np.ones((2, 100))
    x[1, [3, 4, 5, 19, 20, 98, 99]] = np.nan
    x[0, -1] = np.inf
    np.savez(tmp_path / "gaps.npz", data=x, sampling_rate=1 / 3)  # blocks of 20 samples
    (tmp_path / "bad.edf").write_bytes(b"rubbish")
    shutil.copy(data_dir / "test_edfann.edf", tmp_path)
    assert _inspect(str(tmp_path), "--json") == 1
    captured = capsys.readouterr()
    result = json.loads(captured.out)
    first, second = result["recordings"][0]["channels"]
    assert (first["missing"], first["gaps"]) == (1, 1)
    assert (second["missing"], second["gaps"]) == (7, 3)
    assert second["longest_gap_s"] == pytest.approx(9.0)
    assert result["recordings"][1]["channels"] == []
    assert result["recordings"][1]["duration_s"] == 0.0
    assert [failure["id"] for failure in result["failed"]] == ["bad"]
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("normwear-fast: error: ")
    assert "bad.edf" in captured.err
    assert _inspect(str(tmp_path / "test_edfann.edf")) == 0
    assert "holds no signal" in capsys.readouterr().out


def test_a_rate_is_for_the_recordings_without_a_clock(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from normwear_fast.encode.settings import EncodeSettings
    from normwear_fast.encode.survey import survey

    np.save(tmp_path / "bare.npy", np.ones((1, 320)))
    np.savez(tmp_path / "timed.npz", data=np.ones((1, 640)), sampling_rate=64.0)
    assert _inspect(str(tmp_path), "--rate", "32") == 0
    out = capsys.readouterr().out
    assert "bare: NPY, 0:00:10\n" in out
    assert "timed: NPZ, 0:00:10\n" in out
    assert out.count("has a clock of its own: --rate 32 is not for it and left out") == 1
    settings = EncodeSettings(window=2.0, hop=2.0, rate=32.0)
    entries = survey(find_recordings([tmp_path]), settings)
    assert [(entry.windows, entry.error) for entry in entries] == [(5, None), (5, None)]
    assert "--rate 32 is not for it" in entries[1].notes[0]
    # one by itself must not contradict
    alone = tmp_path / "timed.npz"
    assert _inspect(str(alone), "--rate", "32") == 1
    assert "--rate 32 contradicts the file's own 64 Hz" in capsys.readouterr().err
    assert "--rate 32 contradicts" in str(survey(find_recordings([alone]), settings)[0].error)


def test_a_recording_that_lacks_a_channel_says_why(tmp_path: Path) -> None:
    from normwear_fast.encode.settings import EncodeSettings
    from normwear_fast.encode.survey import survey

    x = np.random.default_rng(1).normal(size=640)
    np.savez(tmp_path / "a.npz", ppg=x, acc=np.stack([x, x]), sampling_rate=64.0)
    np.savez(tmp_path / "b.npz", ppg=x, acc=np.stack([x, x], axis=1), sampling_rate=64.0)
    table = pd.DataFrame({"time_s": np.arange(640) / 64, "ppg": x, "acc_1": np.nan})
    table.to_csv(tmp_path / "c.csv", index=False)
    settings = EncodeSettings(window=2.0, hop=2.0, channels=("ppg", "acc_1"))
    errors = [str(entry.error) for entry in survey(find_recordings([tmp_path]), settings)]
    assert errors[0] == "None"
    for error, reason in zip(errors[1:], ("acc has shape (640, 2); (ch", "acc_1"), strict=True):
        said = error.partition("has no channel acc_1; it has ppg; ")[2]
        assert reason in said
        assert said.endswith("left out")


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")
def test_inspect_prints_names_that_are_not_utf8(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = os.fsencode(tmp_path)
    table = pd.DataFrame({"time_s": np.arange(50) / 50, "ecg": 1.0})
    table.to_csv(os.fsdecode(folder + b"/caf\xe9.csv"), index=False)
    table.to_parquet(tmp_path / "r.parquet")
    os.replace(tmp_path / "r.parquet", folder + b"/th\xe9.parquet")
    assert _inspect(str(tmp_path)) == 0
    out = capsys.readouterr().out
    for text in ("caf\\udce9: CSV", "th\\udce9: Parquet", "2 recordings, 0 failed"):
        assert text in out
    assert _inspect(str(tmp_path), "--json") == 0
    assert json.loads(capsys.readouterr().out)["recordings"][0]["id"] == "caf\udce9"


def test_inspect_has_help_and_one_line_for_mistakes(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert _inspect("--help") == 0
    assert "normwear-fast inspect examples/cohort" in capsys.readouterr().out
    for words in ([str(tmp_path / "nowhere")], [str(tmp_path)], []):
        assert _inspect(*words) == 2
        error = capsys.readouterr().err
        assert error.startswith("normwear-fast: error: ")
        assert error.count("\n") == 1


def test_inspect_reads_them_all(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def fill(root: Any, put: Any) -> None:
        put(root, "data", signal(1, 500)).attrs["sampling_rate"] = 10.0

    write_h5(tmp_path / "h.h5", fill)
    write_zarr(tmp_path / "z.zarr", fill, 3)
    write_fif(tmp_path / "f_raw.fif")
    write_e4(tmp_path / "e4")
    (tmp_path / "bv").mkdir()
    write_brainvision(tmp_path / "bv", signal(3, 2000, np.int16))
    (tmp_path / "bad.h5").write_bytes(b"\x89HDF\r\n\x1a\n" + b"\0" * 100)
    assert main(["inspect", str(tmp_path), "--json"]) == 1
    out = capsys.readouterr()
    content = json.loads(out.out)
    assert [one["id"] for one in content["recordings"]] == ["bv/rec", "e4", "f_raw", "h", "z"]
    assert len(content["failed"]) == 1
    assert re.fullmatch(r"normwear-fast: error: [^\n]*bad\.h5[^\n]*\n", out.err)
