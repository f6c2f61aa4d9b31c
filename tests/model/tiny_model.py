"""A small FastNormWear with the recipe's weights, samples for it, and how its embeddings are compared."""

from __future__ import annotations

import numpy as np
from helpers import recipe_state_dict

from normwear_fast import FastNormWear, NormWearConfig

TINY = NormWearConfig(embed_dim=32, depth=3, num_heads=2, decoder_embed_dim=16, decoder_depth=1)


def tiny(optimized_cwt=True, precision="float32", **kwargs):
    model = FastNormWear(optimized_cwt, config=TINY, precision=precision, **kwargs)
    model.load_state_dict(recipe_state_dict(model.state_dict(), 5))
    return model


def two_orders(tokens: np.ndarray) -> float:
    """How far two orders of summing bring the mean of (windows, C, T, E) tokens apart."""
    return tokens.shape[2] * np.finfo(np.float32).eps * float(np.abs(tokens).max())


def changes(model, x, change):
    before = model.encode(x)
    change()
    return not np.array_equal(model.encode(x), before)


X = np.random.default_rng(3).standard_normal((2, 2, 130)).astype(np.float32)
