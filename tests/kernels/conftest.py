"""Triton's interpreter runs a kernel's programs one after another, here the last one first: the next one
would put right what a program writes beyond its own. tests/test_gpu.py has them in order.
"""

from __future__ import annotations

import pytest
from triton.runtime.interpreter import interpreter_builder


@pytest.fixture(autouse=True)
def _last_program_first(monkeypatch: pytest.MonkeyPatch) -> None:
    place = interpreter_builder.set_grid_idx

    def backward(*program: int) -> None:
        place(*(n - 1 - i for n, i in zip(interpreter_builder.grid_dim, program, strict=True)))

    monkeypatch.setattr(interpreter_builder, "set_grid_idx", backward)
