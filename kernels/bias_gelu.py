"""`operators.bias_gelu` in Triton: gelu(x + bias) in one pass, in place or into float8 with row scales.

Two numbers, 131,040 rows of 3,072 on an H100: 1.61 GB of bfloat16 read and written take 480 us at a
nominal 3.35 TB/s, in which its multiprocessors issue 34 instructions a value. With libdevice's erff
the kernel takes 38 of them (sm_90's disassembly), so the normal distribution's tail is written as one
power of two, which takes 18:

    gelu(x) = max(x, 0) - |x| Phi(-|x|),    Phi(-a) = 2^p(a),

p, the logarithm of the tail, being so smooth that a polynomial of degree 8 will do. It was fitted for
the least largest error of Phi: 8e-9, and 4e-8 where the polynomial is evaluated in float32. Nothing
cancels for negative x, and p falls without bound, so that the tail vanishes as it must.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from normwear_fast import operators
from normwear_fast.errors import InputError
from normwear_fast.kernels.float8 import row_scale
from normwear_fast.kernels.tuning import Choice, Table, pick

CHOICES: Table = {
    80: (
        Choice({"ROWS": 4, "COLUMNS": 1024}, num_warps=4, num_stages=1),
        Choice({"ROWS": 2, "COLUMNS": 1024}, num_warps=4, num_stages=1),
        Choice({"ROWS": 8, "COLUMNS": 1024}, num_warps=8, num_stages=1),
        Choice({"ROWS": 4, "COLUMNS": 512}, num_warps=2, num_stages=1),
    ),
}

FLOAT8_CHOICES: Table = {
    89: (
        Choice(num_warps=2, num_stages=1),
        Choice(num_warps=4, num_stages=1),
        Choice(num_warps=8, num_stages=1),
    ),
}
"""A row a program: its values stay in registers until its largest is known. No GPU before capability
8.9 converts to float8."""


@triton.jit
def gelu(x):
    """Exact GELU of float32 values; infinities and NaN as the formula's limits have them."""
    a = tl.minimum(tl.abs(x), 16.0)  # an infinity times the tail's zero would be NaN
    p = -2.7720490e-06
    p = p * a + 3.8620747e-05
    p = p * a - 1.8254759e-04
    p = p * a - 1.4587016e-04
    p = p * a + 7.0754720e-03
    p = p * a - 5.2505028e-02
    p = p * a - 4.5920490e-01
    p = p * a - 1.1511058e00
    p = p * a - 1.0
    return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL) - a * tl.exp2(p)


@triton.jit(do_not_specialize=("rows",))
def bias_gelu_kernel(
    x,  # (rows, HIDDEN), overwritten
    bias,  # (HIDDEN,) float32
    rows,
    x_stride,  # values from row to row
    HIDDEN: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    parts: tl.constexpr = (HIDDEN + COLUMNS - 1) // COLUMNS
    program = tl.program_id(0)
    row = (program // parts) * ROWS + tl.arange(0, ROWS)[:, None]
    column = (program % parts) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    inside = row < rows
    if HIDDEN % COLUMNS != 0:
        inside = inside & (column < HIDDEN)
    at = x + row.to(tl.int64) * x_stride + column
    value = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    value += tl.load(bias + column, mask=column < HIDDEN, other=0.0).to(tl.float32)
    tl.store(at, gelu(value).to(x.dtype.element_ty), mask=inside)


@triton.jit
def bias_gelu_float8_kernel(
    x,  # (rows, HIDDEN)
    bias,  # (HIDDEN,) float32
    out,  # (rows, HIDDEN) float8_e4m3fn
    scale,  # (rows,) float32
    x_stride,
    out_stride,
    HIDDEN: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr,  # the power of two from HIDDEN up
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK_HIDDEN)
    inside = column < HIDDEN
    value = tl.load(x + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    value = gelu(value + tl.load(bias + column, mask=inside, other=0.0).to(tl.float32))
    largest = tl.max(tl.abs(value), axis=0)
    divisor = row_scale(largest)
    quotient = value * (1.0 / divisor)
    tl.store(scale + row, divisor)
    tl.store(out + row * out_stride + column, quotient.to(tl.float8e4nv), mask=inside)


def bias_gelu(
    x: Tensor, bias: Tensor, *, out: Tensor | None = None, scale: Tensor | None = None
) -> None:
    """`operators.bias_gelu` in one launch; float64 runs plain.

    Args:
        x: (rows, hidden) float32 or bfloat16, any row stride; overwritten where there is no ``out``.
        bias: (hidden,) float32.
        out: (rows, hidden) float8_e4m3fn for the result, any row stride; x is then left as it is.
        scale: (rows,) float32, written with ``out``: a row's largest size over 448, by which its
            values are divided (1 for a row of zeros).

    Raises:
        InputError: ``out`` of another dtype, or without ``scale``.
    """
    if out is not None and (out.dtype != torch.float8_e4m3fn or scale is None):
        raise InputError(
            "bias_gelu: out is for float8_e4m3fn with scale (rows,) float32, not "
            f"{out.dtype}{' without scale' if scale is None else ''}"
        )
    if x.dtype == torch.float64 and out is None:
        operators.bias_gelu(x, bias)
        return
    rows, width = x.shape
    if rows == 0:
        return
    with torch.cuda.device_of(x):
        if out is None:
            choice = pick("bias_gelu", str(x.dtype), CHOICES, x.device)
            blocks = choice.blocks
            programs = triton.cdiv(rows, blocks["ROWS"]) * triton.cdiv(width, blocks["COLUMNS"])
            bias_gelu_kernel[(programs,)](
                x, bias, rows, x.stride(0), HIDDEN=width, **choice.launch()
            )
        else:
            choice = pick("bias_gelu", f"{x.dtype} {out.dtype}", FLOAT8_CHOICES, x.device)
            bias_gelu_float8_kernel[(rows,)](
                x,
                bias,
                out,
                scale,
                x.stride(0),
                out.stride(0),
                HIDDEN=width,
                BLOCK_HIDDEN=triton.next_power_of_2(width),
                **choice.launch(),
            )
