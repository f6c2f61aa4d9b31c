"""pool_norm in Triton, interpreted, against its definition in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from normwear_fast import operators
from normwear_fast.kernels.pool_norm import pool_norm
from normwear_fast.packing import Segments

CPU = torch.device("cpu")
EPS = 1e-5


def draw(rng, *shape, dtype=torch.float32) -> torch.Tensor:
    return torch.from_numpy(rng.standard_normal(shape)).to(dtype)


def strided(x: torch.Tensor) -> torch.Tensor:
    """The same rows inside a wider matrix of NaN."""
    wide = torch.full((len(x), x.shape[1] + 8), torch.nan, dtype=x.dtype)
    wide[:, : x.shape[1]] = x
    return wide[:, : x.shape[1]]


@pytest.mark.parametrize("pool", ["mean", "cls", "patch"])
@pytest.mark.parametrize("with_update", [False, True])
@pytest.mark.parametrize(
    ("dtype", "out_dtype", "width"),
    [
        (torch.float32, torch.float32, 128),
        (torch.float32, torch.float16, 7),
        (torch.bfloat16, None, 768),
        (torch.bfloat16, torch.bfloat16, 100),
    ],
)
def test_parity(pool, with_update, dtype, out_dtype, width):
    rng = np.random.default_rng()
    lengths = [int(n) for n in (1, *rng.integers(1, 50, 3), 16)]
    sequences = Segments(lengths, CPU)
    residual = strided(draw(rng, sequences.total, width, dtype=dtype) * 3 + 2)
    update = draw(rng, sequences.total, width, dtype=dtype) if with_update else None
    carried = draw(rng, width) if width != 100 else None
    weight, bias = 1 + draw(rng, width) / 10, draw(rng, width) / 10
    before = residual.clone()

    expected = operators.pool_norm(
        residual.double(),
        None if carried is None else carried.double(),
        weight.double(),
        bias.double(),
        EPS,
        sequences,
        pool,
        update=None if update is None else update.double(),
    )
    out = None if out_dtype is None else torch.full_like(expected, torch.nan, dtype=out_dtype)
    got = pool_norm(residual, carried, weight, bias, EPS, sequences, pool, update=update, out=out)
    assert got.dtype == (out_dtype or torch.float32)
    assert out is None or got is out
    assert torch.equal(residual, before)
    # Standardising 7 values can magnify the rounding of the sum they come from by their spread.
    rounding = torch.finfo(got.dtype).eps / 2
    torch.testing.assert_close(
        got.double(), expected, rtol=rounding + 2e-6, atol=2e-6 if width > 7 else 2e-5
    )


@pytest.mark.parametrize("pool", ["mean", "cls"])
def test_a_sequence_of_no_tokens_gets_zeros(pool):
    """A fixed-size table ends in such sequences, which start past the last row."""
    rng = np.random.default_rng()
    sequences = Segments([20, 3, 0, 0], CPU)
    residual, weight, bias = draw(rng, 23, 64), draw(rng, 64), draw(rng, 64)
    real = Segments([20, 3], CPU)
    expected = operators.pool_norm(residual, None, weight, bias, EPS, real, pool)
    out = torch.full((4, 64), torch.nan)
    pool_norm(residual, None, weight, bias, EPS, sequences, pool, out=out)
    torch.testing.assert_close(out[:2], expected, rtol=0, atol=1e-5)
    assert torch.equal(out[2:], torch.zeros(2, 64))


def test_float64_runs_plain():
    rng = np.random.default_rng()
    sequences, out = Segments([4, 5], CPU), torch.empty(2, 8)
    args = [draw(rng, *shape, dtype=torch.float64) for shape in ((9, 8), (8,), (8,), (8,))]
    expected = operators.pool_norm(*args, EPS, sequences, "mean")
    assert torch.equal(pool_norm(*args, EPS, sequences, "mean"), expected)
    assert torch.equal(pool_norm(*args, EPS, sequences, "mean", out=out), expected.float())
