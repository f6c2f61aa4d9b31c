"""qkv and fc1 on a Hopper GPU, with bias and activation: the definition and the kernel's call.

Triton ends a tile before it begins the next: its sums get their bias and GELU, are rounded and stored,
while the tensor cores wait. With 768 values to a sum that is a fifth of fc1's time. In
csrc/cuda/linear.cu two warpgroups take turns, and none of it is waited for. 131,072 rows, kept up for
0.2 s on an H100 (2026-11-26): qkv 685 us, the vendor's product 775; fc1 990, Triton's 1,144; qkv of
float8 417, the vendor's 507. Not so proj and fc2, which add to the residual: 298 and 1,016 us, the
vendor's 284 and 901.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from normwear_fast import _native, cuda_backend
from normwear_fast.errors import InputError

FLOAT8 = torch.float8_e4m3fn

TILE_COLUMNS, MOST_COLUMNS, STEP_BYTES = 192, 3072, 128
"""Columns of a tile, most columns, and bytes of a row in one step, as in csrc/cuda/linear.cu."""

MOST_ROWS = 2**30
"""The kernel counts rows in 32 bits."""

BIAS, GELU, SCALED = range(3)
"""What becomes of a product, as in csrc/cuda/launch.h."""


def runs(device: torch.device) -> bool:
    """Whether kernels for Hopper run there: on such a GPU, where they were built, and with a driver for
    the CUDA they were built with, which may be newer than torch's."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) != (9, 0):
        return False
    module, _ = _native.load()
    return module is not None and bool(module.CUDA) and bool(module.cuda_hopper_runs())


def takes(columns: int, inner_bytes: int) -> bool:
    """Whether the kernel is written for products of these sizes."""
    steps = inner_bytes % STEP_BYTES == 0 < inner_bytes
    return steps and columns % TILE_COLUMNS == 0 < columns <= MOST_COLUMNS


def fits(device: torch.device, width: int, hidden: int) -> bool:
    """Whether a block's products of ``width`` values, to any of queries, keys and values and to
    ``hidden`` neurons, can be the kernel's there."""
    # A value of float8 is one byte: the stricter.
    return all(takes(columns, width) for columns in (width, 3 * width, hidden)) and runs(device)


def linear_ref(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    scales: tuple[Tensor, Tensor] | None = None,
    gelu: bool = False,
) -> Tensor:
    """x weight^T + bias and GELU (erf) of it, in float64: the definition of `linear`."""
    product = x.double() @ weight.double().T
    if scales is not None:
        product *= scales[0].double()[:, None] * scales[1].double()
    if bias is not None:
        product += bias.double()
    return F.gelu(product) if gelu else product


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    scales: tuple[Tensor, Tensor] | None = None,
    gelu: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """`linear_ref` in one launch, summed in float32 (float8: as tensor cores sum it), rounded once.

    Args:
        x: (rows, K) bfloat16, or e4m3 with ``scales``; a row is a multiple of 128 bytes.
        weight: (N, K) in x's dtype, N a multiple of 192 up to 3072.
        bias: (N,) float32 or bfloat16, or None.
        scales: (rows,) and (N,) float32: x and weight stand for their rows times these.
        gelu: not with ``scales``.
        out: (rows, N) bfloat16 buffer for the result.

    Returns:
        ``out``, or a new tensor.

    Raises:
        InputError: a tensor of another dtype, device, shape or layout.
        UsageError: not built, or the launch was refused.
    """
    from normwear_fast.kernels.tuning import multiprocessors  # needs Triton; this module does not

    name, device, dtype = "linear", x.device, torch.bfloat16 if scales is None else FLOAT8
    if x.ndim != 2:
        raise InputError(f"{name}: x has shape {tuple(x.shape)}; it must be (rows, values)")
    (rows, inner), columns = x.shape, len(weight)
    if gelu and scales is not None:
        raise InputError(f"{name}: gelu is not made of scaled operands")
    if not takes(columns, inner * dtype.itemsize):
        raise InputError(
            f"{name}: {inner} values to {columns} outputs; rows must be multiples of {STEP_BYTES} "
            f"bytes, outputs a multiple of {TILE_COLUMNS} up to {MOST_COLUMNS}"
        )
    if rows > MOST_ROWS:
        raise InputError(f"{name}: {rows:,} rows; one call takes {MOST_ROWS:,} at most")
    if out is None:
        out = torch.empty((rows, columns), dtype=torch.bfloat16, device=device)
    cuda_backend.check(name, "x", x, device, (dtype,), (rows, inner))
    cuda_backend.check(name, "weight", weight, device, (dtype,), (columns, inner))
    cuda_backend.check(name, "out", out, device, (torch.bfloat16,), (rows, columns))
    if bias is not None:
        floats = (torch.float32, torch.bfloat16)
        cuda_backend.check(name, "bias", bias, device, floats, (columns,))
    x_scale, scale = scales or (None, None)
    if x_scale is not None and scale is not None:
        cuda_backend.check(name, "x's scale", x_scale, device, (torch.float32,), (rows,))
        cuda_backend.check(name, "weight's scale", scale, device, (torch.float32,), (columns,))
    cuda_backend.launch(
        name,
        device,
        {
            "x": x,
            "weight": weight,
            "bias": bias,
            "x_scale": x_scale,
            "scale": scale,
            "out": out,
            "rows": rows,
            "columns": columns,
            "inner": inner,
            "epilogue": GELU if gelu else BIAS if scales is None else SCALED,
            "bias_type": cuda_backend.TYPES[torch.float32 if bias is None else bias.dtype],
            "blocks": multiprocessors(device),
        },
    )
    return out
