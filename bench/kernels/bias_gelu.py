"""bias_gelu: the MLP's activation, against the bandwidth of a copy."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.kernels import SEQUENCES, TOKENS, WIDTH, Check, Compiled
from bench.kernels.measure import copy_bandwidth, default_device, excess, seconds, twice
from normwear_fast import operators
from normwear_fast.kernels import bias_gelu as module

ROWS, HIDDEN = SEQUENCES * TOKENS, 4 * WIDTH
FLOAT32, BFLOAT16, FLOAT8 = torch.float32, torch.bfloat16, torch.float8_e4m3fn

INSTRUCTIONS = 18.0
"""Of a value: what is counted as its FLOPs."""


def _float8_runs(device: torch.device) -> bool:
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 9)


def compiled() -> list[Compiled]:
    found = [
        Compiled(
            name=f"bias_gelu {name}",
            kernel=module.bias_gelu_kernel,
            signature={"x": x, "bias": "*fp32", "rows": "i32", "x_stride": "i32"},
            constants={"HIDDEN": HIDDEN},
            table=module.CHOICES,
            flops=INSTRUCTIONS * ROWS * HIDDEN,
            bytes=2.0 * size * ROWS * HIDDEN,
            programs=lambda blocks: -(-ROWS // blocks["ROWS"]) * -(-HIDDEN // blocks["COLUMNS"]),
            divisible=("x_stride",),
        )
        for name, x, size in (("bfloat16", "*bf16", 2), ("float32", "*fp32", 4))
    ]
    found.append(
        Compiled(
            name="bias_gelu float8",
            kernel=module.bias_gelu_float8_kernel,
            signature={
                "x": "*bf16",
                "bias": "*fp32",
                "out": "*fp8e4nv",
                "scale": "*fp32",
                "x_stride": "i32",
                "out_stride": "i32",
            },
            constants={"HIDDEN": HIDDEN, "BLOCK_HIDDEN": 4096},
            table=module.FLOAT8_CHOICES,
            flops=INSTRUCTIONS * ROWS * HIDDEN,
            bytes=3.0 * ROWS * HIDDEN + 4.0 * ROWS,
            programs=lambda blocks: ROWS,
            divisible=("x_stride", "out_stride"),
        )
    )
    return found


def checks(device: torch.device | None = None, rows: int = 3_000) -> list[tuple[str, Check]]:
    """In place and into float8, in two widths, on up to ``rows`` rows."""
    device = device or default_device()
    return [
        (f"bias_gelu {dtype}{' to float8' if float8 else ''} {hidden}", check)
        for dtype in (FLOAT32, BFLOAT16)
        for float8 in (False, True)
        for hidden in (HIDDEN, 100)
        if not float8 or _float8_runs(device)
        for check in [_check(dtype, float8, hidden, rows, device)]
    ]


def _check(dtype: torch.dtype, float8: bool, hidden: int, most: int, device: torch.device) -> Check:
    def check() -> dict[str, float]:
        rows = int(np.random.default_rng().integers(1, most + 1))
        x = (torch.randn(rows, hidden, device=device) * 3).to(dtype)
        bias = torch.randn(hidden, device=device)
        x[0], bias[0] = -30.0, 0.0  # a row of nothing, as far as float32 reaches
        exact = x.double()
        operators.bias_gelu(exact, bias.double())

        def run() -> Tensor:
            if not float8:
                inside = x.clone()
                module.bias_gelu(inside, bias)
                return inside
            out = torch.full((rows, hidden), torch.nan, device=device).to(FLOAT8)
            scale = torch.full((rows,), torch.nan, device=device)
            module.bias_gelu(x, bias, out=out, scale=scale)
            return out.float() * scale[:, None]

        got, stable = twice(run)
        if float8:
            # Half a step: 2^-4 of the value, or 2^-10 of the scale below the smallest normal value.
            step = exact.abs().amax(1, keepdim=True) / 448 * 2**-10
            error = (got.double() - exact).abs() - (step + (2**-4 + 1e-5) * exact.abs())
            return {"error": float(error.max()), "bound": 1e-6, "stable": stable}
        return {**excess(got, exact, 1e-6, torch.finfo(dtype).eps / 2 + 3e-7), "stable": stable}

    return check


def timings(device: torch.device | None = None, sequences: int = SEQUENCES) -> list[dict[str, Any]]:
    """At the judged shape, as a part of the bandwidth of a copy."""
    device = device or default_device()
    rows = sequences * TOKENS
    bandwidth = copy_bandwidth(device, 2 * rows * HIDDEN)
    bias = torch.randn(HIDDEN, device=device)
    found = []
    for dtype, float8 in ((BFLOAT16, False), (FLOAT32, False), (BFLOAT16, True)):
        if float8 and not _float8_runs(device):
            continue
        x = torch.randn(rows, HIDDEN, device=device).to(dtype)
        out = torch.empty(rows, HIDDEN, device=device, dtype=FLOAT8) if float8 else None
        scale = torch.empty(rows, device=device) if float8 else None

        def run(x=x, out=out, scale=scale) -> None:  # type: ignore[no-untyped-def]
            module.bias_gelu(x, bias, out=out, scale=scale)

        taken = seconds(run, device)
        moved = rows * (HIDDEN * (3 if float8 else 2 * x.element_size()) + (4 if float8 else 0))
        found.append(
            {
                "name": f"bias_gelu {dtype}{' to float8' if float8 else ''}",
                "seconds": taken,
                "bytes": moved,
                "flops": INSTRUCTIONS * rows * HIDDEN,
                "of_bandwidth": moved / taken / bandwidth,
            }
        )
    return found
