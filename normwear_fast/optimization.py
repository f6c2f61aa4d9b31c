"""What pretraining and fine-tuning optimise alike: the learning rate's course, and what decays."""

from __future__ import annotations

import math
from dataclasses import fields
from typing import Any

import numpy as np
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


def with_plain_numbers(settings: Any) -> None:
    """Turns NumPy's numbers in a frozen dataclass into Python's: torch's seeds, JSON and a checkpoint
    that runs nothing know no others."""
    for each in fields(settings):
        value = getattr(settings, each.name)
        if isinstance(value, np.generic):
            object.__setattr__(settings, each.name, value.item())


def decays(parameter: Tensor) -> bool:
    """Whether AdamW's weight decay is for it: matrices, not biases, norms or single tokens."""
    return parameter.squeeze().ndim >= 2
