"""linear_gelu in Triton, interpreted, against its definition in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from normwear_fast.errors import InputError
from normwear_fast.kernels.linear_gelu import launch, linear_gelu, linear_gelu_ref
from normwear_fast.kernels.tuning import Choice

TILED = Choice({"BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_K": 16, "GROUP_M": 2})
PERSISTENT = Choice({**TILED.blocks, "PER_SM": 1})


def draw(rng, *shape, dtype=torch.float32) -> torch.Tensor:
    return torch.from_numpy(rng.standard_normal(shape)).to(dtype)


@pytest.mark.parametrize("choice", [TILED, PERSISTENT], ids=["tiled", "persistent"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("rows", "columns", "inner"), [(96, 64, 32), (1, 8, 8), (33, 72, 24), (130, 40, 64)]
)
def test_parity(choice, dtype, rows, columns, inner):
    """Whole tiles, and edges in every dimension; more tiles than programs; rows inside a wider matrix."""
    rng = np.random.default_rng()
    x = torch.full((rows, inner + 8), torch.nan, dtype=dtype)[:, :inner]
    x.copy_(draw(rng, rows, inner))
    weight, bias = draw(rng, columns, inner, dtype=dtype) / 4, draw(rng, columns)
    buffer = torch.full((rows + 2, columns + 8), torch.nan, dtype=dtype)
    out = buffer[:rows, :columns]
    launch(choice, x, weight, bias, out)
    exact = linear_gelu_ref(x.double(), weight.double(), bias.double())
    torch.testing.assert_close(
        out.double(), exact, rtol=torch.finfo(dtype).eps / 2 + 1e-5, atol=1e-5
    )
    assert buffer[rows:].isnan().all()
    assert buffer[:, columns:].isnan().all()


def test_operator():
    rng = np.random.default_rng()
    x, weight = draw(rng, 5, 32, dtype=torch.bfloat16), draw(rng, 48, 32, dtype=torch.bfloat16)
    bias, out = draw(rng, 48), torch.full((5, 48), torch.nan, dtype=torch.bfloat16)
    assert linear_gelu(x, weight, bias, out=out) is out
    expected = linear_gelu_ref(x, weight, bias)
    torch.testing.assert_close(out, expected, rtol=2**-7, atol=1e-5)
    assert torch.equal(linear_gelu(x, weight, bias), out)
    assert linear_gelu(x[:0], weight, bias).shape == (0, 48)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_wide_types_run_plain(dtype):
    rng = np.random.default_rng()
    x, weight, bias = (draw(rng, *shape, dtype=dtype) for shape in ((5, 32), (48, 32), (48,)))
    expected = linear_gelu_ref(x, weight, bias)
    assert torch.equal(linear_gelu(x, weight, bias), expected)
    assert torch.equal(linear_gelu(x, weight, bias, out=torch.empty_like(expected)), expected)


def test_a_weight_whose_rows_are_not_end_to_end():
    with pytest.raises(InputError, match="linear_gelu: weight is not contiguous"):
        linear_gelu(
            torch.zeros(3, 32).bfloat16(), torch.zeros(32, 48).bfloat16().T, torch.zeros(48)
        )
