"""`pool_norm`: the final LayerNorm and the pooling, in one pass over the residual.

Bytes: 131,040 rows of 768 bfloat16 are 201 MB, 60 us at an H100's nominal 3.35 TB/s, 48 us at the
4.2 TB/s of an H200. ``mean`` reads that and writes 0.7 MB; ``patch`` writes 403 MB of float32 as well;
``cls`` touches a row a sequence. The affine part comes after the mean, once a sequence: LayerNorm's
weight and bias are the same for every row.

``mean`` with a program a sequence, eight warps on eight rows, took 125 us on an H200 (2026-11-26), and
85 us for three sequences alone: 234 programs are 1.8 waves of 132, and 560 rows a long way for one. So
PARTS programs share a sequence and leave sums in float32, 11.5 MB, that a second kernel adds in order.
That alone would not do: Triton 3.6 gives four warps a row of 1024 columns, one of which has only columns
beyond 768, and a row costs 584 warp instructions, 83 us of all issue slots. A program of one warp needs
no other's sums: 279 a row, 39 us beside the reading.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from normwear_fast import operators
from normwear_fast.kernels.tuning import Choice, Table, pick
from normwear_fast.operators import Pool
from normwear_fast.packing import Segments

MEAN_CHOICES: Table = {
    80: (
        Choice({"BLOCK_ROWS": 1, "STAGES": 3, "PARTS": 16}, num_warps=1, num_stages=1),
        Choice({"BLOCK_ROWS": 1, "STAGES": 2, "PARTS": 16}, num_warps=1, num_stages=1),
        Choice({"BLOCK_ROWS": 1, "STAGES": 3, "PARTS": 32}, num_warps=1, num_stages=1),
        Choice({"BLOCK_ROWS": 1, "STAGES": 3, "PARTS": 8}, num_warps=1, num_stages=1),
        Choice({"BLOCK_ROWS": 1, "STAGES": 1, "PARTS": 16}, num_warps=1, num_stages=1),
        Choice({"BLOCK_ROWS": 2, "STAGES": 2, "PARTS": 16}, num_warps=1, num_stages=1),
        Choice({"BLOCK_ROWS": 8, "STAGES": 4, "PARTS": 8}, num_warps=8, num_stages=1),
    ),
}
"""STAGES - 1 blocks of rows are on their way: with the first choice 3 KB in each of 21 programs of an
H100's multiprocessor, where about 25 KB keep memory busy. PARTS is the choice's alone: a window has the
same bits by itself as in a batch."""

SUM_WARPS = 8
"""Of `pool_sum_kernel`: four values a thread."""

ROWS_CHOICES: Table = {
    80: (
        Choice({"BLOCK_ROWS": 4}, num_warps=4, num_stages=1),
        Choice({"BLOCK_ROWS": 2}, num_warps=2, num_stages=1),
        Choice({"BLOCK_ROWS": 8}, num_warps=4, num_stages=1),
        Choice({"BLOCK_ROWS": 1}, num_warps=1, num_stages=1),
        Choice({"BLOCK_ROWS": 2}, num_warps=1, num_stages=1),
    ),
}
"""A row or two for each warp."""


@triton.jit
def _centred(x, inside, E: tl.constexpr, eps):
    """Rows of x (BLOCK_ROWS, BLOCK_E) float32 with zero mean, zero beyond E; 1 / their deviations."""
    mean = tl.sum(x, axis=1) / E
    centred = tl.where(inside[None, :], x - mean[:, None], 0.0)
    variance = tl.sum(centred * centred, axis=1) / E
    return centred, 1.0 / tl.sqrt_rn(variance + eps)


@triton.jit
def _loaded(
    residual,  # (rows, E)
    update,  # (rows, E) or None
    carried,  # (E,) float32 or None
    row,  # (BLOCK_ROWS,) int64
    real,  # (BLOCK_ROWS,) bool
    residual_stride,
    update_stride,
    E: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """(BLOCK_ROWS, BLOCK_E) float32: residual + update + carried, zero where there is nothing."""
    column = tl.arange(0, BLOCK_E)
    mask = real[:, None] & (column < E)[None, :]
    x = tl.load(residual + row[:, None] * residual_stride + column[None, :], mask=mask, other=0.0)
    x = x.to(tl.float32)
    if update is not None:
        at = update + row[:, None] * update_stride + column[None, :]
        x += tl.load(at, mask=mask, other=0.0).to(tl.float32)
    if carried is not None:
        x += tl.load(carried + column, mask=column < E, other=0.0)[None, :]
    return x


@triton.jit
def pool_mean_kernel(
    residual,  # (tokens, E)
    update,  # (tokens, E) or None
    carried,  # (E,) float32 or None
    cu,  # (S + 1,) int32
    parts,  # (S * PARTS, E) float32: sums of standardised rows
    residual_stride,
    update_stride,
    eps,
    E: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    STAGES: tl.constexpr,
    PARTS: tl.constexpr,
):
    """A program a part of a sequence: every PARTS-th block of rows, in order. No rows: zeros."""
    sequence = tl.program_id(0) // PARTS
    part = tl.program_id(0) % PARTS
    first = tl.load(cu + sequence)
    count = tl.load(cu + sequence + 1) - first
    column = tl.arange(0, BLOCK_E)
    inside = column < E
    total = tl.zeros((BLOCK_ROWS, BLOCK_E), dtype=tl.float32)
    for start in tl.range(part * BLOCK_ROWS, count, PARTS * BLOCK_ROWS, num_stages=STAGES):
        offset = start + tl.arange(0, BLOCK_ROWS)
        real = offset < count
        row = first.to(tl.int64) + offset
        x = _loaded(
            residual, update, carried, row, real, residual_stride, update_stride, E, BLOCK_E
        )
        centred, scale = _centred(x, inside, E, eps)
        total += centred * tl.where(real, scale, 0.0)[:, None]
    target = parts + tl.program_id(0).to(tl.int64) * E + column
    tl.store(target, tl.sum(total, axis=0), mask=inside)


@triton.jit
def pool_sum_kernel(
    parts,  # (S * PARTS, E) float32
    weight,  # (E,) float32
    bias,  # (E,) float32
    cu,  # (S + 1,) int32
    out,  # (S, E)
    E: tl.constexpr,
    BLOCK_E: tl.constexpr,
    PARTS: tl.constexpr,
):
    """A program a sequence: its parts in order, then what makes the sum a mean of normed rows."""
    sequence = tl.program_id(0)
    count = tl.load(cu + sequence + 1) - tl.load(cu + sequence)
    column = tl.arange(0, BLOCK_E)
    inside = column < E
    at = parts + sequence.to(tl.int64) * PARTS * E + column
    total = tl.zeros((BLOCK_E,), dtype=tl.float32)
    for part in tl.static_range(PARTS):
        total += tl.load(at + part * E, mask=inside, other=0.0)
    factor = tl.load(weight + column, mask=inside, other=0.0)
    shift = tl.load(bias + column, mask=inside, other=0.0)
    pooled = tl.where(count > 0, total / tl.maximum(count, 1) * factor + shift, 0.0)
    target = out + sequence.to(tl.int64) * E + column
    tl.store(target, pooled.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=("count",))
def pool_rows_kernel(
    residual,  # (tokens, E)
    update,  # (tokens, E) or None
    carried,  # (E,) float32 or None
    weight,  # (E,) float32
    bias,  # (E,) float32
    cu,  # (S + 1,) int32: the first row of each sequence is taken; or None: every row
    out,  # (count, E)
    count,
    residual_stride,
    update_stride,
    eps,
    E: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    index = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    written = index < count
    real = written
    row = index
    if cu is not None:
        row = tl.load(cu + index, mask=written, other=0)
        real = written & (tl.load(cu + index + 1, mask=written, other=0) > row)
    column = tl.arange(0, BLOCK_E)
    inside = column < E
    x = _loaded(
        residual,
        update,
        carried,
        row.to(tl.int64),
        real,
        residual_stride,
        update_stride,
        E,
        BLOCK_E,
    )
    factor = tl.load(weight + column, mask=inside, other=0.0)
    shift = tl.load(bias + column, mask=inside, other=0.0)
    centred, scale = _centred(x, inside, E, eps)
    normed = centred * scale[:, None] * factor[None, :] + shift[None, :]
    if cu is not None:
        normed = tl.where(real[:, None], normed, 0.0)
    target = out + index.to(tl.int64)[:, None] * E + column[None, :]
    tl.store(target, normed.to(out.dtype.element_ty), mask=written[:, None] & (column < E)[None, :])


def pool_norm(
    residual: Tensor,
    carried: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    sequences: Segments,
    pool: Pool,
    *,
    update: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """`operators.pool_norm` in one launch, or two for ``mean``; float64 weights run plain.

    Args:
        residual: (tokens, E) float32 or bfloat16, any row stride.
        carried: (E,) float32 or None.
        weight, bias: (E,) float32 of the norm.
        eps: of the norm.
        sequences: tokens of each sequence; one of zero tokens gets a row of zeros.
        pool: ``mean``, ``cls`` or ``patch``.
        update: (tokens, E) still to be added to the residual, or None.
        out: contiguous buffer for the result in float32, bfloat16 or float16.

    Returns:
        ``out``, or a new float32 tensor: (S, E), or (tokens, E) for ``patch``.
    """
    if weight.dtype == torch.float64:
        pooled = operators.pool_norm(
            residual, carried, weight, bias, eps, sequences, pool, update=update
        )
        return pooled if out is None else out.copy_(pooled)
    width = residual.shape[1]
    count = len(residual) if pool == "patch" else len(sequences)
    if out is None:
        out = torch.empty((count, width), dtype=torch.float32, device=residual.device)
    if count == 0:
        return out
    strides = (residual.stride(0), 0 if update is None else update.stride(0))
    widths = {"E": width, "BLOCK_E": triton.next_power_of_2(width)}
    case = f"{pool} {residual.dtype}"
    with torch.cuda.device_of(residual):
        if pool == "mean":
            choice = pick("pool_norm", case, MEAN_CHOICES, residual.device)
            n = choice.blocks["PARTS"]
            parts = torch.empty((count * n, width), dtype=torch.float32, device=residual.device)
            pool_mean_kernel[(count * n,)](
                residual,
                update,
                carried,
                sequences.cu,
                parts,
                *strides,
                eps,
                **widths,
                **choice.launch(),
            )
            pool_sum_kernel[(count,)](
                parts,
                weight,
                bias,
                sequences.cu,
                out,
                **widths,
                PARTS=n,
                num_warps=SUM_WARPS,
            )
        else:
            choice = pick("pool_norm", case, ROWS_CHOICES, residual.device)
            pool_rows_kernel[(triton.cdiv(count, choice.blocks["BLOCK_ROWS"]),)](
                residual,
                update,
                carried,
                weight,
                bias,
                sequences.cu if pool == "cls" else None,
                out,
                count,
                *strides,
                eps,
                **widths,
                **choice.launch(),
            )
    return out
