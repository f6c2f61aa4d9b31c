"""pool_norm: one pass over the residual, against the bandwidth of a copy."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor

from bench.kernels import SEQUENCES, TOKENS, WIDTH, Check, Compiled
from bench.kernels.measure import copy_bandwidth, default_device, excess, seconds, twice
from normwear_fast import operators
from normwear_fast.kernels import pool_norm as module
from normwear_fast.kernels.tuning import Choice
from normwear_fast.operators import Pool
from normwear_fast.packing import Segments

POOLS: tuple[Pool, ...] = ("mean", "cls", "patch")
EPS = 1e-6
ROWS = SEQUENCES * TOKENS
CHANNELS = 3
"""Of a window."""
PARTS = module.MEAN_CHOICES[80][0].blocks["PARTS"]


def compiled() -> list[Compiled]:
    constants = {"E": WIDTH, "BLOCK_E": 1024, "update": None}
    common = {
        "residual": "*bf16",
        "carried": "*fp32",
        "parts": "*fp32",
        "weight": "*fp32",
        "bias": "*fp32",
        "cu": "*i32",
        "out": "*fp32",
        "residual_stride": "i32",
        "update_stride": "i32",
        "eps": "fp32",
    }
    sums = {
        80: tuple(
            Choice({"PARTS": parts}, num_warps=module.SUM_WARPS)
            for parts in dict.fromkeys(choice.blocks["PARTS"] for choice in module.MEAN_CHOICES[80])
        )
    }
    return [
        Compiled(
            name="pool_norm mean",
            kernel=module.pool_mean_kernel,
            signature=common,
            constants=constants,
            table=module.MEAN_CHOICES,
            flops=8.0 * ROWS * WIDTH,
            bytes=2.0 * ROWS * WIDTH + 4.0 * PARTS * SEQUENCES * WIDTH,
            programs=lambda blocks: SEQUENCES * blocks["PARTS"],
            divisible=("residual_stride",),
        ),
        Compiled(
            name="pool_norm mean, sum of parts",
            kernel=module.pool_sum_kernel,
            signature=common,
            constants={"E": WIDTH, "BLOCK_E": 1024},
            table=sums,
            flops=float(PARTS + 3) * SEQUENCES * WIDTH,
            bytes=4.0 * (PARTS + 1) * SEQUENCES * WIDTH,
            programs=lambda blocks: SEQUENCES,
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


def _poisoned(size: tuple[int, int], **options: Any) -> Tensor:
    return torch.full(size, torch.nan, **options)


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

        def run() -> Tensor:
            rows = sequences.total if pool == "patch" else len(sequences)
            out = torch.full((rows, WIDTH), torch.nan, device=device, dtype=out_dtype)
            with patch.object(torch, "empty", _poisoned):  # what the parts of a mean are kept in
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
    """Every pool at the judged shape and the mean of one window, as a part of the bandwidth of a copy."""
    device = device or default_device()
    bandwidth = copy_bandwidth(device, 4 * sequences * TOKENS * WIDTH)
    vectors = [torch.randn(WIDTH, device=device) for _ in range(3)]
    cases: list[tuple[str, Pool, int]] = [(pool, pool, sequences) for pool in POOLS]
    cases.append(("mean of a window", "mean", CHANNELS))
    found = []
    for dtype in (torch.bfloat16, torch.float32):
        for name, pool, count in cases:
            segments = Segments([TOKENS] * count, device)
            residual = torch.randn(segments.total, WIDTH, device=device).to(dtype)
            rows = segments.total if pool == "patch" else count
            out = torch.empty(rows, WIDTH, device=device)
            read = count if pool == "cls" else segments.total

            def run(residual=residual, pool=pool, segments=segments, out=out) -> None:  # type: ignore[no-untyped-def]
                module.pool_norm(residual, *vectors, EPS, segments, pool, out=out)

            taken = seconds(run, device)
            moved = read * WIDTH * residual.element_size() + out.nbytes
            found.append(
                {
                    "name": f"pool_norm {name} {dtype}",
                    "seconds": taken,
                    "bytes": moved,
                    "flops": 8.0 * read * WIDTH,
                    "of_bandwidth": moved / taken / bandwidth,
                }
            )
    return found
