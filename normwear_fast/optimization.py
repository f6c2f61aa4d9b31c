"""What pretraining and fine-tuning optimise alike: the learning rate's course, and what decays."""

from __future__ import annotations

import math

from torch import Tensor


def rate_factor(step: int, steps: int, warm_up: int) -> float:
    """Factor of the peak learning rate: a linear warm-up, then half a cosine to zero.

    Args:
        step: counted from 0.
        steps: of the whole run.
        warm_up: of them.

    Source: Luo et al. 2026 (arXiv 2412.09758), pretraining.
    """
    if step < warm_up:
        return (step + 1) / warm_up
    done = (step - warm_up) / max(1, steps - warm_up)
    return 0.5 * (1 + math.cos(math.pi * done))


def decays(parameter: Tensor) -> bool:
    """Whether AdamW's weight decay is for it: matrices, not biases, norms or single tokens."""
    return parameter.squeeze().ndim >= 2
