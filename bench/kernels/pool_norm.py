"""pool_norm: one pass over the residual, against the bandwidth of a copy."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from bench.kernels import SEQUENCES, TOKENS, WIDTH, Check, Compiled
from bench.kernels.measure import copy_bandwidth, default_device, excess, seconds, twice
from normwear_fast import operators
from normwear_fast.kernels import pool_norm as module
from normwear_fast.operators import Pool
from normwear_fast.packing import Segments

POOLS: tuple[Pool, ...] = ("mean", "cls", "patch")
EPS = 1e-6
ROWS = SEQUENCES * TOKENS


def compiled() -> list[Compiled]:
    constants = {"E": WIDTH, "BLOCK_E": 1024, "update": None}
    common = {
        "residual": "*bf16",
        "carried": "*fp32",
        "weight": "*fp32",
        "bias": "*fp32",
        "cu": "*i32",
        "out": "*fp32",
        "residual_stride": "i32",
        "update_stride": "i32",
        "eps": "fp32",
    }
    return [
        Compiled(
            name="pool_norm mean",
            kernel=module.pool_mean_kernel,
            signature=common,
            constants=constants,
            table=module.MEAN_CHOICES,
            flops=8.0 * ROWS * WIDTH,
            bytes=2.0 * ROWS * WIDTH + 4.0 * SEQUENCES * WIDTH,
            programs=lambda blocks: SEQUENCES,
            divisible=("residual_stride",),
        ),
        Compiled(
            name="pool_norm patch",
            kernel=module.pool_rows_kernel,
            signature={**common, "count": "i32"},
            constants={**constants, "cu": None},
            table=module.ROWS_CHOICES,
            flops=8.0 * ROWS * WIDTH,
            bytes=6.0 * ROWS * WIDTH,
            programs=lambda blocks: -(-ROWS // blocks["BLOCK_ROWS"]),
            divisible=("residual_stride",),
        ),
        Compiled(
            name="pool_norm cls",
            kernel=module.pool_rows_kernel,
            signature={**common, "count": "i32"},
            constants=constants,
            table=module.ROWS_CHOICES,
            flops=8.0 * SEQUENCES * WIDTH,
            bytes=6.0 * SEQUENCES * WIDTH,
            programs=lambda blocks: -(-SEQUENCES // blocks["BLOCK_ROWS"]),
            divisible=("residual_stride",),
        ),
    ]


def checks(device: torch.device | None = None, longest: int = 1300) -> list[tuple[str, Check]]:
    """Ragged sequences and some of no tokens, every pool and dtype.

    Args:
        device: the GPU by default.
        longest: tokens of a sequence at most.
    """
    device = device or default_device()
    return [
        (f"pool_norm {pool} {dtype} {out}", _check(pool, dtype, out, device, longest))
        for pool in POOLS
        for dtype in (torch.float32, torch.bfloat16)
        for out in (torch.float32, torch.bfloat16)
    ]


def _check(
    pool: Pool, dtype: torch.dtype, out_dtype: torch.dtype, device: torch.device, longest: int
) -> Check:
    def check() -> dict[str, float]:
        rng = np.random.default_rng()
        lengths = [*(int(n) for n in rng.integers(1, longest, 20)), 1, 0, 0]
        sequences = Segments(lengths, device)
        residual = torch.randn(sequences.total, WIDTH, device=device).mul(3).to(dtype)
        update = torch.randn(sequences.total, WIDTH, device=device).to(dtype)
        vectors = [torch.randn(WIDTH, device=device) for _ in range(3)]

        def run() -> torch.Tensor:
            rows = sequences.total if pool == "patch" else len(sequences)
            out = torch.full((rows, WIDTH), torch.nan, device=device, dtype=out_dtype)
            return module.pool_norm(
                residual, *vectors, EPS, sequences, pool, update=update, out=out
            )

        got, stable = twice(run)
        cpu = torch.device("cpu")
        exact = operators.pool_norm(
            residual.double().cpu(),
            *(vector.double().cpu() for vector in vectors),
            EPS,
            Segments(lengths[:-2], cpu),
            pool,
            update=update.double().cpu(),
        )
        if pool != "patch":
            exact = torch.cat((exact, exact.new_zeros(2, WIDTH)))
        return {**excess(got, exact, 5e-6, torch.finfo(out_dtype).eps), "stable": stable}

    return check


def timings(device: torch.device | None = None, sequences: int = SEQUENCES) -> list[dict[str, Any]]:
    """Every pool at the judged shape, as a part of the bandwidth of a copy."""
    device = device or default_device()
    segments = Segments([TOKENS] * sequences, device)
    bandwidth = copy_bandwidth(device, 4 * segments.total * WIDTH)
    vectors = [torch.randn(WIDTH, device=device) for _ in range(3)]
    found = []
    for dtype in (torch.bfloat16, torch.float32):
        residual = torch.randn(segments.total, WIDTH, device=device).to(dtype)
        for pool in POOLS:
            rows = segments.total if pool == "patch" else sequences
            out = torch.empty(rows, WIDTH, device=device)
            read = sequences if pool == "cls" else segments.total

            def run(residual=residual, pool=pool, out=out) -> None:  # type: ignore[no-untyped-def]
                module.pool_norm(residual, *vectors, EPS, segments, pool, out=out)

            taken = seconds(run, device)
            moved = read * WIDTH * residual.element_size() + out.nbytes
            found.append(
                {
                    "name": f"pool_norm {pool} {dtype}",
                    "seconds": taken,
                    "bytes": moved,
                    "flops": 8.0 * read * WIDTH,
                    "of_bandwidth": moved / taken / bandwidth,
                }
            )
    return found
