"""Noise, and sampling rates below, at and above 65 Hz, for the tests of preprocessing."""

from __future__ import annotations

import importlib
from collections.abc import Callable

import numpy as np
from hypothesis import strategies as st

# The package's attribute of this name is the function.
module = importlib.import_module("normwear_fast.preprocess")
Golden = Callable[[str], dict[str, np.ndarray]]
# Below, at and above 65 Hz; whole, decimal, of a millisecond clock, next to a simple fraction's.
RATES = (
    *(1, 4, 10.5, 50, 64, 65, 65.5, 66, 99.9, 100, 117.096, 125, 128, 1000 / 7.7, 130.0004),
    *(200, 250, 256, 360, 1000, 4000),
)
rates = st.sampled_from(RATES) | st.floats(1, 4000)
seeds = st.integers(0, 2**32 - 1)


def noise(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)
