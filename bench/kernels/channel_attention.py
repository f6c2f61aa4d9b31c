"""channel_attention: tokens of a channel, [CLS] rows of a window, one query a channel; beside SDPA."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from bench.kernels import HEADS, SEQUENCES, TOKENS, WIDTH, Check, Compiled
from bench.kernels.measure import default_device, excess, seconds, twice
from normwear_fast import operators
from normwear_fast.kernels import channel_attention as module
from normwear_fast.packing import Segments

ROWS, SIZE, CHANNELS = SEQUENCES * TOKENS, WIDTH // HEADS, 4
FLOAT32, BFLOAT16 = torch.float32, torch.bfloat16


def _flops(queries: Segments, keys: Segments) -> float:
    pairs = sum(q * k for q, k in zip(queries.lengths, keys.lengths, strict=True))
    return 4.0 * WIDTH * pairs


def _bytes(queries: Segments, keys: Segments, dtype: torch.dtype) -> float:
    return 2.0 * dtype.itemsize * WIDTH * (queries.total + keys.total)


def compiled() -> list[Compiled]:
    cpu = torch.device("cpu")
    tokens, ones = Segments([TOKENS] * SEQUENCES, cpu), Segments([1] * SEQUENCES, cpu)
    windows = Segments([CHANNELS] * (SEQUENCES // CHANNELS), cpu)
    found = []
    for name, dtype, queries, keys, table in (
        ("bfloat16", BFLOAT16, tokens, tokens, module.LONG_CHOICES),
        ("bfloat16 of [CLS] rows", BFLOAT16, windows, windows, module.SHORT_CHOICES),
        ("bfloat16 of one query", BFLOAT16, ones, tokens, module.FEW_CHOICES),
        ("float32", FLOAT32, tokens, tokens, module.FLOAT32_CHOICES),
    ):
        pointer = "*bf16" if dtype == BFLOAT16 else "*fp32"

        def programs(blocks: Any, queries: Segments = queries) -> int:
            return HEADS * sum(-(-n // blocks["BLOCK_M"]) for n in queries.lengths)

        found.append(
            Compiled(
                name=f"channel_attention {name}",
                kernel=module.channel_attention_kernel,
                signature={
                    "query": pointer,
                    "key_value": pointer,
                    "out": pointer,
                    "tiles": "*i32",
                    "cu_queries": "*i32",
                    "cu_keys": "*i32",
                    "query_stride": "i32",
                    "key_value_stride": "i32",
                    "out_stride": "i32",
                },
                constants={
                    "HEADS": HEADS,
                    "HEAD_SIZE": SIZE,
                    "PRECISION": "ieee",
                    "OPTIMISTIC": queries.longest > 64,
                },
                table=table,
                flops=_flops(queries, keys),
                bytes=_bytes(queries, keys, dtype),
                programs=programs,
                dot=dtype == BFLOAT16,
                unit="bfloat16" if dtype == BFLOAT16 else "float32",
                divisible=("query_stride", "key_value_stride", "out_stride"),
            )
        )
    return found


def _draw(rows: int, heads: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(rows, 3 E) queries, keys and values, the queries as after folding."""
    width = heads * SIZE
    qkv = torch.randn(rows, 3 * width, device=device)
    qkv[:, :width] *= 2 * SIZE**-0.5 / float(np.log(2))
    return qkv.to(dtype)


def _steepen(qkv: Tensor, sequences: Segments, heads: int, powers: float) -> None:
    """Scores grow by that many powers of two from a sequence's first key to its last, in two of three
    queries; the other is as it was drawn."""
    query, key, _ = qkv.view(len(qkv), 3, heads, SIZE).unbind(1)
    key[..., 0] = 0
    query[::3, :, 0], query[1::3, :, 0] = 16, 16
    for start, stop in zip(sequences.bounds[:-1], sequences.bounds[1:], strict=True):
        slope = torch.linspace(0, powers / 16, stop - start, device=qkv.device)
        key[start:stop, :, 0] = slope[:, None].to(qkv.dtype)


def checks(
    device: torch.device | None = None, longest: int = 1300, count: int = 20, heads: int = HEADS
) -> list[tuple[str, Check]]:
    """Ragged channels, windows of 1 to 64, one query a channel, and channels whose scores grow beyond
    what the optimistic softmax holds, or fall.

    Args:
        device: the GPU by default.
        longest: tokens of a channel at most.
        count: segments whose lengths are drawn.
        heads: of 64 values.
    """
    device = device or default_device()
    rng = np.random.default_rng()
    ragged = [longest, 1, *(int(n) for n in rng.integers(1, longest + 1, count))]
    windows = [1, 14, 64, *(int(n) for n in rng.integers(1, 15, count))]
    ones = [1] * len(ragged)
    return [
        (f"channel_attention {name} {dtype}", _check(queries, keys, heads, dtype, device, powers))
        for name, queries, keys, powers in (
            ("of tokens", ragged, ragged, 0.0),
            ("of [CLS] rows", windows, windows, 0.0),
            ("of one query", ones, ragged, 0.0),
            ("of tokens, 2^80 steep", ragged, ragged, 80.0),
            ("of tokens, 2^600 steep", ragged, ragged, 600.0),
            ("of tokens, 2^-600 steep", ragged, ragged, -600.0),
            ("of one query, 2^600 steep", ones, ragged, 600.0),
        )
        for dtype in (FLOAT32, BFLOAT16)
    ]


def _check(
    queries: list[int],
    keys: list[int],
    heads: int,
    dtype: torch.dtype,
    device: torch.device,
    powers: float,
) -> Check:
    def check() -> dict[str, float]:
        asking, asked = Segments(queries, device), Segments(keys, device)
        width = heads * SIZE
        qkv = _draw(asked.total, heads, dtype, device)
        if powers:
            _steepen(qkv, asked, heads, powers)
        query, key_value = qkv[:, :width], qkv[:, width:]
        if asking.total != asked.total:
            query = query[asked.cu[:-1].long()]

        def run() -> Tensor:
            out = torch.full((asking.total, width), torch.nan, device=device, dtype=dtype)
            return module.channel_attention(query, key_value, asking, asked, heads, out=out)

        got, stable = twice(run)
        exact = operators.channel_attention(
            query.double(), key_value.double(), asking, asked, heads
        )
        # Weights, rounded to bfloat16, move a mean of values by 2^-8 of the largest; what float32 leaves
        # of large scores does, too.
        largest = float(key_value[:, width:].abs().max())
        absolute = largest * ((4e-6 if dtype == FLOAT32 else 2**-8) + 4e-7 * abs(powers))
        return {**excess(got, exact, absolute, torch.finfo(dtype).eps / 2), "stable": stable}

    return check


def _sdpa(count: int, tokens: int, dtype: torch.dtype, device: torch.device) -> Callable[[], None]:
    """torch's attention on ``count`` sequences of that many tokens, laid out as it likes them."""
    q, k, v = torch.randn(3, count, HEADS, tokens, SIZE, device=device).to(dtype)

    def run() -> None:
        scaled_dot_product_attention(q, k, v)

    return run


def _baselines(
    count: int, tokens: int, dtype: torch.dtype, device: torch.device
) -> dict[str, float]:
    """Seconds by backend of torch's attention; those that cannot run here are left out."""
    found = {}
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION):
        try:
            with sdpa_kernel(backend):
                found[backend.name.lower()] = seconds(_sdpa(count, tokens, dtype, device), device)
        except RuntimeError:
            continue
    return found


def timings(
    device: torch.device | None = None, sequences: int = SEQUENCES, tokens: int = TOKENS
) -> list[dict[str, Any]]:
    """Equal lengths, a mix of lengths from one to six, [CLS] rows, one query a channel.

    The mix is held against SDPA padded to the longest, without the mask that its flash kernel does not
    take: what padding costs at least.
    """
    device = device or default_device()
    equal, ones = Segments([tokens] * sequences, device), Segments([1] * sequences, device)
    windows = Segments([CHANNELS] * max(1, sequences // CHANNELS), device)
    spread = np.linspace(tokens * 2 / 7, tokens * 12 / 7, sequences).astype(int)
    mix = Segments([max(1, int(n)) for n in spread], device)
    found = []
    for name, queries, keys, dtype in (
        ("equal", equal, equal, BFLOAT16),
        ("mix 1:6", mix, mix, BFLOAT16),
        ("of [CLS] rows", windows, windows, BFLOAT16),
        ("of one query", ones, equal, BFLOAT16),
        ("equal", equal, equal, FLOAT32),
    ):
        qkv = _draw(max(queries.total, keys.total), HEADS, dtype, device)
        query, key_value = qkv[: queries.total, :WIDTH], qkv[: keys.total, WIDTH:]
        out = torch.empty(queries.total, WIDTH, device=device, dtype=dtype)

        def run(query=query, key_value=key_value, queries=queries, keys=keys, out=out) -> None:  # type: ignore[no-untyped-def]
            module.channel_attention(query, key_value, queries, keys, HEADS, out=out)

        taken, flops = seconds(run, device), _flops(queries, keys)
        row: dict[str, Any] = {
            "name": f"channel_attention {name} {dtype}",
            "seconds": taken,
            "flops": flops,
            "bytes": _bytes(queries, keys, dtype),
            "flops_per_s": flops / taken,
        }
        if dtype == BFLOAT16 and queries is keys and queries is not windows:
            sdpa = _baselines(len(queries), queries.longest, dtype, device)
            row |= {f"{backend}_seconds": value for backend, value in sdpa.items()}
            row |= {f"over_{backend}": value / taken for backend, value in sdpa.items()}
        found.append(row)
    return found
