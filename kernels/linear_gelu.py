"""`linear_gelu`: fc1 with its bias and activation in the product's epilogue.

Two numbers, 131,040 rows, 768 to 3,072, on an H100: 618 GFLOP take 0.78 ms at the 798 TFLOP/s its
vendor's products reach; 1.0 GB (201 MB of rows, 805 MB of activations) 0.30 ms at a nominal 3.35 TB/s.
The product with `bias_gelu` after it writes, reads and writes the activations, 18,432 bytes a token
instead of 6,144: 0.48 ms more. This kernel is the faster way where it reaches 0.62 of the vendor's rate,
activation included.

The activation is 16 instructions a value, 0.2 ms if nothing runs beside it. So there are persistent
programs, whose next tile is on its way meanwhile. Tiles of 128 x 256 take 1.05 ms on an H100, with two
instructions more, and 1.02 on an H200 (2026-11-26); two programs a multiprocessor with tiles of
128 x 128, one multiplying while the other rounds, 1.11 and 1.02: they read a third more from the L2
cache. A program a tile takes 1.24 and 1.18, the vendor's product and `bias_gelu` 1.36 and 1.21. On an
H200 tiles of 64 x 256 and 64 x 128 took 1.24 and 1.39 ms, and a kernel in CUDA C++ with two
accumulators a warpgroup, one filled while the other is rounded, 1.52: tiles of 128 x 192 could not be
fed. A second one, csrc/cuda/linear.cu, takes this kernel's place on Hopper where it is built: 0.86.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F
from triton.tools.tensor_descriptor import TensorDescriptor

from normwear_fast.errors import InputError
from normwear_fast.kernels.tuning import Choice, Table, multiprocessors, pick


def _tile(m: int, n: int, k: int, per_sm: int | None = None) -> dict[str, int]:
    """A choice's blocks; PER_SM, the persistent programs a multiprocessor, where there are such."""
    blocks = {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "GROUP_M": 8}
    return blocks if per_sm is None else {**blocks, "PER_SM": per_sm}


CHOICES: Table = {
    80: (
        Choice(_tile(128, 128, 32), num_warps=8, num_stages=4),
        Choice(_tile(128, 128, 64), num_warps=8, num_stages=3),
        Choice(_tile(128, 256, 64), num_warps=8, num_stages=3),
    ),
    90: (
        Choice(_tile(128, 256, 64, per_sm=1), num_warps=8, num_stages=4),
        Choice(_tile(128, 256, 64, per_sm=1), num_warps=8, num_stages=3),
        Choice(_tile(128, 128, 64, per_sm=2), num_warps=4, num_stages=3),
        Choice(_tile(128, 128, 64, per_sm=2), num_warps=8, num_stages=3),
        Choice(_tile(128, 128, 64), num_warps=8, num_stages=3),
    ),
    100: (
        Choice(_tile(128, 256, 64), num_warps=8, num_stages=3),
        Choice(_tile(128, 128, 64), num_warps=8, num_stages=3),
        Choice(_tile(128, 256, 64, per_sm=1), num_warps=8, num_stages=3),
        Choice(_tile(128, 128, 64, per_sm=2), num_warps=8, num_stages=3),
    ),
}


@triton.jit
def _gelu(x):
    """`bias_gelu.gelu` for a result of 16 bits: a polynomial of degree 6 on [0, 5.5], Phi 0.003 % off."""
    a = tl.minimum(tl.abs(x), 5.5)
    p = 2.61537498e-5
    p = p * a - 6.60981168e-4
    p = p * a + 7.48830941e-3
    p = p * a - 5.19704036e-2
    p = p * a - 4.60329473e-1
    p = p * a - 1.15058398
    p = p * a - 1.00003612
    return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL) - a * tl.exp2(p)


@triton.jit
def _place(tile, rows, N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M):
    """First row and column of a tile; GROUP_M tiles of rows take turns with the same columns, so that
    both operands' blocks stay in the L2 cache."""
    tiles_n: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    group = tile // (GROUP_M * tiles_n)
    within = tile % (GROUP_M * tiles_n)
    height = tl.minimum(tl.cdiv(rows, BLOCK_M) - group * GROUP_M, GROUP_M)
    return (group * GROUP_M + within % height) * BLOCK_M, (within // height) * BLOCK_N


@triton.jit(do_not_specialize=("rows",))
def linear_gelu_kernel(
    x,  # (rows, K)
    weight,  # (N, K)
    bias,  # (N,) float32
    out,  # (rows, N)
    rows,
    x_stride,
    out_stride,
    N: tl.constexpr,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """One program a tile."""
    first_m, first_n = _place(tl.program_id(0), rows, N, BLOCK_M, BLOCK_N, GROUP_M)
    m = first_m + tl.arange(0, BLOCK_M)
    n = first_n + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    # Past the edges the last row and column again, so that no load of the loop needs a mask for them.
    a = x + tl.minimum(m, rows - 1).to(tl.int64)[:, None] * x_stride + k[None, :]
    b = weight + tl.minimum(n, N - 1)[None, :] * K + k[:, None]
    product = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for first in range(0, K, BLOCK_K):
        if K % BLOCK_K == 0:
            product = tl.dot(tl.load(a), tl.load(b), product, input_precision="ieee")
        else:
            left = tl.load(a, mask=(k < K - first)[None, :], other=0.0)
            right = tl.load(b, mask=(k < K - first)[:, None], other=0.0)
            product = tl.dot(left, right, product, input_precision="ieee")
        a += BLOCK_K
        b += BLOCK_K
    product += tl.load(bias + n, mask=n < N, other=0.0)[None, :]
    target = out + m.to(tl.int64)[:, None] * out_stride + n[None, :]
    inside = (m < rows)[:, None] & (n < N)[None, :]
    tl.store(target, _gelu(product).to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=("rows",))
def linear_gelu_persistent_kernel(
    x,  # descriptor of (rows, K), blocks of (BLOCK_M, BLOCK_K)
    weight,  # descriptor of (N, K), blocks of (BLOCK_N, BLOCK_K)
    bias,  # (N,) float32
    out,  # descriptor of (rows, N), blocks of (BLOCK_M, BLOCK_N / 2)
    rows,
    N: tl.constexpr,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """Every program takes each num_programs-th tile; the loads of the next one run under the epilogue.

    A descriptor reads zeros past the edges and writes nothing there.
    """
    half: tl.constexpr = BLOCK_N // 2
    tiles = tl.cdiv(rows, BLOCK_M) * ((N + BLOCK_N - 1) // BLOCK_N)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=True):
        m, n = _place(tile, rows, N, BLOCK_M, BLOCK_N, GROUP_M)
        product = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for k in range(0, K, BLOCK_K):
            product = tl.dot(x.load([m, k]), weight.load([n, k]).T, product)
        # Half at a time: the stores' shared memory is what a second program needs.
        halves = tl.permute(tl.reshape(product, (BLOCK_M, 2, half)), (0, 2, 1))
        left, right = tl.split(halves)
        column = n + tl.arange(0, half)
        left += tl.load(bias + column, mask=column < N, other=0.0)[None, :]
        out.store([m, n], _gelu(left).to(out.dtype))
        column += half
        right += tl.load(bias + column, mask=column < N, other=0.0)[None, :]
        out.store([m, n + half], _gelu(right).to(out.dtype))


def linear_gelu_ref(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """gelu(x weight^T + bias), exact (erf), with float32 or wider accumulation: the definition."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return F.gelu(F.linear(x.to(wide), weight.to(wide), bias.to(wide))).to(x.dtype)


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor, *, out: Tensor | None = None) -> Tensor:
    """`linear_gelu_ref` in one launch; float32 and float64 run plain.

    Args:
        x: (rows, K) bfloat16 or float16, K and the row stride multiples of 8.
        weight: (N, K) in x's dtype, contiguous, N a multiple of 8.
        bias: (N,) float32.
        out: (rows, N) buffer in x's dtype, its row stride a multiple of 8.

    Returns:
        ``out``, or a new tensor.

    Raises:
        InputError: a weight whose rows are not end to end.
    """
    rows, columns = len(x), len(weight)
    if x.dtype not in (torch.bfloat16, torch.float16):
        product = linear_gelu_ref(x, weight, bias)
        return product if out is None else out.copy_(product)
    if not weight.is_contiguous():
        raise InputError("linear_gelu: weight is not contiguous")
    if out is None:
        out = torch.empty((rows, columns), dtype=x.dtype, device=x.device)
    if rows == 0:
        return out
    choice = pick("linear_gelu", str(x.dtype), CHOICES, x.device)
    with torch.cuda.device_of(x):
        launch(choice, x, weight, bias, out)
    return out


def launch(choice: Choice, x: Tensor, weight: Tensor, bias: Tensor, out: Tensor) -> None:
    """The kernel that a choice is for."""
    (rows, inner), columns = x.shape, len(weight)
    options = choice.launch()
    per_sm = options.pop("PER_SM", None)
    m, n, k = (choice.blocks[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K"))
    tiles = triton.cdiv(rows, m) * triton.cdiv(columns, n)
    if per_sm is None:
        linear_gelu_kernel[(tiles,)](
            x,
            weight,
            bias,
            out,
            rows,
            x.stride(0),
            out.stride(0),
            N=columns,
            K=inner,
            **options,
        )
    else:
        linear_gelu_persistent_kernel[(min(tiles, per_sm * multiprocessors(x.device)),)](
            TensorDescriptor.from_tensor(x, [m, k]),
            TensorDescriptor.from_tensor(weight, [n, k]),
            bias,
            TensorDescriptor.from_tensor(out, [m, n // 2]),
            rows,
            N=columns,
            K=inner,
            **options,
        )
