"""What every test shares: threads, seeds, the golden files, and the outcome report of test-all."""

from __future__ import annotations

import datetime
import json
import os
import platform
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Workers of pytest-xdist share the cores: a BLAS that started all its threads in each would be
# several times slower. Only in the workers, which inherit the controller's environment, and before
# NumPy and torch read it.
if "PYTEST_XDIST_WORKER_COUNT" in os.environ:
    share = (os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, share)))

# Triton's kernels run on CPU tensors, interpreted; it looks when a kernel is defined. What compiles
# them instead (bench/kernel_report.py) is tested in a process of its own.
os.environ.setdefault("TRITON_INTERPRET", "1")

import numpy as np
import pytest
from hypothesis import settings

GOLDEN = Path(__file__).parent / "golden"
DATA = Path(__file__).parent / "data"
COHORT = Path(__file__).parent.parent / "examples" / "cohort"

# Fresh examples on every run; hypothesis prints the failing one. A deadline would only measure how
# busy the machine is.
settings.register_profile("normwear", deadline=None, print_blob=True)
settings.load_profile("normwear")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """The same global random state at the start of every test; fresh draws use default_rng()."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


@pytest.fixture(scope="session")
def golden() -> Callable[[str], dict[str, np.ndarray]]:
    """`golden("position_small")`: the arrays of tests/golden/position_small.npz."""

    def load(name: str) -> dict[str, np.ndarray]:
        with np.load(GOLDEN / f"{name}.npz", allow_pickle=False) as file:
            return {key: file[key] for key in file.files}

    return load


@pytest.fixture(scope="session")
def golden_dir() -> Path:
    return GOLDEN


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """tests/data: recordings that are there to be awkward."""
    return DATA


@pytest.fixture(scope="session")
def cohort_dir() -> Path:
    """examples/cohort: the recordings that `make demo` encodes."""
    return COHORT


class OutcomeReport:
    """Writes every test's outcome, duration and reason as JSON when the run ends."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tests: dict[str, dict[str, Any]] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        entry = self.tests.setdefault(report.nodeid, {"outcome": "passed", "seconds": 0.0})
        entry["seconds"] = round(entry["seconds"] + report.duration, 3)
        if report.failed:
            entry["outcome"] = "failed" if report.when == "call" else "error"
            entry["reason"] = str(report.longrepr).strip().splitlines()[-1]
        elif report.skipped:
            entry["outcome"] = "xfailed" if hasattr(report, "wasxfail") else "skipped"
            where = report.longrepr
            entry["reason"] = where[2] if isinstance(where, tuple) else str(where)

    def pytest_sessionfinish(self) -> None:
        import torch

        from normwear_fast import build

        outcomes = [test["outcome"] for test in self.tests.values()]
        result = {
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "cuda_device": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
            "cores": os.cpu_count(),
            "build": build.build_info(),
            "counts": {name: outcomes.count(name) for name in sorted(set(outcomes))},
            "tests": dict(sorted(self.tests.items())),
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(result, indent=1) + "\n")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--outcomes", type=Path, help="write every test's outcome to this JSON file")


def pytest_configure(config: pytest.Config) -> None:
    path = config.getoption("--outcomes")
    if path is not None and not hasattr(config, "workerinput"):
        config.pluginmanager.register(OutcomeReport(path))
