"""`operators.channel_attention` in Triton: one kernel for the tokens of a channel, the [CLS] rows of a
window, and the one query a channel of the last layer under ``cls`` pooling.

The softmax of more than 64 queries is optimistic. A block of keys gives each row a reference, its largest
score so far; all further weights are 2^(score - reference), which needs no largest score, no shrinking of
sums and no shuffles. Floats are as exact at any scale, so that this is as good as the running maximum,
unless a later score is so far above that a sum overflows: by 96 powers of two. The sum tells, and such a
tile is done again with the running maximum. So are those with NaN or infinite scores.

The numbers at 234 sequences of 560 tokens and 12 heads of 64, on an H100 or H200:

- 225 GFLOP: 0.28 ms at 798 TFLOP/s of bfloat16;
- 881 M powers of two: 0.24 ms at 16 a clock and multiprocessor, 1.755 GHz. At this head size softmax
  costs as much as the products, and only overlap hides it: four programs of one warpgroup stay on a
  multiprocessor, some multiplying while others exponentiate.
- A block of 64 x 64 is 256 clocks of powers and 256 of products. Beside them a scheduler issues 188
  instructions (64 sums, 32 powers, 16 roundings); with the running maximum 272. Blocks of 32 keys are
  117, which is a quarter more a key, but a fifth program fits.
- An H200 (2026-11-26) takes 548 us in tiles of 64 x 64, 654 with two stages for three, 672 in 128 x 64,
  889 in 64 x 128; 628 with the running maximum; cuDNN 780, torch's flash 1070. At 548 us half of the
  issue slots are busy, the tensor cores 47 % of the time, L2 65 %. Slower were 0 for a reference where
  all scores are within +-32 (603: its loop is there twice, for three programs) and a quarter of the
  powers by a polynomial (575). Fewer registers by force spill: 96 in 64 x 64, for five programs.
- Memory sees 604 MB of qkv and 201 MB of result once, 0.24 ms at 3.35 TB/s, if a sequence's heads
  and tiles run side by side: heads go fastest, so that the 528 programs at work share 5 sequences of
  2.6 MB in L2.

The queries' head_size^-0.5 log2(e) makes the scores exponents of two: no scaling in the loop. What is
more than full blocks of keys comes first, masked, and gives the reference. The next block's scores are
not asked for before this one's weights: Triton 3.6 waits for a product of the loop where it is made, so
that only registers would be lost. For sm_100 it does not load a block while it works on another; there
the other programs are all that overlaps.

Few queries keep the running maximum: one a channel only waits for memory, 99 us on the H200 for 402 MB,
and a block on its own before the pipelined loop costs it 6 %.
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
        Choice({"BLOCK_M": 128, "BLOCK_N": 64}, num_warps=8, num_stages=3),
        Choice({"BLOCK_M": 64, "BLOCK_N": 64}, num_warps=4, num_stages=3),
        Choice({"BLOCK_M": 128, "BLOCK_N": 64}, num_warps=8, num_stages=2),
        Choice({"BLOCK_M": 128, "BLOCK_N": 32}, num_warps=8, num_stages=3),
        Choice({"BLOCK_M": 64, "BLOCK_N": 32}, num_warps=4, num_stages=3),
    ),
    90: (
        Choice({"BLOCK_M": 64, "BLOCK_N": 64}, num_warps=4, num_stages=3),
        Choice({"BLOCK_M": 64, "BLOCK_N": 32}, num_warps=4, num_stages=3),
        Choice({"BLOCK_M": 64, "BLOCK_N": 32}, num_warps=4, num_stages=4),
        Choice({"BLOCK_M": 64, "BLOCK_N": 32}, num_warps=4, num_stages=5),
        Choice({"BLOCK_M": 64, "BLOCK_N": 16}, num_warps=4, num_stages=4),
        Choice({"BLOCK_M": 128, "BLOCK_N": 64}, num_warps=8, num_stages=3),
    ),
    100: (
        Choice({"BLOCK_M": 128, "BLOCK_N": 64}, num_warps=8, num_stages=3),
        Choice({"BLOCK_M": 128, "BLOCK_N": 128}, num_warps=8, num_stages=2),
        Choice({"BLOCK_M": 128, "BLOCK_N": 64}, num_warps=8, num_stages=2),
        Choice({"BLOCK_M": 64, "BLOCK_N": 64}, num_warps=4, num_stages=3),
    ),
}
"""More than 64 queries: a channel's tokens."""

SHORT_CHOICES: Table = {
    80: (
        Choice({"BLOCK_M": 16, "BLOCK_N": 16}, num_warps=1, num_stages=1),
        Choice({"BLOCK_M": 16, "BLOCK_N": 32}, num_warps=1, num_stages=1),
        Choice({"BLOCK_M": 32, "BLOCK_N": 32}, num_warps=2, num_stages=1),
    ),
}
"""At most 64 queries and keys: the [CLS] rows of a window."""

FEW_CHOICES: Table = {
    80: (
        Choice({"BLOCK_M": 16, "BLOCK_N": 64}, num_warps=4, num_stages=3),
        Choice({"BLOCK_M": 16, "BLOCK_N": 64}, num_warps=4, num_stages=4),
        Choice({"BLOCK_M": 16, "BLOCK_N": 128}, num_warps=4, num_stages=3),
        Choice({"BLOCK_M": 16, "BLOCK_N": 32}, num_warps=2, num_stages=4),
    ),
}
"""At most 64 queries of more keys: [CLS] of a channel. Reading keys and values is all there is."""

FLOAT32_CHOICES: Table = {
    80: (
        Choice({"BLOCK_M": 32, "BLOCK_N": 16}, num_warps=4, num_stages=2),
        Choice({"BLOCK_M": 64, "BLOCK_N": 16}, num_warps=8, num_stages=2),
        Choice({"BLOCK_M": 32, "BLOCK_N": 32}, num_warps=8, num_stages=2),
        Choice({"BLOCK_M": 16, "BLOCK_N": 32}, num_warps=4, num_stages=2),
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


ROOM: tl.constexpr = tl.constexpr(32.0)
"""A reference is so far above the largest score that gave it, for later ones to be up to 96 above that;
what is 94 below no longer counts."""

LIMIT: tl.constexpr = tl.constexpr(2.0**64)
"""Tiles with a sum of weights from here on, or NaN, are done again: below, no weight has overflowed, nor
has a sum of values up to 2^63."""


@triton.jit
def _attend(
    q,  # (BLOCK_M, HEAD_SIZE)
    k_at,  # (BLOCK, HEAD_SIZE) pointers
    v_at,  # (BLOCK, HEAD_SIZE) pointers
    valid,  # (BLOCK,) bool: which keys there are
    highest,  # (BLOCK_M,) float32, the largest score so far
    total,  # (BLOCK_M,) float32, the sum of 2^(score - highest)
    summed,  # (BLOCK_M, HEAD_SIZE) float32, the same sum weighted by the values
    PRECISION: tl.constexpr,
):
    """One block of keys further, whatever its scores: highest, total and summed with it."""
    k = tl.load(k_at, mask=valid[:, None], other=0.0)
    v = tl.load(v_at, mask=valid[:, None], other=0.0)
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    scores = tl.where(valid[None, :], scores, float("-inf"))
    new = tl.maximum(highest, tl.max(scores, axis=1))
    weights = tl.exp2(scores - new[:, None])
    shrink = tl.exp2(highest - new)
    total = total * shrink + tl.sum(weights, axis=1)
    summed = summed * shrink[:, None]
    summed = tl.dot(weights.to(v.dtype), v, summed, input_precision=PRECISION)
    return new, total, summed


@triton.jit
def _attend_online(
    q,  # (BLOCK_M, HEAD_SIZE)
    k_block,  # (BLOCK_N, HEAD_SIZE) pointers to the first block
    value_offset,  # values from a key to its value
    stride,  # values from key to key
    keys,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
):
    """All keys with the running maximum, whatever their scores: total and summed."""
    BLOCK_M: tl.constexpr = q.shape[0]
    highest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    summed = tl.zeros(q.shape, tl.float32)
    for start in tl.range(0, keys, BLOCK_N, num_stages=STAGES):
        highest, total, summed = _attend(
            q,
            k_block,
            k_block + value_offset,
            start + tl.arange(0, BLOCK_N) < keys,
            highest,
            total,
            summed,
            PRECISION=PRECISION,
        )
        k_block += BLOCK_N * stride
    return total, summed


@triton.jit
def _attend_optimistic(
    q,  # (BLOCK_M, HEAD_SIZE)
    k_block,  # (BLOCK_N, HEAD_SIZE) pointers to the first block
    value_offset,  # values from a key to its value
    stride,  # values from key to key
    keys,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """All keys, if no score is far above those of the first block: total and summed."""
    LANES: tl.constexpr = 8  # columns that different threads hold: their sums wait till the end
    BLOCK_M: tl.constexpr = q.shape[0]
    highest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    summed = tl.zeros(q.shape, tl.float32)
    # First what is more than full blocks, or one of them. Once, but as a loop: Triton frees its shared
    # memory only at a loop's end. And not `_attend_online` of these keys: on sm_90 that costs 136
    # registers for 121, three programs for four, and on sm_80 it spills.
    lead = keys - tl.maximum(keys - 1, 0) // BLOCK_N * BLOCK_N
    for _ in tl.range(0, lead, BLOCK_N, num_stages=1):
        highest, total, summed = _attend(
            q,
            k_block,
            k_block + value_offset,
            tl.arange(0, BLOCK_N) < lead,
            highest,
            total,
            summed,
            PRECISION=PRECISION,
        )
    # In 64 bits: a sequence of 932,000 tokens has 2^31 values of qkv before its last block.
    k_block += lead.to(tl.int64) * stride
    reference = highest + ROOM
    # 2^-ROOM, but by row: ptxas lets no two products overlap (its C7515) where sums enter a loop as they
    # left a product or as constants.
    scale = tl.exp2(highest - reference)
    total *= scale
    summed *= scale[:, None]
    totals = tl.zeros((BLOCK_M, LANES), tl.float32)
    for _ in tl.range(0, keys - lead, BLOCK_N):
        scores = tl.dot(q, tl.trans(tl.load(k_block)), input_precision=PRECISION)
        weights = tl.exp2(scores - reference[:, None])
        totals += tl.sum(tl.reshape(weights, (BLOCK_M, BLOCK_N // LANES, LANES)), axis=1)
        v = tl.load(k_block + value_offset)
        summed = tl.dot(weights.to(v.dtype), v, summed, input_precision=PRECISION)
        k_block += BLOCK_N * stride
    return total + tl.sum(totals, axis=1), summed


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
    OPTIMISTIC: tl.constexpr,
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

    k_at = key_value + key_row.to(tl.int64) * key_value_stride + head * HEAD_SIZE
    k_block = k_at + tl.arange(0, BLOCK_N)[:, None] * key_value_stride + feature[None, :]
    if OPTIMISTIC:
        total, summed = _attend_optimistic(
            q,
            k_block,
            HEADS * HEAD_SIZE,
            key_value_stride,
            keys,
            PRECISION=PRECISION,
            BLOCK_N=BLOCK_N,
        )
        if tl.min((total < LIMIT).to(tl.int32), axis=0) == 0:
            total, summed = _attend_online(
                q,
                k_block,
                HEADS * HEAD_SIZE,
                key_value_stride,
                keys,
                PRECISION=PRECISION,
                BLOCK_N=BLOCK_N,
                STAGES=1,
            )
    else:
        total, summed = _attend_online(
            q,
            k_block,
            HEADS * HEAD_SIZE,
            key_value_stride,
            keys,
            PRECISION=PRECISION,
            BLOCK_N=BLOCK_N,
            STAGES=None,
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
            OPTIMISTIC=name in ("long", "full"),
            **choice.launch(),
        )
    return out
