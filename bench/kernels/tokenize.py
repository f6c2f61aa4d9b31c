"""tokenize: 234 channels of 6 s, 10,062 rows of patches in 13 columns."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.kernels import SEQUENCES, TOKENS, WIDTH, Check, Compiled
from bench.kernels.measure import copy_bandwidth, default_device, excess, seconds, twice
from normwear_fast import operators
from normwear_fast.config import NormWearConfig
from normwear_fast.kernels import tokenize as module
from normwear_fast.operators import Tokenizer
from normwear_fast.packing import Segments, sequence_tokens
from normwear_fast.wavelets import ScalogramMethod

CONFIG = NormWearConfig()
SAMPLES = 390
VALUES, BLOCK_V, COLUMNS = 48, 64, CONFIG.grid_columns
PATCH_ROWS = SEQUENCES * (TOKENS - 1) // COLUMNS


def _flops(rows: int) -> float:
    """Of both products for that many rows of patches, padding included."""
    filters = module.column_filters(
        SAMPLES - 2, "conv", CONFIG.wavelet, CONFIG.num_scales, CONFIG.patch_size
    )
    return 2.0 * rows * 3 * BLOCK_V * (float(filters.columns[:, 2].sum()) + COLUMNS * WIDTH)


def compiled() -> list[Compiled]:
    found = []
    for residual, precision, table in (
        ("*bf16", "tf32", module.TF32_CHOICES),
        ("*fp32", "ieee", module.IEEE_CHOICES),
    ):
        size = 2 if residual == "*bf16" else 4
        series_bytes = 3.0 * 4 * SEQUENCES * 800
        found.append(
            Compiled(
                name=f"tokenize {precision}",
                kernel=module.tokens_kernel,
                signature={
                    "padded": "*fp32",
                    "rows": "*i32",
                    "tiles": "*i32",
                    "columns": "*i64",
                    "weight": "*fp32",
                    "templates": "*fp32",
                    "ones": "*fp32",
                    "constants": "*fp32",
                    "residual": residual,
                    "plane": "i32",
                    "num_rows": "i32",
                    "num_tiles": "i32",
                    "residual_stride": "i32",
                },
                constants={
                    "COLUMNS": COLUMNS,
                    "E": WIDTH,
                    "VALUES": VALUES,
                    "BLOCK_V": BLOCK_V,
                    "PRECISION": precision,
                },
                table=table,
                flops=_flops(PATCH_ROWS),
                bytes=series_bytes + float(size) * SEQUENCES * TOKENS * WIDTH,
                programs=lambda blocks: COLUMNS * -(-PATCH_ROWS // blocks["BLOCK_M"]),
                dot=precision == "tf32",
                unit="tf32" if precision == "tf32" else "float32",
                divisible=("plane", "residual_stride"),
            )
        )
        found.append(
            Compiled(
                name=f"tokenize series {precision}",
                kernel=module.series_kernel,
                signature={
                    "series": "*fp32",
                    "spans": "*i32",
                    "templates": "*fp32",
                    "padded": "*fp32",
                    "constants": "*fp32",
                    "residual": residual,
                    "plane": "i32",
                    "residual_stride": "i32",
                },
                constants={"E": WIDTH, "PRECISION": precision},
                table=module.SERIES_CHOICES,
                flops=6.0 * SEQUENCES * SAMPLES,
                bytes=series_bytes + 4.0 * SEQUENCES * SAMPLES,
                programs=lambda blocks: SEQUENCES,
                divisible=("plane", "residual_stride"),
            )
        )
    return found


def _batch(
    lengths: list[int], method: ScalogramMethod, width: int, device: torch.device
) -> tuple[Tensor, Segments, Segments, Tokenizer]:
    tokens = [sequence_tokens(length, method, CONFIG) for length in lengths]
    counts = tuple(sorted(set(tokens)))
    tokenizer = Tokenizer(
        patch_weight=torch.randn(width, 135, device=device) / 135**0.5,
        templates=torch.randn(sum(counts), width, device=device),
        token_counts=counts,
        patch_size=CONFIG.patch_size,
        num_scales=CONFIG.num_scales,
        method=method,
        wavelet=CONFIG.wavelet,
    )
    series = torch.randn(sum(lengths), device=device).cumsum(0) * 0.1
    return series, Segments(lengths, device), Segments(tokens, device), tokenizer


def _defined(
    series: Tensor, samples: Segments, sequences: Segments, tokenizer: Tokenizer
) -> Tensor:
    """The definition in float64, on the CPU."""
    cpu = torch.device("cpu")
    wide = dataclasses.replace(
        tokenizer,
        patch_weight=tokenizer.patch_weight.double().cpu(),
        templates=tokenizer.templates.double().cpu(),
        prepared={},
    )
    rows = torch.empty(sequences.total, len(wide.patch_weight), dtype=torch.float64)
    at = Segments(samples.lengths, cpu), Segments(sequences.lengths, cpu)
    operators.tokenize(rows, series.cpu(), *at, wide)
    return rows


def checks(
    device: torch.device | None = None, width: int = WIDTH, longest: int = 1400
) -> list[tuple[str, Check]]:
    """Ragged lengths up to ``longest``, both scalograms, every dtype and precision; raw counts."""
    device = device or default_device()
    cases: list[tuple[torch.dtype, module.InputPrecision]] = [
        (torch.float32, "ieee"),
        (torch.float32, "tf32"),
        (torch.bfloat16, "tf32"),
    ]
    methods: tuple[ScalogramMethod, ...] = ("conv", "scipy")
    return [
        (
            f"tokenize {method} {dtype} {precision}{' counts' if counts else ''}",
            _check(method, dtype, precision, device, width, longest, counts),
        )
        for method in methods
        for dtype, precision in cases
        for counts in (False, True)
    ]


def _check(
    method: ScalogramMethod,
    dtype: torch.dtype,
    precision: module.InputPrecision,
    device: torch.device,
    width: int,
    longest: int,
    counts: bool,
) -> Check:
    """``counts``: every other series stands on a constant some thousand times what varies on it."""

    def check() -> dict[str, float]:
        rng = np.random.default_rng()
        lengths = [11, 12, 64, 65, 390, 391, 390, 641, 642, 643, 1300]
        lengths = [n for n in lengths if n <= longest]
        lengths += [int(n) for n in rng.integers(11, longest, len(lengths))]
        batch = _batch([lengths[i] for i in rng.permutation(len(lengths))], method, width, device)
        total = batch[2].total
        varying = _defined(*batch)
        if counts:
            each = torch.tensor(batch[1].lengths)
            constant = torch.where(torch.arange(len(each)) % 2 == 0, 4096.0, 0.0)
            # Steps of 2^-10, so that the sum is exact.
            series = (batch[0] * 1024).round() / 1024
            batch = (series + constant.repeat_interleave(each).to(device), *batch[1:])

        def run() -> Tensor:
            rows = torch.full((total, width), torch.nan, device=device, dtype=dtype)
            module.tokenize(rows, *batch, input_precision=precision)
            return rows

        got, stable = twice(run)
        exact = _defined(*batch)
        # float32 sums of up to 640 products and then 135; TF32 rounds its operands to 10 bits.
        # A patch of a constant is large at the ends of its series and next to nothing between.
        rounding = 2**-10 if precision == "tf32" else 3e-6
        absolute = rounding * (varying.abs().max() + exact.abs().amax(dim=1, keepdim=True))
        absolute = absolute.to(device)
        relative = torch.finfo(dtype).eps
        return {**excess(got, exact, absolute, relative), "stable": stable}

    return check


def timings(device: torch.device | None = None, sequences: int = SEQUENCES) -> list[dict[str, Any]]:
    """Uniform and ragged micro-batches, beside what their bytes and FLOPs would take."""
    device = device or default_device()
    found = []
    bandwidth = copy_bandwidth(device, 2 * sequences * TOKENS * WIDTH)
    rng = np.random.default_rng(0)
    ragged = [int(n) for n in np.sort(rng.integers(128, 651, sequences // 4)) for _ in range(4)]
    for name, lengths in (("uniform", [SAMPLES] * sequences), ("ragged", ragged)):
        batch = _batch(lengths, "conv", WIDTH, device)
        for dtype, precision in ((torch.bfloat16, "tf32"), (torch.float32, "ieee")):
            rows = torch.empty(batch[2].total, WIDTH, device=device, dtype=dtype)

            def run(rows=rows, batch=batch, precision=precision) -> None:  # type: ignore[no-untyped-def]
                module.tokenize(rows, *batch, input_precision=precision)

            taken = seconds(run, device)
            patches = (batch[2].total - len(lengths)) // COLUMNS
            found.append(
                {
                    "name": f"tokenize {name} {dtype} {precision}",
                    "seconds": taken,
                    "seconds_a_channel": taken / len(lengths),
                    "tokens_per_s": batch[2].total / taken,
                    "bytes": rows.nbytes,
                    "flops": _flops(patches),
                    "of_bandwidth": rows.nbytes / taken / bandwidth,
                }
            )
    return found
