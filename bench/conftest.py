"""The suite's options, its build check, and the JSON and chart it leaves in ``bench/results``."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bench.saving import dated, save
from normwear_fast.benchmarking import machine, set_allocator_thresholds
from normwear_fast.build import build_info, check_build


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("normwear-fast")
    group.addoption("--threads", type=int, default=None, help="torch threads (default: torch's)")
    group.addoption(
        "--malloc-threshold",
        type=int,
        default=None,
        help="bytes below which glibc reuses freed buffers, for every row alike (default: glibc's)",
    )
    group.addoption("--rounds", type=int, default=5, help="interleaved rounds a row")
    group.addoption("--save", default=None, help="write bench/results/<device>-<date>-NAME.json")


def pytest_sessionstart(session: pytest.Session) -> None:
    check_build()
    if session.config.getoption("--threads"):
        torch.set_num_threads(session.config.getoption("--threads"))
    threshold = session.config.getoption("--malloc-threshold")
    if threshold is not None and not set_allocator_thresholds(threshold):
        pytest.exit("--malloc-threshold needs glibc", returncode=2)


@pytest.fixture
def rounds(request: pytest.FixtureRequest) -> int:
    return int(request.config.getoption("--rounds"))


@pytest.fixture(scope="session")
def table(request: pytest.FixtureRequest) -> dict[str, dict[str, Any]]:
    """Rows of this session by name; printed at the end and, with ``--save``, written."""
    rows: dict[str, dict[str, Any]] = {}
    request.config.stash[ROWS] = rows
    return rows


ROWS = pytest.StashKey[dict[str, dict[str, Any]]]()


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    rows = config.stash.get(ROWS, {})
    if not rows:
        return
    columns = ("channel_windows_per_s", "ratio", "ratio_spread", "of_ceiling", "max_abs_error")
    terminalreporter.write_line("")
    terminalreporter.write_line(f"{'row':44}" + "".join(f"{name:>23}" for name in columns))
    for name, row in rows.items():
        cells = (row.get(column) for column in columns)
        text = "".join(f"{'' if cell is None else format(cell, '.4g'):>23}" for cell in cells)
        terminalreporter.write_line(f"{name:44}{text}")
    label = config.getoption("--save")
    if label:
        threshold = config.getoption("--malloc-threshold")
        result = {
            "machine": machine() | {"malloc_threshold": threshold or "glibc's own"},
            "build": build_info(),
            "rows": rows,
        }
        from bench.chart import draw

        draw(save(dated(label), result))
