"""Readers that die, recordings that break off, full disks: what is said, and what is kept."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from encode_runs import make_cohort, rows, run

from normwear_fast.encode import load_embeddings, readers
from normwear_fast.encode.prepare import Job
from normwear_fast.errors import OutputError, UsageError
from normwear_fast.recordings.base import Channel, Recording, register

pytestmark = pytest.mark.usefixtures("writer_keeps_up")


def test_a_reader_that_dies_is_replaced(
    cohort: Path, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each worker is killed once while it works."""
    begin, killed = readers._Reader.begin, []

    def begin_and_die(self: Any, task: Any, *args: Any) -> None:
        begin(self, task, *args)
        if isinstance(task, Job) and len(killed) < 2:
            killed.append(self.process.pid)
            os.kill(self.process.pid, signal.SIGKILL)

    monkeypatch.setattr(readers._Reader, "begin", begin_and_die)
    assert run(cohort, tmp_path / "out", workers=2).failed == {}
    assert len(killed) == 2
    assert rows(tmp_path / "out") == rows(undisturbed)


def test_readers_that_cannot_start_are_said_so(
    cohort: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readers, "_serve", slice)  # ends at once
    summary = run(cohort / "a.npz", tmp_path / "out", workers=1)
    assert summary.exit_code == 1
    assert "reader process died (exit code 0)" in summary.failed["a"]
    assert summary.units == 0


@register(".broken")
class Broken(Recording):
    """Ten seconds that can be read, then an error; or none, once repaired."""

    format = "broken"
    repaired = False

    def __init__(self, path: Path, *, sampling_rate: float | None = None) -> None:
        self.path = path
        self.channels = (Channel("S", "", 65.0, 65 * 100),)

    def _blocks(self, channels: list[int], seconds: float) -> Iterator[list[np.ndarray]]:
        rng = np.random.default_rng(1)
        for block in range(10):
            if block == 4 and not self.repaired:
                raise ValueError("bad\nblock")
            yield [rng.standard_normal(650)]


def test_a_recording_that_breaks_off_is_reported_and_the_rest_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its whole units stay; the other recording of its unit, and the run, are not hurt."""
    folder = make_cohort(tmp_path / "in")
    (folder / "bad.broken").write_text("x")
    summary = run(folder, tmp_path / "out")
    assert summary.exit_code == 1
    path = folder / "bad.broken"
    assert summary.failed == {"bad": f"{path}: cannot be read (ValueError: bad block)"}
    table = load_embeddings(tmp_path / "out")
    broken = table[table.recording == "bad"]
    assert 0 < len(broken) <= 20
    assert (broken.status == "ok").all()
    assert set(table.recording) == {"a", "b", "bad", "c/d", "c/e", "f"}
    # It stays failed when the run is asked for again: no row depends on when it was read.
    monkeypatch.setattr(Broken, "repaired", True)
    again = run(folder, tmp_path / "out")
    assert again.already_complete
    assert again.failed == summary.failed
    assert run(folder, tmp_path / "out", overwrite=True).exit_code == 0
    assert len(load_embeddings(tmp_path / "out")) == again.windows


def assert_goes_on(cohort: Path, output: Path, undisturbed: Path) -> None:
    names = set(os.listdir(output))
    assert all(name == "manifest.json" or name.startswith("part-") for name in names)
    run(cohort, output)
    assert rows(output) == rows(undisturbed)


@pytest.mark.usefixtures("many_parts")
def test_no_space_left_is_said_and_the_run_goes_on(
    cohort: Path, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, synced = tmp_path / "out", os.fsync
    writes = []

    def full(descriptor: int) -> None:
        writes.append(descriptor)
        if len(writes) > 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        synced(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match="no space left"):
        run(cohort, output)
    monkeypatch.setattr(os, "fsync", synced)
    assert_goes_on(cohort, output, undisturbed)


@pytest.mark.usefixtures("many_parts")
def test_a_full_file_system_is_said_and_the_run_goes_on(
    cohort: Path, undisturbed: Path, tmp_path: Path
) -> None:
    """A real one, of 32 KB, where it can be mounted."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=32k", "tmpfs", str(disk)]
    if os.geteuid() or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a tmpfs needs root")
    try:
        with pytest.raises(OutputError, match="no space left"):
            run(cohort, disk / "out")
        subprocess.run(["mount", "-o", "remount,size=16m", str(disk)], check=True)
        assert_goes_on(cohort, disk / "out", undisturbed)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_no_output_there_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="no part-"):
        load_embeddings(tmp_path)


def test_a_library_that_is_not_installed_is_named(
    undisturbed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, install in (("pandas", r"'normwear-fast\[eval\]'"), ("polars", "polars")):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, name, None)
            with pytest.raises(UsageError, match=f"pip install {install}; library='numpy' and"):
                load_embeddings(undisturbed, name)
            assert len(load_embeddings(undisturbed, "numpy")["embedding"]) == 54
