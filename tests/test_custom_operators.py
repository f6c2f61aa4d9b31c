"""The operators as `torch.library` nodes: same numbers, right fakes, declared mutations."""

from __future__ import annotations

import pytest
import torch

from normwear_fast import operators
from normwear_fast.backends import TORCH
from normwear_fast.config import NormWearConfig
from normwear_fast.engine import Engine
from normwear_fast.folding import fold
from normwear_fast.packing import Layout
from normwear_fast.reference import ReferenceNormWear

CONFIG = NormWearConfig(embed_dim=16, depth=1, num_heads=2, decoder_embed_dim=16, decoder_depth=0)
WIDTH = CONFIG.embed_dim


@pytest.fixture(scope="module")
def layout():
    shapes = [(2, 40), (1, 64)]
    return Layout(shapes, "conv", CONFIG, torch.device("cpu"))


@pytest.fixture(scope="module")
def tokenizer(layout):
    model = ReferenceNormWear(CONFIG, decoder=False)
    engine = Engine(fold(model, torch.float32), CONFIG, "conv", TORCH)
    return engine.tokenizer(tuple(sorted(set(layout.sequences.lengths))))


def arguments(name, layout, tokenizer):
    rows = layout.sequences.total
    residual = torch.randn(rows, WIDTH)
    carried, bias = torch.randn(WIDTH), torch.randn(WIDTH)
    cu = layout.sequences.cu
    return {
        "tokenize": (
            residual,
            torch.randn(layout.samples.total),
            layout.samples.cu,
            cu,
            tokenizer.patch_weight,
            tokenizer.templates,
            list(tokenizer.token_counts),
            list(tokenizer.patch_size),
            tokenizer.num_scales,
            "conv",
            "mexh",
        ),
        "residual_norm": (residual, carried, 1e-6, torch.randn(rows, WIDTH), torch.bfloat16),
        "channel_attention": (
            torch.randn(rows, WIDTH),
            torch.randn(rows, 2 * WIDTH),
            cu,
            cu,
            CONFIG.num_heads,
        ),
        "bias_gelu": (residual, bias),
        "pool_norm": (residual, carried, bias, bias, 1e-5, cu, "mean", None),
    }[name]


@pytest.mark.parametrize(
    "name", ["tokenize", "residual_norm", "channel_attention", "bias_gelu", "pool_norm"]
)
def test_opcheck(name, layout, tokenizer):
    operator = getattr(torch.ops.normwear, name).default
    torch.library.opcheck(operator, arguments(name, layout, tokenizer))


def test_equal_to_the_functions(layout, tokenizer):
    residual, series, *_ = arguments("tokenize", layout, tokenizer)
    other = torch.full_like(residual, float("nan"))
    series_segments, sequences = layout.samples, layout.sequences
    operators.tokenize(residual, series, series_segments, sequences, tokenizer)
    args = list(arguments("tokenize", layout, tokenizer))
    args[0], args[1] = other, series
    torch.ops.normwear.tokenize(*args)
    assert torch.allclose(residual, other, atol=1e-5)

    residual, carried, eps, update, dtype = arguments("residual_norm", layout, tokenizer)
    mine = residual.clone()
    expected = operators.residual_norm(mine, carried, eps, update=update, dtype=dtype)
    got = torch.ops.normwear.residual_norm(residual, carried, eps, update, dtype)
    assert got.dtype == torch.bfloat16
    assert torch.allclose(expected.float(), got.float(), atol=2e-2)
    assert torch.allclose(mine, residual, atol=1e-6)

    pooled = arguments("pool_norm", layout, tokenizer)
    expected = operators.pool_norm(*pooled[:5], sequences, "mean")
    assert torch.allclose(torch.ops.normwear.pool_norm(*pooled), expected, atol=1e-5)
