"""Features that separate and features that do not, and a small model."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from normwear_fast.evaluate import baselines


@pytest.fixture(scope="module")
def matrix() -> dict[str, Any]:
    """A fixed random matrix with labels that depend on it, and a split."""
    random = np.random.default_rng(20260)
    x = random.standard_normal((240, 30)).astype(np.float32)
    hidden = x @ random.standard_normal((30, 3)) + 3 * random.standard_normal((240, 3))
    is_test = random.random(240) < 0.4
    return {
        "x": x,
        "binary": (hidden[:, 0] > 0).astype(np.int64),
        "three": hidden.argmax(axis=1),
        "targets": 200 + 10 * hidden[:, :2],
        "is_test": is_test,
        "train": np.flatnonzero(~is_test),
        "test": np.flatnonzero(is_test),
        "subjects": np.full(240, ""),
    }


@pytest.fixture(scope="module")
def tiny() -> baselines.NormWear:
    from normwear_fast.config import NormWearConfig
    from normwear_fast.model import FastNormWear

    config = NormWearConfig(
        embed_dim=32, depth=1, num_heads=1, decoder_embed_dim=32, decoder_depth=1
    )
    return baselines.NormWear(FastNormWear(optimized_cwt=True, config=config), name="random")
