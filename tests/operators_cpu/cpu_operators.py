"""What the CPU operators' tests share: instruction sets, inputs, and how outputs are compared."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

from normwear_fast import _native, native, operators
from normwear_fast.backends import TORCH
from normwear_fast.config import NormWearConfig
from normwear_fast.engine import Engine
from normwear_fast.folding import fold
from normwear_fast.packing import Layout, Segments
from normwear_fast.reference import ReferenceNormWear

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
NATIVE = _native.load()[0] is not None
EPS = 1e-6
NAN, INFINITY = float("nan"), float("inf")
CONFIG = NormWearConfig(embed_dim=16, depth=1, num_heads=2, decoder_embed_dim=16, decoder_depth=0)
PRECISIONS = sorted(native.OPERANDS)
needs_native = pytest.mark.skipif(not NATIVE, reason="normwear_fast._C was not built")


def has(name: str) -> pytest.MarkDecorator:
    missing = name != "torch" and name not in native.instruction_sets()
    return pytest.mark.skipif(missing, reason=f"not run: this build or processor has no {name}")


NAMES = [pytest.param(name, marks=has(name)) for name in native.INSTRUCTION_SETS]
BACKENDS = [pytest.param("torch"), *NAMES]


def kernels(name: str):
    module = _native.load()[0]
    assert module is not None
    return module.kernels(name)


def draw(rng, *shape, dtype=torch.float32, scale=1.0) -> torch.Tensor:
    values = torch.from_numpy((scale * rng.standard_normal(shape)).astype(np.float32))
    return values.to(dtype)


def strided(x: torch.Tensor, extra: int = 5) -> torch.Tensor:
    """The same rows inside a wider matrix of NaN."""
    wide = torch.full((x.shape[0], x.shape[1] + extra), float("nan"), dtype=x.dtype)
    wide[:, 2 : 2 + x.shape[1]] = x
    return wide[:, 2 : 2 + x.shape[1]]


def close(got: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    """Within ``tolerance`` in float32; bfloat16 results may also round: 2^-8 of the value."""
    assert torch.isfinite(got).all()
    bound = torch.full_like(expected, tolerance)
    if got.dtype == torch.bfloat16:
        bound = bound + 2**-8 * expected.abs()
    worst = ((got.double() - expected).abs() - bound).max()
    assert worst <= 0, f"{float(worst):.3g} over a tolerance of {tolerance:g}"


DTYPES = [torch.float32, torch.bfloat16]


def multiplied(name, a, w, precision, *, dtype=torch.float32, **options) -> torch.Tensor:
    k = native.kernels(name)
    c = torch.full((len(a), len(w)), NAN, dtype=dtype)
    packed = native.pack(k, w, native.OPERANDS[precision])
    return native.linear(k, a, packed, c, eps=EPS, **options)


def attended(name, values: torch.Tensor) -> torch.Tensor:
    """Values as they come out of attention to one key, of score 0."""
    row = values[None]
    nothing, one = torch.zeros_like(row), Segments([1], CPU)
    key_value = torch.cat((nothing, row), 1)
    return native.backend(name).channel_attention(nothing, key_value, one, one, 1)[0]


@cache
def tokens_of(*shapes: tuple[int, int]) -> tuple[Layout, operators.Tokenizer]:
    layout = Layout(shapes, "conv", CONFIG, CPU)
    engine = Engine(fold(ReferenceNormWear(CONFIG), torch.float32), CONFIG, "conv", TORCH)
    return layout, engine.tokenizer(tuple(sorted(set(layout.sequences.lengths))))
