"""One file an operator: what its Triton kernels compile to, their checks on a GPU, and their times.

Each module offers three functions:

- ``compiled()``: every kernel as it runs in the encoder, for `python -m bench.kernel_report`;
- ``checks()``: (name, check) on random ragged inputs against float64, for `python -m bench.gpu_check`;
- ``timings()``: rows of seconds at the judged shape, beside their bytes, FLOPs and baseline.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from normwear_fast.kernels.tuning import Table

SEQUENCES, TOKENS, WIDTH, HEADS = 234, 560, 768, 12
"""Half a full micro-batch: 234 channels of 6 s in the released model, 131,040 rows."""

Check = Callable[[], dict[str, float]]
"""Runs a kernel twice into poisoned outputs; gives error, bound and stable (1: the same bits twice)."""

Timing = Callable[[], list[dict[str, Any]]]


@dataclass(frozen=True)
class Compiled:
    """A kernel with the types and constants it has in the encoder.

    Args:
        name: operator and case, such as ``channel_attention bfloat16``.
        kernel: the ``triton.jit`` function.
        signature: argument name to Triton type, such as ``*bf16``, ``i32``, ``fp32``; ``constexpr`` for
            constants. Pointers are taken to be multiples of 16 bytes.
        constants: constexpr arguments besides the choice's blocks.
        table: the kernel's choices.
        flops: of one launch at the judged shape.
        bytes: read from and written to memory by that launch, each once.
        programs: of that launch, by the choice's blocks.
        dot: whether it must use tensor cores.
        unit: of the FLOPs: ``bfloat16``, ``tf32``, ``float32`` or ``float8``.
        divisible: integer arguments that are multiples of 16 (strides, widths).
    """

    name: str
    kernel: Any
    signature: Mapping[str, str]
    constants: Mapping[str, Any]
    table: Table
    flops: float
    bytes: float
    programs: Callable[[Mapping[str, int]], int]
    dot: bool = False
    unit: str = "float32"
    divisible: tuple[str, ...] = field(default=())
