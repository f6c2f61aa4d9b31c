"""The fixed sin-cos position table and its resizing to other window lengths."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def _sincos(positions: Tensor, width: int) -> Tensor:
    """(n,) -> (n, width): sines of every frequency, then cosines, not interleaved; float64."""
    omega = 10000.0 ** (-torch.arange(width // 2, dtype=torch.float64) / (width // 2))
    angles = positions.double()[:, None] * omega
    return torch.cat((angles.sin(), angles.cos()), dim=1)


def position_table(width: int, rows: int, columns: int) -> Tensor:
    """(1, 1 + rows * columns, width) float32: zero for [CLS], then patch (t, s) at 1 + columns t + s.

    The first half of the width encodes the scale index s, the second half the time index t.
    """
    with torch.device("cpu"):
        time = torch.arange(rows).repeat_interleave(columns)
        scale = torch.arange(columns).repeat(rows)
        patches = torch.cat((_sincos(scale, width // 2), _sincos(time, width // 2)), dim=1)
        table = torch.cat((torch.zeros(1, width, dtype=torch.float64), patches))
    return table.float()[None]


def resize_positions(table: Tensor, rows: int, columns: int) -> Tensor:
    """The table for another number of patch rows: (1, 1 + h0 * columns, E) -> (1, 1 + rows * columns, E).

    Bicubic over the patch grid, corners not aligned, as upstream; unchanged where rows already fit.
    """
    grid_rows = (table.shape[1] - 1) // columns
    if grid_rows == rows:
        return table
    patches = table[:, 1:].reshape(1, grid_rows, columns, -1).permute(0, 3, 1, 2)
    patches = F.interpolate(patches, size=(rows, columns), mode="bicubic", align_corners=False)
    return torch.cat((table[:, :1], patches.permute(0, 2, 3, 1).flatten(1, 2)), dim=1)
