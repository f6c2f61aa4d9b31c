"""pool_norm in Triton, interpreted, against its definition in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from normwear_fast import operators
from normwear_fast.kernels import pool_norm as module
from normwear_fast.kernels.pool_norm import pool_norm
from normwear_fast.kernels.tuning import Choice
from normwear_fast.packing import Segments

CHOICES = module.MEAN_CHOICES[80]
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


@pytest.fixture
def poisoned(monkeypatch):
    """What nobody has written is NaN."""
    monkeypatch.setattr(torch, "empty", lambda *size, **o: torch.full(*size, torch.nan, **o))


@pytest.mark.parametrize(
    ("rows", "parts"), sorted({(c.blocks["BLOCK_ROWS"], c.blocks["PARTS"]) for c in CHOICES})
)
def test_parts_of_a_sequence(rows, parts, monkeypatch, poisoned):
    """In every way there is a choice of: fewer rows than parts, a multiple of them, none at all; and the
    same bits for a sequence alone."""
    rng = np.random.default_rng()
    choice = Choice({"BLOCK_ROWS": rows, "STAGES": 2, "PARTS": parts})
    monkeypatch.setattr(module, "pick", lambda *_: choice)
    lengths = [1, 0, 8, 32, 33, 0]
    sequences = Segments(lengths, CPU)
    residual, update = (draw(rng, sequences.total, 64, dtype=torch.bfloat16) for _ in range(2))
    vectors = [draw(rng, 64) for _ in range(3)]
    got = pool_norm(residual, *vectors, EPS, sequences, "mean", update=update)
    exact = operators.pool_norm(
        residual.double(),
        *(vector.double() for vector in vectors),
        EPS,
        Segments([n for n in lengths if n], CPU),
        "mean",
        update=update.double(),
    )
    full = torch.tensor(lengths) > 0
    torch.testing.assert_close(got[full].double(), exact, rtol=2e-6, atol=4e-6)
    assert torch.equal(got[~full], torch.zeros(2, 64))
    for i, (start, stop) in enumerate(zip(sequences.bounds, sequences.bounds[1:], strict=False)):
        own, one = slice(start, stop), Segments([stop - start], CPU)
        alone = pool_norm(residual[own], *vectors, EPS, one, "mean", update=update[own])
        assert torch.equal(alone[0], got[i])


def test_float64_runs_plain():
    rng = np.random.default_rng()
    sequences, out = Segments([4, 5], CPU), torch.empty(2, 8)
    args = [draw(rng, *shape, dtype=torch.float64) for shape in ((9, 8), (8,), (8,), (8,))]
    expected = operators.pool_norm(*args, EPS, sequences, "mean")
    assert torch.equal(pool_norm(*args, EPS, sequences, "mean"), expected)
    assert torch.equal(pool_norm(*args, EPS, sequences, "mean", out=out), expected.float())
