"""The pixels of patches: what the patch projection multiplies, of kept patches alone.

Two ways to them, held together by a test: from a scalogram (`patch_pixels`, `gather_patches`), and from
the series (`SeriesPatches`), which never stores the scalogram.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from normwear_fast.config import NormWearConfig
from normwear_fast.scalograms import derivatives
from normwear_fast.wavelets import wavelet_bank

SEQUENCES_AT_ONCE = 64
"""Sequences whose whole scalogram exists at a time: 19 MB, which stays in the cache of large CPUs."""

NEGLIGIBLE = 1e-30
"""Filter values below this are zero. The wavelets' tails run through the subnormal numbers, with which
a CPU multiplies ten times slower."""


def patch_pixels(scalogram: Tensor, config: NormWearConfig) -> Tensor:
    """(S, 3, rows, scales), or (S, 1, samples) of the series -> (S, patches, pixels of a patch)."""
    rows, scales = config.patch_size
    if config.tokens == "series":
        return scalogram[:, 0, : config.grid_rows * rows].unflatten(1, (config.grid_rows, rows))
    x = scalogram.unflatten(3, (config.grid_columns, scales))
    x = x.unflatten(2, (config.grid_rows, rows))  # (S, 3, t, row, s, scale)
    return x.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def gather_patches(pixels: Tensor, kept: Tensor) -> Tensor:
    """(S, patches, pixels) and (S, k) -> (S, k, pixels)."""
    return pixels.gather(1, kept[:, :, None].expand(-1, -1, pixels.shape[2]))


class SeriesPatches(nn.Module):
    """Series to the pixels of their kept patches, on the device, without gradients.

    A wavelet transform is linear: for one length it is a matrix, here with its columns in the order of
    the patches' pixels. One product gives a block of sequences all pixels, and the kept ones are
    gathered from it. The matrix has 386 x 25,155 values, 39 MB, whatever the batch.
    """

    matrix: Tensor

    def __init__(self, config: NormWearConfig) -> None:
        super().__init__()
        self.config = config
        if config.tokens == "scalogram":
            self.register_buffer("matrix", self._matrix(), persistent=False)
        self._block: Tensor | None = None

    def _matrix(self) -> Tensor:
        """(samples - 2, patches * rows * scales of a patch) float32."""
        config = self.config
        samples, rows = config.pretrain_samples - 2, config.grid_rows * config.patch_size[0]
        bank = wavelet_bank(samples, "conv", config.wavelet, config.num_scales)
        filters = torch.tensor(bank, dtype=torch.float32)  # (scales, W)
        filters[filters.abs() < NEGLIGIBLE] = 0
        width = filters.shape[1]
        tap = torch.arange(samples)[:, None] - torch.arange(rows) + width // 2
        matrix = filters.t()[tap.clamp(0, width - 1)]  # (samples, rows, scales)
        matrix = matrix * ((tap >= 0) & (tap < width))[:, :, None]
        matrix = matrix.unflatten(2, (config.grid_columns, -1)).unflatten(1, (config.grid_rows, -1))
        return matrix.transpose(2, 3).reshape(samples, -1).contiguous()

    @torch.no_grad()
    def forward(self, series: Tensor, kept: Tensor) -> Tensor:
        """(S, samples) float32 and (S, k) -> (S, k, pixels) float32."""
        config = self.config
        if config.tokens == "series":
            return gather_patches(patch_pixels(series[:, None], config), kept)
        area = config.patch_size[0] * config.patch_size[1]
        patches, count = config.grid_tokens - 1, kept.shape[1]
        out = series.new_empty(len(series), count, 3, area)
        block = self._block
        if block is None or block.device != series.device:
            rows = 3 * SEQUENCES_AT_ONCE
            self._block = block = series.new_empty(rows, patches * area)
        with torch.autocast(series.device.type, enabled=False):
            for first in range(0, len(series), SEQUENCES_AT_ONCE):
                part = slice(first, first + SEQUENCES_AT_ONCE)
                inputs = derivatives(series[part].float()).flatten(0, 1)
                pixels = torch.mm(inputs, self.matrix, out=block[: len(inputs)])
                sequence = torch.arange(len(inputs), device=series.device).view(-1, 1, 3)
                chosen = (sequence * patches + kept[part, :, None]).flatten()  # of (s, 3, patches)
                pixels = pixels.view(-1, area).index_select(0, chosen)
                out[part] = pixels.view(-1, count, 3, area)
        return out.flatten(2)
