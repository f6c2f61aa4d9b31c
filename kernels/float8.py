"""How a row becomes float8 (e4m3): divided by a scale of its own, so that its largest value fits."""

from __future__ import annotations

import triton
import triton.language as tl

LARGEST = tl.constexpr(448.0)


@triton.jit
def row_scale(largest):
    """What rows whose largest sizes these are, float32, are divided by.

    1 for rows of zeros, and for those so small that the division would leave float32's range.
    """
    return tl.where(largest > 1e-30, largest / LARGEST, 1.0)
