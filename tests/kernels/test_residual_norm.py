"""residual_norm in Triton, interpreted, against its definition in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from normwear_fast import operators
from normwear_fast.errors import InputError
from normwear_fast.kernels.residual_norm import residual_norm

EPS = 1e-6
FLOAT32, BFLOAT16, FLOAT8 = torch.float32, torch.bfloat16, torch.float8_e4m3fn


def draw(rng, *shape, dtype=torch.float32, scale=1.0) -> torch.Tensor:
    return torch.from_numpy(scale * rng.standard_normal(shape)).to(dtype)


def strided(x: torch.Tensor, room: int = 8) -> torch.Tensor:
    """The same rows inside a wider matrix of NaN."""
    wide = torch.full((len(x), x.shape[1] + room), torch.nan, dtype=torch.float32).to(x.dtype)
    wide[:, : x.shape[1]] = x
    return wide[:, : x.shape[1]]


def expectation(residual, carried, update) -> tuple[torch.Tensor, torch.Tensor]:
    """The definition's residual, to the bit, and its norm in float64."""
    stored = residual
    if update is not None:
        stored = (residual.float() + update.float()).to(residual.dtype)
    wide = None if carried is None else carried.double()
    return stored, operators.residual_norm(stored.double(), wide, EPS)


@pytest.mark.parametrize(
    ("dtype", "update_dtype", "out_dtype", "width"),
    [
        (FLOAT32, None, FLOAT32, 768),
        (FLOAT32, FLOAT32, FLOAT32, 100),
        (FLOAT32, BFLOAT16, BFLOAT16, 768),
        (BFLOAT16, None, BFLOAT16, 768),
        (BFLOAT16, BFLOAT16, BFLOAT16, 128),
        (BFLOAT16, FLOAT32, FLOAT32, 7),
        (BFLOAT16, BFLOAT16, FLOAT8, 768),
        (FLOAT32, BFLOAT16, FLOAT8, 36),
    ],
)
@pytest.mark.parametrize("with_carried", [False, True])
def test_parity(dtype, update_dtype, out_dtype, width, with_carried):
    rng = np.random.default_rng()
    rows = int(rng.integers(4, 12))
    residual = draw(rng, rows, width, dtype=dtype, scale=30.0) + 10.0
    residual[1] = 3.0  # no variance
    # As much as eps, and so little that a norm is 1e-5 of a unit.
    little = torch.tensor([[EPS**0.5], [1e-5 * EPS**0.5]])
    residual[2:4] = little * draw(rng, 2, width)
    residual = strided(residual)
    update = None
    if update_dtype is not None:
        update = strided(draw(rng, rows, width, dtype=update_dtype, scale=60.0), room=16)
        update[1] = 5.0
        update[2:4] = little * draw(rng, 2, width)
    carried = draw(rng, width) if with_carried else None
    stored, expected = expectation(residual, carried, update)

    out = strided(torch.full((rows, width), torch.nan).to(out_dtype), room=24)
    scale = torch.full((rows + 2,), torch.nan)
    float8 = out_dtype == FLOAT8
    got = residual_norm(
        residual, carried, EPS, update=update, out=out, scale=scale if float8 else None
    )
    assert got is out
    assert torch.equal(residual, stored)
    if update is not None:
        assert residual._base[:, width:].isnan().all()
    assert scale[rows:].isnan().all()
    # Standardising magnifies the rounding of a value near the mean: about 5e-7 of the largest.
    if float8:
        divisor = scale[:rows, None].double()
        largest = expected.abs().amax(1, keepdim=True)
        exact = torch.where(largest > 0, largest / 448, 1.0)
        torch.testing.assert_close(divisor, exact, rtol=1e-5, atol=0)
        # Half a step: 2^-3 of the value, or 2^-9 of the scale below the smallest normal value.
        step = torch.maximum(2**-3 * expected.abs(), 2**-9 * divisor)
        # 5e-6 is the norm's own error, which can tip a value that lies half-way.
        assert ((out.double() * divisor - expected).abs() <= 0.5001 * step + 5e-6).all()
    else:
        rounding = torch.finfo(out_dtype).eps / 2 + 2e-6
        torch.testing.assert_close(out.double(), expected, rtol=rounding, atol=5e-6)


def test_the_last_programs_rows(monkeypatch):
    """A choice of several rows a program writes none past the last one."""
    from normwear_fast.kernels import residual_norm as module

    monkeypatch.setattr(module, "pick", lambda *_: module.CHOICES[80][2])
    rng = np.random.default_rng()
    whole, out = draw(rng, 8, 64), torch.full((8, 64), torch.nan)
    before = whole.clone()
    update, carried = draw(rng, 6, 64), draw(rng, 64)
    stored, expected = expectation(whole[:6], carried, update)
    residual_norm(whole[:6], carried, EPS, update=update, out=out[:6])
    torch.testing.assert_close(out[:6].double(), expected, rtol=2e-6, atol=5e-6)
    assert torch.equal(whole[:6], stored)
    assert torch.equal(whole[6:], before[6:])
    assert out[6:].isnan().all()
    out, scale = torch.zeros(8, 64).to(FLOAT8), torch.full((8,), torch.nan)
    residual_norm(whole[:6], carried, EPS, out=out[:6], scale=scale)
    assert scale[:6].isfinite().all()
    assert scale[6:].isnan().all()
    assert not out[6:].float().any()


def test_results_of_its_own():
    rng = np.random.default_rng()
    residual = draw(rng, 3, 32, dtype=BFLOAT16)
    assert residual_norm(residual, None, EPS).dtype == BFLOAT16
    assert residual_norm(residual, None, EPS, dtype=FLOAT32).dtype == FLOAT32
    assert residual_norm(residual[:0], None, EPS).shape == (0, 32)
    with pytest.raises(InputError, match="scale"):
        residual_norm(residual, None, EPS, dtype=FLOAT8)
    wide = residual.double()
    assert torch.equal(
        residual_norm(wide, None, EPS, update=wide.clone()),
        operators.residual_norm(residual.double(), None, EPS, update=residual.double()),
    )
