"""`operators.channel_attention` in Triton: one kernel for the tokens of a channel, the [CLS] rows of a
window, and the one query a channel of the last layer under ``cls`` pooling.

The numbers at 234 sequences of 560 tokens and 12 heads of 64, on an H100:

- 225 GFLOP: 0.28 ms at 798 TFLOP/s of bfloat16;
- 881 M powers of two: 0.24 ms at 16 a clock and multiprocessor, 1.755 GHz. At this head size softmax
  costs as much as the products, and only overlap hides it: two programs of two warpgroups stay on a
  multiprocessor, one multiplying while another exponentiates. The power of two stays with its unit:
  a polynomial would take eight issue slots for one, and issue is as scarce: the main loop is 273
  instructions a warp for a block of 128 x 64, 544 clocks, beside 544 of powers and 512 of products.
- Tiles of 128 queries waste an eighth at 560, blocks of 64 keys 3 %: 0.30 ms if all of the above
  overlaps. Five tiles read keys and values from L2, 2.0 GB, 0.37 ms at the 5.5 TB/s that others have
  measured; nine tiles of 64 would waste 3 % and read 3.6 GB. Which is faster only a GPU can say.
- Memory sees 604 MB of qkv and 201 MB of result once, 0.24 ms at 3.35 TB/s, if a sequence's heads
  and tiles run side by side: heads go fastest, so that the 264 programs at work share 4 sequences of
  2.6 MB in L2.

The queries' head_size^-0.5 log2(e) makes the scores exponents of two: no scaling in the loop. Full
blocks of keys run without a mask; what is left of them follows in a loop of its own. For sm_100 Triton
3.6 does not load a block while it works on another; there the second program is all that overlaps.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from normwear_fast import operators
from normwear_fast.kernels.tuning import Choice, Table, pick
from normwear_fast.packing import Segments

HEAD_SIZES = (16, 32, 64, 128)
"""The kernel is written for; others run plain."""

LONG_CHOICES: Table = {
    80: (
        Choice({"BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_TAIL": 64}, num_warps=8, num_stages=3),
        Choice({"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_TAIL": 64}, num_warps=4, num_stages=3),
        Choice({"BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_TAIL": 64}, num_warps=8, num_stages=2),
        Choice({"BLOCK_M": 128, "BLOCK_N": 32, "BLOCK_TAIL": 32}, num_warps=8, num_stages=3),
        Choice({"BLOCK_M": 64, "BLOCK_N": 32, "BLOCK_TAIL": 32}, num_warps=4, num_stages=3),
    ),
    90: (
        Choice({"BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_TAIL": 64}, num_warps=8, num_stages=3),
        Choice({"BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_TAIL": 64}, num_warps=8, num_stages=2),
        Choice({"BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_TAIL": 64}, num_warps=4, num_stages=3),
        Choice({"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_TAIL": 64}, num_warps=4, num_stages=3),
        Choice({"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_TAIL": 64}, num_warps=4, num_stages=2),
        Choice({"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_TAIL": 64}, num_warps=8, num_stages=2),
    ),
    100: (
        Choice({"BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_TAIL": 64}, num_warps=8, num_stages=3),
        Choice({"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_TAIL": 64}, num_warps=8, num_stages=2),
        Choice({"BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_TAIL": 64}, num_warps=8, num_stages=2),
        Choice({"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_TAIL": 64}, num_warps=4, num_stages=3),
    ),
}
"""More than 64 queries: a channel's tokens. BLOCK_TAIL keys a step after the last full BLOCK_N."""

SHORT_CHOICES: Table = {
    80: (
        Choice({"BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_TAIL": 16}, num_warps=1, num_stages=1),
        Choice({"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_TAIL": 32}, num_warps=1, num_stages=1),
        Choice({"BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_TAIL": 32}, num_warps=2, num_stages=1),
    ),
}
"""At most 64 queries and keys: the [CLS] rows of a window."""

FEW_CHOICES: Table = {
    80: (
        Choice({"BLOCK_M": 16, "BLOCK_N": 64, "BLOCK_TAIL": 64}, num_warps=4, num_stages=3),
        Choice({"BLOCK_M": 16, "BLOCK_N": 64, "BLOCK_TAIL": 64}, num_warps=4, num_stages=4),
        Choice({"BLOCK_M": 16, "BLOCK_N": 128, "BLOCK_TAIL": 64}, num_warps=4, num_stages=3),
        Choice({"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_TAIL": 32}, num_warps=2, num_stages=4),
    ),
}
"""At most 64 queries of more keys: [CLS] of a channel. Reading keys and values is all there is."""

FLOAT32_CHOICES: Table = {
    80: (
        Choice({"BLOCK_M": 32, "BLOCK_N": 16, "BLOCK_TAIL": 16}, num_warps=4, num_stages=2),
        Choice({"BLOCK_M": 64, "BLOCK_N": 16, "BLOCK_TAIL": 16}, num_warps=8, num_stages=2),
        Choice({"BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_TAIL": 32}, num_warps=8, num_stages=2),
        Choice({"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_TAIL": 32}, num_warps=4, num_stages=2),
    ),
}
"""Products in full float32, without tensor cores: four sums a thread, for more of them spill, which is
five products to a load of 16 bytes from shared memory."""


def _case(dtype: torch.dtype, queries: int, keys: int) -> tuple[str, Table]:
    """Name and choices for a dtype and the most queries and keys of a segment."""
    if dtype == torch.float32:
        return "full", FLOAT32_CHOICES
    if queries > 64:
        return "long", LONG_CHOICES
    return ("short", SHORT_CHOICES) if keys <= 64 else ("few", FEW_CHOICES)


@triton.jit
def _attend(
    q,  # (BLOCK_M, HEAD_SIZE)
    k_at,  # (BLOCK, HEAD_SIZE) pointers
    v_at,  # (BLOCK, HEAD_SIZE) pointers
    valid,  # (BLOCK,) bool: which keys there are, where MASKED
    highest,  # (BLOCK_M,) float32, the largest score so far
    total,  # (BLOCK_M,) float32, the sum of 2^(score - highest)
    summed,  # (BLOCK_M, HEAD_SIZE) float32, the same sum weighted by the values
    MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One block of keys further: highest, total and summed with it."""
    k = tl.load(k_at, mask=valid[:, None], other=0.0) if MASKED else tl.load(k_at)
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    if MASKED:
        scores = tl.where(valid[None, :], scores, float("-inf"))
    new = tl.maximum(highest, tl.max(scores, axis=1))
    weights = tl.exp2(scores - new[:, None])
    shrink = tl.exp2(highest - new)
    total = total * shrink + tl.sum(weights, axis=1)
    summed = summed * shrink[:, None]
    v = tl.load(v_at, mask=valid[:, None], other=0.0) if MASKED else tl.load(v_at)
    summed = tl.dot(weights.to(v.dtype), v, summed, input_precision=PRECISION)
    return new, total, summed


@triton.jit
def channel_attention_kernel(
    query,  # (query rows, E)
    key_value,  # (key rows, 2 E): keys, then values
    out,  # (query rows, E)
    tiles,  # (n, 2) int32: segment or -1, first query within it
    cu_queries,  # (segments + 1,) int32
    cu_keys,  # (segments + 1,) int32
    query_stride,  # values from row to row
    key_value_stride,
    out_stride,
    HEADS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_TAIL: tl.constexpr,
):
    tile = tl.program_id(0) // HEADS
    head = tl.program_id(0) % HEADS
    segment = tl.load(tiles + 2 * tile)
    if segment < 0:
        return
    first = tl.load(tiles + 2 * tile + 1)
    query_row = tl.load(cu_queries + segment)
    queries = tl.load(cu_queries + segment + 1) - query_row - first
    key_row = tl.load(cu_keys + segment)
    keys = tl.load(cu_keys + segment + 1) - key_row
    row = tl.arange(0, BLOCK_M)
    feature = tl.arange(0, HEAD_SIZE)
    real = (row < queries)[:, None]
    query_row = (query_row + first).to(tl.int64)
    q_at = query + query_row * query_stride + head * HEAD_SIZE
    q = tl.load(q_at + row[:, None] * query_stride + feature[None, :], mask=real, other=0.0)

    highest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    summed = tl.zeros((BLOCK_M, HEAD_SIZE), tl.float32)
    k_at = key_value + key_row.to(tl.int64) * key_value_stride + head * HEAD_SIZE
    column = tl.arange(0, BLOCK_N)
    k_block = k_at + column[:, None] * key_value_stride + feature[None, :]
    full = keys // BLOCK_N * BLOCK_N
    for _ in tl.range(0, full, BLOCK_N):
        highest, total, summed = _attend(
            q,
            k_block,
            k_block + HEADS * HEAD_SIZE,
            column,
            highest,
            total,
            summed,
            MASKED=False,
            PRECISION=PRECISION,
        )
        k_block += BLOCK_N * key_value_stride
    # In 64 bits: a sequence of 932,000 tokens has 2^31 values of qkv before its last block.
    k_at += full.to(tl.int64) * key_value_stride
    tail = tl.arange(0, BLOCK_TAIL)
    for start in tl.range(0, keys - full, BLOCK_TAIL, num_stages=1):
        k_tail = k_at + (start + tail)[:, None] * key_value_stride + feature[None, :]
        highest, total, summed = _attend(
            q,
            k_tail,
            k_tail + HEADS * HEAD_SIZE,
            start + tail < keys - full,
            highest,
            total,
            summed,
            MASKED=True,
            PRECISION=PRECISION,
        )
    # No keys, in a table's unused entries: zeros, for what multiplies them must stay finite.
    attended = summed * (1.0 / tl.where(total == 0, 1.0, total))[:, None]
    out_at = out + query_row * out_stride + head * HEAD_SIZE
    out_at += row[:, None] * out_stride + feature[None, :]
    tl.store(out_at, attended.to(out.dtype.element_ty), mask=real)


def channel_attention(
    query: Tensor,
    key_value: Tensor,
    queries: Segments,
    keys: Segments,
    num_heads: int,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """`operators.channel_attention` in one launch; float64 and other head sizes run plain.

    Args:
        query: (query rows, E) bfloat16 or float32, any row stride; holds head_size^-0.5 log2(e).
        key_value: (key rows, 2 E) of the same dtype, any row stride: keys, then values.
        queries: query rows of each segment; of a fixed-size table, as many entries as it has.
        keys: key rows of each segment; where a segment has none, its results are zeros.
        num_heads: H.
        out: (query rows, E) buffer for the result, any row stride; rows of no segment are left alone.

    Returns:
        (query rows, E).
    """
    rows, width = query.shape
    size = width // num_heads
    if query.dtype == torch.float64 or size not in HEAD_SIZES:
        return operators.channel_attention(query, key_value, queries, keys, num_heads, out=out)
    if out is None:
        out = torch.empty((rows, width), dtype=query.dtype, device=query.device)
    name, table = _case(query.dtype, queries.longest, keys.longest)
    choice = pick("channel_attention", f"{name} {query.dtype}", table, query.device)
    tiles = queries.tiles(choice.blocks["BLOCK_M"])
    if len(tiles) == 0:
        return out
    with torch.cuda.device_of(query):
        channel_attention_kernel[(len(tiles) * num_heads,)](
            query,
            key_value,
            out,
            tiles,
            queries.cu,
            keys.cu,
            query.stride(0),
            key_value.stride(0),
            out.stride(0),
            HEADS=num_heads,
            HEAD_SIZE=size,
            PRECISION="ieee",
            **choice.launch(),
        )
    return out
