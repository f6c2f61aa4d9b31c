"""What is written appears whole or not at all, and what cannot be written is known before the work."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest
from helpers import full_disk

from normwear_fast.errors import OutputError
from normwear_fast.files import check_writable, replacing


def test_a_folder_that_can_be_written_is_left_as_it_was(tmp_path: Path) -> None:
    check_writable(tmp_path)
    check_writable(tmp_path / "new" / "er")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match=r"file/out: cannot be written \(Not a directory\)"):
        check_writable(tmp_path / "file" / "out")
    with (
        full_disk(),
        pytest.raises(OutputError, match=r"out: cannot be written \(File too large\)"),
    ):
        check_writable(tmp_path / "out")

    def refuse(*args: object, **options: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    with pytest.raises(OutputError, match="Read-only file system"):
        check_writable(tmp_path)


def test_a_file_is_replaced_whole_or_kept(tmp_path: Path) -> None:
    path = tmp_path / "a" / "table.csv"
    with replacing(path) as temporary:
        assert temporary.suffix == ".csv"
        temporary.write_text("first")
        assert not path.exists()
    assert path.read_text() == "first"
    with (
        full_disk(3),
        pytest.raises(OutputError, match=r"table\.csv: cannot be written \(File too large\)"),
        replacing(path) as temporary,
    ):
        temporary.write_text("second")
    with pytest.raises(OutputError), replacing(path) as temporary:
        (temporary / "third").touch()
    assert path.read_text() == "first"
    assert os.listdir(path.parent) == ["table.csv"]
