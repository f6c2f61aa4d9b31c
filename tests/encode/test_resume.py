"""A run that was interrupted or killed goes on to the same rows; one of anything else is refused."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from encode_runs import SETTINGS, StopAfter, make_cohort, models, rows, run

from normwear_fast import FastNormWear
from normwear_fast.encode import EncodeSettings, load_embeddings
from normwear_fast.encode.survey import file_state
from normwear_fast.errors import OutputError

pytestmark = pytest.mark.usefixtures("writer_keeps_up")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_keeps_what_is_whole_and_goes_on(
    number: int, cohort: Path, undisturbed: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    summary = run(cohort, output, progress=StopAfter(2, number))
    assert summary.interrupted
    assert summary.exit_code == 130
    assert 2 <= summary.units_done < summary.units
    assert json.loads((output / "manifest.json").read_text())["state"] == "interrupted"
    assert set(rows(output)) < set(rows(undisturbed))
    assert signal.getsignal(number) is not None
    again = run(cohort, output)
    assert again.exit_code == 0
    assert again.units_done == summary.units
    assert rows(output) == rows(undisturbed)
    assert again.tally.ok == (load_embeddings(output).status == "ok").sum()


def test_a_finished_run_is_left_alone(cohort: Path, undisturbed: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in undisturbed.iterdir()}
    summary = run(cohort, undisturbed)
    assert summary.already_complete
    assert summary.exit_code == 0
    assert {p: p.stat().st_mtime_ns for p in undisturbed.iterdir()} == before


def kill_and_go_on(
    recordings: int, workers: Sequence[int], kills: int, tmp_path: Path
) -> dict[str, Any]:
    """Kills runs of a mixed cohort at random points, each then going on to its end (tests/kills.py)."""
    seed = np.random.SeedSequence().entropy % 2**32  # type: ignore[operator]
    print(f"kill seed {seed}")  # shown by pytest on failure
    script = Path(__file__).parent.parent / "kills.py"
    words = [sys.executable, script, tmp_path, recordings, ",".join(map(str, workers)), kills, seed]
    done = subprocess.run(
        [str(word) for word in words],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def assert_undisturbed(output: Path, undisturbed: Path) -> None:
    assert rows(output) == rows(undisturbed)
    names = sorted(os.listdir(output))
    assert names[0] == "manifest.json"
    assert all(name.startswith("part-") for name in names[1:])


def test_killed_at_random_points_ends_in_the_same_rows(tmp_path: Path) -> None:
    result = kill_and_go_on(16, [0], 5, tmp_path)
    assert result["kills"] == result["same_rows"] == 5


@pytest.mark.torture
@pytest.mark.timeout(3600)
def test_killed_a_hundred_times_ends_in_the_same_rows(tmp_path: Path) -> None:
    """Its outcome is bench/results/kill-torture.json."""
    result = kill_and_go_on(60, [0, 0, 0, 1, 0, 0, 0, 2], 100, tmp_path)
    path = Path(__file__).parents[2] / "bench" / "results" / "kill-torture.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    assert result["kills"] == result["same_rows"] == 100


@pytest.mark.usefixtures("many_parts")
def test_leftovers_of_a_killed_run_are_removed(
    cohort: Path, undisturbed: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    run(cohort, output, progress=StopAfter(1))
    (output / ".part-000001.parquet.tmp").write_bytes(b"half a part")
    (output / ".manifest.json.tmp").write_bytes(b"{")
    (output / ".lock").write_text("99999999")
    run(cohort, output)
    assert_undisturbed(output, undisturbed)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"window": 3.0, "hop": 3.0}, "window was 2.0, now 3.0; hop was 2.0, now 3.0"),
        ({"pool": "cls"}, "pool was mean, now cls"),
        ({"channels": ("S0",)}, "channels was None, now S0"),
        ({"preprocess": "none"}, "preprocess was reference, now none"),
    ],
)
def test_other_settings_are_refused(
    change: dict[str, Any], named: str, cohort: Path, undisturbed: Path
) -> None:
    before = rows(undisturbed)
    with pytest.raises(OutputError, match="--overwrite") as caught:
        run(cohort, undisturbed, replace(SETTINGS, **change))
    assert named in str(caught.value)
    assert rows(undisturbed) == before


def test_other_weights_are_refused(cohort: Path, undisturbed: Path) -> None:
    with pytest.raises(OutputError, match=r"weights\.seed was 0, now 1"):
        run(cohort, undisturbed, load_models=lambda threads: models(seed=1))


def test_other_inputs_are_refused(tmp_path: Path) -> None:
    folder, output = make_cohort(tmp_path / "in"), tmp_path / "out"
    run(folder, output)
    os.utime(folder / "b.npz", ns=(0, 5))
    (folder / "f.npz").unlink()
    np.save(folder / "new.npy", np.zeros((1, 1000)))
    with pytest.raises(OutputError, match="b was changed; recording f is gone; recording new is"):
        run(folder, output)


def test_a_header_stands_for_its_samples_too(data_dir: Path, tmp_path: Path) -> None:
    for suffix in (".hea", ".mat"):
        (tmp_path / f"a103l{suffix}").write_bytes((data_dir / f"a103l{suffix}").read_bytes())
    settings_ = EncodeSettings(window=60.0, channels=("II",))
    run(tmp_path / "a103l.hea", tmp_path / "out", settings_)
    os.utime(tmp_path / "a103l.mat", ns=(0, 5))
    with pytest.raises(OutputError, match="recording a103l was changed"):
        run(tmp_path / "a103l.hea", tmp_path / "out", settings_)


def test_a_header_stands_for_its_segments_samples_too(tmp_path: Path) -> None:
    """Whatever their files are named; a segment without a header of its own costs only itself."""
    (tmp_path / "r.hea").write_text("r/2 1 50 200\na 100\nb 100\n")
    (tmp_path / "a.hea").write_text("a 1 50 100\nsamples_1.sig 16 100/mV 16 0 0 0 0 ECG\n")
    files = {"r.hea", "a.hea", "samples_1.sig", "b.dat"}
    for name in ("samples_1.sig", "b.dat"):
        (tmp_path / name).write_bytes(bytes(200))
    for number, name in enumerate(sorted(files)):
        os.utime(tmp_path / name, ns=(0, number + 5))
    size, latest = file_state(tmp_path / "r.hea")
    assert size == sum((tmp_path / name).stat().st_size for name in files)
    assert latest == 8
    os.utime(tmp_path / "samples_1.sig", ns=(0, 99))
    assert file_state(tmp_path / "r.hea") == (size, 99)


def test_a_brainvision_header_stands_for_the_files_it_names(tmp_path: Path) -> None:
    header = tmp_path / "r.vhdr"
    header.write_text("Brain Vision\n[Common Infos]\nDataFile=other.eeg\nMarkerFile=../m.vmrk\n")
    (tmp_path / "other.eeg").write_bytes(bytes(50))
    assert (
        file_state(header)[0] == header.stat().st_size
    )  # a name that leads out: the reader says so
    header.write_text(header.read_text().replace("../m", "$b"))
    assert file_state(header)[0] == header.stat().st_size + 50


def test_threads_and_unit_sizes_are_taken_over(
    cohort: Path, undisturbed: Path, tmp_path: Path
) -> None:
    """A resumed run cuts its units as it did before, whatever it would choose today."""
    output, asked = tmp_path / "out", []

    def load(threads: int | None) -> list[FastNormWear]:
        asked.append(threads)
        return models()

    run(cohort, output, progress=StopAfter(1), load_models=load)
    run(cohort, output, replace(SETTINGS, batch_tokens=None, unit_tokens=None), load_models=load)
    assert rows(output) == rows(undisturbed)
    manifest = json.loads((output / "manifest.json").read_text())
    assert asked == [None, manifest["model"]["threads"]]
