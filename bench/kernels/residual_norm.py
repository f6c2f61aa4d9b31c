"""residual_norm: each row read and written once, against the bandwidth of a copy."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.kernels import SEQUENCES, TOKENS, WIDTH, Check, Compiled
from bench.kernels.measure import copy_bandwidth, default_device, excess, seconds, twice
from normwear_fast import operators
from normwear_fast.kernels import residual_norm as module

EPS = 1e-6
ROWS = SEQUENCES * TOKENS
FLOAT32, BFLOAT16, FLOAT8 = torch.float32, torch.bfloat16, torch.float8_e4m3fn
TRITON_TYPES = {FLOAT32: "*fp32", BFLOAT16: "*bf16", FLOAT8: "*fp8e4nv"}

CASES: list[tuple[torch.dtype, torch.dtype | None, torch.dtype]] = [
    (BFLOAT16, None, BFLOAT16),
    (BFLOAT16, BFLOAT16, BFLOAT16),
    (FLOAT32, BFLOAT16, BFLOAT16),
    (FLOAT32, None, FLOAT32),
    (BFLOAT16, BFLOAT16, FLOAT8),
    (BFLOAT16, None, FLOAT8),
]
"""Residual, update and result as the encoder has them: the first in every layer of bfloat16."""


def _name(residual: torch.dtype, update: torch.dtype | None, out: torch.dtype) -> str:
    def short(dtype: torch.dtype) -> str:
        return str(dtype).removeprefix("torch.").removesuffix("_e4m3fn")

    added = "" if update is None else f" + {short(update)}"
    return f"residual_norm {short(residual)}{added} to {short(out)}"


def _bytes(rows: int, residual: torch.dtype, update: torch.dtype | None, out: torch.dtype) -> float:
    """The residual read, with an update also that and the residual written, and the result."""
    moved = residual.itemsize + out.itemsize
    moved += 0 if update is None else residual.itemsize + update.itemsize
    return float(rows) * (WIDTH * moved + (4 if out == FLOAT8 else 0))


def compiled() -> list[Compiled]:
    found = []
    for residual, update, out in CASES:
        constants: dict[str, Any] = {"E": WIDTH, "BLOCK_E": 1024}
        constants |= {"update": None} if update is None else {}
        constants |= {} if out == FLOAT8 else {"scale": None}
        signature = {
            "residual": TRITON_TYPES[residual],
            "update": TRITON_TYPES[update or residual],
            "carried": "*fp32",
            "out": TRITON_TYPES[out],
            "scale": "*fp32",
            "rows": "i32",
            "residual_stride": "i32",
            "update_stride": "i32",
            "out_stride": "i32",
            "eps": "fp32",
        }
        found.append(
            Compiled(
                name=_name(residual, update, out),
                kernel=module.residual_norm_kernel,
                signature={k: v for k, v in signature.items() if k not in constants},
                constants=constants,
                table=module.FLOAT8_CHOICES if out == FLOAT8 else module.CHOICES,
                flops=9.0 * ROWS * WIDTH,
                bytes=_bytes(ROWS, residual, update, out),
                programs=lambda blocks: -(-ROWS // blocks["ROWS"]),
                divisible=("residual_stride", "update_stride", "out_stride"),
            )
        )
    return found


def _float8_runs(device: torch.device) -> bool:
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 9)


def checks(device: torch.device | None = None, rows: int = 5_000) -> list[tuple[str, Check]]:
    """Every case in two widths, on up to ``rows`` rows."""
    device = device or default_device()
    return [
        (f"{_name(*case)} {width}", _check(case, width, rows, device))
        for case in CASES
        for width in (WIDTH, 100)
        if case[2] != FLOAT8 or _float8_runs(device)
    ]


def _check(
    case: tuple[torch.dtype, torch.dtype | None, torch.dtype],
    width: int,
    most: int,
    device: torch.device,
) -> Check:
    dtype, update_dtype, out_dtype = case

    def check() -> dict[str, float]:
        rows = int(np.random.default_rng().integers(1, most + 1))
        residual = (torch.randn(rows, width, device=device) * 30 + 10).to(dtype)
        residual[0] = 3.0  # no variance
        update, stored = None, residual
        if update_dtype is not None:
            update = (torch.randn(rows, width, device=device) * 60).to(update_dtype)
            update[0] = 5.0
            stored = (residual.float() + update.float()).to(dtype)
        carried = torch.randn(width, device=device)
        scale = torch.full((rows,), torch.nan, device=device)
        written = True

        def run() -> Tensor:
            nonlocal written
            x = residual.clone()
            out = torch.full((rows, width), torch.nan, device=device).to(out_dtype)
            scale.fill_(torch.nan)
            kept = scale if out_dtype == FLOAT8 else None
            module.residual_norm(x, carried, EPS, update=update, out=out, scale=kept)
            written = written and torch.equal(x, stored)
            # A quotient may fall either side of a step, so float8 is judged after its scale.
            return out.float() * scale[:, None] if out_dtype == FLOAT8 else out

        got, stable = twice(run)
        exact = operators.residual_norm(stored.double(), carried.double(), EPS)
        if out_dtype == FLOAT8:
            relative = 2**-4 + 1e-5
            absolute = 2**-10 * float(exact.abs().max()) / 448 + 1e-5
        else:
            relative, absolute = torch.finfo(out_dtype).eps / 2 + 2e-6, 5e-6
        found = excess(got, exact, absolute, relative)
        if not written:
            found["error"] = float("inf")
        return {**found, "stable": stable}

    return check


def timings(device: torch.device | None = None, sequences: int = SEQUENCES) -> list[dict[str, Any]]:
    """Every case at the judged shape, as a part of the bandwidth of a copy."""
    device = device or default_device()
    rows = sequences * TOKENS
    bandwidth = copy_bandwidth(device, 2 * rows * WIDTH)
    carried = torch.randn(WIDTH, device=device)
    found = []
    for case in CASES:
        dtype, update_dtype, out_dtype = case
        if out_dtype == FLOAT8 and not _float8_runs(device):
            continue
        residual = torch.randn(rows, WIDTH, device=device).to(dtype)
        # Added again in every run: small, so that many runs stay finite.
        update = None if update_dtype is None else torch.zeros_like(residual, dtype=update_dtype)
        out = torch.empty(rows, WIDTH, device=device, dtype=out_dtype)
        scale = torch.empty(rows, device=device) if out_dtype == FLOAT8 else None

        def run(residual=residual, update=update, out=out, scale=scale) -> None:  # type: ignore[no-untyped-def]
            module.residual_norm(residual, carried, EPS, update=update, out=out, scale=scale)

        taken, moved = seconds(run, device), _bytes(rows, *case)
        found.append(
            {
                "name": _name(*case),
                "seconds": taken,
                "bytes": moved,
                "flops": 9.0 * rows * WIDTH,
                "of_bandwidth": moved / taken / bandwidth,
            }
        )
    return found
