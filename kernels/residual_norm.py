"""`operators.residual_norm` in Triton: the pending update, the carried constant and the norm in one pass.

Bytes only. 131,040 rows of 768 bfloat16 read and written are 403 MB, 120 us at an H100's nominal
3.35 TB/s; 805 MB and 240 us with an update, which is read, and the residual written back. The 300 to
500 instructions a row are 40 to 70 us of issue.

A warp takes a row and holds it in registers, 16 bytes a lane and load, so that mean and variance are
shuffles: no shared memory and no barrier.
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
        Choice({"ROWS": 1}, num_warps=1, num_stages=1),
        Choice({"ROWS": 2}, num_warps=1, num_stages=1),
        Choice({"ROWS": 4}, num_warps=1, num_stages=1),
        Choice({"ROWS": 1}, num_warps=2, num_stages=1),
    ),
}
"""ROWS one after another in a program: the carried constant then stays in registers."""

FLOAT8_CHOICES: Table = {89: CHOICES[80]}
"""The same for a float8 result, which no GPU before capability 8.9 converts to."""


@triton.jit(do_not_specialize=("rows",))
def residual_norm_kernel(
    residual,  # (rows, E); the update is added to it
    update,  # (rows, E) or None
    carried,  # (E,) float32 or None
    out,  # (rows, E)
    scale,  # (rows,) float32 where out is float8, else None
    rows,
    residual_stride,  # values from row to row
    update_stride,
    out_stride,
    eps,
    E: tl.constexpr,
    BLOCK_E: tl.constexpr,  # the power of two from E up
    ROWS: tl.constexpr,
):
    column = tl.arange(0, BLOCK_E)
    inside = column < E
    constant = 0.0
    if carried is not None:
        constant = tl.load(carried + column, mask=inside, other=0.0)
    for i in tl.static_range(ROWS):
        row = tl.program_id(0).to(tl.int64) * ROWS + i
        here = inside & (row < rows)
        at = residual + row * residual_stride + column
        x = tl.load(at, mask=here, other=0.0)
        if update is not None:
            pending = tl.load(update + row * update_stride + column, mask=here, other=0.0)
            x = (x.to(tl.float32) + pending.to(tl.float32)).to(x.dtype)
            tl.store(at, x, mask=here)
        # What is normed is what was stored, as in the definition.
        value = x.to(tl.float32) + constant
        centred = tl.where(inside, value - tl.sum(value, axis=0) / E, 0.0)
        variance = tl.sum(centred * centred, axis=0) / E
        factor = 1.0 / tl.sqrt_rn(variance + eps)
        if scale is not None:
            largest = tl.max(tl.abs(centred), axis=0) * factor
            divisor = row_scale(largest)
            tl.store(scale + row, divisor, mask=row < rows)
            factor = factor / divisor
        normed = (centred * factor).to(out.dtype.element_ty)
        tl.store(out + row * out_stride + column, normed, mask=here)


def residual_norm(
    residual: Tensor,
    carried: Tensor | None,
    eps: float,
    *,
    update: Tensor | None = None,
    dtype: torch.dtype | None = None,
    out: Tensor | None = None,
    scale: Tensor | None = None,
) -> Tensor:
    """`operators.residual_norm` in one launch; a float64 residual runs plain.

    Args:
        residual: (rows, E) float32 or bfloat16, any row stride; ``update`` is added to it in place,
            rounded once, and the norm is that of the rounded values.
        carried: (E,) float32 or None.
        eps: of the norm.
        update: (rows, E) float32 or bfloat16, or None.
        dtype: of the result: float32, bfloat16 or float8_e4m3fn; the residual's by default.
        out: (rows, E) buffer for the result, any row stride.
        scale: (rows,) float32, written where the result is float8_e4m3fn: a row's largest size over
            448, by which its values are divided (1 for a row of zeros).

    Returns:
        (rows, E): zero mean and unit variance a row.

    Raises:
        InputError: a float8 result without ``scale``.
    """
    dtype = out.dtype if out is not None else dtype or residual.dtype
    float8 = dtype == torch.float8_e4m3fn
    if float8 and scale is None:
        raise InputError("residual_norm: a float8 result needs scale (rows,) float32")
    if residual.dtype == torch.float64:
        return operators.residual_norm(residual, carried, eps, update=update, dtype=dtype, out=out)
    rows, width = residual.shape
    if out is None:
        out = torch.empty((rows, width), dtype=dtype, device=residual.device)
    if rows == 0:
        return out
    table = FLOAT8_CHOICES if float8 else CHOICES
    choice = pick("residual_norm", f"{residual.dtype} {dtype}", table, residual.device)
    with torch.cuda.device_of(residual):
        residual_norm_kernel[(triton.cdiv(rows, choice.blocks["ROWS"]),)](
            residual,
            update,
            carried,
            out,
            scale if float8 else None,
            rows,
            residual.stride(0),
            0 if update is None else update.stride(0),
            out.stride(0),
            eps,
            E=width,
            BLOCK_E=triton.next_power_of_2(width),
            **choice.launch(),
        )
    return out
