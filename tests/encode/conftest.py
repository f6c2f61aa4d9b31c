"""The cohort and the run over it that nobody disturbed, made once."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from encode_runs import make_cohort, run

from normwear_fast.encode import local, pipeline


@pytest.fixture(scope="session")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_cohort(tmp_path_factory.mktemp("cohort"))


@pytest.fixture(scope="session")
def undisturbed(cohort: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("output") / "out"
    summary = run(cohort, output)
    assert summary.exit_code == 0
    assert sorted(os.listdir(output)) == ["manifest.json", "part-000000.parquet"]
    return output


@pytest.fixture
def many_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every unit becomes a part of its own."""
    monkeypatch.setattr(pipeline, "PART_SECONDS", 0.0)


@pytest.fixture
def writer_keeps_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """One result waits at most: a stop comes before these small models are through."""
    monkeypatch.setattr(local, "RESULT_BYTES", 0)
