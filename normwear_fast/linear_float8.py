"""fc1 with bias and activation in its epilogue, in float8 on a Hopper GPU: the definition and the kernel.

fp8 spends a third of its time between its products: fc1's result, 805 MB a full micro-batch in bfloat16,
is written, read, activated, scaled by its row's largest value and written once more. A scale known before
the product is made takes all of that into the product's epilogue. There is one: the norm before fc1 gives
rows of length sqrt(E) at most, so that no pre-activation of neuron n exceeds sqrt(E) |w_n| + |b_n|, and
GELU makes nothing larger. With that at 448 nothing overflows, and a unit of standard deviation lands near
448 / sqrt(E) = 16, ten powers of two above the smallest normal number of e4m3. What each neuron is
multiplied by is taken back in the columns of fc2.

A lane of the tensor cores holds eight columns of 32 that are not neighbours. They are written side by
side, so that the result's columns stand in another order (:func:`order`), which fc2's weights take on.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

from normwear_fast import cuda_backend, linear_hopper
from normwear_fast.errors import InputError
from normwear_fast.linear_hopper import FLOAT8

FLOAT8_MAX = 448.0
"""Largest finite value of e4m3: a row or column is scaled so that its largest size becomes this."""

INNER, MOST_COLUMNS, TILE_COLUMNS = 768, 3072, 192
"""Values of a row, most columns, and columns of a tile, as in csrc/cuda/linear_float8.cu."""

GROUP = 32
"""Columns that change places among themselves."""

LARGEST_RESULT = 2**35
"""Values of a result: the kernel counts its places in eighths, in 32 bits."""

SMALLEST = 2.0**-100
"""A neuron whose pre-activation stays below, as a pruned one's does, is treated as if it reached this:
its factor is finite, and what it leaves to fc2 next to nothing."""


def quantise_columns(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A weight (N, K) as e4m3 with one float32 scale an output: weight ~ scale[:, None] * q."""
    largest = weight.abs().amax(dim=1).float()
    scale = torch.where(largest > 0, largest / FLOAT8_MAX, torch.ones_like(largest))
    return (weight.float() / scale[:, None]).to(FLOAT8), scale


def order(columns: int, device: torch.device | None = None) -> Tensor:
    """(columns,) int64: which column of the product stands at each place of the result.

    Args:
        columns: a multiple of 32.
    """
    i = torch.arange(columns, device=device)
    within = i % GROUP
    return i - within + within % 8 // 2 * 8 + within // 8 * 2 + within % 2


@dataclass(frozen=True)
class Float8Linear:
    """The weights of fc1 and what its result becomes.

    Args:
        weight: (N, K) e4m3.
        scale: (N,) float32: the weights stand for scale[:, None] * weight.
        bias: (N,) bfloat16.
        factor: (N,) bfloat16: what GELU of the result is multiplied by before it is rounded to e4m3.
    """

    weight: Tensor
    scale: Tensor
    bias: Tensor
    factor: Tensor

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor) -> Float8Linear:
        """From float weights (N, K) and biases (N,), for rows of length sqrt(K) at most."""
        size = weight.float().norm(dim=1) * weight.shape[1] ** 0.5 + bias.float().abs()
        factor = FLOAT8_MAX / size.clamp(min=SMALLEST)
        return cls(*quantise_columns(weight), bias.bfloat16(), factor.bfloat16())

    @cached_property
    def pairs(self) -> Tensor:
        """(N / 2, 4) int32, of two columns: their scales, their biases, their factors."""
        halves = torch.stack((self.bias.view(-1, 2), self.factor.view(-1, 2)), dim=1)
        words = (self.scale.view(-1, 2).view(torch.int32), halves.flatten(1).view(torch.int32))
        return torch.cat(words, dim=1).contiguous()


def linear_float8_ref(x: Tensor, x_scale: Tensor, linear: Float8Linear) -> Tensor:
    """The definition, in float64: (rows, N) e4m3, its columns in :func:`order`."""
    product = (x.double() * x_scale.double()[:, None]) @ linear.weight.double().T
    out = F.gelu(product * linear.scale.double() + linear.bias.double()) * linear.factor.double()
    out = out.clamp(-FLOAT8_MAX, FLOAT8_MAX)
    return out[:, order(out.shape[1], out.device)].to(FLOAT8)


def fits(device: torch.device, inner: int, columns: int) -> bool:
    """Whether the kernel runs there on such sizes."""
    return takes(inner, columns) and linear_hopper.runs(device)


def takes(inner: int, columns: int) -> bool:
    """Whether the kernel is written for products of these sizes."""
    return inner == INNER and columns % (2 * TILE_COLUMNS) == 0 and columns <= MOST_COLUMNS


@lru_cache(maxsize=1024)
def parts(blocks: int, columns: int, places: int) -> int:
    """Into how many parts a block's columns are split: the fewest that keep all of the device at work.

    A part is worked through in pairs of tiles of 192 columns; fetching its rows costs about half a tile.

    Args:
        blocks: of rows, each the work of one place or, in parts, of several.
        columns: of the product.
        places: that work at the same time: the device's multiprocessors.
    """
    pairs = columns // (2 * TILE_COLUMNS)

    def rounds(n: int) -> float:
        return -(-blocks * n // places) * (2 * pairs / n + 0.5)

    return min((n for n in range(1, pairs + 1) if pairs % n == 0), key=rounds)


def linear_float8(
    x: Tensor, x_scale: Tensor, linear: Float8Linear, *, out: Tensor | None = None
) -> Tensor:
    """`linear_float8_ref` in one launch, accumulated as the tensor cores accumulate float8.

    Args:
        x: (rows, 768) e4m3.
        x_scale: (rows,) float32: x stands for x_scale[:, None] * x.
        linear: weights of (N, 768), N a multiple of 384 up to 3072.
        out: (rows, N) buffer for the result.

    Returns:
        ``out``, or a new tensor.

    Raises:
        InputError: a tensor of another dtype, device, shape or layout, or more than 2^35 results.
        UsageError: not built, or the launch was refused.
    """
    from normwear_fast.kernels.tuning import multiprocessors  # needs Triton; this module does not

    name, device = "linear_float8", x.device
    rows, columns = len(x), len(linear.weight)
    if not takes(INNER, columns):
        raise InputError(
            f"{name}: {columns} outputs, not a multiple of {2 * TILE_COLUMNS} up to {MOST_COLUMNS}"
        )
    if rows * columns > LARGEST_RESULT:
        raise InputError(
            f"{name}: {rows:,} rows of {columns:,} outputs; one call makes {LARGEST_RESULT:,} at most"
        )
    if out is None:
        out = torch.empty((rows, columns), dtype=FLOAT8, device=device)
    cuda_backend.check(name, "x", x, device, (FLOAT8,), (rows, INNER))
    cuda_backend.check(name, "x_scale", x_scale, device, (torch.float32,), (rows,))
    cuda_backend.check(name, "weight", linear.weight, device, (FLOAT8,), (columns, INNER))
    cuda_backend.check(name, "out", out, device, (FLOAT8,), (rows, columns))
    processors = multiprocessors(device)
    cuda_backend.launch(
        name,
        device,
        {
            "x": x,
            "x_scale": x_scale,
            "weight": linear.weight,
            "pairs": linear.pairs,
            "out": out,
            "rows": rows,
            "columns": columns,
            "parts": parts(-(-rows // 128), columns, processors),
            "blocks": processors,
        },
    )
    return out
