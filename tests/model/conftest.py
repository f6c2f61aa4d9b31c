"""The small model, for tests that do not change it."""

from __future__ import annotations

import pytest
from tiny_model import tiny


@pytest.fixture(scope="module")
def model():
    return tiny()
