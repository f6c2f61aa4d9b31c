"""`gather_rows` and `scatter_rows`: the [CLS] rows out of the residual, and back after their fusion.

Bytes only: 3 KB a sequence each way, 1.4 MB of 201 MB at the judged 234 sequences. What counts is that
each is one launch, where indexing in torch would be three to five.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from normwear_fast.kernels.tuning import Choice, Table, pick

CHOICES: Table = {80: (Choice({"BLOCK": 1024}, num_warps=4, num_stages=1),)}


@triton.jit
def gather_rows_kernel(
    residual,  # (tokens, E)
    update,  # (tokens, E), or anything where HAS_UPDATE is 0
    rows,  # (S,) int32, -1 for nothing
    out,  # (S, E)
    E: tl.constexpr,
    HAS_UPDATE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    sequence = tl.program_id(0)
    row = tl.load(rows + sequence)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < E
    target = out + sequence.to(tl.int64) * E + column
    if row < 0:
        tl.store(target, tl.zeros((BLOCK,), out.dtype.element_ty), mask=inside)
    else:
        at = row.to(tl.int64) * E + column
        x = tl.load(residual + at, mask=inside)
        if HAS_UPDATE:
            pending = tl.load(update + at, mask=inside)
            x = (x.to(tl.float32) + pending.to(tl.float32)).to(x.dtype)
            tl.store(update + at, tl.zeros_like(pending), mask=inside)
        tl.store(target, x, mask=inside)


@triton.jit
def scatter_rows_kernel(
    x,  # (S, E)
    constant,  # (E,) float32
    rows,  # (S,) int32, -1 for nothing
    residual,  # (tokens, E)
    E: tl.constexpr,
    BLOCK: tl.constexpr,
):
    sequence = tl.program_id(0)
    row = tl.load(rows + sequence)
    if row >= 0:
        column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = column < E
        value = tl.load(x + sequence.to(tl.int64) * E + column, mask=inside).to(tl.float32)
        value += tl.load(constant + column, mask=inside)
        target = residual + row.to(tl.int64) * E + column
        tl.store(target, value.to(residual.dtype.element_ty), mask=inside)


def gather_rows(
    residual: Tensor, rows: Tensor, *, update: Tensor | None = None, out: Tensor
) -> Tensor:
    """`operators.gather_rows` in one launch."""
    choice = pick("gather_rows", "any", CHOICES, residual.device)
    width = residual.shape[1]
    grid = (len(rows), triton.cdiv(width, choice.blocks["BLOCK"]))
    gather_rows_kernel[grid](
        residual,
        residual if update is None else update,
        rows,
        out,
        E=width,
        HAS_UPDATE=update is not None,
        **choice.launch(),
    )
    return out


def scatter_rows(x: Tensor, constant: Tensor, rows: Tensor, residual: Tensor) -> None:
    """`operators.scatter_rows` in one launch."""
    choice = pick("scatter_rows", "any", CHOICES, residual.device)
    width = residual.shape[1]
    grid = (len(rows), triton.cdiv(width, choice.blocks["BLOCK"]))
    scatter_rows_kernel[grid](x, constant, rows, residual, E=width, **choice.launch())
