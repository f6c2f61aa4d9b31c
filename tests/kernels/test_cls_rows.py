"""`gather_rows` and `scatter_rows` in Triton: the definition's numbers, and nothing else touched."""

from __future__ import annotations

import pytest
import torch

from normwear_fast import operators
from normwear_fast.kernels import cls_rows

DTYPES = (torch.float32, torch.bfloat16)
WIDTHS = (16, 128, 1100)


def rows_with_gaps(tokens):
    """The last, the first, where every micro-batch has a [CLS], some between, and entries of nothing."""
    some = 1 + torch.randperm(tokens - 2)[: tokens // 3]
    return torch.tensor([tokens - 1, 0, *some, -1, -1, -1], dtype=torch.int32)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("pending", [False, True])
def test_gather(width, dtype, pending):
    residual = torch.randn(40, width).to(dtype)
    rows = rows_with_gaps(40)
    updates = [torch.randn(40, width).to(dtype) if pending else None for _ in range(2)]
    if pending:
        updates[1] = updates[0].clone()
    outs = [torch.full((len(rows), width), torch.nan, dtype=dtype) for _ in range(2)]
    operators.gather_rows(residual, rows, update=updates[0], out=outs[0])
    cls_rows.gather_rows(residual, rows, update=updates[1], out=outs[1])
    assert torch.equal(*outs)
    assert not outs[1][-3:].any()
    if pending:
        assert torch.equal(*updates)
        assert not updates[1][rows[:-3].long()].any()


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scatter(width, dtype):
    rows = rows_with_gaps(40)
    x, constant = torch.randn(len(rows), width).to(dtype), torch.randn(width)
    residuals = [torch.full((40, width), torch.nan, dtype=dtype) for _ in range(2)]
    operators.scatter_rows(x, constant, rows, residuals[0])
    cls_rows.scatter_rows(x, constant, rows, residuals[1])
    assert torch.equal(residuals[0].nan_to_num(7.0), residuals[1].nan_to_num(7.0))
    assert int(residuals[1].isnan().all(dim=1).sum()) == 40 - (len(rows) - 3)
