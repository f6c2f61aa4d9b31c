"""bias_gelu in Triton, interpreted, against its definition in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from normwear_fast import operators
from normwear_fast.errors import InputError
from normwear_fast.kernels.bias_gelu import bias_gelu


def draw(rng, *shape, dtype=torch.float32, scale=1.0) -> torch.Tensor:
    return torch.from_numpy(scale * rng.standard_normal(shape)).to(dtype)


BEYOND = -256.0
"""What stands beside the rows: in every type here, and GELU makes it 0."""


def strided(x: torch.Tensor, room: int = 8) -> torch.Tensor:
    """The same rows inside a wider matrix."""
    wide = torch.full((len(x), x.shape[1] + room), BEYOND).to(x.dtype)
    wide[:, : x.shape[1]] = x
    return wide[:, : x.shape[1]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "hidden"), [(1, 1), (7, 100), (5, 1024), (6, 3072)])
def test_parity(dtype, rows, hidden):
    rng = np.random.default_rng()
    x, bias = strided(draw(rng, rows, hidden, dtype=dtype, scale=3.0)), draw(rng, hidden)
    expected = x.double()
    operators.bias_gelu(expected, bias.double())
    bias_gelu(x, bias)
    rounding = torch.finfo(dtype).eps / 2 + 2e-7
    torch.testing.assert_close(x.double(), expected, rtol=rounding, atol=1e-6)
    assert (x._base[:, hidden:] == BEYOND).all()


def test_gelu_over_a_dense_grid():
    """Phi is off by less than 1e-7, and its tail neither comes back nor turns into NaN."""
    x = torch.linspace(-14, 14, 100_001)[None]
    got = x.clone()
    bias_gelu(got, torch.zeros(x.shape[1]))
    wide = x.double()
    exact = 0.5 * wide * torch.special.erfc(-wide / 2**0.5)
    assert ((got.double() - exact).abs() <= 1.2e-7 * wide.abs() + 1e-12).all()
    special = torch.tensor([[torch.nan, torch.inf, -1e30, -torch.inf, 1e30, 0.0, -20.0]])
    bias_gelu(special, torch.zeros(special.shape[1]))
    assert special[0, 0].isnan()
    assert special[0, 1:].tolist() == [torch.inf, 0.0, 0.0, torch.tensor(1e30).item(), 0.0, 0.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("hidden", [40, 3072])
def test_float8_rows(dtype, hidden):
    rng = np.random.default_rng()
    x, bias = strided(draw(rng, 5, hidden, dtype=dtype, scale=3.0)), draw(rng, hidden)
    x[2] = -torch.inf  # gelu is 0 everywhere: scale 1
    x[3] *= 1e-3
    x[4] = -x[4].abs() - bias  # gelu is negative everywhere, -0.17 at most
    before = x.clone()
    expected = x.double()
    operators.bias_gelu(expected, bias.double())
    expected[2] = 0
    out = strided(torch.full((5, hidden), torch.nan).to(torch.float8_e4m3fn), room=16)
    scale = torch.full((7,), torch.nan)
    bias_gelu(x, bias, out=out, scale=scale)
    assert torch.equal(x, before)
    assert (out._base[:, hidden:].float() == BEYOND).all()
    assert scale[5:].isnan().all()
    largest = expected.abs().amax(1)
    torch.testing.assert_close(
        scale[:5].double(), torch.where(largest > 0, largest / 448, 1.0), rtol=1e-5, atol=0
    )
    # Half a step: 2^-3 of the value, or 2^-9 of the scale below the smallest normal value.
    divisor = scale[:5, None].double()
    step = torch.maximum(2**-3 * expected.abs(), 2**-9 * divisor)
    # What float32 adds can tip a value that lies half-way: the sum's rounding and gelu's own error.
    own = 3e-7 * (x.double().abs() + bias.double().abs())
    own[2] = 0
    assert ((out.double() * divisor - expected).abs() <= 0.5001 * step + own).all()


def test_what_it_does_not_take():
    x, out = torch.zeros(2, 8), torch.zeros(2, 8)
    with pytest.raises(InputError, match="float8_e4m3fn"):
        bias_gelu(x, torch.zeros(8), out=out)
    with pytest.raises(InputError, match="without scale"):
        bias_gelu(x, torch.zeros(8), out=out.to(torch.float8_e4m3fn))
    wide = torch.randn(2, 8, dtype=torch.float64)
    expected = wide.clone()
    operators.bias_gelu(expected, torch.ones(8, dtype=torch.float64))
    bias_gelu(wide, torch.ones(8, dtype=torch.float64))
    assert torch.equal(wide, expected)
    bias_gelu(torch.zeros(0, 8), torch.zeros(8))
